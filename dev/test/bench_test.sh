#!/bin/bash
# What dev/bench/bench.py runs, compares and writes, with a fake train_gpt and PyTorch.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
command -v python3 >/dev/null || skip_all "dev/bench/bench.py is not tested: there is no python3 (make deps)"

# 1000 tokens/s on two threads, 500 on one, and no bf16 for tiny.
cat >"$dir/train_gpt" <<'END'
#!/bin/bash
echo "$*" >>"${0%/*}/ours.log"
while [[ $1 ]]; do
    case $1 in -m) model=$2 ;; --dtype) dtype=$2 ;; --threads) threads=$2 ;; esac
    shift
done
[[ $model$dtype == tinybf16 ]] && echo "train_gpt: no bf16 here" >&2 && exit 1
cat <<JSON
{"tokens_per_s": $((threads * 500)), "flops_per_token": 1e6, "peak_memory": 1073741824, "parameters": 124, "cpu": "x", "version": "1", "config": {"model_type": "gpt2"}, "peak_flops": {"float32": 2e9, "bf16": 4e9}, "bandwidth": {"read": 1e9, "write": 1e9, "update": 1e9}}
JSON
END
# 500 tokens/s, "pure" 800, unpinned half of that; another model than ours in bf16.
cat >"$dir/python" <<'END'
#!/bin/bash
[[ $1 == -c ]] && echo '{"version": "2.9.1", "config": "", "blas": [], "threads": 2}' && exit
echo "$OMP_PROC_BIND $*" >>"${0%/*}/torch.log"
speed=500 parameters=124
[[ $* == *"--mode pure "* ]] && speed=800 parameters=125
[[ $OMP_PROC_BIND ]] || ((speed /= 2))
[[ $* == *"--mode autocast "* ]] && echo "RuntimeError: it cannot" >&2 && exit 1
echo "{\"tokens_per_s\": $speed, \"parameters\": $parameters, \"median_seconds\": 1, \"peak_memory\": 1073741824}"
END
chmod +x "$dir/train_gpt" "$dir/python"
bench() { python3 dev/bench/bench.py --program "$dir/train_gpt" --torch "$dir/python" --out "$dir/b.json" "$@" 2>&1; }
value() { python3 -c "import json, sys; b = json.load(open('$dir/b.json')); print($1)"; }

out=$(bench --only gpt2-124m:4x512,tiny)
check "it succeeds" test $? -eq 0
check "the ratio is of medians" says "$out" "2.00x"
check "bf16 is compared with the best mode" says "$out" "1.25x"
check "a different model is reported" says "$out" "NOT THE SAME MODEL: 125 parameters, not 124"
check "a failing mode is reported" says "$out" "RuntimeError: it cannot"
check "an unsupported dtype is reported" says "$out" "no bf16 here"
check "bars are judged" says "$out" "2 threads over 1"
check "MFU is of the dtype's peak" test "$(value "b['cases'][1]['mfu']")" = 0.25
check "2 threads over 1" test "$(value "[r['measured'] for r in b['bars'] if 'over 1' in r['what']]")" = "['2', '2']"
check "all cases are written" test "$(value "len(b['cases'])")" = 8
check "three rounds" test "$(value "len(b['cases'][0]['runs'])")" = 3
check "PyTorch runs on 2 threads only" test "$(grep -c -- '--threads 1' "$dir/torch.log")" = 0
check "unpinned once a dtype" test "$(grep -c '^ ' "$dir/torch.log")" = 2
bench --only gpt2-124m:4x64:float32 --torch none --rounds 2 >/dev/null
check "without PyTorch" test "$(value "b['cases'][0]['torch']")" = "{}"
check "cases without a bar run once" test "$(value "len(b['cases'][0]['runs'])")" = 1
out=$(bench --only gpt3)
check "nothing selected is an error" test $? -eq 1
check "and lists what exists" says "$out" "llama-130m:16x256"
out=$(bench --torch "$dir/none")
check "a missing PyTorch is an error" says "$out" "no PyTorch that works"

summary
