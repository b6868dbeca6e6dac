#!/bin/bash
# The PyTorch reference (dev/reference): checks itself, then models of train_gpt that are not among
# its fixtures.
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
check() { # NAME COMMAND...: passes if the command does
    local output
    if output=$("${@:2}" 2>&1); then
        ((passed++))
        echo "  ok   $1"
    else
        ((failed++))
        echo "  FAIL $1: $(tail -5 <<<"$output")"
    fi
}
check "the reference's gradients" python3 dev/reference/check_model.py
for scheme in $(./train_gpt schemes --format names) mix:1 sandwich+gpas; do
    ./train_gpt --dump-state "$dir/state.safetensors" --layers 3 --width 24 --heads 3 -n "$scheme" -b 2 -t 16 \
        --dtype float32 --device cpu --threads 1 >/dev/null
    check "train_gpt's own model under $scheme" python3 dev/reference/compare.py "$dir/state.safetensors"
done
echo "$passed passed, $failed failed"
((failed == 0))
