#!/bin/bash
# dev/fuzz/seeds.sh DIR: fills DIR/TARGET with initial inputs from the program's output and the
# tests' fixtures.
set -eu
dir=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fixtures=dev/test/fixtures/tokenizers

seed() { # TARGET NAME: stores standard input
    mkdir -p "$dir/$1"
    cat >"$dir/$1/$2"
}
join() { # FILE FILE: one input for targets that take two files
    cat "$1"
    printf '\xff'
    cat "$2"
}

small=(--layers 1 --positions 8 --width 8 --heads 2 -t 8 -b 1 -d 8 -g 0 -v 1 --val-tokens 8 --threads 1 --dtype float32
    --device cpu)
for arch in llama gpt2; do
    ./train_gpt --arch $arch "${small[@]}" -n lns -x 1 --save-every 1 -o "$work/$arch" >/dev/null
    step=$work/$arch/step-000001
    seed config $arch <"$step/config.json"
    seed checksums $arch <"$step/checksums.json"
    seed json $arch <"$step/config.json"
    seed state $arch <"$step/trainer_state.json"
    head -c 100000 "$step/model.safetensors" | seed safetensors $arch
    join "$work/$arch/run.json" "$work/$arch/log.jsonl" | seed run $arch
done
seed config mix <<<'{"model_type": "lns-llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9, "max_position_embeddings": 8, "rms_norm_eps": 1e-6, "norm_scheme": "mix:1+gpas"}'
seed json deep <<<'[[[[{"a": [1, -2.5e3, true, null, "\u00e9\n"]}]]]]'
seed index two <<<'{"metadata": {"total_size": 32}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
for dtype in F64 F16 BF16 I64 BOOL; do
    text="{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"$dtype\",\"shape\":[0,3],\"data_offsets\":[0,0]}}"
    # shellcheck disable=SC2059 # the length is the format
    { printf "\\x$(printf %x ${#text})\0\0\0\0\0\0\0" && printf %s "$text"; } | seed safetensors "$dtype"
done

for name in README.md LICENSE; do head -c 2000 $name >"$work/$name"; done
data/tokenize --tokenizer bytes -o "$work/bytes" "$work/README.md" >/dev/null
data/tokenize --tokenizer bytes --val-fraction 0 --pad-documents 16 -o "$work/padded" "$work/LICENSE" >/dev/null
for name in bytes padded; do seed shard $name <"$work/${name}_train_000000.bin"; done

join $fixtures/gpt2-subset/encoder.json $fixtures/gpt2-subset/vocab.bpe | seed gpt2 subset
printf '{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}\xff#version: 0.2\na b\n' | seed gpt2 small
for name in exact folding; do seed sentencepiece $name <$fixtures/$name.model; done
printf '{"add_prefix_space": true, "add_bos_token": true, "bos_token": "<s>", "tokenizer_class": "GPT2Tokenizer"}\xff' | seed tokenizer_json config
printf '{}\xff{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}]}, "post_processor": null, "decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}' | seed tokenizer_json tokenizer

while read -r line; do
    name=${line#'{"name":"'} name=${name%%'"'*}
    tokenizer=${line#*'"tokenizer":'}
    { printf '{}\xff%s\xffHello, 12 <s>world\xe2\x96\x81' "${tokenizer%',"cases":'*}"; } | seed tokenizer_json "$name"
done <$fixtures/kinds.jsonl

seed encode prose <"$work/README.md"
printf "It's 12 o'clock \t\n\n  \xe2\x96\x81 \xf0\x9f\x99\x82 \xff\xc3 <|endoftext|>" | seed encode odd
head -c 64 "$work/LICENSE" | seed decode text

seed flags train <<<$'-m\nllama-130m\n-n\nmix:3+gpas\n--lr=1e-3\n-x\n10k\n-y\n0'
seed flags sample <<<$'sample\nruns/x\n--prompt\nOne\n-g\n12\n--top-k=3'
seed flags probe <<<$'probe\nruns/x\n--probes\nvariance,angular\n--probe-tokens\n64'
seed flags export <<<$'export\nruns/x\nDIR\n--dtype\nbfloat16\n--shard-size=5G'
seed config_file flags <<<$'# of a run\nnorm = mix:2\nlr = 1e-3\nsteps=10\n[sample]\nprompt = "One, two"\n'
