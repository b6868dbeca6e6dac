#!/bin/bash
# Runs test programs and scripts one after the other and sums up: the last line is
# "N passed, M failed". A test says its own numbers in such a line, or as GoogleTest does; one that
# does neither counts as one, by its exit status.
passed=0 failed=0 broken=()
output=$(mktemp)
trap 'rm -f "$output"' EXIT

for test in "$@"; do
    echo "== $test"
    case $test in
    /*) command=("$test") ;;
    *) command=("./$test") ;;
    esac
    # OpenMP's threads wait in busy loops, and would take the processors from the simulator's.
    [[ $test == *_sim ]] && command=(env OMP_NUM_THREADS=1 "${command[@]}")
    [[ $test == */unit_tests || $test == *_test ]] && command+=(--gtest_brief=1)
    "${command[@]}" 2>&1 | tee "$output"
    status=${PIPESTATUS[0]}

    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$output" | tail -1)
    if [[ $line ]]; then
        p=${line%% *} f=${line#*, } f=${f%% *}
    else # GoogleTest, in colour or not
        p=$(sed -nE 's/.*\[  PASSED  \][^0-9]*([0-9]+) tests?\..*/\1/p' "$output" | tail -1)
        f=$(grep -cE '\[  FAILED  \].* \([0-9]+ ms\)$' "$output")
        [[ -z $p && $f == 0 && $status == 0 ]] && p=1
    fi
    p=${p:-0} f=${f:-0}
    ((status != 0 && f == 0)) && f=1 # it crashed, or failed without saying how often
    ((passed += p, failed += f))
    ((f > 0)) && broken+=("$test ($f, exit status $status)")
done

echo
for name in "${broken[@]}"; do echo "FAILED: $name"; done
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
