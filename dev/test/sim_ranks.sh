#!/bin/bash
# ./train_gpt_sim: two ranks with a simulated GPU each train like one; so does one whose streams run
# as late as possible, with another order of threads.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
program=$PWD/train_gpt_sim
[[ -x $program ]] || skip_all "ranks on a simulated GPU are not tested: train_gpt_sim is not built"
same() { [[ -n $1 && $1 == "$2" ]]; }

export LNS_CACHE=none OMP_NUM_THREADS=1 LNS_SIM_THREADS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
flags=(--device cuda --layers 2 --width 32 --heads 2 -x 3 -t 16 -v 0 --val-tokens 64 -s 0 -g 4)
losses() { grep -oE '^step .*(loss [0-9.]+|validation loss [0-9.]+)' "$1" | sed 's/  *[0-9.]*K* tok.*//'; }

"$program" "${flags[@]}" --dtype float32 -b 4 -o "$dir/one" >"$dir/one.log" 2>&1
one=$(losses "$dir/one.log")
check "one rank trains" same "$(grep -c loss <<<"$one")" 3

LNS_SIM_STREAMS=late LNS_SIM_ORDER=shuffled:3 \
    "$program" "${flags[@]}" --dtype float32 -b 4 -o "$dir/late" >"$dir/late.log" 2>&1
check "late streams change nothing" same "$(losses "$dir/late.log")" "$one"

if command -v mpirun >/dev/null && "$program" --version 2>&1 | grep -q 'MPI [^n]'; then
    LNS_SIM_GPUS=2 mpirun --oversubscribe -n 2 "$program" "${flags[@]}" --dtype float32 -b 2 \
        -o "$dir/two" >"$dir/two.log" 2>&1
    check "two ranks train as one does" same "$(losses "$dir/two.log")" "$one"

    # NCCL waits for a rank forever: the watching thread must end the others.
    cat >"$dir/rank" <<'END'
#!/bin/bash
echo $$ >"$0-$OMPI_COMM_WORLD_RANK"
exec "$@"
END
    chmod +x "$dir/rank"
    LNS_RANK_TIMEOUT=2 LNS_SIM_GPUS=2 mpirun --oversubscribe -n 2 "$dir/rank" "$program" \
        "${flags[@]}" -x 1000000 --dtype float32 -b 2 -o "$dir/hangs" >"$dir/hangs.log" 2>&1 &
    until [[ -s $dir/hangs/log.jsonl ]] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
    start=$SECONDS
    kill -STOP "$(<"$dir/rank-1")"
    wait $!
    check "a rank that hangs ends the other" [ $? != 0 ]
    check "in time" [ $((SECONDS - start)) -le 15 ]
    check "with a message" grep -q 'train_gpt: rank 1 .* has not answered for 2 s' "$dir/hangs.log"
else
    ((skipped++))
    echo "SKIPPED: two ranks: there is no mpirun, or this build has no MPI"
fi

summary
