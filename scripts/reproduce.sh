#!/bin/bash
# Reruns the comparison of "The Curse of Depth in Large Language Models" (arXiv 2502.05795) at one
# scale, from the data to the report. Run it in the project's root.
set -euo pipefail
# shellcheck source=scripts/python.sh
. "$(dirname "$0")/python.sh"

usage() {
    cat <<'USAGE'
Usage: scripts/reproduce.sh SCALE [--quick] [--packed] [--data FILE] [--tokenizer SPEC]
                            [--out DIR] [--dry-run] [-- FLAGS]

  laptop                24 layers of width 128 on the text of --data: every scheme at three learning
                        rates, a second seed for the four best and for pre, and what the embedding's
                        scale and pure bf16 do; a run takes some 10 minutes on 2 cores with AMX, all
                        a night; 9 s on an H200
  130m 250m 350m 1b     the paper's table with the paper's recipe, on C4
  7b                    LNS beside OLMo's scaled initialization, on C4

It measures the speed in a minute of training and says what all will cost; then it makes the data,
trains scheme after scheme, probes what it trained, and writes a table and OUT/report.html.
Interrupted (Ctrl-C), the same command goes on: finished and diverged runs are not run again.

  --quick               fewer: at laptop ten schemes, two rates, one seed; else pre and lns
  --packed              C4's documents one after the other, in place of one a sequence, cut and
                        padded (as the paper had them); laptop and 7b always
  --data FILE           text, plain, .gz, .xz or .zst, in place of C4; a line <|endoftext|> ends
                        each document. For laptop some 20 MB, not read twice
  --tokenizer SPEC      as data/tokenize has it; by default T5's for C4, and for --data one that
                        SentencePiece learns from it
  --out DIR             by default runs/reproduce-SCALE
  --dry-run             says what it would do and cost, and stops
  FLAGS                 for ./train_gpt; they win over the scale's

Environment: SCHEMES="pre lns", RATES="1e-3", SEEDS="1 2" replace the scale's; SECOND_SEED=yes then
runs the best again, as laptop does. LAUNCH="mpirun -np 8" starts each run. PROBE_FLAGS="--probes
variance" are for ./train_gpt probe. MEASURE_SECONDS=60.
USAGE
}

fail() {
    echo "reproduce.sh: $*" >&2
    exit 1
}

scale='' quick='' packed='' text='' tokenizer='' out='' dry='' more=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --quick) quick=yes ;;
    --packed) packed=yes ;;
    --dry-run) dry=yes ;;
    --data | --tokenizer | --out)
        [[ ${2:-} ]] || fail "$1 needs a value"
        case $1 in
        --data) text=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        *) out=$2 ;;
        esac
        shift
        ;;
    --)
        more=("${@:2}")
        break
        ;;
    -*) fail "unknown option $1. Flags for ./train_gpt come after --; see scripts/reproduce.sh --help" ;;
    *)
        [[ ! $scale ]] || fail "one scale is expected, found '$1' besides $scale"
        scale=$1
        ;;
    esac
    shift
done

