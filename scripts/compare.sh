#!/bin/bash
# Trains one model under several norm schemes and compares the results.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

usage() {
    cat <<'USAGE'
Usage: scripts/compare.sh [PRESET] [OPTION...] [SCHEME...] [-- FLAGS]

Trains the same model under each SCHEME (whatever -n of ./train_gpt accepts), one run after the
other, and prints a table. FLAGS are passed to ./train_gpt and are the same for all runs: the model,
the data, the steps. Run it in the project's root. If it is interrupted (Ctrl-C), the same command
continues; finished and diverged runs are not repeated.

  scripts/compare.sh
  scripts/compare.sh -o runs/plays pre lns -- -i 'data/tinyshakespeare/*_train_*.bin' -x 500

A PRESET repeats a comparison of "The Curse of Depth in Large Language Models" (arXiv 2502.05795).
It measures the training speed for a minute and estimates the total cost, then makes the data,
trains, probes each trained model, and writes OUT/table.txt and OUT/report.html:

  laptop                24 layers of width 128, on the text of --data: every scheme at three
                        learning rates, a second seed for the four best and for pre, and variants
                        with the paper's embedding scale and pure bf16. A run takes about 10 minutes
                        on 2 cores with AMX and 9 s on an H200
  60m 130m 250m 350m 1b the paper's recipe on C4 (60m has no counterpart in the paper)
  7b                    LNS, and OLMo's scaled initialization, on C4

  -o, --out DIR         default: runs/compare, or runs/compare-PRESET
  --minutes N           stop and save after N minutes, with exit status 130; the same command continues
  --train-only          no probes, no table, no report
  --dry-run             print the plan and its cost, and stop

With a PRESET only:
  --quick               fewer runs: ten schemes, two learning rates and one seed for laptop; pre and
                        lns (7b: lns and pre+scaled-init) for the others
  --data FILE           text to train on instead of C4, plain or as .gz, .xz or .zst; a line
                        <|endoftext|> ends a document; may be repeated. laptop needs about 20 MB
  --tokenizer SPEC      as for data/tokenize. Default: T5's for C4; for --data, a SentencePiece
                        model trained on it
  --packed              concatenate documents instead of giving each its own sequence, cut or
                        padded to 256 tokens as in the paper; laptop and 7b always do
  --tokens DIR          where the tokens are, or will be, for several comparisons of the same text.
                        Default: OUT/data, for C4 data/c4 or data/c4-padded

Environment: RATES="1e-3 3e-3" and SEEDS="1 2" train each scheme with each learning rate and seed;
SECOND_SEED=yes then repeats the best with seed 2, as laptop does. LAUNCH="mpirun -np 8" starts
each run. PROBE_FLAGS="--probes variance" are passed to ./train_gpt probe. MEASURE_SECONDS=60.
USAGE
}

fail() {
    echo "compare.sh: $*" >&2
    exit 1
}

preset='' quick='' packed='' texts=() tokenizer='' tokens='' out='' dry='' train_only='' minutes=''
schemes=() more=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --quick) quick=yes ;;
    --packed) packed=yes ;;
    --dry-run) dry=yes ;;
    --train-only) train_only=yes ;;
    --data | --tokenizer | --tokens | --minutes | -o | --out)
        [[ ${2:-} ]] || fail "$1 needs a value"
        case $1 in
        --data) texts+=("$2") ;;
        --tokenizer) tokenizer=$2 ;;
        --tokens) tokens=$2 ;;
        --minutes) minutes=$2 ;;
        *) out=$2 ;;
        esac
        shift
        ;;
    --)
        more=("${@:2}")
        break
        ;;
    -*) fail "unknown option $1. Flags for ./train_gpt come after --; see scripts/compare.sh --help" ;;
    laptop | 60m | 130m | 250m | 350m | 1b | 7b)
        [[ ! $preset ]] || fail "expected one preset, found $preset and $1"
        preset=$1
        ;;
    *) schemes+=("$1") ;;
    esac
    shift
done
[[ $preset || ! $quick$packed${texts[*]-}$tokenizer$tokens ]] || fail "--quick, --packed, --data," \
    "--tokens and --tokenizer belong to a preset: laptop, 60m, 130m, 250m, 350m, 1b or 7b"
