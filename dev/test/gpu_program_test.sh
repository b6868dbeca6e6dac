#!/bin/bash
# The program on a (simulated) GPU, as a user runs it: choosing the device, training, resuming,
# sampling, insufficient memory, ranks.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
[[ -x train_gpt_sim ]] || skip_all "the program on a GPU is not tested: train_gpt_sim is not built"
export LNS_CACHE=$dir/cache # the chosen matmul algorithms, which determine the bits
gpu() { ./train_gpt_sim "$@" 2>&1; }
last() { python3 -c "import json, sys; print(json.loads(open('$1/log.jsonl').readlines()[-1])['$2'])"; }
near() { awk "BEGIN { exit !(($1 - $2)^2 < $3^2) }"; }
small=(--threads 1 --layers 2 --width 16 --heads 2 -b 2 -t 16 --val-tokens 64 -v 0 -s 0 -g 4)

out=$(gpu "${small[@]}" --dry-run)
check "a GPU is used where there is one" says "$out" "GPU        simulated GPU"
check "in bf16" says "$out" "precision  bf16,"
check "its memory is planned" says "$out" "of the GPU's: parameters"
out=$(gpu "${small[@]}" --dry-run --dtype bf16 --master-weights no --moments bf16)
check "pure bf16 has gradients in bf16" says "$out" "bf16 gradients"
out=$(gpu "${small[@]}" --dry-run --dtype bf16 --master-weights no --gradients float32)
check "unless told otherwise" test "$(grep -c "bf16 gradients" <<<"$out")" = 0
check "no float32 model has them" says "$(gpu --dtype float32 --gradients bf16)" "--gradients bf16"
check "a CPU is used if requested" test "$(gpu "${small[@]}" --dry-run --device cpu | grep -c GPU)" = 0
out=$(LNS_SIM_ARCH=0 gpu "${small[@]}" --dry-run)
check "the CPU is used if there is no GPU" says "$out" "not on a GPU: there is no NVIDIA driver here"
out=$(LNS_SIM_ARCH=0 gpu --device cuda)
check "a requested GPU that is missing is an error" says "$out" "train_gpt: --device cuda: there is no"
out=$(LNS_SIM_MEMORY=600M gpu bench -m llama-9m -b 64 -t 256)
check "too little memory is explained" says "$out" " of 600 MiB free"
check "with advice on what would fit" grep -qE "try --batch [0-9]+, or (--batch [0-9]+ with )?--recompute" <<<"$out"

for way in mixed pure muon float32; do
    case $way in
    mixed) flags=(--dtype bf16) ;;
    pure) flags=(--dtype bf16 --master-weights no --moments bf16 --rounding stochastic --lisa 1) ;;
    muon) flags=(--dtype bf16 --moments bf16 --rounding stochastic --optimizer muon --normuon --lisa 1) ;;
    float32) flags=(--dtype float32 --recompute layers) ;;
    esac
    gpu "${small[@]}" -d 64 -x 4 --save-every 2 --keep 0 "${flags[@]}" -o "$dir/$way" >/dev/null
    check "$way trains" test -e "$dir/$way/step-000004/model.safetensors"
    cp -r "$dir/$way" "$dir/again" && rm -r "$dir/again/step-000004"
    gpu -y -o "$dir/again" >/dev/null
    for file in model optimizer; do
        check "$way resumes bit for bit: $file" cmp "$dir/$way/step-000004/$file.safetensors" \
            "$dir/again/step-000004/$file.safetensors"
    done
    rm -rf "$dir/again"
done
cp -r "$dir/float32" "$dir/cpu" && rm -r "$dir/cpu/step-000004"
gpu -y -o "$dir/cpu" --device cpu >/dev/null
check "a CPU resumes a GPU's run" near "$(last "$dir/cpu" val_loss)" \
    "$(last "$dir/float32" val_loss)" 1e-3
check "a CPU samples the same as a GPU" test \
    "$(gpu sample "$dir/float32" -g 12 --device cuda --prompt One --temperature 0)" = \
    "$(gpu sample "$dir/float32" -g 12 --device cpu --prompt One --temperature 0)"
loss() { gpu eval "$dir/float32" --device "$1" --val-tokens 128 -b 2 -t 16 | awk '{ print $2 }'; }
check "and measures the same loss" near "$(loss cuda)" "$(loss cpu)" 1e-4

out=$(gpu "${small[@]}" -x 9 --overfit-batch --lr 1e30 --grad-clip 0 -o "$dir/broken")
check "non-finite values end the run" says "$out" "not finite; the first tensor that is not"
check "before they are saved" test ! -e "$dir/broken/step-000009"
out=$(gpu bench --json -b 1 -t 8 --steps 1 --profile | python3 -c 'import json, sys; b = json.load(sys.stdin); print(b["gpu"], b["device"], b["peak_memory"] >= b["model_memory"] > 1e6, len(b["profile"]) > 10, all(p > 0 for p in b["peak_flops"].values()))')
check "bench measures the GPU" test "$out" = "simulated GPU cuda True True True"

# A step abandoned between micro-batches is repeated with the same bits.
long=("${small[@]}" -d 1024 -x 2)
gpu "${long[@]}" -o "$dir/whole" >/dev/null
./train_gpt_sim "${long[@]}" --save-every 0 -o "$dir/stopped" >/dev/null 2>&1 &
pid=$!
while [[ ! -s $dir/stopped/log.jsonl ]] && kill -0 $pid; do sleep 0.02; done
kill -TERM $pid
wait $pid
check "a signal between micro-batches saves" test $? = 130 -a -d "$dir/stopped/step-000001"
gpu -o "$dir/stopped" -y >/dev/null
for file in model optimizer; do
    check "the abandoned step is repeated: $file" cmp -s \
        "$dir/whole/step-000002/$file.safetensors" "$dir/stopped/step-000002/$file.safetensors"
done

# Two ranks with a GPU each, and with one for both.
if command -v mpirun >/dev/null && says "$(gpu --version)" "MPI: Open MPI"; then
    root=''
    [[ $(id -u) == 0 ]] && root=--allow-run-as-root
    # shellcheck disable=SC2086
    two() { mpirun $root --oversubscribe -np 2 ./train_gpt_sim "$@" 2>&1; }
    out=$(two "${small[@]}" -x 1 -o "$dir/shared")
    check "ranks do not share a GPU" says "$out" "would share a GPU"
    export LNS_SIM_GPUS=2
    if says "$(gpu "${small[@]}" --dry-run)" "of 0 to 1"; then
        two "${small[@]}" --dtype float32 -b 1 -d 64 -x 4 -o "$dir/two" >/dev/null
        check "two ranks train like one" near "$(last "$dir/two" val_loss)" \
            "$(last "$dir/float32" val_loss)" 1e-4
    else
        skip "two ranks with a GPU each: this simulator has one"
    fi
else
    skip "ranks with a GPU each: there is no mpirun, or this build has no MPI"
fi

summary
