#!/bin/bash
# scripts/compare.sh and reproduce.sh from text to table, in miniature: the plan, resuming after an
# interruption, and runs that diverge.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
export CUDA_VISIBLE_DEVICES='' MEASURE_SECONDS=1
unset RATES SEEDS SECOND_SEED LAUNCH PROBE_FLAGS
SCHEMES=''
here() { compgen -G "$dir/$1" >/dev/null; }
absent() { ! here "$1"; }
count() { grep -cF -- "$2" <<<"$1"; }

for ((i = 0; i < 400; i++)); do
    echo "Document $i says that $((i * i)) is the square of $i, and little else."
    ((i % 4)) || echo '<|endoftext|>'
done >"$dir/text.txt"
gzip -k "$dir/text.txt"
small=(--layers 2 --width 8 --heads 2 -t 16 -b 2 -d 32 -x 3 --save-every 1 --keep 0 -v 3
    --val-tokens 32 -g 0 --threads 1 --dtype float32)
reproduce() { # OUT FLAG...: the laptop preset on the small text, with bytes as tokens
    # shellcheck disable=SC2086
    scripts/compare.sh laptop $SCHEMES --data "$dir/text.txt.gz" --tokenizer bytes --out "$dir/$1" "${@:2}" \
        -- "${small[@]}" --width "${WIDTH:-8}" 2>&1
}

# What it will cost, of nothing but the flags
out=$(SCHEMES="pre lns" RATES=1e-3 reproduce run --dry-run)
check "dry run: ends well" test $? -eq 0
check "dry run: the runs" says "$out" "2 runs of 3 steps, 2 of them left"
check "dry run: tokens of a run and of all" test "$(grep -cE '(a run +96|all left +192) tokens, [0-9.e+]+ FLOPs, ' <<<"$out")" = 2
check "dry run: the speed was measured" test "$(awk '{ print ($1 > 0) }' "$dir/run/speed")" = 1
check "dry run: what was measured with is gone" absent 'run/measuring*'
check "dry run: nothing is made" absent run/data
out=$(reproduce all --dry-run)
check "the whole: every scheme at three rates, variants, second seeds" says "$out" \
    "$((3 * ($(./train_gpt schemes --format names | wc -w) + 4) + 6 + 5)) runs"
out=$(reproduce all --dry-run --quick)
check "quick: ten schemes at two rates" says "$out" "20 runs of 3 steps, 20 of them left"

# Interrupted in the second of its runs (exit status 130, saved), it continues with that one.
cat >"$dir/launch" <<'END'
#!/bin/bash
# Stops the second run after a step of it.
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    [[ ${!i} == -o ]] && run=${!next}
done
[[ $run == */lns-* && ! -e $run ]] || exec "$@"
"$@" -x 100000 &
until [[ -s $run/log.jsonl ]]; do sleep 0.05; done
kill -TERM $!
wait $!
END
chmod +x "$dir/launch"
small+=(-x 200) # the launcher's is stopped long before
steps() { wc -l <"$dir/$1/log.jsonl"; }
out=$(SCHEMES="pre lns post" RATES=1e-2 LAUNCH="$dir/launch" reproduce run)
check "interrupted: status 130" test $? -eq 130
check "interrupted: the first is finished" test "$(cat "$dir/run/pre-lr1e-2-seed1/outcome")" = finished
check "interrupted: the second is not" absent run/lns-lr1e-2-seed1/outcome
check "interrupted: and has begun" test "$(steps run/lns-lr1e-2-seed1)" -lt 200
check "interrupted: the third has not begun" absent run/post-lr1e-2-seed1
before=$(stat -c %Y.%i "$dir/run/pre-lr1e-2-seed1/log.jsonl")
out=$(SCHEMES="pre lns post" RATES=1e-2 reproduce run)
check "continuing: ends well" test $? -eq 0
check "continuing: says what is left" says "$out" "3 runs of 200 steps, 2 of them left"
check "continuing: the first is not run again" test "$before" = "$(stat -c %Y.%i "$dir/run/pre-lr1e-2-seed1/log.jsonl")"
check "continuing: the second continues" says "$out" "continuing from $dir/run/lns-lr1e-2-seed1/step-"
check "continuing: each step once" test "$(steps run/lns-lr1e-2-seed1)" = 200
check "continuing: to its end" here run/lns-lr1e-2-seed1/step-000200
check "the table has all" test "$(grep -cE '^(pre|lns|post) .* finished$' "$dir/run/table.txt")" = 3
out=$(SCHEMES="pre lns post" RATES=1e-2 reproduce run)
check "all done: nothing runs" test "$(count "$out" "step 1/")" = 0
check "all done: says so" says "$out" "3 runs of 200 steps, 0 of them left"
if why=$(python3 scripts/figures.py 2>&1); then
    check "the report" grep -q lns "$dir/run/report.html"
