"""Compares models that train_gpt reads and writes with Hugging Face's transformers.

    python3 dev/reference/check_export.py [--program ./train_gpt] [--keep DIR] [-k NAME]

Import: transformers saves small random models of every architecture (in one file or several, in
float32, float16 or bfloat16); train_gpt reads them, and its logits and gradients are compared with
those of transformers.

Export: train_gpt makes models of every architecture and scheme, whose parameters are then drawn at
random. AutoModelForCausalLM loads the output of `train_gpt export`, and its logits are compared with
train_gpt's for the original model. Models that stock tools cannot run must be refused by them.

Errors are ‖a − b‖/‖b‖, in float32. The last line is "N passed, M failed".
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import zlib

import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5
V, C, L, NH, T = 300, 24, 3, 4, 16
passed = failed = 0
program = keep = None


def check(name, good, detail=""):
    global passed, failed
    passed += bool(good)
    failed += not good
    print(f"  {'ok  ' if good else 'FAIL'} {name} {detail}", flush=True)


def close(name, a, b, tolerance=TOLERANCE):
    error = ((a.double() - b.double()).norm() / b.double().norm()).item()
    check(name, error <= tolerance, f"{error:.1e}")


def train_gpt(*arguments):
    run = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def must(*arguments):
    status, output = train_gpt(*arguments)
    if status != 0:
        raise RuntimeError(f"train_gpt {' '.join(map(str, arguments))}: {output}")
    return output


def state_of(path, state):
    """train_gpt's logits and gradients with the weights at path."""
    must("--init-from", path, "--dump-state", state, "--dtype", "float32", "--device", "cpu",
         "--threads", 1, "-b", 2, "-t", T)
    return load_file(state)


def draw(name, shape):
    """Random values: norm weights around 1, biases and γ away from 0."""
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=random)
    leaf = name.split(".")[-1]
    if leaf.endswith(("_gate", "bias")):
        return 0.3 * values
    if leaf.endswith("_gamma"):
        return 0.5 + 0.2 * values
    if len(shape) == 1:
        return 1 + 0.2 * values
    return (0.5 if any(n in name for n in ("embed", "wte", "wpe")) else 0.2) * values


# Import


def hugging_face_models():
    """Yields names, models, and arguments for saving them."""
    torch.manual_seed(1)
    sizes = dict(vocab_size=V, hidden_size=C, num_hidden_layers=L, num_attention_heads=NH,
                 intermediate_size=40, max_position_embeddings=64)
    gqa = dict(sizes, num_key_value_heads=2)
    none = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    gpt2 = hf.GPT2Config(vocab_size=V, n_embd=C, n_layer=L, n_head=NH, n_positions=64, **none)
    yield "gpt2", hf.GPT2LMHeadModel(gpt2), {}
    yield "gpt2 without transformer.", hf.GPT2LMHeadModel(gpt2), {"base": True}
    yield "gpt2, sharded", hf.GPT2LMHeadModel(gpt2), {"max_shard_size": "30KB"}
    llama = hf.LlamaForCausalLM
    theta = dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5)
    yield "llama", llama(hf.LlamaConfig(**sizes, **none, **theta)), {}
    yield "llama, GQA, all biases, head_dim", llama(hf.LlamaConfig(
        **gqa, **none, attention_bias=True, mlp_bias=True, head_dim=10)), {}
    yield "llama, tied", llama(hf.LlamaConfig(**gqa, **none, tie_word_embeddings=True)), {}
    yield "llama, bfloat16, sharded", llama(hf.LlamaConfig(**gqa, **none)).bfloat16(), {
        "max_shard_size": "20KB"}
    yield "llama, float16", llama(hf.LlamaConfig(**gqa, **none)).half(), {}
    qwen2 = hf.Qwen2ForCausalLM
    yield "qwen2", qwen2(hf.Qwen2Config(**gqa, **none)), {}
    yield "qwen2, tied", qwen2(hf.Qwen2Config(**gqa, **none, tie_word_embeddings=True)), {}
    yield "olmo", hf.OlmoForCausalLM(hf.OlmoConfig(**sizes, **none)), {}
    yield "olmo, biases", hf.OlmoForCausalLM(hf.OlmoConfig(**gqa, **none, attention_bias=True)), {}
    yield "olmo2", hf.Olmo2ForCausalLM(hf.Olmo2Config(**gqa, **none)), {}
    scaled = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    yield "llama 3", llama(hf.LlamaConfig(**gqa, **none, rope_parameters=scaled, head_dim=16)), {}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    yield "llama, linear positions", llama(hf.LlamaConfig(
        **gqa, **none, rope_parameters=linear, attention_bias=True)), {}
    yield "deepseek-llm", llama(hf.LlamaConfig(**sizes, **none, rms_norm_eps=1e-6)), {}
    qwen3 = hf.Qwen3ForCausalLM
    yield "qwen3", qwen3(hf.Qwen3Config(**gqa, **none, head_dim=10)), {}
    yield "qwen3, tied, biases, bfloat16", qwen3(hf.Qwen3Config(
        **gqa, **none, head_dim=8, tie_word_embeddings=True, attention_bias=True)).bfloat16(), {}
    window = dict(use_sliding_window=True, sliding_window=5)
    yield "qwen3, sliding window", qwen3(hf.Qwen3Config(
        **gqa, **none, head_dim=6, **window, max_window_layers=1)), {}
    yield "qwen2, sliding window", qwen2(hf.Qwen2Config(
        **gqa, **none, **window, layer_types=["sliding_attention", "full_attention",
                                              "sliding_attention"])), {}
    mistral = hf.MistralForCausalLM
    yield "mistral, sliding window", mistral(hf.MistralConfig(**gqa, **none, sliding_window=6)), {}
    yield "mistral, wide window", mistral(hf.MistralConfig(**gqa, **none, sliding_window=T)), {}
    yield "mistral, no window, head_dim", mistral(hf.MistralConfig(
        **gqa, **none, sliding_window=None, head_dim=12)), {}
    smollm3 = hf.SmolLM3ForCausalLM
    yield "smollm3", smollm3(hf.SmolLM3Config(**gqa, **none, no_rope_layer_interval=2)), {}
    yield "smollm3, sliding window, biases", smollm3(hf.SmolLM3Config(
        **gqa, **none, **window, no_rope_layers=[0, 1, 0], attention_bias=True, mlp_bias=True,
        tie_word_embeddings=False)), {}


