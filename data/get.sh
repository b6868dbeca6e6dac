#!/bin/bash
# Downloads a public data set and converts it to token shards. The same command resumes interrupted
# downloads.
set -euo pipefail

usage() {
    cat <<'END'
Usage: data/get.sh NAME [DIR] [--tokenizer SPEC] [--files N] [--pad-documents N]

  tinyshakespeare   1 MB of plays; default tokenizer: bytes
  tinystories       2.2 GB of stories written by GPT-4; default tokenizer: gpt2
  fineweb-10B       10 billion tokens of web text as finished shards of 200 MB (GPT-2's tokenizer);
                    --files N of 103, default 10
  c4                the Colossal Clean Crawled Corpus (English), 320 MB compressed per file; default
                    tokenizer: t5; --files N of 1024, default 1
  evals             the benchmarks of ./train_gpt eval --tasks, as JSON lines: HellaSwag, PIQA, ARC,
                    BoolQ, OpenBookQA, WinoGrande, MMLU. ARC comes with a corpus: 850 MB are
                    downloaded, and 20 MB kept

Writes NAME_train_*.bin and NAME_val_*.bin to DIR (default: data/NAME), evals TASK.jsonl. SPEC is bytes, gpt2, t5 (the
last two are downloaded as well), or whatever data/tokenize accepts. --pad-documents N (c4,
tinystories) is passed on to data/tokenize.

Environment: LNS_MIRROR=URL downloads URL/HOST/PATH instead of https://HOST/PATH; LNS_TOKENIZE names
the program (default: data/tokenize); LNS_RETRY_SECONDS (default: 5).
END
}

fail() {
    echo "get.sh: $*" >&2
    exit 1
}

name='' dir='' tokenizer='' files='' pad=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --tokenizer | --files)
        (($# > 1)) || fail "$1 needs a value"
        [[ $1 == --files ]] && files=$2 || tokenizer=$2
        shift
        ;;
    --pad-documents)
        [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 needs a number of tokens"
        pad=("$1" "$2")
        shift
        ;;
    -*) fail "unknown option $1. See data/get.sh --help" ;;
    *)
        if [[ ! $name ]]; then
            name=$1
        elif [[ ! $dir ]]; then
            dir=$1
        else
            fail "one name and one directory are expected, found '$1' besides. See data/get.sh --help"
        fi
        ;;
    esac
    shift
done
[[ $name ]] || { usage >&2 && exit 1; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${dir:-$here/$name}
tokenize=${LNS_TOKENIZE:-$here/tokenize}
retry_seconds=${LNS_RETRY_SECONDS:-5}
hub=https://huggingface.co

need() {
    local program
    for program; do
        command -v "$program" >/dev/null ||
            fail "$program is missing. Install it (Debian and Ubuntu: apt install $program)"
    done
}
need_tokenize() {
    [[ -x $tokenize ]] || fail "there is no $tokenize. Build it first: make data/tokenize"
}

# space MB: prints how much space is needed, and fails if there is less.
space() {
    local free
    free=$(df -Pk "$dir" | awk 'NR == 2 { print int($4 / 1000) }')
    echo "$name: needs about $1 MB in $dir, where $free MB are free"
    ((free >= $1)) || [[ ${LNS_MIRROR:-} ]] ||
        fail "there is too little space. Choose another directory: data/get.sh $name DIR"
}

check_sum() { # FILE SHA256
    local found
    found=$(sha256sum "$1" | cut -d' ' -f1)
    [[ $found == "$2" ]] && return
    rm -f "$1"
    fail "$1 has the SHA-256 $found, expected $2. It was removed; run the command again, and if it" \
        "the same happens again, do not trust what the server sends"
}

# download URL FILE [SHA256]: FILE is complete or absent; FILE.part is what has arrived so far.
download() {
    local url=$1 file=$2 sum=${3:-} part=$2.part headers=$2.headers
    local try code status linked size
    [[ ${LNS_MIRROR:-} ]] && url=$LNS_MIRROR/${url#https://}
    if [[ -f $file ]]; then
        [[ $sum ]] && check_sum "$file" "$sum"
        echo "  have $file"
        return
    fi
    echo "  $url"
    for ((try = 1; ; try++)); do
        status=0
        code=$(curl --location --fail "${curl_progress[@]}" --continue-at - --output "$part" \
            --dump-header "$headers" --write-out '%{http_code}' --connect-timeout 20 \
            --speed-limit 1000 --speed-time 60 "$url") || status=$?
        # Hugging Face sends the SHA-256 of the whole file, also with a part of it.
        linked=$(sed -nE 's/^x-linked-etag: *"?([0-9a-f]{64})"?.*/\1/Ip' "$headers" 2>/dev/null | tail -1)
        size=$(sed -nE 's,^content-range: *bytes \*/([0-9]+).*,\1,Ip' "$headers" 2>/dev/null | tail -1)
        rm -f "$headers"
        ((status == 0)) && break
        ((try < 6)) || fail "$url did not arrive in $try tries (curl: $status, HTTP: $code)." \
            "What arrived is kept in $part; run the command again to resume"
        if [[ $code == 416 ]]; then
            # Nothing is left to send: the file is complete, or the part belongs to another file.
            [[ $size && $size == "$(wc -c <"$part")" ]] && break
            rm -f "$part"
        elif ((status == 33)); then
            rm -f "$part" # the server cannot send the rest alone
        elif [[ $code == 4?? && $code != 408 && $code != 429 ]]; then
            fail "$url is refused (HTTP $code). The file may have moved, or need an account"
        else
            sleep "$((retry_seconds * try))"
        fi
    done
    sum=${sum:-$linked}
    [[ $sum ]] && check_sum "$part" "$sum"
    mv "$part" "$file"
}

# Downloads the tokenizer and turns its name into what data/tokenize accepts.
fetch_tokenizer() {
    local home=https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
    case $tokenizer in
    gpt2)
        mkdir -p "$dir/gpt2"
        download $home/encoder.json "$dir/gpt2/encoder.json" \
            196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
        download $home/vocab.bpe "$dir/gpt2/vocab.bpe" \
            1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
        tokenizer=gpt2:$dir/gpt2
        ;;
    t5)
        download $hub/google-t5/t5-base/resolve/main/spiece.model "$dir/t5.model"
        tokenizer=$dir/t5.model
        ;;
    esac
}

