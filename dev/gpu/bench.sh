#!/bin/bash
# Times training on this machine's GPU, and PyTorch if a Python has it:
#
#     dev/gpu/bench.sh [DIRECTORY [MINUTES]]     default: build/gpu, 10 minutes
#
# Writes to DIRECTORY the results of `make bench DEVICE=cuda QUICK=1`, or with more than 15 minutes
# of the full benchmark (about an hour), and then profiles of a step. BENCH_TORCH names the Python.
cd "$(dirname "$0")/../.." || exit 1
. dev/gpu/common.sh
minutes=${2:-10}
begin "${1:-build/gpu}" "$minutes"

need gpu 30 nvidia-smi
build train_gpt
flags=(--out "$out/bench-cuda.json")
((minutes > 15)) || flags+=(--quick)
(($(left) > 240)) && reserve=90 || reserve=30
step bench $(($(left) - reserve + 60)) python3 dev/bench/bench_gpu.py "${flags[@]}" \
    --minutes "$(awk "BEGIN { print ($(left) - $reserve) / 60 }")"
cat "$out/bench.log"
for model in gpt2-124m llama-130m llama-1b; do
    step "profile-$model" 60 ./train_gpt bench --device cuda -m $model -b 0 -t 1024 --steps 5 --profile
done
# Attention by mma, to compare with wgmma.
step profile-mma 60 env LNS_ATTENTION=mma ./train_gpt bench --device cuda -m llama-130m -b 0 \
    -t 1024 --steps 5 --profile
step clocks 10 nvidia-smi -q -d CLOCK,POWER,TEMPERATURE
