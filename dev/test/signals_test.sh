#!/bin/bash
# What ends a run or corrupts its output: signals in every phase, closed pipes, limits, shards that
# shrink, directories that disappear, links and FIFOs instead of files. Each run is then resumed
# and compared with one that was never stopped.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
[[ -x ./train_gpt ]] || skip_all "signals and lost outputs are not tested: ./train_gpt is not built"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
program=$PWD/train_gpt
cd "$dir" || exit 1
small="--threads 1 --layers 2 --width 16 --heads 2 -b 2 -t 16 --val-tokens 64 -v 0 -s 0 -g 0 --dtype float32"
endless="$small -x 100000000 --save-every 0"
# shellcheck disable=SC2086 # words
begin() { # ARGUMENTS...: starts a run into ./run and waits for its first step
    rm -rf run
    "$program" "$@" -o run >out 2>&1 &
    pid=$!
    for _ in $(seq 600); do
        [[ -s run/log.jsonl ]] && return
        kill -0 $pid 2>/dev/null || return
        sleep 0.05
    done
}
ends_with() { # STATUS: within 30 s
    for _ in $(seq 600); do
        kill -0 $pid 2>/dev/null || break
        sleep 0.05
    done
    kill -KILL $pid 2>/dev/null
    wait $pid 2>/dev/null
    [[ $? == "$1" ]]
}
saved_last_step() {
    local step
    step=$(sed -n '$s/.*"step":\([0-9]*\),.*/\1/p' run/log.jsonl)
    [[ -d $(printf 'run/step-%06d' "$step") ]] && out_says "saved as run/step-"
}

for signal in HUP INT TERM USR1 USR2 XCPU; do
    # shellcheck disable=SC2086
    begin $endless
    kill -$signal $pid
    kill -$signal $pid 2>/dev/null # repeated
    check "$signal: 130" ends_with 130
    check "$signal: the last step is saved" saved_last_step
    check "$signal: out_says how to continue" out_says "continue with:"
done

# A step of 2,000 micro-batches is abandoned, and repeated with the same bits.
long="$small -d 64000 -x 3"
# shellcheck disable=SC2086
"$program" $long -o whole >/dev/null 2>&1
# shellcheck disable=SC2086
begin $long --save-every 0
kill -TERM $pid
check "between micro-batches: 130" ends_with 130
check "between micro-batches: the last complete step is saved" saved_last_step
check "the abandoned step is repeated" "$program" -o run -y >/dev/null 2>&1
check "with the same bits" cmp -s whole/step-000003/model.safetensors run/step-000003/model.safetensors
check "and moments" cmp -s whole/step-000003/optimizer.safetensors run/step-000003/optimizer.safetensors

# In the first step, the start itself is saved.
rm -rf run
# shellcheck disable=SC2086
"$program" $small -d 3200000 -x 3 -o run >out 2>&1 &
pid=$!
until [[ -s run/run.json ]]; do sleep 0.05; done
sleep 0.3
kill -INT $pid
check "in the first step: 130" ends_with 130
check "in the first step: saved" test -d run/step-000000

# An endless validation is abandoned.
rm -rf run
# shellcheck disable=SC2086
"$program" ${small/--val-tokens 64 -v 0/--val-tokens 100M -v 1} -x 3 -o run >out 2>&1 &
pid=$!
until [[ -s run/run.json ]]; do sleep 0.05; done
sleep 0.5
kill -TERM $pid
check "in a validation: 130" ends_with 130
check "in a validation: saved" saved_last_step

