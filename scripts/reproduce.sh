#!/bin/bash
# Repeats a table of the paper and reports the result beside the paper's.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=scripts/common.sh
. "$here/common.sh"

usage() {
    cat <<'USAGE'
Usage: scripts/reproduce.sh TABLE [OPTION...] [SCHEME...] [-- FLAGS]

Repeats a TABLE of "The Curse of Depth in Large Language Models" (arXiv 2502.05795): trains each of
its schemes with each learning rate and seed (scripts/compare.sh does), and writes OUT/TABLE.html and
TABLE.txt: the best learning rate of each scheme, mean ± standard deviation over seeds, a paired test
against Pre-LN, and the paper's numbers. Run it in the project's root. If it is interrupted, killed
or out of time, the same command continues; runs that tables share are trained once.

  table1  Post-LN, DeepNorm, Mix-LN, Pre-LN and LNS
  table6  LNS and other ways to damp deep layers: LayerScale, SkipInit, initializations
  table7  Admin, Group-LN, Sandwich-LN, Mix-LN and LNS
  table8  places of LNS: before and after the norm, after the sublayer, after the sum
  olmo    table 3 and figure 1: OLMo's architecture, scaled initialization and LNS
  qwen    table 4: Qwen2.5's architecture, Pre-LN and LNS
  depth   does depth pay? The same number of parameters in 6, 12, 24 and 48 layers
  130m    llama-130m for 1,200 steps under pre and lns, by the paper's text (embeddings from 0.02,
          float32 master weights) and by its code (0.632, pure bf16): perplexity at every tenth

  --scale SIZE     laptop (24 layers of width 128, about 10 minutes a run on 2 cores, 9 s on an H200), or
                   the paper's models and steps: 60m, 130m, 250m, 350m, 1b; olmo: also 7b; qwen: also
                   0.5b [laptop; of 130m: 130m]
  --seeds N        seeds 1 … N [3; of 130m: 1]
  --rates X,Y,…    peak learning rates [5e-4,1e-3,2e-3; of 130m: 1e-3]
  --data FILE      text, as for scripts/compare.sh; may be repeated. Its documents are concatenated.
                   Without it, C4 (not for laptop)
  --tokenizer SPEC as for data/tokenize. Default: T5's for C4; for --data, a SentencePiece model
                   trained on it
  --steps N        steps of each run, instead of the paper's
  --minutes N      stop and save after N minutes, with exit status 130; the same command continues
  --pdf DIR        write each figure there, too, as a vector file
  -o, --out DIR    [runs/reproduce-SIZE]
  --dry-run        print the runs and their cost, and stop

SCHEMEs replace the table's. FLAGS are passed to ./train_gpt (-- -b 64, say). Environment: LAUNCH and
MEASURE_SECONDS, as for scripts/compare.sh.

  scripts/reproduce.sh table1 --data TEXT.xz --minutes 20
  scripts/reproduce.sh 130m --data prose.txt.xz --data manuals.txt.xz --minutes 20 -- -b 128
USAGE
}

fail() {
    echo "reproduce.sh: $*" >&2
    exit 1
}

tables=$(awk -F '\t' '!/^#/ && !seen[$1]++ { print $1 }' "$here/paper.tsv")
tables=${tables//$'\n'/, }
table='' scale='' seeds='' rates='' steps='' out='' dry='' texts=() minutes='' schemes=() more=()
tokenizer=() report_flags=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --dry-run) dry=yes ;;
    --scale | --seeds | --rates | --data | --tokenizer | --steps | --minutes | --pdf | -o | --out)
        [[ ${2:-} ]] || fail "$1 needs a value"
        case $1 in
        --scale) scale=$2 ;;
        --seeds) seeds=$2 ;;
        --rates) rates=$2 ;;
        --data) texts+=(--data "$2") ;;
        --tokenizer) tokenizer=(--tokenizer "$2") ;;
        --steps) steps=$2 ;;
        --minutes) minutes=$2 ;;
        --pdf) report_flags=(--pdf "$2") ;;
        *) out=$2 ;;
        esac
        shift
        ;;
    --)
        more=("${@:2}")
        break
        ;;
    -*) fail "unknown option $1. Flags for ./train_gpt come after --; see scripts/reproduce.sh --help" ;;
    *) if [[ $table ]]; then schemes+=("$1"); else table=$1; fi ;;
    esac
    shift
done
[[ $table ]] || fail "name a table: $tables; see scripts/reproduce.sh --help"
[[ ", $tables, " == *", $table, "* ]] || fail "there is no table '$table'; there are $tables"
number() { # FLAG VALUE PATTERN WHAT
    [[ $2 =~ ^($3)$ ]] || fail "$1 $2: $4 is expected"
}
seeds=${seeds:-$([[ $table == 130m ]] && echo 1 || echo 3)}
rates=${rates:-$([[ $table == 130m ]] && echo 1e-3 || echo 5e-4,1e-3,2e-3)}
scale=${scale:-$([[ $table == 130m ]] && echo 130m || echo laptop)}
number --seeds "$seeds" '[1-9][0-9]*' "a number of seeds"
rate='[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?'
number --rates "$rates" "$rate(,$rate)*" "a list of learning rates such as 5e-4,1e-3"
[[ ! $steps ]] || number --steps "$steps" '[1-9][0-9]*' "a number of steps"
[[ ! $minutes ]] || number --minutes "$minutes" '[0-9]+(\.[0-9]+)?' "a number"
((${#schemes[@]})) || mapfile -t schemes < <(awk -F '\t' -v table="$table" '$1 == table { print $2 }' "$here/paper.tsv")

# Layers, width, width of the MLP and heads of models with the same number of parameters, to 0.5%;
# the size's own model needs none.
sizes() {
    case $scale in
    laptop) echo 6:240:568:6 12:168:504:7 24 48:96:232:3 ;;
    130m) echo 6:1024:2352:16 12 24:576:1576:9 48:448:1040:7 ;;
    250m) echo 6:1472:3816:23 12:1088:3088:17 24 48:576:1768:9 ;;
    350m) echo 6:1856:4984:29 12:1408:3600:22 24 48:768:1856:12 ;;
    1b) echo 6:3904:10296:61 12:2816:7672:44 24 48:1472:3912:23 ;;
    esac
}

