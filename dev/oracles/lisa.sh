#!/bin/bash
# Training with LISA, compared with PyTorch (`make test-oracles`).
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
failed=0
for arch in llama gpt2; do
    flags=(--dtype float32 --device cpu --threads 1 -b 2 -t 16 -v 0 -g 0 --val-tokens 16)
    ./train_gpt --arch $arch -n pre --layers 5 --width 24 --heads 3 -x 20 "${flags[@]}" -o "$dir/base" >/dev/null
    tune=(./train_gpt --init-from "$dir/base" --lisa 2 --lisa-interval 3 -x 14 -l 1e-3 "${flags[@]}")
    "${tune[@]}" --dump-state "$dir/state.safetensors" >/dev/null
    "${tune[@]}" --overfit-batch -o "$dir/run" >/dev/null
    HF_HUB_OFFLINE=1 python3 dev/oracles/lisa.py "$dir/base/step-000020" "$dir/state.safetensors" "$dir/run" || failed=1
    rm -rf "${dir:?}"/*
done
exit $failed