# Validation has a text of its own: its shards get the prefix of the training shards.
rename_validation() {
    local shard
    for shard in "$dir/${name}-valid_train_"*.bin; do
        mv "$shard" "$dir/${name}_val_${shard##*_train_}"
    done
    rm -rf "$dir/${name}-valid_tokenizer"
}

tinyshakespeare() {
    tokenizer=${tokenizer:-bytes}
    need_tokenize
    space 10
    fetch_tokenizer
    download https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt \
        "$dir/tinyshakespeare.txt" 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
    "$tokenize" --tokenizer "$tokenizer" -o "$dir/$name" "$dir/tinyshakespeare.txt"
}

tinystories() {
    tokenizer=${tokenizer:-gpt2}
    need_tokenize
    space 7000
    fetch_tokenizer
    local kind home=$hub/datasets/roneneldan/TinyStories/resolve/main
    for kind in valid train; do
        download "$home/TinyStoriesV2-GPT4-$kind.txt" "$dir/TinyStoriesV2-GPT4-$kind.txt"
    done
    local flags=(--tokenizer "$tokenizer" --doc-separator '<|endoftext|>' --val-fraction 0
        ${pad[@]+"${pad[@]}"})
    "$tokenize" "${flags[@]}" -o "$dir/$name" "$dir/TinyStoriesV2-GPT4-train.txt"
    "$tokenize" "${flags[@]}" -q -o "$dir/$name-valid" "$dir/TinyStoriesV2-GPT4-valid.txt"
    rename_validation
}

# Checks a finished shard against llm.c's header: magic, version, length.
check_shard() {
    local magic version count size
    read -r magic version count < <(od -An -td4 -N12 "$1")
    size=$(wc -c <"$1")
    [[ $magic == 20240520 && $version == 1 && $size == $((1024 + 2 * count)) ]] && return
    rm -f "$1"
    fail "$1 is no shard: it starts with ${magic:-nothing}, ${version:-nothing}, and has $size bytes." \
        "Expected 20240520, 1 and 1024 bytes and 2 for each token. It was removed; run the command again"
}

fineweb-10B() {
    [[ ! $tokenizer || $tokenizer == gpt2 ]] ||
        fail "fineweb-10B comes as shards of GPT-2's tokenizer, so --tokenizer $tokenizer cannot be had"
    count_files 10 103
    space $((200 * (files + 1)))
    local i shard
    for ((i = 0; i <= files; i++)); do
        shard=$(printf 'fineweb_%s_%06d.bin' "$( ((i)) && echo train || echo val)" "$i")
        download "$hub/datasets/kjj0/fineweb10B-gpt2/resolve/main/$shard" "$dir/${shard/fineweb/$name}"
        check_shard "$dir/${shard/fineweb/$name}"
    done
    tokenizer=gpt2 fetch_tokenizer # for samples
    mkdir -p "$dir/${name}_tokenizer"
    cp "$dir/gpt2/encoder.json" "$dir/${name}_tokenizer/vocab.json"
    cp "$dir/gpt2/vocab.bpe" "$dir/${name}_tokenizer/merges.txt"
}