# A pipe whose reader ended, and a full disk.
rm -rf run
# shellcheck disable=SC2086
(
    "$program" $endless -o run 2>out
    echo $? >status
) | sed '/^step 1\//q' >/dev/null
check "a closed pipe: an error" test "$(cat status)" = 1
check "a closed pipe: out_says so" out_says "cannot write to the standard output: Broken pipe. Step"
check "a closed pipe: saved" test -n "$(ls -d run/step-* 2>/dev/null)"
fails() { # SENTENCE COMMAND...: status 1
    local sentence=$1 status=0
    shift
    "$@" 2>out || status=$?
    [[ $status == 1 ]] && out_says "$sentence"
}
ev="-t 16 -b 2 --val-tokens 64 --threads 1"
cp -r whole one
if [[ -c /dev/full ]]; then
    lost="cannot write to the standard output"
    # shellcheck disable=SC2086
    full() { fails "$lost" "$program" "$@" >/dev/full; }
    for command in "--help" "--version" "eval whole $ev" "sample whole -g 4 --threads 1" \
        "bench -m tiny -b 1 -t 8 -x 1 --json --threads 1" "$small -x 1 --dry-run" \
        "$small -x 1 -o never" "export whole exported" "probe whole -t 16 -b 2 --threads 1 --probes variance --probe-tokens 32"; do
        # shellcheck disable=SC2086
        check "/dev/full: $command" full $command
    done
    check "/dev/full: no run is started" test ! -e never
else
    skip "a full output: there is no /dev/full"
fi
# shellcheck disable=SC2086
closed() { fails "cannot write to the standard output" "$program" eval whole $ev >&-; }
check "a closed standard output" closed

# A limit on the size of files.
# shellcheck disable=SC2086
limited() { (ulimit -f 20 && exec "$program" $small -x 4 -o limited >/dev/null); }
check "a limit on a file's size" fails "File too large" limited

# Data that shrinks.
if [[ -x $OLDPWD/data/tokenize ]]; then
    head -c 200000 /dev/zero | tr '\0' 'a' >text
    "$OLDPWD/data/tokenize" -q --threads 1 -o data text 2>/dev/null
    # shellcheck disable=SC2086
    begin $endless -i 'data_train_*.bin'
    truncate -s 2000 data_train_000000.bin
    check "a shard that shrinks: an error" ends_with 1
    check "a shard that shrinks: named" out_says "train_gpt: data_train_000000.bin became shorter"
    check "a shard that shrinks: saved" out_says "is saved as run/step-"
else
    skip "a shard that shrinks: data/tokenize is not built"
fi

# A directory that disappears.
# shellcheck disable=SC2086
begin $endless
mv run moved
for _ in $(seq 200); do
    out_says "WARNING: run was removed" && break
    sleep 0.05
done
check "a renamed directory is reported at once" out_says "WARNING: run was removed, renamed or unmounted"
kill -TERM $pid
check "but still written" ends_with 130
check "under its name" test -n "$(ls -d run/step-* 2>/dev/null)"
rm -rf moved

# Links, FIFOs.
echo precious >victim
mkdir linked
ln -s ../victim linked/lock
# shellcheck disable=SC2086
check "a lock that is a link" fails "symbolic link" "$program" $small -x 1 -o linked >/dev/null
check "is not followed" test "$(cat victim)" = precious
mkfifo fifo
(timeout 20 cat fifo >received) &
# shellcheck disable=SC2086
timeout 20 "$program" $small --dump-state fifo >out 2>&1
wait $!
check "--dump-state into a FIFO" test -p fifo -a -s received
ln -s target link
# shellcheck disable=SC2086
"$program" $small --dump-state link >out 2>&1
check "--dump-state through a link" test -L link -a -s target
ln -s nowhere link2
check "export does not replace a link" fails "symbolic link" "$program" export whole link2 >/dev/null
mkdir real
ln -s real linked-run
# shellcheck disable=SC2086
check "-o a link to a directory" "$program" $small -x 1 -o linked-run >/dev/null
check "which remains a link" test -L linked-run -a -s real/log.jsonl

# A run is locked before anything in it is read.
# shellcheck disable=SC2086
begin $endless
echo damaged >run/run.json
check "the lock comes first" fails "another run" "$program" -y -o run >/dev/null
kill -TERM $pid
ends_with 130

summary
