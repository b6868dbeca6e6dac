#!/bin/bash
# Trains a model of the paper (arXiv 2502.05795) as the paper did. Run it in the project's root.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: [NAME=VALUE...] scripts/recipe.sh 60m|130m|250m|350m|1b [FLAGS]

For each scheme it says how many tokens and FLOPs the run takes, prints the command and runs it;
the same line again goes on with what was interrupted. FLAGS are passed on to ./train_gpt
and win over the recipe's.

  SCHEMES="pre lns"        what to train, one after the other
  DATA=data/c4             directory of token shards: data/get.sh c4 --files N makes it
  OUT=runs/paper           each run is a directory OUT/llama-SIZE-SCHEME
  LAUNCH=                  what starts a run, for example LAUNCH="mpirun -np 8"
USAGE
}

fail() {
    echo "recipe.sh: $*" >&2
    exit 1
}

# Files of C4, of about 150M tokens each, that the recipe's tokens take.
size=${1:-}
case $size in
60m) files=9 ;; # the paper has no run of this size
130m) files=18 ;;
250m) files=36 ;;
350m) files=53 ;;
1b) files=88 ;;
-h | --help) usage && exit ;;
*) usage >&2 && exit 1 ;;
esac
shift
data=${DATA:-data/c4}
[[ -x train_gpt ]] || fail "there is no ./train_gpt here. Build it (make train_gpt) in the project's" \
    "root, and run scripts/recipe.sh there"
compgen -G "$data/*_train_*.bin" >/dev/null || fail "there are no shards $data/*_train_*.bin. Get" \
    "as many as this recipe reads once (about $files GB): data/get.sh c4 --files $files"
read -ra launch <<<"${LAUNCH:-}"
read -ra schemes <<<"${SCHEMES:-pre lns}"

for scheme in "${schemes[@]}"; do
    run=${OUT:-runs/paper}/llama-$size-${scheme//:/-}
    command=(${launch[@]+"${launch[@]}"} ./train_gpt -m "llama-$size" --recipe paper -n "$scheme"
        -i "$data/*_train_*.bin" -o "$run" -v 1000 -s 0 --save-every 1000 "$@")
    [[ -d $run ]] && command+=(-y)
    "${command[@]}" --dry-run | grep -E '^(model|parameters|memory|run|compute) '
    printf '\n+' && printf ' %q' "${command[@]}" && printf '\n\n'
    "${command[@]}"
done