[[ ! $minutes || $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--minutes $minutes: a number is expected"
[[ ! $minutes ]] || command -v timeout >/dev/null || fail "--minutes needs timeout, which is part of GNU coreutils"
for flag in ${more[@]+"${more[@]}"}; do
    case $flag in
    -n* | --norm | --norm=* | -o* | --out | --out=* | -y* | --resume*) ;;
    --seed*) [[ $preset${SEEDS:-} ]] || continue ;;
    -l* | --lr | --lr=*) [[ $preset${RATES:-} ]] || continue ;;
    -i* | --train*) [[ $preset ]] || continue ;;
    *) continue ;;
    esac
    fail "$flag is given to each run by this script: name schemes before --, learning rates in" \
        "RATES, seeds in SEEDS, and places with --out and --data"
done
[[ -x train_gpt ]] || fail "there is no ./train_gpt here. Build it (make train_gpt) in the project's" \
    "root, and run scripts/compare.sh there"

# A preset: the flags of every run, schemes, learning rates (none: the recipe's), and the size of a
# vocabulary trained on --data.
rates='' seeds=1 variants='' second_seed='' vocabulary=32000 val_every=1000 val_tokens=10000000
case $preset in
'')
    flags=() seeds='' val_every=100 val_tokens=131072 # the program's defaults
    usual='pre lns post mix sandwich deepnorm'
    ;;
laptop)
    # The paper's optimizer and schedule. Its embeddings and its pure bf16 are variants.
    packed=yes vocabulary=4096 val_every=250 val_tokens=131072
    flags=(-m tiny --layers 24 --width 128 --heads 4 -t 128 -b 32 -d 4096 -x 1500
        --beta1 0.9 --beta2 0.999 --eps 1e-8 --weight-decay 0 --grad-clip 0
        --lr-schedule cosine --warmup 10% --final-lr-frac 0.1 --save-every 250 --probe-every 250)
    usual="$(./train_gpt schemes --format names) pre+gpas lns+gpas pre+scaled-init lns+scaled-init"
    rates='1e-3 3e-3 3e-4'
    if [[ $quick ]]; then
        usual='pre lns post mix deepnorm deepnorm-published sandwich lns+scaled-init pre+gpas lns-init'
        rates='1e-3 3e-3'
    elif [[ ! ${schemes[*]-}${RATES:-}${SEEDS:-}${SECOND_SEED:-} ]]; then
        variants='embed bf16 paper' second_seed=yes
    fi
    ;;
7b)
    # From the paper: OLMo's code and 20 billion tokens. The learning rate is OLMo's. Weights and
    # moments in bf16 with stochastic rounding are our choice, to fit one GPU of 80 GB.
    packed=yes val_every=200
    flags=(-m olmo-7b -t 2048 -b 1 -d 4194304 -x 4768 --lr 3e-4 --beta1 0.9 --beta2 0.95
        --weight-decay 0.1 --grad-clip 1 --lr-schedule cosine --warmup 10% --final-lr-frac 0.1
        --dtype bf16 --master-weights no --moments bf16 --rounding stochastic --recompute layers
        --save-every 200)
    usual='pre+scaled-init lns pre'
    [[ $quick ]] && usual='pre+scaled-init lns'
    ;;
*)
    flags=(-m "llama-$preset" --recipe paper --save-every 1000 --probe-every 1000)
    usual='pre lns post deepnorm deepnorm-published mix'
    [[ $quick ]] && usual='pre lns'
    ;;
