#!/bin/bash
# Fine-tunes a model on instructions and scores it before and after.
set -euo pipefail
# shellcheck source=scripts/python.sh
. "$(dirname "$0")/python.sh"

usage() {
    cat <<'USAGE'
Usage: scripts/finetune.sh CHECKPOINT --data FILE.jsonl [OPTION...] [-- FLAGS]

Scores CHECKPOINT on benchmarks, fine-tunes it on the instructions in FILE (plain, .gz, .xz or .zst),
scores the result on the same questions, and prints a table of both, also into OUT/table.txt. FLAGS
are passed to ./train_gpt instead of --recipe paper-sft, the paper's: 4 epochs at 3e-4, 4 layers at a
time, in bf16. If it is interrupted (Ctrl-C), the same command continues.

  scripts/finetune.sh runs/base --data instructions.jsonl --tasks arc_easy,boolq,openbookqa
  scripts/finetune.sh SmolLM2-135M --data sft.jsonl.xz -- --recipe paper-sft --lisa 0 --epochs 1

  --tasks NAMES     arc_easy,boolq,openbookqa by default; ./train_gpt eval --help lists all
  --task-data DIR   where their data is: NAME.jsonl or NAME.jsonl.xz (data/get.sh evals fetches it)
  --limit N         only the first N questions of each
  --template NAME   how instructions become text, as for data/tokenize
  --seq-len N       tokens of an example [512]
  --pack            several examples a sequence
  -o, --out DIR     default: runs/finetune
USAGE
}

fail() {
    echo "finetune.sh: $*" >&2
    exit 1
}

base='' data='' out=runs/finetune tasks=arc_easy,boolq,openbookqa seq_len=512
eval_flags=() tokenize_flags=() train_flags=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --pack) tokenize_flags+=(--pack) ;;
    --)
        shift
        train_flags=("$@")
        break
        ;;
    --data | --tasks | --task-data | --limit | --template | --seq-len | -o | --out)
        (($# > 1)) || fail "$1 needs a value"
        case $1 in
        --data) data=$2 ;;
        --tasks) tasks=$2 ;;
        --task-data | --limit) eval_flags+=("$1" "$2") ;;
        --template) tokenize_flags+=("$1" "$2") ;;
        --seq-len) seq_len=$2 ;;
        *) out=$2 ;;
        esac
        shift
        ;;
    -*) fail "there is no option $1; see --help" ;;
    *)
        [[ -z $base ]] || fail "'$1' follows the checkpoint '$base': one is expected; see --help"
        base=$1
        ;;
    esac
    shift
done
[[ $base && $data ]] || fail "name a checkpoint and --data FILE; see --help"
[[ -x ./train_gpt && -x data/tokenize ]] || fail "build first, in the project's root: make train_gpt data/tokenize"
[[ -r $data ]] || fail "cannot read the instructions '$data'"
((${#train_flags[@]})) || train_flags=(--recipe paper-sft)
mkdir -p "$out"

# What a step made stands under its final name only once it is complete.
score() { # CHECKPOINT NAME
    [[ -e $out/$2.json ]] && return
    echo "scoring $1 ..."
    ./train_gpt eval "$1" --tasks "$tasks" --json "${eval_flags[@]}" >"$out/$2.json.new"
    mv "$out/$2.json.new" "$out/$2.json"
}

unpack() {
    case $1 in
    *.gz) gzip -dc "$1" ;;
    *.xz) xz -dc "$1" ;;
    *.zst) zstd -dc "$1" ;;
    *) cat "$1" ;;
    esac
}

score "$base" before
if ! compgen -G "$out/sft_train_*.bin" >/dev/null; then
    tokenizer=$base
    # A run's newest checkpoint has the tokenizer.
    checkpoints=("$base"/step-*)
    [[ -d ${checkpoints[-1]} ]] && tokenizer=${checkpoints[-1]}
    unpack "$data" | data/tokenize --instructions --tokenizer "$tokenizer" --seq-len "$seq_len" \
        -o "$out/sft" "${tokenize_flags[@]}" -
fi
if [[ ! -e $out/trained ]]; then
    if [[ -d $out/run ]]; then
        ./train_gpt -o "$out/run" -y
    else
        ./train_gpt --init-from "$base" -i "$out/sft_train_*.bin" -o "$out/run" -g 0 "${train_flags[@]}"
    fi
    touch "$out/trained"
fi
score "$out/run" after

python3 - "$out/before.json" "$out/after.json" <<'PYTHON' | tee "$out/table.txt"
import json
import sys


def with_error(value, error):  # error: of one question there is none
    return f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if isinstance(error, float) else "")


before, after = (json.load(open(name)) for name in sys.argv[1:])
rows = [("task", "metric", "chance", "before", "after", "difference")]
parts = {part for group in before.get("group_subtasks", {}).values() for part in group}
for task, x in before["results"].items():
    if task in parts:  # of mmlu, whose own row has them all
        continue
    y = after["results"][task]
    chance = before["configs"].get(task, {}).get("metadata", {}).get("chance")
    for metric in ("acc", "acc_norm"):
        if metric + ",none" in x:
            a, b = (with_error(r[metric + ",none"], r[metric + "_stderr,none"]) for r in (x, y))
            rows.append((task, metric, f"{100 * chance:.1f}" if chance else "", a, b,
                         f"{100 * (y[metric + ',none'] - x[metric + ',none']):+.2f}"))
widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
for row in rows:
    print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
PYTHON
echo "talk with it: ./train_gpt chat $out/run"
