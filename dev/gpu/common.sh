# shellcheck shell=bash
# Functions of check.sh and bench.sh: steps with time limits and logs, and their summary.

begin() { # DIRECTORY MINUTES
    out=$1 deadline=$((SECONDS + 60 * $2)) failed=0
    mkdir -p "$out" || exit 1
    out=$(cd "$out" && pwd)
    : >"$out/summary.txt"
    trap finish EXIT
}

note() { echo "$*" | tee -a "$out/summary.txt"; }

left() { echo $((deadline - SECONDS)); } # seconds

# step NAME SECONDS COMMAND…: runs the command for at most SECONDS or the time left, with output to
# NAME.log and the outcome to the summary. Returns the command's exit status.
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

# A step without which the rest is pointless.
need() { step "$@" || exit 1; }

finish() {
    local status=$?
    echo
    echo "== $out/summary.txt"
    cat "$out/summary.txt"
    ((status != 0 || failed)) && echo "FAILED" && exit 1
    echo "all passed"
}

# Builds for this GPU only, in a third of the time.
build() { # TARGETS…
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    [[ $capability == 90 ]] && capability=90a # with Hopper's own instructions
    need build 420 make CUDA_ARCH="sm_${capability:-80}" "$@"
}
