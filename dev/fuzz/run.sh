#!/bin/bash
# dev/fuzz/run.sh DIR SECONDS [TARGET...]: runs each target of DIR/fuzz (`make fuzz`) for SECONDS,
# JOBS at a time (default 1). DIR/seeds holds initial inputs, DIR/corpus/TARGET the corpus,
# DIR/found failing inputs, and DIR/executions the counts of all runs so far.
set -u
dir=$1 seconds=$2
shift 2
targets=("$@")
((${#targets[@]})) || mapfile -t targets < <("$dir/fuzz" --list)
[[ -d $dir/seeds ]] || dev/fuzz/seeds.sh "$dir/seeds" || exit 1
mkdir -p "$dir/found" && touch "$dir/executions"
parent=/dev/shm
[[ -d $parent && -w $parent ]] || parent=/tmp
FUZZ_SCRATCH=$(mktemp -d "$parent/lns-fuzz-XXXXXX")
export FUZZ_SCRATCH ASAN_OPTIONS=quarantine_size_mb=16:detect_leaks=0
trap 'rm -rf "$FUZZ_SCRATCH"' EXIT

run() { # TARGET
    mkdir -p "$dir/corpus/$1" "$dir/seeds/$1"
    ln -f "$dir/fuzz" "$dir/$1"
    # Close standard output, which --help would flood.
    "$dir/$1" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=32768 -close_fd_mask=1 \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="$dir/found/$1-" \
        "$dir/corpus/$1" "$dir/seeds/$1" >"$dir/$1.log" 2>&1
    echo $? >"$dir/$1.status"
}
running=0
for target in "${targets[@]}"; do
    ((running >= ${JOBS:-1})) && wait -n && ((running--))
    run "$target" &
    ((++running))
done
wait

passed=0 failed=0 sum=0
for target in "${targets[@]}"; do
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$dir/$target.log")
    status=$(<"$dir/$target.status")
    ((sum += ${executions:=0}))
    echo "$target $executions" >>"$dir/executions"
    if ((status == 0)); then
        ((passed++))
        printf '  %-16s %10d executions\n' "$target" "$executions"
    else
        ((failed++))
        printf '  %-16s %10d executions, then failed (%s):\n' "$target" "$executions" "$dir/$target.log"
        grep -E 'ERROR|broken invariant|terminate|what\(\)|runtime error|SUMMARY|Test unit written' \
            "$dir/$target.log" | head -8 | sed 's/^/      /'
    fi
done
echo "$sum executions; $(awk '{ n += $2 } END { print n }' "$dir/executions") in all runs so far"
echo "$passed passed, $failed failed"
((failed == 0))
