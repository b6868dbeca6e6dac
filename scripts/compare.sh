#!/bin/bash
# Trains one model under several norm schemes, one after the other, and prints their table. Run it
# in the project's root. The same command again skips what is finished and goes on with the rest.
set -euo pipefail
# shellcheck source=scripts/python.sh
. "$(dirname "$0")/python.sh"

usage() {
    cat <<'USAGE'
Usage: scripts/compare.sh [-o DIR] [-s SUFFIX] [SCHEME...] [-- FLAGS]

SCHEME is what -n of ./train_gpt takes; by default pre lns post mix sandwich deepnorm. The FLAGS
are passed on to ./train_gpt, and are the same for every scheme: the model, the data, the steps,
the seed. Each run is a directory DIR/SCHEME (by default runs/compare/SCHEME); what it printed is
DIR/SCHEME.txt. With -s it is DIR/SCHEMESUFFIX, and DIR may hold runs of other flags with another
SUFFIX.

  scripts/compare.sh
  scripts/compare.sh -o runs/plays pre lns -- -i 'data/tinyshakespeare/*_train_*.bin' -x 500

Environment: LAUNCH starts each run, for example LAUNCH="mpirun -np 8".
USAGE
}

fail() {
    echo "compare.sh: $*" >&2
    exit 1
}

out=runs/compare suffix='' schemes=() flags=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    -o)
        (($# > 1)) || fail "-o needs a directory"
        out=$2
        shift
        ;;
    -s)
        (($# > 1)) || fail "-s needs a suffix"
        suffix=$2
        shift
        ;;
    --)
        flags=("${@:2}")
        break
        ;;
    -*) fail "unknown option $1. Flags for ./train_gpt come after --; see scripts/compare.sh --help" ;;
    *) schemes+=("$1") ;;
    esac
    shift
done
((${#schemes[@]})) || schemes=(pre lns post mix sandwich deepnorm)
for flag in ${flags[@]+"${flags[@]}"}; do
    case $flag in
    -n* | --norm | --norm=* | -o* | --out | --out=* | -y* | --resume*)
        fail "$flag is given to each run by this script: name schemes before --, and DIR with -o"
        ;;
    esac
done
[[ -x train_gpt ]] || fail "there is no ./train_gpt here. Build it (make train_gpt) in the project's" \
    "root, and run scripts/compare.sh there"
read -ra launch <<<"${LAUNCH:-}"

# One directory holds runs of the same flags only, but for the suffix: other flags would not be the
# same training.
mkdir -p "$out"
given=$(printf '%q ' ${flags[@]+"${flags[@]}"})
given=${given% }
recorded=$out/flags$suffix
if [[ -f $recorded ]]; then
    [[ $given == "$(<"$recorded")" ]] || fail "the runs in $out were started with the flags" \
        "'$(<"$recorded")', not '$given': choose another directory with -o"
else
    echo "$given" >"$recorded"
fi

runs=()
for scheme in "${schemes[@]}"; do
    run=$out/${scheme//:/-}$suffix
    runs+=("$run")
    if [[ -f $run/outcome ]]; then
        echo "== $scheme: $(<"$run/outcome")"
        continue
    fi
    resume=()
    [[ -d $run ]] && resume=(-y)
    command=(${launch[@]+"${launch[@]}"} ./train_gpt -n "$scheme" -o "$run"
        ${resume[@]+"${resume[@]}"} ${flags[@]+"${flags[@]}"})
    printf '== %s:' "$scheme" && printf ' %q' "${command[@]}" && echo

    # A signal to all of us must leave tee to print what the trainer says while it saves.
    status=0
    "${command[@]}" 2>"$run.err" | (trap '' INT TERM && exec tee -a "$run.txt") ||
        status=${PIPESTATUS[0]}
    error=$(<"$run.err")
    rm "$run.err"
    [[ $error ]] && echo "$error" >&2
    if ((status == 0)); then
        echo finished >"$run/outcome"
    elif [[ $error == *'is not finite'* ]]; then
        echo "$error" >"$run/outcome" # a result too: on to the next scheme
    elif ((status == 130)); then
        echo "compare.sh: stopped. The same command goes on" >&2
        exit 130
    else
        compgen -G "$out/*$suffix/log.jsonl" >/dev/null || rm "$recorded" # nothing began with them
        fail "$scheme stopped with exit status $status. The same command tries again"
    fi
done

echo
if ! command -v python3 >/dev/null; then
    echo "compare.sh: the runs are done. There is no table of them, because there is no python3:" \
        "\`make deps\`, then scripts/table.py ${runs[*]}" >&2
    exit
fi
python3 scripts/table.py "${runs[@]}"
