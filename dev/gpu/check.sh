#!/bin/bash
# Checks the CUDA model on a machine with a GPU, in at most ten minutes:
#
#     dev/gpu/check.sh [DIRECTORY]     for logs and summary.txt; default: build/gpu
#
# Builds, runs test_gpt's GPU rows, checks that resumed training is the same bit for bit, and runs
# compute-sanitizer, which slows kernels a hundredfold, on two models. Exits 0 if everything passed.
cd "$(dirname "$0")/../.." || exit 1
. dev/gpu/common.sh
begin "${1:-build/gpu}" 10

need gpu 30 nvidia-smi
build train_gpt test_gpt
need program 60 ./train_gpt bench --device cuda -m llama-9m -b 8 -t 256 --steps 3 --profile

step test_gpt 240 ./test_gpt -k "cuda: "
note "      $(tail -n 1 "$out/test_gpt.log")"
step test_gpt-mma 120 env LNS_ATTENTION=mma ./test_gpt -k "cuda: llama C="

# Resume runs from the checkpoint in their middle and compare the results.
run() { # NAME FLAGS…
    local name=$1
    shift
    step "train-$name" 60 ./train_gpt --device cuda -o "$out/run-$name" "$@"
}
model=(-m llama-9m -b 8 -t 128 --total-batch 2048 --val-tokens 4096 -v 0 -s 0 -g 16 -x 20
    --save-every 10 --keep 0)
rm -rf "$out"/run-*
for way in mixed pure float32; do
    case $way in
    mixed) flags=(--dtype bf16) ;;
    pure) flags=(--dtype bf16 --master-weights no --moments bf16 --rounding stochastic) ;;
    float32) flags=(--dtype float32 --recompute layers) ;;
    esac
    run $way "${model[@]}" "${flags[@]}" || continue
    cp -r "$out/run-$way" "$out/run-$way-again"
    rm -r "$out/run-$way-again/step-000020"
    run $way-again -y || continue
    for file in model optimizer; do
        step "same-$way-$file" 10 cmp "$out/run-$way/step-000020/$file.safetensors" \
            "$out/run-$way-again/step-000020/$file.safetensors"
    done
done
# A CPU resumes a GPU's run.
if cp -r "$out/run-mixed" "$out/run-cpu" && rm -r "$out/run-cpu/step-000020"; then
    step train-cpu 60 ./train_gpt --device cpu -o "$out/run-cpu" -y
    note "      on the GPU: $(tail -n 1 "$out/run-mixed/log.jsonl" | cut -c1-60)"
    note "      on the CPU: $(tail -n 1 "$out/run-cpu/log.jsonl" | cut -c1-60)"
fi
rm -rf "$out"/run-*

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [[ -z $sanitizer ]]; then
    note "skip  compute-sanitizer: not found (it comes with the CUDA toolkit)"
    exit
fi
sanitize() { # TOOL ROWS
    step "$1-${2%% *}" 90 "$sanitizer" --tool "$1" --error-exitcode 9 ./test_gpt -k "cuda: $2"
}
for rows in "llama  lns" "gpt2  pre"; do sanitize memcheck "$rows"; done
for tool in synccheck initcheck; do sanitize $tool "llama  lns"; done
# racecheck is slower than the rest: 16 s for a row.
for row in "llama  lns+gpas" "gpt2  pre+gpas"; do sanitize racecheck "$row"; done
