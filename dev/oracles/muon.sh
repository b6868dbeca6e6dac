#!/bin/bash
# Training with Muon, compared with PyTorch (`make test-oracles`).
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
failed=0
muon=(--optimizer muon)
# Where an update is nearly 0, float32 may decide otherwise: a small decay keeps that below 1e-5.
cautious=(--cautious-decay --weight-decay 0.01)
tune() { # its name and flags
    local name=$1
    shift
    ./train_gpt --init-from "$dir/base" -x 20 -l 3e-3 --eps 1e-5 --overfit-batch "${flags[@]}" "$@" -o "$dir/runs/$name" >/dev/null
}
for arch in llama gpt2; do
    flags=(--dtype float32 --device cpu --threads 1 -b 2 -t 16 -v 0 -g 0 --val-tokens 16)
    size=(--layers 3 --width 24 --heads 3)
    [[ $arch = llama ]] && size+=(--kv-heads 1)
    ./train_gpt --arch $arch -n pre "${size[@]}" -x 20 "${flags[@]}" -o "$dir/base" >/dev/null
    ./train_gpt --init-from "$dir/base" "${flags[@]}" -x 0 --dump-state "$dir/state.safetensors" >/dev/null
    mkdir "$dir/runs"
    tune moonlight "${muon[@]}"
    tune jordan "${muon[@]}" --muon-scale jordan --muon-lr 0.01
    tune polar-express "${muon[@]}" --orthogonalize polar-express "${cautious[@]}"
    tune normuon "${muon[@]}" --normuon --momentum 0.9
    tune normuon-jordan "${muon[@]}" --normuon --muon-scale jordan --muon-lr 0.01 "${cautious[@]}"
    tune adamw "${cautious[@]}"
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python3 dev/oracles/muon.py "$dir/base/step-000020" "$dir/state.safetensors" "$dir/runs"/* || failed=1
    rm -rf "${dir:?}"/*
done
exit $failed
