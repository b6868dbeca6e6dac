# shellcheck shell=bash
# What check.sh and bench.sh share: steps with a time limit, each with a log, and their summary.

begin() { # DIRECTORY MINUTES
    out=$1 deadline=$((SECONDS + 60 * $2)) failed=0
    mkdir -p "$out" || exit 1
    out=$(cd "$out" && pwd)
    : >"$out/summary.txt"
    trap finish EXIT
}

note() { echo "$*" | tee -a "$out/summary.txt"; }

left() { echo $((deadline - SECONDS)); } # seconds

# step NAME SECONDS COMMAND…: runs it no longer than that or than there is time; its output goes to
# NAME.log, and the line that says how it ended to the summary. Exit status: the command's.
step() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    (($(left) < limit)) && limit=$(left)
    if ((limit < 5)); then
        note "skip  $name: no time left"
        return 1
    fi
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
    0) note "ok    $name ($((SECONDS - started)) s)" ;;
    124 | 137) note "FAIL  $name: not done after $limit s" ;;
    *) note "FAIL  $name: exit status $status ($((SECONDS - started)) s)" ;;
    esac
    ((status == 0)) && return
    failed=1
    tail -n 12 "$out/$name.log" | sed 's/^/      /'
    return $status
}

# Ends everything, where nothing after it makes sense.
need() { step "$@" || exit 1; }

finish() {
    local status=$?
    echo
    echo "== $out/summary.txt"
    cat "$out/summary.txt"
    ((status != 0 || failed)) && echo "FAILED" && exit 1
    echo "all is well"
}

# Builds for the GPU that is here alone: a third of the time.
build() { # TARGETS…
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    [[ $capability == 90 ]] && capability=90a # with what only Hopper has
    need build 420 make CUDA_ARCH="sm_${capability:-80}" "$@"
}