def check_import(name, model, saving):
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(draw(parameter_name, parameter.shape))
    path = os.path.join(keep, "import-" + "".join(c if c.isalnum() else "-" for c in name))
    base = saving.pop("base", False)
    (model.base_model if base else model).save_pretrained(path, **saving)
    ours = state_of(path, path + ".state")
    model = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    logits = model(ours["inputs"].long()).logits
    close(f"{name}: logits", ours["logits"], logits.detach())
    # What is read is also written, for transformers to read.
    must("export", path, path + "-again", "--dtype", "float32")
    again = hf.AutoModelForCausalLM.from_pretrained(path + "-again", dtype=torch.float32).eval()
    with torch.no_grad():
        close(f"{name}: exported again", again(ours["inputs"].long()).logits, logits)
    targets = ours["targets"].long()
    torch.nn.functional.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    worst, where = 0.0, ""
    for parameter_name, gradient in gradients.items():
        mine = ours.get("grad." + parameter_name)
        if mine is None or mine.shape != gradient.shape:
            worst, where = float("inf"), parameter_name
            break
        # The gradient of the key's bias is only rounding: softmax is invariant to that bias, but
        # for rotation, which differs by position.
        share = 1e-2 if parameter_name.endswith("k_proj.bias") else 1e-3
        size = max(gradient.norm().item(), share * max(g.norm().item() for g in gradients.values()))
        error = (mine - gradient).norm().item() / size
        worst, where = max((worst, where), (error, parameter_name))
    check(f"{name}: {len(gradients)} gradients", worst <= TOLERANCE, f"{worst:.1e} ({where})")


# Export

SIZES = ["--layers", L, "--width", C, "--heads", NH, "--vocab", V, "--positions", 64]


@functools.lru_cache
def schemes():
    """{scheme: how it is exported: "plain" and "folded" models are stock ones, "own" are not}."""
    found = {"mix:0": "plain", "lns+scaled-init": "folded", "pre+gpas": "own", "lns+gpas": "own"}
    for row in json.loads(must("schemes", "--format", "json", "--layers", L)):
        name = row["name"] + (":1" if row["out_norm"] == "first_k" else "")
        pre = row["in_norm"] == "all" and row["out_norm"] == row["branch_norm"] == "none"
        folds = row["depth"] == "output" or row["gamma"] != "none"
        found[name] = "own" if not pre or row["skip"] != 1 else "folded" if folds else "plain"
    return found


def make_checkpoint(architecture, scheme, more):
    """Makes a checkpoint with random parameters."""
    run = os.path.join(keep, f"export-{architecture}-{scheme}-{len(os.listdir(keep))}")
    grouped = [] if architecture in ("gpt2",) else ["--kv-heads", 2]
    must("--arch", architecture, "-n", scheme, *SIZES, *grouped, *more, "-x", 0, "-g", 0, "-b", 2,
         "-t", T, "--val-tokens", 64, "--threads", 1, "-o", run)
    checkpoint = os.path.join(run, "step-000000")
    file = os.path.join(checkpoint, "model.safetensors")
    save_file({n: draw(n, v.shape) for n, v in load_file(file).items()}, file)
    os.remove(os.path.join(checkpoint, "checksums.json"))  # of the weights before
    return checkpoint


