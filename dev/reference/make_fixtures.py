"""Makes fixtures/ARCHITECTURE.safetensors: the PyTorch model's results, for the C++ tests.

    /usr/bin/python3 dev/reference/make_fixtures.py [--out DIR]

A file holds, as F32 (computed in float64 from parameters that are exact in F32):
    inputs, targets          I32 (B,T)
    param.NAME               every scheme's parameters, with the same values in all schemes
    SCHEME/loss              ()
    SCHEME/logits            (B,T,V)
    SCHEME/grad.NAME         for each of the scheme's parameters
and in `__metadata__` "config" and "schemes", as JSON. A scalar gamma is the first element of the
stored gamma (C). In the last layer of some +gpas schemes mlp_gate only scales the input of the
final norm: its gradient is nearly 0, so compare it together with the other gates.
"""

import argparse
import json
import os
import zlib
from dataclasses import asdict

import numpy as np
import tensor_file
import torch
from model import Config, Model, Scheme, forward_backward, scheme_rows

B, T, P, L = 2, 7, 9, 3

# Odd sizes. L is not 4, where deepnorm-published's 8^(1/2) would equal (2L)^(1/2).
CONFIGS = [
    Config("gpt2", 19, 10, L, 5, 5, 40, P, 0.0, 1e-5, True),
    Config("llama", 29, 12, L, 3, 3, 13, P, 1e4, 1e-6, False),
    Config("llama-gqa", 19, 16, L, 4, 2, 9, P, 1e4, 1e-6, False),
    Config("qwen2", 19, 16, L, 4, 2, 9, P, 1e6, 1e-6, True),
    Config("olmo", 29, 12, L, 3, 3, 13, P, 1e4, 1e-5, False),
    Config("olmo2", 29, 12, L, 3, 3, 13, P, 1e4, 1e-6, False),
    # Frequencies of each kind: kept, between and slower
    Config("llama-3", 19, 16, L, 4, 2, 9, P, 10.0, 1e-5, True, head_dim=8, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 30}, attention_bias=True),
    Config("qwen3", 19, 16, L, 4, 2, 9, P, 1e6, 1e-6, False, head_dim=6),
    Config("mistral", 19, 16, L, 4, 2, 9, P, 1e4, 1e-5, False, sliding_window=3),
    Config("smollm3", 19, 16, L, 4, 2, 9, P, 5e4, 1e-6, True, sliding_window=4,
           window_layers=[False, True, False], rotated_layers=[True, False, True],
           rope_scaling={"rope_type": "linear", "factor": 2.0}, mlp_bias=True),
    Config("llama-dyt", 19, 16, L, 4, 2, 9, P, 1e4, 1e-6, False, norm_type="dyt"),
    Config("gpt2-dyt", 19, 10, L, 5, 5, 40, P, 0.0, 1e-5, True, norm_type="dyt"),
]


def schemes_of(config):
    """Every scheme with RMSNorm and with LayerNorm, and additions; elsewhere few."""
    if config.norm_type == "dyt":  # norms in every place
        return ["pre", "lns", "mix:1", "sandwich", "peri", "layerscale", "siamese", "hybrid"]
    if config.architecture not in ("gpt2", "llama"):
        return ["pre", "lns", "mix:1+gpas", "sandwich+gpas", "peri", "siamese",
                "hybrid+value-residual"]
    names = [name + (":1" if name == "mix" else ":2" if name == "group" else "")
             for name in scheme_rows(L)]
    # A gate goes with norms before, behind, and on branches alike: finite differences try the rest.
    return names + ["pre+gpas", "post+gpas", "mix:1+gpas", "sandwich+gpas", "lns+gpas-each", "pre+x0",
                    "peri+x0", "mix:1+gpas+x0", "lns+value-residual", "hybrid+value-residual",
                    "attnres:2"]


# Chosen so that float32's rounding errors stay well below the tolerance of 1e-5 in every tensor (see
# check_model.py); with most seeds some gradient nearly cancels.
SEEDS = {"gpt2": 267, "llama": 35, "llama-gqa": 31, "qwen2": 34, "olmo": 22, "olmo2": 11,
         "llama-3": 6, "qwen3": 1, "mistral": 1, "smollm3": 1, "llama-dyt": 1, "gpt2-dyt": 1}


