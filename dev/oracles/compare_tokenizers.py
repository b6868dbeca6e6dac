"""Compares our tokenizers with PyPI's `tokenizers`, on text files and on random strings.

compare_tokenizers.py [--strings N] [--text FILE ...] [FOLDER ...]: the FOLDERs have a tokenizer.json (and
perhaps a tokenizer_config.json); without one, small tokenizers of each kind are trained on the text.
TOKENS names the program dev/oracles/tokens.
"""
import argparse, json, os, random, struct, subprocess, sys, tempfile, time, unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PROGRAM = os.environ.get("TOKENS", "tokens")
GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""]


def ours(folder, mode, records, code):
    """Runs the program on all records; code: the format of an element of a record, b or i."""
    data = b"".join(struct.pack("<i", len(r)) + (r if code == "b" else struct.pack(f"<{len(r)}i", *r))
                    for r in records)
    out = subprocess.run([PROGRAM, folder, mode], input=data, stdout=subprocess.PIPE, check=True).stdout
    results, at = [], 0
    while at < len(out):
        n = struct.unpack_from("<i", out, at)[0]
        at += 4
        if code == "b":
            results.append(list(struct.unpack_from(f"<{n}i", out, at)))
            at += 4 * n
        else:
            results.append(out[at:at + n])
            at += n
    assert len(results) == len(records), f"{len(results)} results of {len(records)} records"
    return results


def random_strings(n, names, seed=1):
    """Strings that tokenizers find hard: characters of all planes, controls, runs, emoji, names."""
    draw = random.Random(seed)
    words = "the of Hello it's I'LL they'Ve 'd 12 3.14 100000 don't naïve Ünï ΣΊΣΥΦΟΣ ſ 'ſ ﬁ ２ Ⅷ ½ 中文 日本 한국어 عربي हिन्दी ไทย".split()
    emoji = ["🙂", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]
    space = [" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\u180e", "\u200b", "▁"]

    def anything():
        while True:
            c = draw.randrange(0x110000) if draw.random() < 0.5 else draw.randrange(0x3000)
            if not 0xD800 <= c < 0xE000:
                return chr(c)

    def piece():
        kind = draw.randrange(12)
        if kind < 3: return draw.choice(words)
        if kind < 5: return draw.choice(space)
        if kind == 5: return draw.choice(space) * draw.randrange(1, 20)
        if kind == 6: return draw.choice(emoji)
        if kind == 7: return draw.choice(names) if names else "<s>"
        if kind == 8: return chr(draw.randrange(128))
        if kind == 9: return draw.choice("eaoAn") + "".join(chr(draw.randrange(0x300, 0x370)) for _ in range(draw.randrange(1, 4)))
        if kind == 10: return "".join(draw.choice("abcXYZ.,'!?") for _ in range(draw.randrange(1, 30)))
        return anything()
    return ["".join(piece() for _ in range(draw.randrange(1, 14))) for _ in range(n)]