def stored(path):
    """All tensors of a directory, and the number of their files."""
    files = sorted(f for f in os.listdir(path) if f.endswith(".safetensors"))
    tensors = {}
    for file in files:
        with safe_open(os.path.join(path, file), "pt") as f:
            tensors.update({n: f.get_tensor(n) for n in f.keys()})
    return tensors, len(files)


def logits_of(path, inputs, dtype=torch.float32):
    model = hf.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if type(model).__name__.startswith("Lns"):
        raise ValueError("not a stock model")
    with torch.no_grad():
        return model(inputs.long()).logits


def check_export(architecture, scheme, more=()):
    name = f"{architecture} {scheme} {' '.join(more)}".strip()
    checkpoint = make_checkpoint(architecture, scheme, more)
    out = checkpoint + "-exported"
    output = must("export", checkpoint, out)
    ours = state_of(checkpoint, checkpoint + ".state")
    reloaded = state_of(out, out + ".state")
    own = "stock tools cannot run it" in output
    native = "olmo2" if architecture == "olmo2" else "pre"
    stock = schemes()[scheme] != "own" if native == "pre" else scheme == "olmo2"
    check(f"{name}: reported as {'stock' if stock else 'our own'}", own != stock)
    if stock and schemes()[scheme] == "folded":
        close(f"{name}: reloaded", reloaded["logits"], ours["logits"], 1e-6)
    else:
        check(f"{name}: reloaded, bit for bit", torch.equal(reloaded["logits"], ours["logits"]))
    if stock:
        close(f"{name}: transformers", logits_of(out, ours["inputs"]), ours["logits"])
    else:
        try:
            logits_of(out, ours["inputs"])
            refused = ""
        except Exception as error:
            refused = str(error)
        check(f"{name}: transformers refuses it", "lns-" + architecture in refused)
    return checkpoint, out, ours


def check_files(architecture):
    """Checks dtypes and shards of exported models."""
    checkpoint, out, ours = check_export(architecture, "lns")
    whole, _ = stored(out)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        path, title = f"{out}-{name}", f"{architecture} {name}"
        must("export", checkpoint, path, "--dtype", name, "--shard-size", "20k")
        parts, files = stored(path)
        check(f"{title}: sharded", files > 1, f"{files} files")
        check(f"{title}: rounded to nearest", parts.keys() == whole.keys() and all(
            torch.equal(v, whole[n].to(dtype)) for n, v in parts.items()))
        model = hf.AutoModelForCausalLM.from_pretrained(path)
        check(f"{title}: transformers' dtype", model.dtype == dtype, model.dtype)
        reloaded = state_of(path, path + ".state")
        with torch.no_grad():
            close(f"{title}: logits of the rounded weights",
                  model.float().eval()(ours["inputs"].long()).logits, reloaded["logits"])
    must("export", out + "-float16", out + "-twice", "--dtype", "float16")
    check(f"{architecture}: exported twice, bit for bit", all(
        torch.equal(v, parts[n]) for n, v in stored(out + "-twice")[0].items()))


def main():
    global program, keep
    options = argparse.ArgumentParser(description="Compares import and export with transformers.")
    options.add_argument("--program", default="./train_gpt")
    options.add_argument("--keep", help="keep the files here; default: a temporary directory")
    options.add_argument("-k", default="", help="run only cases with this in their names")
    args = options.parse_args()
    program, keep = args.program, args.keep or tempfile.mkdtemp()
    os.makedirs(keep, exist_ok=True)
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {hf.__version__}")
    cases = [(name, check_import, (name, model, saving)) for name, model, saving in
             hugging_face_models()]
    for architecture in ("llama", "gpt2", "qwen2", "olmo"):
        cases.append((architecture + " files", check_files, (architecture,)))
        for scheme in schemes():
            if scheme != "lns" and not (scheme == "lns-init" and architecture == "olmo"):
                cases.append((f"{architecture} {scheme}", check_export, (architecture, scheme)))
    cases.append(("llama lns sites", check_export,
                  ("llama", "lns", ("--lns-sites", "mlp", "--lns-power", "1.5"))))
    for scheme in ("olmo2", "lns", "pre"):
        cases.append((f"olmo2 {scheme}", check_export, ("olmo2", scheme)))
    for architecture in ("qwen3", "mistral", "smollm3"):
        for scheme in ("pre", "lns", "layerscale", "peri"):
            cases.append((f"{architecture} {scheme}", check_export, (architecture, scheme)))
    for name, run, arguments in cases:
        if args.k not in name:
            continue
        try:
            run(*arguments)
        except Exception as error:
            check(name, False, f"{type(error).__name__}: {error}")
    if not args.keep:
        subprocess.run(["rm", "-rf", keep])
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