def random_of(config, name):
    text = f"{config.architecture}/{SEEDS[config.architecture]}/{name}"
    return np.random.RandomState(zlib.crc32(text.encode()))


def draw(config, name, shape):
    """A parameter's values, in F32: a function of the architecture, its seed and the name."""
    random = random_of(config, name)
    leaf = name.split(".")[-1]
    if leaf.endswith("gate"):
        return random.uniform(-0.7, 0.7, shape).astype(np.float32)
    if leaf == "value_mix":
        return random.uniform(0.2, 0.8, shape).astype(np.float32)
    if leaf.endswith("_gamma"):
        return (random.choice([-1, 1], shape) * random.uniform(0.3, 0.7, shape)).astype(np.float32)
    if leaf == "query":
        return random.uniform(-0.6, 0.6, shape).astype(np.float32)
    if leaf == "bias":
        return random.uniform(-0.3, 0.3, shape).astype(np.float32)
    if leaf == "alpha":
        return random.uniform(0.4, 0.8, shape).astype(np.float32)
    if len(shape) == 1:
        return random.uniform(0.7, 1.3, shape).astype(np.float32)
    if any(table in name for table in ("embed_tokens", "wte", "wpe")):
        scale = 0.6 if config.tie_word_embeddings else 1.0
    else:
        scale = 0.9 / np.sqrt(shape[0 if config.is_gpt2 else 1])
    return (scale * random.standard_normal(shape)).astype(np.float32)


def all_parameters(config):
    """{name: values} of the union of the schemes' parameters."""
    shapes = {}
    for text in schemes_of(config):
        for name, p in Model(config, Scheme.parse(text, L)).named_parameters():
            shape = shapes.setdefault(name, tuple(p.shape))
            # γ is a vector or a scalar; OLMo 2 norms the whole of q and k, or their heads
            differs = name.endswith(("_gamma", "q_norm.weight", "k_norm.weight"))
            if shape != tuple(p.shape) and not differs:
                raise ValueError(f"{name} is {shape} and, under {text}, {tuple(p.shape)}")
            shapes[name] = max(shape, tuple(p.shape))
    return {name: draw(config, name, shapes[name]) for name in sorted(shapes)}


def parameters_of(config, scheme, stored):
    """{name: values} of this scheme's parameters."""
    own = Model(config, scheme).named_parameters()
    return {name: stored[name][: len(p)] for name, p in own}


def tokens(config):
    """Inputs and targets (B,T); a fifth of the targets are ignored (−1)."""
    random = random_of(config, "tokens")
    inputs = random.randint(0, config.vocab_size, (B, T)).astype(np.int32)
    targets = random.randint(0, config.vocab_size, (B, T)).astype(np.int32)
    targets[0, 2] = targets[1, 0] = targets[1, T - 1] = -1
    return inputs, targets


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    options = argparse.ArgumentParser(description="Makes the fixtures of the C++ tests.")
    options.add_argument("--out", default=os.path.join(here, "fixtures"), help="output folder")
    out = options.parse_args().out
    os.makedirs(out, exist_ok=True)
    torch.set_num_threads(1)  # the same order of summation on every machine
    for config in CONFIGS:
        inputs, targets = tokens(config)
        stored = all_parameters(config)
        tensors = {"inputs": inputs, "targets": targets}
        tensors.update({"param." + name: values for name, values in stored.items()})
        for text in schemes_of(config):
            scheme = Scheme.parse(text, L)
            result = forward_backward(
                config, scheme, parameters_of(config, scheme, stored), inputs, targets)
            for name, values in result.items():
                tensors[f"{text}/{name}"] = np.asarray(values, np.float32)
        metadata = {"config": json.dumps(asdict(config)), "schemes": json.dumps(schemes_of(config))}
        path = os.path.join(out, config.architecture + ".safetensors")
        tensor_file.write(path, tensors, metadata)
        print(f"{path}: {len(tensors)} tensors, {os.path.getsize(path):,} bytes")


if __name__ == "__main__":
    main()
