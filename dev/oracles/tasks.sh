#!/bin/bash
# eval --tasks, compared with lm-evaluation-harness on the fixtures and a tiny model (`make test-oracles`).
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
./train_gpt -n lns -x 20 -o "$dir/run" --layers 2 --width 32 --heads 2 --positions 512 -t 64 -b 8 -v 0 -s 0 -g 0 \
    --dtype float32 --device cpu >/dev/null && ./train_gpt export "$dir/run" "$dir/model" >/dev/null || exit 1
if python3 dev/oracles/tasks.py "$dir/model" dev/test/fixtures/tasks \
    hellaswag,piqa,arc_easy,arc_challenge,boolq,openbookqa,winogrande,mmlu_anatomy 2>"$dir/errors"; then
    echo "1 passed, 0 failed"
else
    tail -5 "$dir/errors"
    echo "0 passed, 1 failed"
    exit 1
fi
