#!/bin/bash
# Fine-tuning from a user's side: data/tokenize --instructions, --epochs, chat, scripts/finetune.sh.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
[[ -x train_gpt && -x data/tokenize ]] || skip_all "fine-tuning is not tested: ./train_gpt or data/tokenize is missing"
program() { CUDA_VISIBLE_DEVICES='' ./train_gpt "$@" --device cpu --threads 1; }
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=''

for ((i = 0; i < 40; i++)); do
    echo "{\"instruction\": \"Say $i.\", \"input\": \"\", \"output\": \"It is $i.\"}"
done >"$dir/i.jsonl"
out=$(data/tokenize --instructions "$dir/i.jsonl" --template chatml --seq-len 96 -o "$dir/sft")
check "tokenize: the summary" says "$out" "40 examples by the template chatml"
check "tokenize: a mask beside each shard" test -s "$dir/sft_train_000000.mask" -a -s "$dir/sft_val_000000.mask"
check "tokenize: the template is stored" grep -q im_start "$dir/sft_tokenizer/chat_template.jinja"
check "verify: shards with masks" ./train_gpt verify "$dir"/sft_train_000000.bin >/dev/null

bad() { # LINE SENTENCE...: is refused, and nothing is written
    local said status=0
    { head -2 "$dir/i.jsonl" && echo "$1"; } >"$dir/bad.jsonl"
    said=$(data/tokenize --instructions "$dir/bad.jsonl" -o "$dir/bad" 2>&1) || status=$?
    for part in "${@:2}"; do says "$said" "$part" || status=0; done
    [[ $status == 1 && ! -e $dir/bad_train_000000.bin ]] || { echo "$said" && return 1; }
}
check "a broken line" bad '{"instruction": "a" "output": "b"}' "bad.jsonl, line 3" "column 28"
check "a missing field" bad '{"instruction": "a"}' "bad.jsonl, line 3" "no field 'output'"
check "no answer" bad '{"messages": [{"role": "user", "content": "a"}]}' "line 3" "has no answer"
{ cat "$dir/i.jsonl" && echo '{"prompt": "a", "completion": ""}' && printf '{"prompt": "a", "completion": "%0200d"}\n' 0; } >"$dir/odd.jsonl"
out=$(data/tokenize --instructions "$dir/odd.jsonl" --template plain --seq-len 96 -o "$dir/odd" 2>&1)
check "an empty answer is told" says "$out" "left out, as their answer is empty: 1 example (the first: $dir/odd.jsonl, line 41)"
check "a long answer is told" says "$out" "cut to 96 tokens: 1 example (the first: $dir/odd.jsonl, line 42)"

# Fine-tuning resumes to the bit.
model=(--layers 2 --width 32 --heads 2 --positions 1024 -b 2)
program -n lns "${model[@]}" -t 64 -x 3 -v 0 -g 0 -o "$dir/base" >/dev/null
tune() { program --init-from "$dir/base" -i "$dir/sft_train_*.bin" -b 2 -v 0 -g 0 --val-tokens 96 "$@"; }
out=$(tune --epochs 1 -o "$dir/whole")
check "--epochs: every window once" says "$out" "step 19/19"
tune --epochs 1 --save-every 10 --keep 0 -o "$dir/cut" >/dev/null
rm -rf "$dir/cut/step-000019"
program -o "$dir/cut" -y >/dev/null
check "resumed: the same weights" cmp "$dir"/{whole,cut}/step-000019/model.safetensors
data/tokenize -q --instructions "$dir/i.jsonl" --template chatml --seq-len 80 -o "$dir/other"
check "resumed: windows of another length" says \
    "$(program -o "$dir/cut" -y -x 25 -i "$dir/other_train_*.bin" 2>&1)" "sequences of 96 tokens do not match"
out=$(tune --recipe paper-sft -x 5 -o "$dir/recipe")
check "--recipe paper-sft: layers" says "$out" "2 of 2 layers at a time, drawn anew every 3 steps"
check "--recipe paper-sft: schedule" says "$out" "linear, peak 0.0003 after 0 steps of warmup, 0 at the end"
check "--epochs and --steps" says "$(tune --epochs 1 -x 3 -o "$dir/no" 2>&1)" "give one"
check "the checkpoint has the template" cmp "$dir/whole/step-000019/chat_template.jinja" "$dir/sft_tokenizer/chat_template.jinja"

# Chat
out=$(printf 'Say 3.\n\n/clear\nSay 4.\n' | program chat "$dir/whole" -g 8 --temperature 0)
check "chat: an answer each" test "$(wc -l <<<"$out")" -ge 2
check "chat: the same each time" test "$out" == "$(printf 'Say 3.\nSay 4.\n' | sed '1a /clear' | program chat "$dir/whole" -g 8 --temperature 0)"
check "chat: a base model has no template" says "$(program chat "$dir/base" 2>&1 </dev/null)" "has no chat template"
check "chat: unknown template" says "$(program chat "$dir/base" --template nope 2>&1 </dev/null)" "there is no chat template 'nope'"
check "chat: a line that is too long" says "$(printf '%02000d\n' 0 | program chat "$dir/whole" -g 8 2>&1)" "the conversation holds 96"

# The whole way
finetune() { scripts/finetune.sh "$dir/base" --data "$dir/i.jsonl" --task-data dev/test/fixtures/tasks --limit 2 -o "$dir/ft" -- -x 3 -b 2 -v 0 --val-tokens 512; }
out=$(finetune 2>&1)
check "finetune.sh: a table of both" says "$out" "difference"
check "finetune.sh: in a file, too" grep -q '^boolq  ' "$dir/ft/table.txt"
check "finetune.sh: a second call only prints" silent_on "$(finetune 2>&1)" "scoring"
summary