else
    skip "the report of scripts/compare.sh: $(tail -1 <<<"$why")"
fi
mkdir "$dir/lacks" && echo 'raise ImportError' >"$dir/lacks/matplotlib.py"
rm -f "$dir/run/report.html" "$dir/run/table.txt"
out=$(SCHEMES="pre lns post" RATES=1e-2 PYTHONPATH=$dir/lacks reproduce run)
check "without Matplotlib: what it can do is done" test $?,"$(wc -l <"$dir/run/table.txt")" = 0,4
check "without Matplotlib: says so" says "$out" "There is no report: Matplotlib is needed to draw"
check "without Matplotlib: and how to get it" says "$out" "\`make deps\`"
check "without Matplotlib: no report" absent run/report.html
mkdir -p "$dir/bin" "$dir/tree/c/pre" && cp -r scripts "$dir/tree/" && cp train_gpt "$dir/tree/"
for tool in bash dirname mkdir cat; do ln -s "$(command -v $tool)" "$dir/bin/"; done
echo finished >"$dir/tree/c/pre/outcome"
out=$(cd "$dir/tree" && PATH=$dir/bin bash scripts/compare.sh -o c pre 2>&1)
check "without python3: what was trained is not a failure" test $? -eq 0
check "without python3: says so" says "$out" "There is no table of them, because there is no python3"
if [[ $(./train_gpt --help) == *'train_gpt probe'* ]]; then
    check "the probes" here run/lns-lr1e-2-seed1/probe.json
fi

# Without a preset: flags, runs and a table, nothing else
out=$(scripts/compare.sh -o "$dir/plain" pre lns -- "${small[@]}" -x 3 2>&1)
check "plain: ends well" test $? -eq 0
check "plain: a table" test "$(grep -cE '^(pre|lns) .* finished$' <<<"$out")" = 2
check "plain: runs are named after schemes" here plain/lns/step-000003

# A run that is killed outright, before and after its first checkpoint
small+=(-x 3)
killed=$dir/killed/pre-lr1e-3-seed1
mkdir -p "$killed"
SCHEMES=pre RATES=1e-3 reproduce killed >/dev/null
check "killed: an empty directory is begun" test "$(cat "$killed/outcome")" = finished
rm -r "$killed/outcome" "$killed/step-000003" # as if killed after step 2
out=$(SCHEMES=pre RATES=1e-3 reproduce killed)
check "killed: continues from the last checkpoint" says "$out" "continuing from $killed/step-000002"
check "killed: to the end" test "$(steps killed/pre-lr1e-3-seed1)" = 3
rm "$killed/outcome"
SCHEMES=pre RATES=1e-3 reproduce killed >/dev/null
check "killed after the last step: recognized" test "$(cat "$killed/outcome")" = finished

# A run that diverges is a result; the next ones are run, the best get a second seed.
small+=(--warmup 0)
export SECOND_SEED=yes
out=$(SCHEMES="pre post" RATES="1e30 1e-3" reproduce bad)
check "diverged: ends well" test $? -eq 0
check "second seed: told" says "$out" "and 2 for the four best and pre"
check "second seed: at the rate that served best" test "$(cat "$dir"/bad/{pre,post}-lr1e-3-seed2/outcome | uniq)" = finished
check "second seed: it is one" grep -q '"--seed": 2,' "$dir/bad/pre-lr1e-3-seed2/run.json"
check "second seed: not of what diverged" absent 'bad/*1e30-seed2'
check "diverged: recorded" grep -q 'not finite' "$dir/bad/pre-lr1e30-seed1/outcome"
check "diverged: others run" test "$(cat "$dir/bad/post-lr1e-3-seed1/outcome")" = finished
check "diverged: in the table" grep -q 'diverged: not finite' "$dir/bad/table.txt"
out=$(SCHEMES="pre post" RATES="1e30 1e-3" reproduce bad)
check "diverged: not run again" silent_on "$out" "step 1/"
check "diverged: all are done" says "$out" "6 runs of 3 steps, 0 of them left"
unset SECOND_SEED

# Other flags, other data, and what is wrong
out=$(WIDTH=16 SCHEMES=pre RATES=1e-3 reproduce killed)
check "other flags are refused" says "$out" "were started with the flags"
echo "other" >>"$dir/text2.txt"
out=$(RATES=1e-3 scripts/compare.sh laptop pre --data "$dir/text2.txt" --tokenizer bytes \
    --out "$dir/killed" -- "${small[@]}" 2>&1)
