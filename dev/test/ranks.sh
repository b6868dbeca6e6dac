#!/bin/bash
# Ranks under mpirun: with different flags, stopped, killed, resumed with another number.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
program=$PWD/train_gpt
command -v mpirun >/dev/null || skip_all "ranks: there is no mpirun"
[[ -x $program ]] || skip_all "ranks: ./train_gpt is not built"
"$program" --version | grep -q 'MPI: no' && skip_all "ranks: this build has no MPI"

cd "$dir" || exit 1
is() { [[ $1 == "$2" ]]; }
same_files() { cmp -s "$1" "$2"; }

export CUDA_VISIBLE_DEVICES='' LNS_RANK_TIMEOUT=2
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# MPICH neither has nor needs these flags.
mpirun=(mpirun)
mpirun --version | grep -q 'Open MPI' && mpirun+=(--oversubscribe --bind-to none)
flags=(--layers 2 --width 16 --heads 2 -t 16 -b 4 -g 0 -v 0 --val-tokens 64 --threads 1 --dtype float32)
ranks() { # N ARGUMENTS...: ./train_gpt on N ranks
    "${mpirun[@]}" -np "$1" "$dir/one" "$program" "${@:2}" >out 2>&1
}
# One rank, which records its PID; rank 1 has the flags, or the directory, of $others.
cat >one <<'END'
#!/bin/bash
rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
echo $$ >pid-$rank
[[ $rank == 1 && $others == cd ]] && cd other
[[ $rank == 1 && $others == -* ]] && exec "$@" $others
[[ $rank == 1 && $others == run\ * ]] && exec "./${others#run }" "${@:2}"
exec "$@"
END
chmod +x one

# If ranks differ, all end before anything is written.
for others in "--lr 0.1" "--seed 5" "--val-tokens 32" "-o elsewhere"; do
    export others
    ranks 2 "${flags[@]}" -x 2 -o differs
    check "$others: status" is $? 1
    check "$others: named" out_says "train_gpt: the ranks differ: rank 1 has --"
    check "$others: nothing written" [ ! -e differs ]
done
cp "$program" changed
chmod +w changed
echo changed >>changed
others="run changed" ranks 2 "${flags[@]}" -x 2 -o differs
check "another build" out_says "rank 1 has a program with the fingerprint"
export others="--threads 2"
ranks 2 "${flags[@]}" -x 2 -o threads
check "threads may differ" is $? 0
mkdir other
echo "lr = 0.01" >ini
echo "lr = 0.02" >other/ini
others="cd" ranks 2 "${flags[@]}" --config ini -x 2 -o differs
check "another --config file" out_says "rank 1 has --lr 0.02 and rank 0 has 0.01"
others="cd" ranks 2 -o threads -y -x 4
check "a rank without the checkpoint" out_says "rank 1 has the newest checkpoint none and rank 0 has step-000002"
cp -r threads other/threads
printf '\1' | dd of=other/threads/step-000002/model.safetensors bs=1 seek=4000 conv=notrunc 2>/dev/null
others="cd" ranks 2 -o threads -y -x 4
check "other weights: status" is $? 1
others="-b 3" ranks 2 eval threads
check "eval: named" out_says "rank 1 has --batch 3 and rank 0 has 16"
unset others

# Resuming with another number of ranks keeps the tokens per step; with the same, every bit.
ranks 3 "${flags[@]}" -x 4 --save-every 2 -o three
check "three ranks" is $? 0
cp -r three fewer
rm -r fewer/step-000004
cp -r fewer parts
ranks 3 -o parts -y
check "three ranks resume bit for bit" \
    same_files parts/step-000004/model.safetensors three/step-000004/model.safetensors
ranks 2 -o fewer -y
check "two ranks resume" is $? 0
check "and say so" out_says "a step keeps its 192 tokens, so --batch is 3 on 2 ranks, not 4"
check "to as many tokens" is "$(tail -1 fewer/log.jsonl | grep -o '"tokens":[0-9]*')" '"tokens":768'
ranks 5 -o fewer -y -x 5
check "five ranks do not" out_says "start 4 (mpirun -np 4) or 6"
ranks 4 -o fewer -y -x 5
check "and the advice works" is $? 0

# If a rank is stopped or killed, all end with a message.
for case in "STOP 0" "STOP 1" "KILL 0" "KILL 1" "SEGV 1"; do
    read -r signal rank <<<"$case"
    name="$signal-$rank"
    ranks 2 "${flags[@]}" -x 50000000 --save-every 2 -o "$name" &
    until compgen -G "$name/step-*" >/dev/null || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
    sleep 0.2
    start=$SECONDS
    kill "-$signal" "$(<"pid-$rank")"
    wait $!
    check "$name: not 0" [ $? != 0 ]
    check "$name: in time" [ $((SECONDS - start)) -le 12 ]
    check "$name: reported" out_says "train_gpt: rank "
    check "$name: what is saved" out_says "The newest checkpoint is $name/step-"
    check "$name: how to continue" out_says "continue with: mpirun -np 2 $program -o $name -y"
done
ranks 2 -o KILL-0 -y -x 0
check "that works" is $? 0

# Ranks that are suspended together for longer than the timeout continue.
ranks 2 "${flags[@]}" -x 50000000 -o asleep &
until [[ -s asleep/log.jsonl ]] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
kill -STOP "$(<pid-0)" "$(<pid-1)"
sleep 4
kill -CONT "$(<pid-0)" "$(<pid-1)"
sleep 1
kill -TERM "$(<pid-0)" "$(<pid-1)"
wait $!
check "ranks suspended together" out_says "stopped by a signal after step"

summary
