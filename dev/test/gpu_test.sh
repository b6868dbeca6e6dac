#!/bin/bash
# dev/gpu/*.sh and dev/bench/bench_gpu.py on a fake GPU machine: what they run, when they give up,
# what they report.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
command -v python3 >/dev/null || skip_all "dev/bench/bench_gpu.py is not tested: there is no python3 (make deps)"

mkdir -p "$dir/tree/dev" "$dir/bin"
cp -r dev/gpu dev/bench "$dir/tree/dev/"
cd "$dir/tree" || exit 1
play() { # FILE SCRIPT
    printf '#!/bin/bash\n%s\n' "$2" >"$1" && chmod +x "$1"
}
play "$dir/bin/nvidia-smi" 'echo 9.0'
play "$dir/bin/make" 'echo "$*" >>make.log'
# A million tokens/s at 55% MFU, and no memory for llama-350m. Checkpoints contain their step.
# shellcheck disable=SC2016
play train_gpt 'echo "$*" >>ours.log
while [[ $1 ]]; do
    case $1 in -m) m=$2 ;; -b) b=$2 ;; -o) o=$2 ;; --json) json=1 ;; --profile) profile=1 ;; esac
    shift
done
if [[ $o ]]; then
    for s in 10 20; do
        mkdir -p "$o/step-0000$s"
        for f in model optimizer; do echo "$s" >"$o/step-0000$s/$f.safetensors"; done
    done
    [[ $o == *pure-again* ]] && echo other >"$o/step-000020/model.safetensors"
    echo "{}" >"$o/log.jsonl"
fi
[[ $m == llama-350m ]] && echo "train_gpt: there is no room" >&2 && exit 1
[[ $json ]] || exit 0
[[ $b == 0 ]] && b=64
p=null
[[ $profile ]] && p="[{\"part\": \"attention\", \"group\": \"forward\", \"calls\": 10, \"seconds\": 1e-3, \"flops\": 3e11, \"bytes\": 1e6}, {\"part\": \"junctions\", \"group\": \"forward\", \"calls\": 10, \"seconds\": 1e-3, \"flops\": 0, \"bytes\": 2.7e9}]"
echo "{\"tokens_per_s\": 1000000, \"batch\": $b, \"mfu\": 0.55, \"mfu_measured\": 0.7, \"gpu\": \"a GPU\", \"data_sheet_flops\": 1e15, \"peak_memory\": 1073741824, \"parameters\": 124, \"config\": {}, \"peak_flops\": {\"float32\": 5e13, \"bf16\": 8e14}, \"bandwidth\": {\"read\": 3e12, \"write\": 3e12, \"update\": 3e12}, \"profile\": $p}"'
play test_gpt 'echo "3 passed, 0 failed"'
play "$dir/bin/compute-sanitizer" '[[ $* == *racecheck* ]] && exit 9; true'
# Half as fast as ours; no more than 32 sequences fit.
# shellcheck disable=SC2016
play "$dir/bin/python" '[[ $* == *__config__* ]] && echo "{\"version\": \"2.9.1\", \"config\": \"\", \"blas\": []}"
[[ $1 == -c ]] && exit
case $* in
*torch_attention*) echo "{\"1024\": {\"flash\": {\"forward\": 6e-5, \"backward\": 1}, \"cudnn\": {\"error\": \"no\"}}}" ;;
*"--batch 64"*) echo "torch.OutOfMemoryError: CUDA out of memory." >&2; exit 1 ;;
*) echo "{\"tokens_per_s\": 500000, \"mode\": \"compile\", \"parameters\": 124, \"peak_memory\": 1073741824}" ;;
esac'

PATH=$dir/bin:$PATH
out=$(dev/gpu/check.sh "$dir/out" 2>&1)
check "a failure is a failure" test $? -eq 1
check "it builds for this GPU alone" says "$(cat make.log)" "CUDA_ARCH=sm_90a train_gpt test_gpt"
check "passed checks are reported" says "$out" "ok    same-mixed-model"
check "bits that differ are found" says "$out" "FAIL  same-pure-model: exit status 1"
check "a race is found" says "$out" "FAIL  racecheck-gpt2: exit status 9"
check "the rest continues" says "$out" "ok    initcheck-llama"
check "the summary comes last" test "$(tail -1 <<<"$out")" = FAILED
check "and in a file" says "$(cat "$dir/out/summary.txt")" "ok    train-cpu"
play "$dir/bin/make" 'echo "error: no"; exit 2'
out=$(dev/gpu/check.sh "$dir/out" 2>&1)
check "without a build nothing runs" test "$(grep -c . "$dir/out/summary.txt")" = 2
check "and its errors are shown" says "$out" "error: no"
play "$dir/bin/make" ''
play test_gpt 'sleep 60'
out=$(bash -c '. dev/gpu/common.sh; begin "$1" 1; step slow 5 ./test_gpt; deadline=0; step late 5 true' - "$dir/out")
check "a hanging check is killed" says "$out" "FAIL  slow: not done after 5 s"
check "checks without time are reported" says "$out" "skip  late: no time left"

out=$(BENCH_TORCH=$dir/bin/python dev/gpu/bench.sh "$dir/out" 10 2>&1)
check "the benchmark succeeds" test $? -eq 0
check "its table is shown" says "$out" "2.00x"
check "PyTorch's batch is halved until it fits" says "$out" "(32 sequences: more do not fit)"
check "MFU is judged" grep -qE "MFU of llama-1b at 1024 +0.60 +0.550 +not met" <<<"$out"
check "attention is judged" grep -qE "attention forward of 1024 against SDPA +0.90 +0.600 +not met" <<<"$out"
check "parts are judged" grep -qE "junction, of its limit +0.85 +0.900 +met" <<<"$out"
check "profiles follow" says "$out" "ok    profile-llama-1b"
out=$(dev/bench/bench_gpu.py --torch none --out "$dir/b.json" --only llama-350m,gpt2-124m:256 2>&1)
check "a model that does not fit is reported" says "$out" "there is no room"
check "the paper's batch is timed" says "$(cat ours.log)" "-m gpt2-124m -t 256 -b 512"
check "all cases are written" test "$(python3 -c "import json; print(len(json.load(open('$dir/b.json'))['cases']))")" = 8

summary