check "other data is refused" says "$out" "choose another --out"
refused() { # SENTENCE ARGUMENT...
    local out status=0
    out=$(scripts/compare.sh "${@:2}" 2>&1) || status=$?
    [[ $status == 1 ]] && says "$out" "$1" && return
    echo "status $status: $out"
    return 1
}
check "neither a preset nor a scheme" refused "unknown norm scheme '2b'" 2b
check "laptop needs a text" refused "needs a text" laptop
check "no such text" refused "no file that can be read" laptop --data "$dir/none"
check "a flag that is the script's" refused "is given to each run" laptop --data "$dir/text.txt" -- --lr 3
check "a flag that is none" refused "there is no flag --nothing" laptop --data "$dir/text.txt" --out "$dir/r" -- --nothing 1
head -c 300 "$dir/text.txt.gz" >"$dir/cut.gz"
check "a text that is cut" refused "cannot be unpacked" laptop --data "$dir/cut.gz" --tokenizer bytes --out "$dir/r" -- "${small[@]}"

# Documents of one sequence each, at another scale: padding is no target.
out=$(scripts/compare.sh 130m pre --data "$dir/text.txt" --tokenizer bytes --out "$dir/padded" \
    -- -m tiny "${small[@]}" -t 256 -b 1 -d 256 --dtype bf16 2>&1)
check "padded: ends well" test $? -eq 0
check "padded: a document a window" says "$out" "windows of 256, a document each"
check "padded: the recipe's rate" grep -q '"--lr": 0.001,' "$dir/padded/pre-seed1/run.json"

# Several comparisons of one text, and a text in two files
check "without a preset there are no tokens to place" refused "belong to a preset" pre --tokens "$dir/t"
out=$(SCHEMES=pre RATES=1e-3 reproduce shared --data "$dir/text2.txt" --tokens "$dir/tokens" --train-only)
check "tokens: where they were wanted" here 'tokens/text_train_*.bin'
check "tokens: of both texts" grep -q "text.txt.gz $dir/text2.txt" "$dir/tokens/made_of"
check "train only: no report" absent shared/report.html

# scripts/reproduce.sh: a table's schemes, rates and seeds; runs that tables share are trained once
table() { # TABLE FLAG...
    scripts/reproduce.sh "$1" --data "$dir/text.txt.gz" --tokenizer bytes --out "$dir/tables" "${@:2}" 2>&1
}
tiny=(-- "${small[@]}" --mlp-width 16)
out=$(table table1 --dry-run "${tiny[@]}")
check "table1: six schemes, three rates, three seeds" says "$out" "laptop: 54 runs of 3 steps, 54 of them left"
check "table1: which" says "$out" "schemes   pre lns post deepnorm deepnorm-published mix"
out=$(scripts/reproduce.sh depth --out "$dir/depth" --dry-run -- -t 16 -b 1 -d 16 --threads 1 2>&1)
for name in table6 table7 table8; do
    check "$name: schemes that there are" says "$(table $name --dry-run "${tiny[@]}")" " of them left"
done
check "depth: a plan without a text" test "$(count "$out" "45 runs")" = 4
check "depth: and the cost of all" grep -qE '^all models  [0-9.e+]+ hours left' <<<"$out"
depths=0
while read -r _ _ model; do
    read -ra model <<<"$model"
    parameters=$(./train_gpt --vocab 4096 "${model[@]}" --dry-run 2>&1 | sed -nE 's/^parameters ([0-9.]+)M.*/\1/p')
    check "depth: 5.80M parameters in ${model[*]}, too" test "${parameters/./}" -gt 568 -a "${parameters/./}" -lt 592
    ((++depths))
done < <(grep '^== depth-' <<<"$out")
check "depth: three sizes beside laptop's own" test "$depths" = 3
out=$(table table1 --seeds 2 --rates 1e-2,1e-3 --steps 4 pre lns "${tiny[@]}")
check "a table: ends well" test $? -eq 0
check "a table: each rate and seed" test "$(cat "$dir"/tables/llama/{pre,lns}-lr1e-{2,3}-seed{1,2}/outcome | grep -c finished)" = 8
check "a table: as many steps as asked" here tables/llama/pre-lr1e-2-seed2/step-000004
check "a table: tested by seed" says "$out" "paired by 2 seeds"
check "a table: the paper's numbers" grep -qE '^lns .*25\.76 \(−3\.6%\).*15\.71 \(−7\.7%\)' "$dir/tables/table1.txt"
[[ ${why:-} ]] || check "a table: a report" grep -q '25.76 (−3.6%)' "$dir/tables/table1.html"
out=$(table table7 --seeds 1 --rates 1e-2 --steps 4 pre lns "${tiny[@]}")
check "another table: runs are shared" says "$out" "2 runs of 4 steps, 0 of them left"
out=$(table table8 --seeds 1 --rates 1e-2 --steps 1 --out "$dir/star" 'hybrid*' lns:after "${tiny[@]}")
check "names of directories are plain" here 'star/llama/hybrid-star-lr1e-2-seed1/step-000001'
check "both are in the table" test "$(grep -cE '^(hybrid\*|lns:after) .*finished' "$dir/star/table8.txt")" = 2
check "another table: its report" grep -q 25.76 "$dir/tables/table7.txt"
export PYTHONPATH=$dir/lacks # tables suffice from here on
for architecture in olmo qwen; do
    out=$(table $architecture --seeds 1 --rates 1e-2 --steps 2 "${tiny[@]}")
    check "$architecture: its numbers" grep -qE '^(pre|pre.scaled-init) .*(19\.30|20\.62)$' "$dir/tables/$architecture.txt"