esac
variant_flags() { # NAME: what the paper's code does and its text does not say (--recipe paper)
    case $1 in
    embed) echo "--embed-std 0.632455532034" ;;
    bf16) echo "--dtype bf16 --master-weights no --moments bf16" ;;
    paper) echo "$(variant_flags embed) $(variant_flags bf16)" ;;
    esac
}
((${#schemes[@]})) || read -ra schemes <<<"${usual//$'\n'/ }"
second_seed=${SECOND_SEED:-$second_seed}
read -ra rates <<<"${RATES:-$rates}"
read -ra seeds <<<"${SEEDS:-$seeds}"
read -ra launch <<<"${LAUNCH:-}"
read -ra probe_flags <<<"${PROBE_FLAGS:-}"
out=${out:-runs/compare${preset:+-$preset}}
[[ ! $preset ]] || flags+=(-v "$val_every" --val-tokens "$val_tokens" -s 0 --keep 1)
flags+=(${more[@]+"${more[@]}"})
for ((i = 0; i + 1 < ${#more[@]}; i++)); do
    case ${more[i]} in
    -v | --val-every) val_every=${more[i + 1]} ;;
    --val-tokens) val_tokens=${more[i + 1]} ;;
    esac
done

# Whatever is missing is reported before anything takes time.
[[ $preset != laptop || ${texts[*]-} || $dry ]] || fail "the laptop preset needs a text to train on: --data FILE, of" \
    "about 20 MB. data/get.sh tinystories fetches one"
unpacker() { # FILE
    case $1 in
    *.gz) echo gzip ;;
    *.xz) echo xz ;;
    *.zst) echo zstd ;;
    *) echo cat ;;
    esac
}
separator='<|endoftext|>'
unpack() { # all texts, one after the other
    local file next=''
    for file in "${texts[@]}"; do
        [[ ! $next ]] || printf '\n%s\n' "$separator"
        next=yes
        case $(unpacker "$file") in
        cat) cat "$file" ;;
        *) "$(unpacker "$file")" -dc "$file" ;;
        esac || return
    done
}
for file in ${texts[@]+"${texts[@]}"}; do
    [[ -f $file && -r $file ]] || fail "--data $file is no file that can be read"
    command -v "$(unpacker "$file")" >/dev/null || fail "$(unpacker "$file"), which unpacks $file, is" \
        "missing. Install it, or pass the unpacked text"
done
text=${texts[*]-}
[[ ! $text || $tokenizer || -x data/vocabulary || $dry ]] || fail "there is no data/vocabulary to train a" \
    "vocabulary with. Build it (make data/vocabulary), or choose a --tokenizer"
[[ ! $preset || -x data/tokenize || $dry ]] || fail "there is no data/tokenize here. Build it: make data/tokenize"

# Where the shards are, or will be.
data=data/c4-padded
[[ $packed ]] && data=data/c4
[[ $text ]] && data=$out/data
data=${tokens:-$data}
have_data() { compgen -G "$data/*_train_*.bin" >/dev/null; }
input=()
if [[ $preset ]] && have_data; then
    input=(-i "$data/*_train_*.bin")
elif [[ $preset == laptop ]]; then
    input=(--vocab "$vocabulary") # built-in stories stand in for the text
fi
for scheme in "${schemes[@]}"; do
    plan=$(./train_gpt -n "$scheme" ${input[@]+"${input[@]}"} ${flags[@]+"${flags[@]}"} --dry-run 2>&1) ||
        fail "these flags are refused: ${plan##*train_gpt: }"
done

# --minutes: timeout ends what runs when they are over.
end=''
[[ ! $minutes ]] || end=$(awk -v minutes="$minutes" 'BEGIN { print int(60 * minutes) }')
limit=()
check_time() { # sets limit, which starts a command that may take the time left
    [[ $end ]] || return 0
    if ((SECONDS >= end)); then
        echo "compare.sh: the time is over. The same command continues" >&2
        exit 130
    fi
    limit=(timeout --foreground --preserve-status $((end - SECONDS)))
}

# Stages are runs that share their flags: "SUFFIX|SCHEMES|FLAGS".
setting() { # RATE SEED
    echo "${1:+-lr$1}${2:+-seed$2}"
}
setting_flags() {
    echo "${1:+--lr $1} ${2:+--seed $2}"
}
run_of() { # SCHEME SUFFIX
    echo "$out/$(run_name "$1" "$2")"
}
stages=()
for seed in "${seeds[@]-}"; do
    for rate in "${rates[@]-}"; do
        stages+=("$(setting "$rate" "$seed")|${schemes[*]}|$(setting_flags "$rate" "$seed")")
    done
done
for variant in $variants; do
    stages+=("-$variant$(setting 1e-3 1)|pre lns|$(setting_flags 1e-3 1) $(variant_flags "$variant")")