# What a scale is: the flags of every run, the schemes, the learning rates ("": the recipe's) and
# seeds, the vocabulary that is learned where there is none, and how many files of C4 the steps
# read once: of documents (356,000 a file), of packed tokens (150M a file).
rates='' variants='' second_seed='' vocabulary=32000 padded_files=0
case $scale in
130m) padded_files=29 packed_files=18 ;;
250m) padded_files=58 packed_files=36 ;;
350m) padded_files=87 packed_files=53 ;;
1b) padded_files=144 packed_files=88 ;;
7b) packed=yes packed_files=134 ;;
laptop) packed=yes packed_files=0 ;;
'') usage >&2 && exit 1 ;;
*) fail "there is no scale '$scale', expected laptop, 130m, 250m, 350m, 1b or 7b" ;;
esac
case $scale in
laptop)
    # The paper's optimizer and schedule; its embeddings and its pure bf16 only in the variants.
    vocabulary=4096 val_every=250 val_tokens=131072
    flags=(-m tiny --layers 24 --width 128 --heads 4 -t 128 -b 32 -d 4096 -x 1500
        --beta1 0.9 --beta2 0.999 --eps 1e-8 --weight-decay 0 --grad-clip 0
        --lr-schedule cosine --warmup 10% --final-lr-frac 0.1 --save-every 250)
    schemes='pre lns lns-init post mix deepnorm deepnorm-published sandwich peri olmo2 layerscale
        skipinit pre+gpas lns+gpas pre+scaled-init lns+scaled-init'
    rates='1e-3 3e-3 3e-4'
    if [[ $quick ]]; then
        schemes='pre lns post mix deepnorm deepnorm-published sandwich lns+scaled-init pre+gpas lns-init'
        rates='1e-3 3e-3'
    elif [[ ! ${SCHEMES:-}${RATES:-}${SEEDS:-}${SECOND_SEED:-} ]]; then
        variants='embed bf16 paper' second_seed=yes
    fi
    ;;
7b)
    # The paper says: OLMo's code and 20 billion tokens. The learning rate is OLMo's; that moments
    # and weights are bf16, rounded stochastically, is ours, to fit one GPU of 80 GB.
    val_every=200 val_tokens=10000000
    flags=(-m olmo-7b -t 2048 -b 1 -d 4194304 -x 4768 --lr 3e-4 --beta1 0.9 --beta2 0.95
        --weight-decay 0.1 --grad-clip 1 --lr-schedule cosine --warmup 10% --final-lr-frac 0.1
        --dtype bf16 --master-weights no --moments bf16 --rounding stochastic --recompute layers
        --save-every 200)
    schemes='pre+scaled-init lns pre'
    [[ $quick ]] && schemes='pre+scaled-init lns'
    ;;
*)
    val_every=1000 val_tokens=10000000
    flags=(-m "llama-$scale" --recipe paper --save-every 1000)
    schemes='pre lns post deepnorm deepnorm-published mix'
    [[ $quick ]] && schemes='pre lns'
    ;;
esac
variant_flags() { # NAME: what the paper's code has and its text does not say (--recipe paper)
    case $1 in
    embed) echo "--embed-std 0.632455532034" ;;
    bf16) echo "--dtype bf16 --master-weights no --moments bf16" ;;
    paper) echo "$(variant_flags embed) $(variant_flags bf16)" ;;
    esac
}
second_seed=${SECOND_SEED:-$second_seed}
read -ra schemes <<<"${SCHEMES:-${schemes//$'\n'/ }}"
read -ra rates <<<"${RATES:-${rates:-recipe}}"
read -ra seeds <<<"${SEEDS:-1}"
read -ra launch <<<"${LAUNCH:-}"
read -ra probe_flags <<<"${PROBE_FLAGS:-}"
out=${out:-runs/reproduce-$scale}
for flag in ${more[@]+"${more[@]}"}; do
    case $flag in
    -n* | --norm | --norm=* | -o* | --out | --out=* | -y* | --resume* | --seed* | -l* | --lr | --lr=* | -i* | --train*)
        fail "$flag is given to each run by this script: SCHEMES, RATES and SEEDS choose them," \
            "--out and --data the places"
        ;;
    esac
done
flags+=(-v "$val_every" --val-tokens "$val_tokens" -s 0 --keep 1)

# What will be needed is here, before anything takes time.
[[ -x train_gpt ]] || fail "there is no ./train_gpt here. Build it (make train_gpt) in the project's" \
    "root, and run scripts/reproduce.sh there"
[[ $scale != laptop || $text ]] || fail "the laptop scale needs a text to train on: --data FILE, of" \
    "some 20 MB. data/get.sh tinystories fetches one"