done
check "olmo: its architecture" grep -q '"model_type": *"[a-z-]*olmo"' "$dir/tables/olmo/lns-lr1e-2-seed1/step-000002/config.json"

# Out of time, then the rest: nothing is trained twice
long=(130m pre --scale 60m --steps 10000)
for ((i = 0; i < 10; i++)); do # a slow machine spends the first seconds on the plan
    out=$(table "${long[@]}" --minutes 0.05 -- -m tiny "${small[@]}" --save-every 5000 --keep 1)
    status=$?
    here 'tables/code/pre-lr1e-3-seed1/step-*' && break
done
check "out of time: status 130" test "$status" -eq 130
check "out of time: says so" says "$out" "of 130m, 2 of 2 runs are left. The same command continues"
check "out of time: saved" here 'tables/code/pre-lr1e-3-seed1/step-*'
check "out of time: a report of what there is" says "$out" "not finished: at step"
out=$(table "${long[@]}" -- -m tiny "${small[@]}" --save-every 5000 --keep 1)
check "with more time: ends well" test $? -eq 0
check "with more time: continues" says "$out" "continuing from $dir/tables/code/pre-lr1e-3-seed1/step-"
check "with more time: each step once" test "$(steps tables/code/pre-lr1e-3-seed1)" = 10000
check "130m: by the text and by the code" test "$(grep -hc '"--embed-std": 0.02,' "$dir"/tables/{text,code}/pre-lr1e-3-seed1/run.json | xargs)" = "1 0"
check "130m: beside what was published" grep -qE '^lns, published +63\.3 +27\.9 ' "$dir/tables/130m.txt"
unset PYTHONPATH
wrong() { # SENTENCE ARGUMENT...
    local out status=0
    out=$(scripts/reproduce.sh "${@:2}" 2>&1) || status=$?
    [[ $status == 1 ]] && says "$out" "$1" && return
    echo "status $status: $out"
    return 1
}
check "no table" wrong "name a table: table1, table6"
check "an unknown table" wrong "there is no table 'table9'" table9
check "an unknown scale" wrong "there is no scale '7b' of table1" table1 --scale 7b
check "no seeds" wrong "--seeds 0: a number of seeds is expected" table1 --seeds 0
check "a rate that is none" wrong "--rates 1e-3,x: a list of learning rates" table1 --rates 1e-3,x
check "130m is of the recipe" wrong "which laptop does not follow" 130m --scale laptop
check "laptop's tables need a text" wrong "needs a text" table1

# A vocabulary that SentencePiece learns
if [[ $(./train_gpt --version) != *'SentencePiece: no'* && -x data/vocabulary ]]; then
    data/vocabulary --size 300 --doc-separator '<|endoftext|>' -o "$dir/v.model" "$dir/text.txt" >/dev/null 2>&1
    check "vocabulary: learned" test -s "$dir/v.model"
    cp "$dir/v.model" "$dir/first.model"
    data/vocabulary --size 300 --doc-separator '<|endoftext|>' -o "$dir/v.model" - <"$dir/text.txt" >/dev/null 2>&1
    check "vocabulary: the same again" cmp "$dir/v.model" "$dir/first.model"
    out=$(data/tokenize --tokenizer "$dir/v.model" --val-fraction 0 --doc-separator '<|endoftext|>' -o "$dir/v" "$dir/text.txt" 2>&1)
    check "vocabulary: tokenizes" says "$out" "sentencepiece (vocabulary 300)"
    out=$(data/vocabulary --size 100000 -o "$dir/w.model" "$dir/text.txt" 2>&1)
    check "vocabulary: a size beyond the text is an error" test $? -eq 1
    check "vocabulary: and says what to do" says "$out" "smaller --size"
    out=$(data/vocabulary -o "$dir/w.model" "$dir/none" 2>&1)
    check "vocabulary: no such text" says "$out" "cannot open $dir/none"
else
    skip "a learned vocabulary: this build has no SentencePiece, or no data/vocabulary"
fi

if command -v shellcheck >/dev/null; then
    check "shellcheck" shellcheck -x scripts/*.sh data/get.sh dev/test/reproduce_test.sh
else
    skip "the scripts' style: there is no shellcheck (make deps)"
fi
summary