# Models: "FOLDER|FLAGS", with the preset of compare.sh that the flags are added to.
preset=$scale models=()
case $table:$scale in
*:laptop | *:60m | *:130m | *:250m | *:350m | *:1b | olmo:7b | qwen:0.5b) ;;
*) fail "there is no scale '$scale' of $table; there are laptop, 60m, 130m, 250m, 350m and 1b, of olmo also 7b, of qwen also 0.5b" ;;
esac
case $table:$scale in
olmo:1b) preset=7b models=("olmo|-m olmo-1b") ;;
olmo:7b) models=("olmo|") ;;
olmo:*) models=("olmo|--arch olmo") ;;
qwen:0.5b) preset=350m models=("qwen|-m qwen2.5-0.5b -x 45776") ;; # 6 billion tokens
qwen:*) models=("qwen|--arch qwen2") ;;
depth:*)
    [[ $(sizes) ]] || fail "there is no depth at scale $scale; there are laptop, 130m, 250m, 350m and 1b"
    for size in $(sizes); do
        IFS=: read -r layers width mlp heads <<<"$size"
        if [[ $width ]]; then
            models+=("depth-$layers|--layers $layers --width $width --mlp-width $mlp --heads $heads")
        else
            models+=("llama|")
        fi
    done
    ;;
130m:laptop) fail "130m compares conventions of the paper's recipe, which laptop does not follow: choose a scale from 60m to 1b" ;;
130m:*)
    steps=${steps:-1200}
    tenth=$(((steps + 9) / 10))
    often="-v $tenth --val-tokens 1000000 --save-every $tenth --probe-every $tenth"
    models=("code|$often" "text|$often --embed-std 0.02 --master-weights yes --moments float32")
    ;;
*) models=("llama|") ;;
esac

out=${out:-runs/reproduce-$scale}
data=(${texts[@]+"${texts[@]}"} ${tokenizer[@]+"${tokenizer[@]}"})
# Other texts than web pages would lose most of their tokens if each document were cut to a sequence.
[[ ! ${texts[*]-} ]] || data+=(--packed --tokens "$out/tokens")
[[ ! $steps ]] || more+=(-x "$steps")
export SEEDS RATES=${rates//,/ } SECOND_SEED='' MEASURE_SECONDS=${MEASURE_SECONDS:-$((60 / ${#models[@]}))}
SEEDS=$(seq -s ' ' "$seeds")
compare() { # MODEL FLAG...
    local flags
    read -ra flags <<<"${1#*|}"
    "$here/compare.sh" "$preset" ${data[@]+"${data[@]}"} --out "$out/${1%%|*}" --train-only "${@:2}" \
        "${schemes[@]}" -- ${flags[@]+"${flags[@]}"} ${more[@]+"${more[@]}"}
}

if [[ $dry ]] || ((${#models[@]} > 1)); then
    echo "$table at scale $scale"
    plan=''
    for model in "${models[@]}"; do
        part=$(compare "$model" --dry-run)
        echo "== ${model/|/ }"
        echo "$part"
        plan+=$part$'\n'
    done
    awk '/^  all left/ {
            unit["s"] = 1; unit["minutes"] = 60; unit["hours"] = 3600; unit["days"] = 86400
            seconds += $(NF - 1) * unit[$NF]; n++
        }
        END { if (n > 1) printf "all models  %.3g hours left\n", seconds / 3600 }' <<<"$plan"
fi
[[ ! $dry ]] || exit 0

status=0
for model in "${models[@]}"; do
    time=()
    [[ ! $minutes ]] || time=(--minutes "$(awk -v m="$minutes" -v s=$SECONDS 'BEGIN { left = m - s / 60; print (left > 0 ? left : 0) }')")
    compare "$model" ${time[@]+"${time[@]}"} || status=$?
    ((status == 0)) || break
done
# The report, also of what was trained until time ran out.
((status == 0)) || [[ $minutes ]] || exit "$status"
((status == 0 || status == 130)) || exit "$status"
runs=() left=0 all=0
for model in "${models[@]}"; do
    for scheme in "${schemes[@]}"; do
        for rate in $RATES; do
            for seed in $SEEDS; do
                run=$out/${model%%|*}/$(run_name "$scheme" "-lr$rate-seed$seed")
                ! grep -qsm1 '}$' "$run/log.jsonl" || runs+=("$run") # a whole step
                ((++all))
                [[ -f $run/outcome ]] || ((++left))
            done
        done
    done
done
# shellcheck disable=SC2034 # read by write_report
paper_flags=(--paper "$table" --scale "$scale")
((${#runs[@]} == 0)) || write_report "$out/$table.txt" "$out/$table.html" "${runs[@]}"
((left == 0)) || echo "reproduce.sh: of $table, $left of $all runs are left. The same command continues" >&2
exit "$status"