unpack() { "${unpack[@]}" "$text"; }
unpack=(cat)
if [[ $text ]]; then
    [[ -f $text && -r $text ]] || fail "--data $text is no file that can be read"
    case $text in
    *.gz) unpack=(gzip -dc) ;;
    *.xz) unpack=(xz -dc) ;;
    *.zst) unpack=(zstd -dc) ;;
    esac
    command -v "${unpack[0]}" >/dev/null || fail "${unpack[0]} is missing, which unpacks $text." \
        "Install it, or name the text unpacked"
    [[ $tokenizer || -x data/vocabulary || $dry ]] || fail "there is no data/vocabulary to learn a" \
        "vocabulary with. Build it (make data/vocabulary), or name a --tokenizer"
fi
[[ -x data/tokenize || $dry ]] || fail "there is no data/tokenize here. Build it: make data/tokenize"
help=$(./train_gpt --help)
[[ $help == *--probe-every* ]] && flags+=(--probe-every "$val_every")
flags+=(${more[@]+"${more[@]}"})
for ((i = 0; i + 1 < ${#more[@]}; i++)); do
    case ${more[i]} in
    -v | --val-every) val_every=${more[i + 1]} ;;
    --val-tokens) val_tokens=${more[i + 1]} ;;
    esac
done

# Where the shards are, or will be.
if [[ $text ]]; then
    data=$out/data
elif [[ $packed ]]; then
    data=data/c4
else
    data=data/c4-padded
fi
have_data() { compgen -G "$data/*_train_*.bin" >/dev/null; }
input=()
if have_data; then
    input=(-i "$data/*_train_*.bin")
elif [[ $scale == laptop ]]; then
    input=(--vocab "$vocabulary") # made up stories, as if of that vocabulary
fi

# The runs: stages of the same flags, "SUFFIX|SCHEMES|FLAGS".
setting() { # RATE SEED
    [[ $1 == recipe ]] && echo "-seed$2" || echo "-lr$1-seed$2"
}
setting_flags() {
    [[ $1 == recipe ]] && echo "--seed $2" || echo "--lr $1 --seed $2"
}
run_of() { # SCHEME SUFFIX
    echo "$out/${1//:/-}$2"
}
stages=()
for seed in "${seeds[@]}"; do
    for rate in "${rates[@]}"; do
        stages+=("$(setting "$rate" "$seed")|${schemes[*]}|$(setting_flags "$rate" "$seed")")
    done
done
for variant in $variants; do
    stages+=("-$variant$(setting 1e-3 1)|pre lns|$(setting_flags 1e-3 1) $(variant_flags "$variant")")
done

# The four schemes that ended best, and pre, each at its best rate: "SCHEME RATE" a line.
best() {
    local scheme rate run loss
    for scheme in "${schemes[@]}"; do
        for rate in "${rates[@]}"; do
            run=$(run_of "$scheme" "$(setting "$rate" "${seeds[0]}")")
            [[ -f $run/outcome && $(<"$run/outcome") == finished ]] || continue
            loss=$(sed -nE 's/.*"val_loss":([0-9.eE+-]+).*/\1/p' "$run/log.jsonl" | tail -1)
            [[ ! $loss ]] || echo "$loss $scheme $rate"
        done
    done | sort -g | awk '!seen[$2]++ && (++n <= 4 || $2 == "pre") { print $2, $3 }'
}
second_stages() {
    local rate chosen
    for rate in "${rates[@]}"; do
        chosen=$(best | awk -v rate="$rate" '$2 == rate { printf "%s ", $1 }')
        [[ $chosen ]] && echo "$(setting "$rate" 2)|${chosen% }|$(setting_flags "$rate" 2)"
    done
    return 0
}

# What it costs.
if ! plan=$(./train_gpt ${input[@]+"${input[@]}"} "${flags[@]}" --dry-run 2>&1); then
    fail "these flags are refused: ${plan##*train_gpt: }"
fi
read -r steps step_tokens < <(sed -nE 's/^run +([0-9]+) steps? of ([0-9]+) tokens.*/\1 \2/p' <<<"$plan")
run_flops=$(sed -nE 's/^compute .* ([0-9.e+]+) FLOPs in all.*/\1/p' <<<"$plan")
[[ ${steps:-} && ${step_tokens:-} && $run_flops ]] || fail "./train_gpt --dry-run says nothing that" \
    "this script understands. Build it anew: make train_gpt"

# Tokens a second, of the first ones that are trained on; kept in OUT/speed.
measure() {
    local dir=$out/measuring seconds=${MEASURE_SECONDS:-60} pid start log
    rm -rf "$dir" && mkdir -p "$out"
    log=$dir/log.jsonl
    echo "measuring the speed in $seconds s of training ..." >&2
    ${launch[@]+"${launch[@]}"} ./train_gpt -n pre -o "$dir" ${input[@]+"${input[@]}"} "${flags[@]}" \
        -v 0 -g 0 --save-every 0 >"$dir.txt" 2>&1 &
    pid=$!
    trap 'kill -TERM $pid 2>/dev/null' EXIT
    start=''
    while kill -0 $pid 2>/dev/null; do
        sleep 0.2
        [[ ! $start && -s $log ]] && start=$SECONDS
        [[ $start ]] && ((SECONDS - start >= seconds)) && break
    done
    # Killed, it writes no checkpoint; mpirun must end its ranks.
    if ((${#launch[@]})); then kill -TERM $pid; else kill -KILL $pid; fi 2>/dev/null || true
    wait $pid 2>/dev/null || true
    trap - EXIT
    [[ -s $log ]] || fail "no step was trained to measure the speed: $(tail -1 "$dir.txt")"
    # The first step also finds its memory.
    grep '}$' "$log" | sed -nE 's/.*"tokens":([0-9]+).*"seconds":([0-9.e+-]+).*/\1 \2/p' | awk '
        NR == 1 { t = $1; s = $2 }
        { tokens = $1; seconds = $2 }
        END { if (NR > 1) { tokens -= t; seconds -= s } if (seconds > 0) printf "%.1f\n", tokens / seconds }
    ' >"$out/speed.new"
    rm -rf "$dir" "$dir.txt"
    mv "$out/speed.new" "$out/speed"
}
[[ -s $out/speed ]] || measure
total=0 left=0
for stage in "${stages[@]}"; do
    IFS='|' read -r suffix names _ <<<"$stage"
    for scheme in $names; do
        ((total += 1))
        [[ -f $(run_of "$scheme" "$suffix")/outcome ]] || ((left += 1))
    done
done
if [[ $second_seed ]]; then
    again=5 # of a best scheme and pre; 4 if pre is one of them
    if ((left == 0)); then
        again=$(best | wc -l)
        ((left = again - $(find "$out" -maxdepth 2 -path '*-seed2/outcome' | wc -l))) || true
    else
        ((left += again))
    fi
    ((total += again))
fi
echo "$scale: $total runs of $steps steps, $left of them left"
echo "  schemes   ${schemes[*]}"
echo "  rates     ${rates[*]}; seeds ${seeds[*]}${second_seed:+, and 2 for the four best and pre}"
[[ $variants ]] && echo "  variants  $variants, of pre and lns at 1e-3"
awk -v steps="$steps" -v step_tokens="$step_tokens" -v flops="$run_flops" -v left="$left" \
    -v speed="$(<"$out/speed")" -v val="$val_tokens" -v every="$val_every" -v file="$out/speed" '
    function number(text) { # 10M, as the flags may have it
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
        # A token of validation is the third of one of training: no backward pass.
        validations = every > 0 ? int((steps + every - 1) / every) : 1
        seconds = (tokens + validations * number(val) / 3) / speed
        printf "  a run     %s tokens, %.3g FLOPs, %s\n", count(tokens), flops, duration(seconds)
        printf "  all left  %s tokens, %.3g FLOPs, %s\n", count(left * tokens), left * flops, duration(left * seconds)
        printf "  speed     %.4g tokens/s, of %s (remove it to measure again); probes come on top\n", speed, file
    }'
if have_data; then
    echo "  data      $data, seen $(sed -n 's/^ *seen //p' <<<"$plan") by each run"
elif [[ $text ]]; then
    echo "  data      $text, to be tokenized into $data"
else
    files=$padded_files
    [[ $packed ]] && files=$packed_files
    echo "  data      C4, $files files of 320 MB to fetch and tokenize into $data"
fi
[[ $dry ]] && exit

# The data. What it was made of is kept beside it: other data would not be the same comparison.
pad=()
[[ $packed ]] || pad=(--pad-documents 256)
tokenize_text() {
    local made_of spec=$tokenizer separator='<|endoftext|>' split=() count model=$data/text.model
    made_of="$text ${tokenizer:-learned $vocabulary} ${pad[*]-}"
    if have_data; then
        [[ $(cat "$data/made_of" 2>/dev/null) == "$made_of" ]] || fail "the tokens in $data were made" \
            "of '$(cat "$data/made_of" 2>/dev/null)', not of '$made_of': choose another --out"
        return
    fi
    mkdir -p "$data"
    count=$(unpack | grep -cxF -- "$separator" || [[ ${PIPESTATUS[0]} == 0 ]]) ||
        fail "$text cannot be unpacked: it is damaged, or not what its name says"
    if ((count > 0)); then
        split=(--doc-separator "$separator")
    elif [[ ! $packed ]]; then
        fail "$text has no line $separator to end a document, so there are none to pad: add such" \
            "lines, or choose --packed"
    fi
    if [[ ! $spec ]]; then
        # All of a text of some MB, the first of one that is long.
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
elif ! have_data; then
    data/get.sh c4 "$data" --files "$files" ${pad[@]+"${pad[@]}"} ${tokenizer:+--tokenizer "$tokenizer"}
fi

# The runs, then what the first ones decide.
run_stage() {
    local suffix names own status=0
    IFS='|' read -r suffix names own <<<"$1"
    read -ra names <<<"$names"
    read -ra own <<<"$own"
    scripts/compare.sh -o "$out" -s "$suffix" "${names[@]}" -- -i "$data/*_train_*.bin" "${flags[@]}" "${own[@]}" ||
        status=$?
    ((status == 0)) || exit $status
    for scheme in "${names[@]}"; do runs+=("$(run_of "$scheme" "$suffix")"); done
    echo
}
runs=()
for stage in "${stages[@]}"; do run_stage "$stage"; done
if [[ $second_seed ]]; then
    mapfile -t again < <(second_stages)
    for stage in ${again[@]+"${again[@]}"}; do run_stage "$stage"; done
fi

# What its layers do, of every run that left a model.
if [[ $help == *'train_gpt probe'* ]]; then
    for run in "${runs[@]}"; do
        if ! compgen -G "$run/step-*" >/dev/null || [[ -f $run/probe.json ]]; then continue; fi
        echo "== probe $run"
        status=0
        ./train_gpt probe "$run" ${probe_flags[@]+"${probe_flags[@]}"} >"$run.probe.txt" || status=$?
        ((status == 130)) && exit 130
        ((status == 0)) || echo "reproduce.sh: $run is not probed, and the report is without it" >&2
    done
fi

echo
if ! command -v python3 >/dev/null; then
    echo "reproduce.sh: the runs are done. There is no table or report of them, because there is no" \
        "python3: \`make deps\`; then the same command writes them" >&2
    exit
fi
python3 scripts/table.py "${runs[@]}" | tee "$out/table.txt"
if ! lack=$(python3 scripts/plotting.py 2>&1); then
    echo "reproduce.sh: the runs are done, and their table is $out/table.txt. There is no report:" \
        "$(tail -1 <<<"${lack#plotting.py: }"). Then the same command writes it" >&2
    exit
fi
python3 scripts/report.py "${runs[@]}" -o "$out/report.html"