c4() {
    tokenizer=${tokenizer:-t5}
    need gzip jq
    need_tokenize
    count_files 1 1024
    space $((1000 * files + 200))
    fetch_tokenizer
    local i train=() home=$hub/datasets/allenai/c4/resolve/main/en
    for ((i = 0; i < files; i++)); do
        train+=("$(printf '%s/c4-train.%05d-of-01024.json.gz' "$dir" "$i")")
        download "$home/${train[i]##*/}" "${train[i]}"
    done
    local validation=$dir/c4-validation.00000-of-00008.json.gz
    download "$home/${validation##*/}" "$validation"
    tokenize_json "$dir/$name" "${train[@]}"
    tokenize_json "$dir/$name-valid" "$validation" -q
    rename_validation
}

tokenize_json() { # PREFIX FILE.json.gz... [-q]
    local prefix=$1 quiet=()
    shift
    [[ ${!#} == -q ]] && quiet=(-q) && set -- "${@:1:$#-1}"
    gzip -dc "$@" | jq -r '.text + "\n<|endoftext|>"' |
        "$tokenize" --tokenizer "$tokenizer" --doc-separator '<|endoftext|>' --val-fraction 0 \
            ${pad[@]+"${pad[@]}"} "${quiet[@]}" -o "$prefix" || {
        rm -f "$prefix"_train_*.bin # made before the damage
        fail "no shards were made of $*. If a file is damaged, remove it and run the command again"
    }
}

# The splits that lm-evaluation-harness scores. Of HellaSwag and MMLU no checksum is published:
# evals.py counts their questions.
evals() {
    # shellcheck source=scripts/python.sh
    . "$here/../scripts/python.sh"
    need python3
    space 900
    local s3=https://ai2-public-datasets.s3.amazonaws.com mosaic=https://storage.googleapis.com/ai2-mosaic/public
    download https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl "$dir/hellaswag_val.jsonl"
    download $mosaic/physicaliqa/physicaliqa-train-dev.zip "$dir/physicaliqa-train-dev.zip" \
        54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd
    download $s3/arc/ARC-V1-Feb2018.zip "$dir/ARC-V1-Feb2018.zip" \
        6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0
    download https://dl.fbaipublicfiles.com/glue/superglue/data/v2/BoolQ.zip "$dir/BoolQ.zip" \
        853fbe7922f70c59629f06a39e8d9ca440c3d740e760fd3b87a5ddf3dcba2436
    download https://s3-us-west-2.amazonaws.com/ai2-website/data/OpenBookQA-V1-Sep2018.zip "$dir/OpenBookQA-V1-Sep2018.zip" \
        82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46
    download $mosaic/winogrande/winogrande_1.1.zip "$dir/winogrande_1.1.zip" \
        d5699402a41de2b4e6b3c6e2a1e6b4faab2130543a12019a8c5d4f35ec502d47
    download https://people.eecs.berkeley.edu/~hendrycks/data.tar "$dir/data.tar"
    python3 "$here/evals.py" "$dir" || fail "the benchmarks were not written; what was downloaded is kept in $dir"
    rm -f "$dir"/{hellaswag_val.jsonl,physicaliqa-train-dev.zip,ARC-V1-Feb2018.zip,BoolQ.zip} \
        "$dir"/{OpenBookQA-V1-Sep2018.zip,winogrande_1.1.zip,data.tar}
    echo "Score a model: ./train_gpt eval CHECKPOINT --tasks hellaswag,mmlu --task-data '$dir'"
}

count_files() { # DEFAULT MOST
    files=${files:-$1}
    if ! [[ $files =~ ^[1-9][0-9]{0,4}$ ]] || ((files > $2)); then
        fail "--files $files is not a number of 1 to $2"
    fi
}

case $name in
c4 | tinystories) ;;
tinyshakespeare | fineweb-10B | evals)
    ((${#pad[@]} == 0)) || fail "--pad-documents needs a text of documents, and $name is none or comes as shards"
    ;;
*) fail "there is no data set '$name', expected tinyshakespeare, tinystories, fineweb-10B, c4 or evals" ;;
esac
need curl sha256sum
mkdir -p "$dir"
curl_progress=(--silent --show-error)
[[ -t 2 ]] && curl_progress=(--progress-bar)
"$name"
[[ $name == evals ]] || echo "Train on it: ./train_gpt -i '$dir/${name}_train_*.bin' -j '$dir/${name}_val_*.bin'"