def train(text, folder, size=3000):
    """Small tokenizers of each kind, under folder; size: about how many tokens."""
    def byte_level(name, pre, normalizer=None, special=("<|endoftext|>",), post=None, added=(), **model):
        t = Tokenizer(models.BPE(**model))
        if normalizer: t.normalizer = normalizer
        t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
        t.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False,
                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        if added: t.add_tokens(list(added))
        if post: t.post_processor = post(t)
        save(name, t)

    def save(name, t, **config):
        os.makedirs(f"{folder}/{name}")
        t.save(f"{folder}/{name}/tokenizer.json")
        config and json.dump(config, open(f"{folder}/{name}/tokenizer_config.json", "w"))

    def split(regex): return pre_tokenizers.Split(Regex(regex), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level("gpt2-like", level)
    byte_level("prefix-space", pre_tokenizers.ByteLevel(add_prefix_space=True),
               post=lambda t: processors.RobertaProcessing(("<|endoftext|>", 0), ("<|endoftext|>", 0)))
    byte_level("llama3-like", pre_tokenizers.Sequence([split(GPT4 % "{1,3}"), bytes_only]), ignore_merges=True,
               special=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
               post=lambda t: processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
                   single="<|begin_of_text|> $A", pair="$A $B", special_tokens=[("<|begin_of_text|>", 0)])]))
    byte_level("qwen2-like", pre_tokenizers.Sequence([split(GPT4 % ""), bytes_only]), normalizers.NFC(),
               special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), added=[AddedToken("<tool_call>", normalized=False)])
    byte_level("o200k-like", pre_tokenizers.Sequence([split(O200K), bytes_only]))
    byte_level("deepseek-like", pre_tokenizers.Sequence([*map(split, DEEPSEEK), bytes_only]),
               special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))
    byte_level("digits", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level]))
    byte_level("falcon-like", pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), level,
               pre_tokenizers.Digits(False), split("[0-9][0-9][0-9]")]))
    byte_level("olmo-like", level, normalizers.NFC(), special=("<|endoftext|>", "<|padding|>"),
               added=[AddedToken("  " * n, normalized=True) for n in (2, 3, 4)] + [AddedToken("|||EMAIL|||", normalized=False)])
    byte_level("added", pre_tokenizers.Sequence([pre_tokenizers.Digits(False), level]), normalizers.Lowercase(),
               added=[AddedToken("[L]", lstrip=True, normalized=False), AddedToken("[R]", rstrip=True, normalized=False),
                      AddedToken("word", single_word=True), AddedToken("Day", normalized=True),
                      AddedToken("[LR]", lstrip=True, rstrip=True, normalized=False), AddedToken("[L][R]", normalized=False)])

    mark = "▁"
    tail = [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()]

    def fallback(name, normalizer, pre, decoder, **model):
        t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True, **model))
        if normalizer: t.normalizer = normalizer
        t.pre_tokenizer = pre_tokenizers.Metaspace(mark, "always")  # learns pieces of words
        special = ["<unk>", "<s>", "</s>"]
        t.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size + 100, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)],
                                                          limit_alphabet=40, show_progress=False))
        spec = json.loads(t.to_str())
        spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] in special]
        spec["pre_tokenizer"] = json.loads(pre.__getstate__()) if pre else None
        spec["decoder"] = json.loads(decoder.__getstate__())
        t = Tokenizer.from_str(json.dumps(spec))
        t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        save(name, t)
    fallback("llama2-like", normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)]), None,
             decoders.Sequence(tail + [decoders.Strip(" ", 1, 0)]))
    fallback("mistral-like", None, pre_tokenizers.Metaspace(mark, "first", split=False),
             decoders.Sequence(tail + [decoders.Strip(" ", 1, 0)]))
    fallback("gemma-like", normalizers.Replace(" ", mark), pre_tokenizers.Split(" ", "merged_with_previous"),
             decoders.Sequence(tail))

    def unigram(name, normalizer, pre, decoder, **options):
        t = Tokenizer(models.Unigram())
        if normalizer: t.normalizer = normalizer
        t.pre_tokenizer, t.decoder = pre, decoder
        t.train_from_iterator([text], trainers.UnigramTrainer(vocab_size=size - 100, unk_token="<unk>", show_progress=False,
                              special_tokens=["<pad>", "</s>", "<unk>"] + options.get("pieces", [])))
        if "pieces" in options:
            spec = json.loads(t.to_str())
            spec["model"]["byte_fallback"] = True
            spec["added_tokens"] = spec["added_tokens"][:3]
            t = Tokenizer.from_str(json.dumps(spec))
        t.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
        save(name, t)
    metaspace = pre_tokenizers.Metaspace(mark, "always")
    unigram("unigram", normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace]), decoders.Metaspace(mark, "always"))
    unigram("unigram-bytes", normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
            metaspace, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(mark, "always")]),
            pieces=[f"<0x{b:02X}>" for b in range(256)])
    unigram("unigram-words", normalizers.NFD(), pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]),
            decoders.Fuse())
    try:  # a table of normalizations, from SentencePiece's trainer
        import io
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as proto
        out = io.BytesIO()
        rules = {}
        if size < 1000:  # the usual table has 240 kB
            rules["normalization_rule_tsv"] = f"{folder}/rules.tsv"
            open(rules["normalization_rule_tsv"], "w").write("A0\t20\nD\t20\nA\t20\nFB01\t66 69\n65 301\tE9\n200B\t\n")
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.split("\n")), model_writer=out, vocab_size=size - 100,
                                                 hard_vocab_limit=False, minloglevel=2, **rules)
        model = proto.ModelProto.FromString(out.getvalue())
        t = Tokenizer(models.Unigram([(p.piece, p.score) for p in model.pieces], unk_id=0))
        t.normalizer = normalizers.Sequence([normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
                                             normalizers.Replace(Regex(" {2,}"), " ")])
        t.pre_tokenizer, t.decoder = metaspace, decoders.Metaspace(mark, "always")
        t.add_special_tokens(["<unk>", "<s>", "</s>"])
        t.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A $B", special_tokens=[("</s>", 2)])
        save("t5-like", t)
    except ImportError as error:
        print(f"no t5-like tokenizer: {error}")