done

# The four best schemes, and pre, each at its best rate: lines of "SCHEME RATE".
best() {
    local scheme rate run loss
    for scheme in "${schemes[@]}"; do
        for rate in "${rates[@]-}"; do
            run=$(run_of "$scheme" "$(setting "$rate" "${seeds[0]-}")")
            [[ -f $run/outcome && $(<"$run/outcome") == finished ]] || continue
            loss=$(sed -nE 's/.*"val_loss":([0-9.eE+-]+).*/\1/p' "$run/log.jsonl" | tail -1)
            [[ ! $loss ]] || echo "$loss $scheme $rate"
        done
    done | sort -g | awk '!seen[$2]++ && (++n <= 4 || $2 == "pre") { print $2, $3 }'
}

# Tokens per second of the first steps, kept in OUT/speed.
measure() {
    local dir=$out/measuring seconds=${MEASURE_SECONDS:-60} pid start='' log
    rm -rf "$dir" && mkdir -p "$out"
    log=$dir/log.jsonl
    echo "measuring the speed in $seconds s of training ..." >&2
    ${launch[@]+"${launch[@]}"} ./train_gpt -n pre -o "$dir" ${input[@]+"${input[@]}"} \
        ${flags[@]+"${flags[@]}"} -v 0 -g 0 --save-every 0 >"$dir.txt" 2>&1 &
    pid=$!
    trap 'kill -TERM $pid 2>/dev/null' EXIT
    while kill -0 $pid 2>/dev/null; do
        sleep 0.2
        [[ ! $start && -s $log ]] && start=$SECONDS
        [[ $start ]] && ((SECONDS - start >= seconds)) && break
    done
    # SIGKILL, so that no checkpoint is written; mpirun must get the chance to end its ranks.
    if ((${#launch[@]})); then kill -TERM $pid; else kill -KILL $pid; fi 2>/dev/null || true
    wait $pid 2>/dev/null || true
    trap - EXIT
    [[ -s $log ]] || fail "no step was trained to measure the speed: $(tail -1 "$dir.txt")"
    # The first step also allocates memory.
    grep '}$' "$log" | sed -nE 's/.*"tokens":([0-9]+).*"seconds":([0-9.e+-]+).*/\1 \2/p' | awk '
        NR == 1 { t = $1; s = $2 }
        { tokens = $1; seconds = $2 }
        END { if (NR > 1) { tokens -= t; seconds -= s } if (seconds > 0) printf "%.1f\n", tokens / seconds }
    ' >"$out/speed.new"
    rm -rf "$dir" "$dir.txt"
    mv "$out/speed.new" "$out/speed"
}

# Prints the runs that are left and their cost; sets files, how many of C4 the data takes.
estimate() {
    local steps step_tokens run_flops total=0 left=0 suffix names=() scheme again per_file
    read -r steps step_tokens < <(sed -nE 's/^run +([0-9]+) steps? of ([0-9]+) tokens.*/\1 \2/p' <<<"$plan")
    run_flops=$(sed -nE 's/^compute .* ([0-9.e+]+) FLOPs in all.*/\1/p' <<<"$plan")
    [[ ${steps:-} && ${step_tokens:-} && $run_flops ]] || fail "the output of ./train_gpt --dry-run is" \
        "not what this script expects. Rebuild it: make train_gpt"
    [[ -s $out/speed ]] || measure
    for stage in "${stages[@]}"; do
        IFS='|' read -r suffix names _ <<<"$stage"
        read -ra names <<<"$names"
        for scheme in "${names[@]}"; do
            ((total += 1))
            [[ -f $(run_of "$scheme" "$suffix")/outcome ]] || ((left += 1))
        done
    done
    if [[ $second_seed ]]; then
        again=5 # the four best and pre; 4 if pre is among them
        if ((left == 0)); then
            again=$(best | wc -l)
            ((left = again - $(find "$out" -maxdepth 2 -path '*-seed2/outcome' | wc -l))) || true
        else
            ((left += again))
        fi
        ((total += again))
    fi
    echo "${preset:-compare}: $total runs of $steps steps, $left of them left"
    echo "  schemes   ${schemes[*]}"
    echo "  rates     ${rates[*]:-as the flags say}; seeds ${seeds[*]:-as the flags say}${second_seed:+, and 2 for the four best and pre}"
    [[ $variants ]] && echo "  variants  $variants, of pre and lns at 1e-3"
    awk -v steps="$steps" -v step_tokens="$step_tokens" -v flops="$run_flops" -v left="$left" \
        -v speed="$(<"$out/speed")" -v val="$val_tokens" -v every="$val_every" -v file="$out/speed" '
        function number(text) { # 10M, as flags may have it
            return text * (text ~ /[kK]$/ ? 1e3 : text ~ /[mM]$/ ? 1e6 : text ~ /[gGbB]$/ ? 1e9 : 1)
        }
        function count(x) {
            return x >= 1e9 ? sprintf("%.3gB", x / 1e9) : x >= 1e6 ? sprintf("%.3gM", x / 1e6) : x
        }
        function duration(s) {
            return s < 90 ? sprintf("%.2g s", s) : s < 5400 ? sprintf("%.3g minutes", s / 60) : s < 1e6 ? sprintf("%.3g hours", s / 3600) \
                : sprintf("%.3g days", s / 86400)
        }
        BEGIN {
            tokens = steps * step_tokens
            # A validation token costs a third of a training token: it has no backward pass.
            validations = every > 0 ? int((steps + every - 1) / every) : 1
            seconds = (tokens + validations * number(val) / 3) / speed
            printf "  a run     %s tokens, %.3g FLOPs, %s\n", count(tokens), flops, duration(seconds)
            printf "  all left  %s tokens, %.3g FLOPs, %s\n", count(left * tokens), left * flops, duration(left * seconds)
            printf "  speed     %.4g tokens/s, from %s (remove it to measure again); probes are not included\n", speed, file
        }'
    per_file=$((356000 * 256)) # positions in a file of C4: its documents, padded, or its tokens
    [[ $packed ]] && per_file=150000000
    files=$((steps * step_tokens / per_file + 1))
    if [[ ! $preset ]]; then
        echo "  data      as the flags say"
    elif have_data; then
        echo "  data      $data, seen $(sed -n 's/^ *seen //p' <<<"$plan") by each run"
    elif [[ $preset == laptop && ! $text ]]; then
        echo "  data      none yet: --data FILE"
    elif [[ $text ]]; then
        echo "  data      $text, to be tokenized into $data"
    else
        echo "  data      C4, $files files of 320 MB to fetch and tokenize into $data"
    fi
}
[[ ! $preset$dry ]] || estimate
[[ $dry ]] && exit

# The data. Its source is recorded beside it: other data would not be the same comparison.
pad=()
[[ $packed ]] || pad=(--pad-documents 256)
tokenize_text() {
    local made_of spec=$tokenizer split=() count model=$data/text.model
    made_of="$text ${tokenizer:-learned $vocabulary} ${pad[*]-}"
    if have_data; then
        [[ $(cat "$data/made_of" 2>/dev/null) == "$made_of" ]] || fail "the tokens in $data were made" \
            "from '$(cat "$data/made_of" 2>/dev/null)', not from '$made_of': choose another --out"
        return
    fi
    mkdir -p "$data"
    count=$(unpack | grep -cxF -- "$separator" || [[ ${PIPESTATUS[0]} == 0 ]]) ||
        fail "$text cannot be unpacked: it is damaged, or not what its name says"
    if ((count > 0)); then
        split=(--doc-separator "$separator")
    elif [[ ! $packed ]]; then
        fail "$text has no line $separator to end a document, so there are no documents to pad: add" \
            "such lines, or choose --packed"
    fi
    if [[ ! $spec ]]; then
        # The first 100 MB are enough for a vocabulary.
        { unpack || true; } 2>/dev/null | head -c 100000000 |
            data/vocabulary --size "$vocabulary" --doc-separator "$separator" -o "$model"
        spec=$model
    fi
    echo "$made_of" >"$data/made_of"
    unpack | data/tokenize --tokenizer "$spec" ${split[@]+"${split[@]}"} ${pad[@]+"${pad[@]}"} -o "$data/text"
    compgen -G "$data/text_val_*.bin" >/dev/null || fail "$text is too short to keep a part for validation"
}
if [[ $text ]]; then
    tokenize_text
elif [[ $preset ]] && ! have_data; then
    data/get.sh c4 "$data" --files "$files" ${pad[@]+"${pad[@]}"} ${tokenizer:+--tokenizer "$tokenizer"}
fi
[[ ! $preset ]] || flags=(-i "$data/*_train_*.bin" "${flags[@]}")

# Trains a stage. A run is OUT/SCHEME followed by the suffix; RUN.txt is what it printed, and
# RUN/outcome is "finished" or how it diverged.
runs=()
train() { # STAGE
    local suffix names=() own given recorded scheme run resume command status error
    IFS='|' read -r suffix names own <<<"$1"
    read -ra own <<<"$own"
    read -ra names <<<"$names"
    own=(${flags[@]+"${flags[@]}"} ${own[@]+"${own[@]}"})
    given=$(printf '%q ' ${own[@]+"${own[@]}"})
    given=${given% } recorded=$out/flags$suffix
    mkdir -p "$out"
    if [[ -f $recorded ]]; then
        [[ $given == "$(<"$recorded")" ]] || fail "the runs in $out were started with the flags" \
            "'$(<"$recorded")', not '$given': choose another directory with --out"
    else
        echo "$given" >"$recorded"
    fi
    for scheme in "${names[@]}"; do
        run=$(run_of "$scheme" "$suffix")
        runs+=("$run")
        if [[ -f $run/outcome ]]; then
            echo "== $scheme: $(<"$run/outcome")"
            continue
        fi
        resume=()
        [[ -d $run ]] && resume=(-y)
        check_time
        command=(${launch[@]+"${launch[@]}"} ./train_gpt -n "$scheme" -o "$run"
            ${resume[@]+"${resume[@]}"} ${own[@]+"${own[@]}"})
        printf '== %s:' "$scheme" && printf ' %q' "${command[@]}" && echo

        # tee must outlive a signal to the process group, to print what the trainer says as it saves.
        status=0
        ${limit[@]+"${limit[@]}"} "${command[@]}" 2>"$run.err" | (trap '' INT TERM && exec tee -a "$run.txt") ||
            status=${PIPESTATUS[0]}
        error=$(<"$run.err")
        rm "$run.err"
        [[ $error ]] && echo "$error" >&2
        if ((status == 0)); then
            echo finished >"$run/outcome"
        elif [[ $error == *'is not finite'* ]]; then
            echo "$error" >"$run/outcome" # divergence is a result, too
        else
            check_time
            if ((status == 130)); then
                echo "compare.sh: stopped. The same command continues" >&2
                exit 130
            fi
            compgen -G "$out/*$suffix/log.jsonl" >/dev/null || rm "$recorded" # nothing was trained with them
            fail "$scheme stopped with exit status $status. The same command tries again"
        fi
    done
    echo
}
for stage in "${stages[@]}"; do train "$stage"; done
if [[ $second_seed ]]; then
    for rate in "${rates[@]-}"; do
        chosen=$(best | awk -v rate="$rate" '$2 == rate { printf "%s ", $1 }')
        [[ ! $chosen ]] || train "$(setting "$rate" 2)|${chosen% }|$(setting_flags "$rate" 2)"
    done
fi

[[ ! $train_only ]] || exit 0
if [[ $preset ]]; then
    for run in "${runs[@]}"; do
        if ! compgen -G "$run/step-*" >/dev/null || [[ -f $run/probe.json ]]; then continue; fi
        echo "== probe $run"
        status=0
        check_time
        ${limit[@]+"${limit[@]}"} ./train_gpt probe "$run" ${probe_flags[@]+"${probe_flags[@]}"} >"$run.probe.txt" || status=$?
        ((status != 0)) && check_time
        ((status == 130)) && exit 130
        ((status == 0)) || echo "compare.sh: $run could not be probed; the report will lack its probes" >&2
    done
    echo
fi
if [[ $preset ]]; then
    write_report "$out/table.txt" "$out/report.html" "${runs[@]}"
else
    write_report '' '' "${runs[@]}"
fi
