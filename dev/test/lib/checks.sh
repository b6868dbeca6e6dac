# shellcheck shell=bash
# Sourced by the test scripts: a temporary folder, $dir, and checks that count what passed.
# shellcheck source=scripts/python.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/python.sh"
export PYTHONDONTWRITEBYTECODE=1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0

# NAME COMMAND...: a failure shows the command, and the end of ./out if there is one.
check() {
    local name=$1
    shift
    if "$@"; then
        ((++passed))
    else
        ((++failed))
        echo "FAILED: $name: $(head -c 600 <<<"$*")"
        [[ ! -f out ]] || tail -c 600 out
    fi
}
skip() { # WHAT: WHY
    ((++skipped))
    echo "SKIPPED: $1"
}
summary() {
    echo "$passed passed, $failed failed, $skipped skipped"
    ((failed == 0))
}
skip_all() { # WHAT: WHY
    skip "$1"
    summary
    exit
}
says() { grep -qF -- "$2" <<<"$1"; } # TEXT PART
silent_on() { ! says "$1" "$2"; }
out_says() { grep -qF -- "$1" out; } # PART: of the file out