def new_characters():
    """Those that Python's Unicode does not have, or tokenizers' tables of marks and punctuation."""
    marks, punctuation, found = normalizers.StripAccents(), pre_tokenizers.Punctuation("removed"), set()
    for c in (chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000):
        kind = unicodedata.category(c)
        if kind == "Cn" or kind[0] == "M" and marks.normalize_str(c) or (
                kind[0] == "P" and punctuation.pre_tokenize_str(c)):
            found.add(c)
    return found


def compare(folder, texts, n_strings, new):
    """Prints a row, and returns the number of differences."""
    t = Tokenizer.from_file(f"{folder}/tokenizer.json")
    added = t.get_added_tokens_decoder()
    names = [a.content for a in added.values()]
    strings = random_strings(n_strings, names[:200] + ["<0x41>", "<unk>"])
    differences, newer, shown = 0, 0, 0

    def check(what, left, right, of):
        nonlocal differences, newer, shown
        for a, b, source in zip(left, right, of):
            if a != b and not new.isdisjoint(source):
                newer += 1  # characters that one Unicode version has and another has not
            elif a != b:
                differences += 1
                shown += 1
                if shown <= 3: print(f"  {what} of {source[:200]!r}:\n    ours   {a[:60]!r}\n    theirs {b[:60]!r}")
    blocks = [text[i:i + 100_000] for text in texts for i in range(0, len(text), 100_000)]
    all_texts = strings + blocks
    utf8 = [s.encode() for s in all_texts]
    config = f"{folder}/tokenizer_config.json"
    said = json.load(open(config)) if os.path.exists(config) else {}
    template = "add_bos_token" not in said and "add_eos_token" not in said
    spelled = ours(folder, "spell", utf8, "b")
    theirs = [e.ids for e in t.encode_batch(all_texts, add_special_tokens=template)]
    check("tokens with special ones", spelled, theirs, all_texts)
    t.encode_special_tokens = True
    plain = [e.ids for e in t.encode_batch(all_texts, add_special_tokens=False)]
    check("tokens", ours(folder, "encode", utf8, "b"), plain, all_texts)
    size, draw = t.get_vocab_size(), random.Random(2)
    known = [i for i in range(size) if t.id_to_token(i) is not None]
    noise = [[draw.choice(known) for _ in range(draw.randrange(1, 20))] for _ in range(n_strings // 10)]
    ids = theirs[:n_strings] + noise
    for mode, skip in (("decode", True), ("show", False)):
        texts_of_ours = ours(folder, mode, ids, "i")
        texts_of_theirs = t.decode_batch(ids, skip_special_tokens=skip)
        pairs = [(a, b, i) for k, (a, b, i) in enumerate(zip(texts_of_ours, texts_of_theirs, ids))
                 if k < n_strings or "\ufffd" not in b]  # they replace invalid bytes, we keep them
        check(mode, [a.decode(errors="replace") for a, _, _ in pairs], [b for _, b, _ in pairs], [i for _, _, i in pairs])
    speed = ""
    if texts:
        with tempfile.NamedTemporaryFile(suffix=".txt") as file:
            file.write("".join(texts).encode())
            file.flush()
            mine = float(subprocess.run([PROGRAM, folder, "time", file.name], stdout=subprocess.PIPE, check=True).stdout)
            start = time.perf_counter()
            lines = "".join(texts).splitlines(keepends=True)
            t.encode_batch(["".join(lines[i:i + 100]) for i in range(0, len(lines), 100)])
            other = os.path.getsize(file.name) / 1e6 / (time.perf_counter() - start)
        speed = f"  {mine:6.1f} MB/s, tokenizers {other:5.1f}"
    print(f"{os.path.basename(folder):16} {2 * len(all_texts) + 2 * len(ids):8} comparisons, {differences:4} different, and {newer} with new characters{speed}", flush=True)
    return differences


def compare_saved(specs, n_strings, new):
    """What we export, loaded by transformers. Returns the number of differences."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        print(f"SKIPPED: transformers: {error}")
        return 0
    different = 0
    for spec in specs:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([PROGRAM, spec, "export", folder], check=True)
            t = AutoTokenizer.from_pretrained(folder)
            texts = [s for s in HARD + random_strings(n_strings, ["<s>", "<|endoftext|>"], 3) if new.isdisjoint(s)]
            theirs = [t.encode(s) for s in texts]
            left = ours(spec, "spell", [s.encode() for s in texts], "b")
            wrong = [s for s, a, b in zip(texts, left, theirs) if a != b]
            print(f"{spec[-40:]:40} by {type(t).__name__}: {len(texts)} texts, {len(wrong)} different {[s[:40] for s in wrong[:2]] or ''}")
            different += len(wrong) > 0
    return different


HARD = ["Hello, world! It's 12,345 o'clock.", "  leading  and   trailing  ", "\n\na\r\n \t b\n", "I'LL they'Ve 'sand 'ſ x's", "café café ﬁ ½ ２ Ⅷ",
        "中文 日本のテスト 한국어", "👩‍👩‍👧‍👦🇩🇪❤️", "<|endoftext|>a<|im_start|> <s> </s><unk>", "a [L] b [R]  c [LR] d[L][R]e", "word sword Word word.", "day Day DAY",
        "<tool_call>|||EMAIL|||    x", "▁▁ ▁a", "1234567 12 3", "don't\u00a0stop\u200b\u3000", "\u180e\x00\x7f", "x" * 100, " " * 50 + "y", "",
        "İSTANBUL ΣΊΣΥΦΟΣ", "ⱥ̈̃ Å Å"]


def make_fixtures(path):
    """Tiny tokenizers of each kind, and what PyPI's tokenizers makes of hard texts, for the unit tests."""
    text = "".join(open(f).read() for f in ("README.md", "CONTRIBUTING.md")) + " café 中文 1234 It's they'll\n" * 3
    with tempfile.TemporaryDirectory() as folder, open(path, "w") as out:
        train(text, folder, 340)
        for name in sorted(f.name for f in os.scandir(folder) if f.is_dir()):
            t = Tokenizer.from_file(f"{folder}/{name}/tokenizer.json")
            cases = []
            for text in HARD:
                t.encode_special_tokens = False
                spelled = t.encode(text).ids
                t.encode_special_tokens = True
                plain = t.encode(text, add_special_tokens=False).ids
                cases.append({"text": text, "spelled": spelled, "plain": plain, "shown": t.decode(spelled, skip_special_tokens=False),
                              "decoded": t.decode(spelled)})
            line = {"name": name, "tokenizer": json.loads(t.to_str()), "cases": cases}
            out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=20_000)
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--keep", help="train the tokenizers into this folder")
    parser.add_argument("--fixtures", metavar="FILE", help="write the unit tests' tokenizers and their tokens, and stop")
    parser.add_argument("folders", nargs="*")
    o = parser.parse_args()
    if o.fixtures:
        make_fixtures(o.fixtures)
        sys.exit()
    texts = [open(path, encoding="utf-8", errors="ignore").read() for path in o.text]
    print(f"tokenizers {tokenizers.__version__}")
    new = new_characters()
    with tempfile.TemporaryDirectory() as work:
        folders = o.folders
        if not folders or o.keep:
            into = o.keep or work
            sample = "".join(texts)[:2_000_000] or open("README.md").read() + "Ünï 中文 ½ café naïve"
            if not os.path.exists(f"{into}/gpt2-like"): train(sample, into)
            folders = folders + sorted(f.path for f in os.scandir(into))
        failed = sum(compare(folder, texts, o.strings, new) > 0 for folder in folders)
        fixtures = "dev/test/fixtures/tokenizers/"
        saved = ["bytes", f"gpt2:{fixtures}gpt2-subset", f"{fixtures}exact.model"] + folders
        failed += compare_saved(saved, 300, new)
        folders += saved
        print(f"{len(folders) - failed} passed, {failed} failed")
        sys.exit(failed > 0)
