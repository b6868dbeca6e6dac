#!/bin/bash
# Runs test programs and scripts and sums up: the last line is "N passed, M failed, K skipped", after
# the reasons for skipping. JOBS=2 runs two at a time. A test reports its counts in such a line (the
# last may be missing) or as GoogleTest does; a test that does neither counts as one, by its exit
# status. It reports the reason for skipping in a line "SKIPPED: WHAT: WHY".
# shellcheck source=scripts/python.sh
. "$(dirname "$0")/../scripts/python.sh"
passed=0 failed=0 skipped=0 broken=() reasons=() times=() jobs=${JOBS:-1}
# Busy-waiting threads would slow the test beside them.
((jobs > 1)) && export OMP_WAIT_POLICY=passive
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# Writes a test's output to $dir/NAME, then its exit status and seconds to $dir/NAME.status.
run() { # TEST
    local name=$dir/${1//\//:} program=${1% part *} command start=$SECONDS
    command=("./$program")
    [[ $program == /* ]] && command=("$program")
    [[ $1 == *" part "* ]] && command=(env GTEST_SHARD_INDEX=$((${1##* } - 1)) GTEST_TOTAL_SHARDS=4 "${command[@]}")
    # Busy-waiting OpenMP threads would slow the simulator's.
    [[ $1 == *_sim ]] && command=(env OMP_NUM_THREADS=1 "${command[@]}")
    [[ $program == */unit_tests || $program == *_test ]] && command+=(--gtest_brief=1)
    if ((jobs == 1)); then
        echo "== $1"
        "${command[@]}" 2>&1 | tee "$name"
        set -- "${PIPESTATUS[0]}"
    else
        "${command[@]}" >"$name" 2>&1
        set -- "$?"
    fi
    echo "$1 $((SECONDS - start))" >"$name.status"
}

count() { # TEST
    local test=$1 output=$dir/${1//\//:} status took line p='' f='' k='' why
    read -r status took <"$output.status"
    mv "$output.status" "$output.counted"
    ((jobs == 1)) || { echo "== $test" && cat "$output"; }
    mapfile -t why < <(sed -n 's/^SKIPPED: //p' "$output")
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' "$output" | tail -1)
    if [[ $line ]]; then
        read -r p _ f _ k _ <<<"$line"
        f=${f%,} k=${k:-${#why[@]}}
    else # GoogleTest, possibly in colour
        p=$(sed -nE 's/.*\[  PASSED  \][^0-9]*([0-9]+) tests?\..*/\1/p' "$output" | tail -1)
        f=$(grep -cE '\[  FAILED  \].* \([0-9]+ ms\)$' "$output")
        k=$(sed -nE 's/.*\[  SKIPPED \][^0-9]*([0-9]+) tests?.*/\1/p' "$output" | tail -1)
        mapfile -t -O ${#why[@]} why < <(sed -nE '/: Skipped$/{ n; p; }' "$output" | sort | uniq -c |
            sed -E 's/^ *1 //; s/^ *([0-9]+) (.*)/\2 (\1 tests)/')
        [[ -z $p && $f == 0 && $status == 0 ]] && p=1
    fi
    p=${p:-0} f=${f:-0} k=${k:-0}
    ((status != 0 && f == 0)) && f=1 # it crashed or did not count its failures
    ((passed += p, failed += f, skipped += k))
    times+=("$(printf '%6d s  %s' "$took" "$test")")
    ((f > 0)) && broken+=("$test ($f, exit status $status)")
    for line in ${why[@]+"${why[@]}"}; do reasons+=("$test: $line"); done
    ((k > 0 && ${#why[@]} == 0)) && reasons+=("$test: no reason given ($k tests)")
}

count_finished() {
    local test
    for test in "${tests[@]}"; do [[ ! -s $dir/${test//\//:}.status ]] || count "$test"; done
}

tests=() running=0
for test; do
    # The longest list of tests is run in four parts, side by side.
    if ((jobs > 1)) && [[ $test == */unit_tests ]]; then
        tests+=("$test part "{1..4})
    else
        tests+=("$test")
    fi
done
for test in "${tests[@]}"; do
    if ((jobs == 1)); then
        run "$test"
    else
        ((running >= jobs)) && wait -n && ((running--))
        run "$test" &
        ((++running))
    fi
    count_finished
done
while ((running-- > 0)); do
    wait -n
    count_finished
done

printf '\nThe slowest:\n'
printf '%s\n' "${times[@]}" | sort -rn | head -5
echo
for line in ${reasons[@]+"${reasons[@]}"}; do echo "SKIPPED: $line"; done
for name in ${broken[@]+"${broken[@]}"}; do echo "FAILED: $name"; done
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0 && passed > 0))
