"""GPT-2, LLaMA, Qwen, Mistral, SmolLM3 and OLMo language models under every norm scheme, in PyTorch.

An independent reference implementation for train_gpt: explicit modules, autograd, nothing fused. It
is written from the formulas, and organized by sublayers with the norms around them, where train_gpt
is organized by the junctions between sublayers. Only the ingredients of each scheme come from
train_gpt (`./train_gpt schemes --format json`). Parameters have Hugging Face's names, so the keys of
`state_dict()` are a checkpoint's.

Easy to get wrong:
- GPT-2's matrices are (in, out), all the others' (out, in).
- Every scheme has the final norm, which is never scaled.
- A norm's name depends on its role *and* the scheme (`norm_names`).
"""

import functools
import json
import math
import os
import subprocess
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Config:
    architecture: str  # gpt2, llama, llama-gqa, llama-3, qwen2, qwen3, olmo, olmo2, mistral, smollm3;
    # of fixtures, gpt2-dyt and llama-dyt too
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float  # unused in gpt2
    norm_eps: float
    tie_word_embeddings: bool
    # None of these in gpt2
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rope_scaling: dict = field(default_factory=dict)  # Hugging Face's field
    sliding_window: int = 0  # keys that a query sees; 0: all
    window_layers: list = field(default_factory=list)  # whether each layer has it; []: all
    rotated_layers: list = field(default_factory=list)  # whether each layer has positions; []: all
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_type: str = "stock"  # or dyt: tanh in place of every norm but those of q and k

    @property
    def is_gpt2(self):
        return self.architecture.startswith("gpt2")

    @staticmethod
    def from_hugging_face(text):
        """The Config and the Scheme of a checkpoint's config.json, given as text."""
        c = json.loads(text)
        family = c["model_type"]
        if family.startswith("lns-"):
            family = family[len("lns-") :]
        if family not in ("gpt2", "llama", "qwen2", "qwen3", "olmo", "olmo2", "mistral", "smollm3"):
            raise ValueError(f"config.json: model_type {c['model_type']!r} has no reference model")
        if family == "gpt2":
            config = Config("gpt2", c["vocab_size"], c["n_embd"], c["n_layer"], c["n_head"],
                            c["n_head"], c.get("n_inner") or 4 * c["n_embd"], c["n_positions"], 0.0,
                            c.get("layer_norm_epsilon", 1e-5), c.get("tie_word_embeddings", True))
        else:
            eps = 1e-5 if family == "olmo" else c["rms_norm_eps"]
            heads = c["num_attention_heads"]
            config = Config(family, c["vocab_size"], c["hidden_size"], c["num_hidden_layers"],
                            heads, c.get("num_key_value_heads") or heads, c["intermediate_size"],
                            c["max_position_embeddings"], c.get("rope_theta", 10000.0), eps,
                            c.get("tie_word_embeddings", False), c.get("head_dim", 0),
                            c.get("rope_scaling") or {}, c.get("sliding_window") or 0,
                            [t == "sliding_attention" for t in c.get("layer_types", [])],
                            [n == 1 for n in c.get("no_rope_layers", [])],
                            family != "qwen2" and c.get("attention_bias", False),
                            c.get("mlp_bias", False))
        ours = c.get("lns_cpp", {})
        config.norm_type = ours.get("norm_type", "stock")
        scheme = Scheme.parse(
            ours.get("scheme", "olmo2" if family == "olmo2" else "pre"), config.num_hidden_layers)
        scheme.lns_power = ours.get("lns_power", scheme.lns_power)
        scheme.lns_sites = ours.get("lns_sites", "attn,mlp").split(",")
        scheme.base_width = ours.get("base_width", scheme.base_width)
        return config, scheme


@functools.lru_cache
def scheme_rows(layers):
    """{name: ingredients} of the schemes that train_gpt knows, in a model of `layers` layers."""
    program = os.environ.get("TRAIN_GPT", "./train_gpt")
    command = [program, "schemes", "--format", "json", "--layers", str(layers)]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {row["name"]: row for row in rows}


@dataclass
class Scheme:
    name: str
    row: dict  # the ingredients; lists have an element for each sublayer
    number: int = -1  # of NAME:NUMBER
    gates: str = ""  # "layer" with +gpas, "sublayer" with +gpas-each
    x0: bool = False
    value_residual: bool = False
    lns_power: float = 0.5
    lns_sites: list = field(default_factory=lambda: ["attn", "mlp"])
    base_width: int = 256  # of CompleteP

    def describe(self):
        text = self.name + (f", gates by {self.gates}" if self.gates else "")
        if self.row["depth"] != "none":
            text += f", power {self.lns_power} at {' and '.join(self.lns_sites)}"
        return text

    @staticmethod
    def parse(text, layers):
        """`NAME[:NUMBER][+ADDITION…]`, as `train_gpt schemes` lists them."""
        base, *additions = text.split("+")
        rows = scheme_rows(layers)
        name, _, number = (base, "", "") if base in rows else base.rpartition(":")
        if name not in rows or (number and rows[name]["number"] is None):
            raise ValueError(f"scheme {base!r} is none of {', '.join(rows)}")
        known = {"gpas", "gpas-each", "x0", "value-residual", "scaled-init", "depth-init"}
        if not set(additions) <= known:
            raise ValueError(f"scheme {text!r} has additions other than {', '.join(known)}")
        row = dict(rows[name])
        if name == "mix" and number:
            late = [k // 2 + 1 > int(number) for k in range(2 * layers)]
            row["in_norm"], row["out_norm"] = late, [not x for x in late]
        return Scheme(
            name, row, int(number) if number else row["number"] or -1,
            gates="layer" if "gpas" in additions else "sublayer" if "gpas-each" in additions else "",
            x0="x0" in additions, value_residual="value-residual" in additions)

    @property
    def head_norms(self):
        return self.row["head_norms"]

    @property
    def source_block(self):
        """How many sublayers' outputs a source of attention residuals adds up."""
        return -(-len(self.row["in_norm"]) // self.number)

    @property
    def two_streams(self):
        return any(self.row["reads_second"])

    def depth_factor(self, where, layer, kind):
        """layer^-lns_power where the scheme scales by depth, else 1."""
        k = sublayer_index(layer, kind)
        scaled = self.row["depth"] == where and kind in self.lns_sites and self.row["depth_at"][k]
        return layer**-self.lns_power if scaled else 1.0


def sublayer_index(layer, kind):
    """From 0; layer is 1..L, kind is attn or mlp."""
    return 2 * (layer - 1) + (kind == "mlp")


def norm_names(gpt2, branch_norms, kind):
    """{role: Hugging Face's name} of a sublayer's norms; kind is attn or mlp."""
    if gpt2:
        n = {"attn": 1, "mlp": 2}[kind]
        return {"in": f"ln_{n}", "out": f"ln_{n}", "branch": f"post_ln_{n}"}
    if kind == "attn":
        return {"in": "input_layernorm", "out": "input_layernorm",
                "branch": "post_attention_layernorm"}
    return {"in": "pre_feedforward_layernorm" if branch_norms else "post_attention_layernorm",
            "out": "post_attention_layernorm", "branch": "post_feedforward_layernorm"}


class LayerNorm(nn.Module):
    groups = 1  # of channels, each normed by itself

    def __init__(self, size, eps, affine):
        super().__init__()
        self.eps = eps
        if affine:
            self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.affine = affine

    def forward(self, x):
        x = x.unflatten(-1, (self.groups, -1))
        x = x - x.mean(-1, keepdim=True)
        x = (x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return x * self.weight + self.bias if self.affine else x


class RMSNorm(nn.Module):
    groups = 1

    def __init__(self, size, eps, affine=True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else 1.0

    def forward(self, x):
        x = x.unflatten(-1, (self.groups, -1))
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)
        return x.flatten(-2) * self.weight


class DyT(nn.Module):
    """arXiv 2503.10622: an elementwise stand-in for a norm."""

    def __init__(self, size, weight, bias):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x):
        x = torch.tanh(self.alpha * x)
        x = x if self.weight is None else self.weight * x
        return x if self.bias is None else x + self.bias


def make_norm(config, scheme):
    """The model's norm over the residual stream's channels."""
    if config.norm_type == "dyt":
        return DyT(config.hidden_size, config.architecture != "olmo", config.is_gpt2)
    if config.is_gpt2 or config.architecture == "olmo":
        norm = LayerNorm(config.hidden_size, config.norm_eps, affine=config.is_gpt2)
    else:
        norm = RMSNorm(config.hidden_size, config.norm_eps)
    if scheme.row["grouped"]:
        norm.groups = scheme.number if scheme.number > 0 else config.num_attention_heads
    return norm


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def slow_down(frequency, scaling):
    """Rotary frequencies as a config.json's rope_scaling changes them."""
    if not scaling:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    wavelength = 2 * math.pi / frequency
    length, low, high = (scaling[key] for key in (
        "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    mixed = (length / wavelength - low) / (high - low)
    between = (1 - mixed) * frequency / scaling["factor"] + mixed * frequency
    slower = torch.where(wavelength > length / low, frequency / scaling["factor"], between)
    return torch.where(wavelength < length / high, frequency, slower)


def rotate(x, theta, scaling):
    """RoPE of x (B,heads,T,HS): channels i and i + HS/2 turn by position · theta^(−2i/HS)."""
    T, HS = x.shape[-2:]
    frequency = slow_down(theta ** (-torch.arange(0, HS, 2, dtype=x.dtype) / HS), scaling)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * frequency  # (T,HS/2)
    a, b = x[..., : HS // 2], x[..., HS // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q, k, v, window=0):
    """Causal attention, to the last `window` positions unless that is 0. q is (B,NH,T,HS); k, v are (B,KVH,T,HS), each for NH/KVH adjacent heads."""
    B, NH, T, HS = q.shape
    group = NH // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(HS)
    ones = torch.ones(T, T, dtype=torch.bool)
    scores = scores.masked_fill(ones.triu(1), -math.inf)
    if window:
        scores = scores.masked_fill(ones.tril(-window), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, NH * HS)


def split_heads(x, heads):
    B, T, width = x.shape
    return x.view(B, T, heads, width // heads).transpose(1, 2)


class Attention(nn.Module):
    """The norms of q, k and v, and v mixed with the first layer's."""

    def __init__(self, config, scheme, number):
        super().__init__()
        NH, KVH, eps = config.num_attention_heads, config.num_key_value_heads, config.norm_eps
        HS = config.head_dim or config.hidden_size // NH
        self.heads, self.kv_heads, self.HS = NH, KVH, HS
        self.q_norm = self.k_norm = self.v_norm = nn.Identity()
        self.whole = config.architecture == "olmo2" and not scheme.head_norms
        if self.whole:  # over all heads together
            self.q_norm, self.k_norm = RMSNorm(NH * HS, eps), RMSNorm(KVH * HS, eps)
        if config.architecture == "qwen3" or scheme.head_norms:
            self.q_norm, self.k_norm = RMSNorm(HS, eps), RMSNorm(HS, eps)
        if scheme.head_norms:
            self.v_norm = RMSNorm(HS, eps)
        if scheme.value_residual and number > 1:
            self.value_mix = nn.Parameter(torch.full((1,), 0.5))
        self.first = []  # the first layer's attention, which is not a part of this one

    def prepared(self, q, k, v):
        """q, k and v as heads, as they are before the rotation."""
        self.v = v
        if hasattr(self, "value_mix"):
            v = (1 - self.value_mix) * v + self.value_mix * self.first[0].v
        if self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = split_heads(q, self.heads), *(split_heads(y, self.kv_heads) for y in (k, v))
        return (q, k, v) if self.whole else (self.q_norm(q), self.k_norm(k), self.v_norm(v))


class GPT2Attention(Attention):
    def __init__(self, config, scheme, number):
        super().__init__(config, scheme, number)
        C = config.hidden_size
        self.c_attn, self.c_proj = Conv1D(C, 3 * C), Conv1D(C, C)

    def forward(self, x):
        return self.c_proj(attend(*self.prepared(*self.c_attn(x).chunk(3, -1))))


class GPT2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.hidden_size, config.intermediate_size)
        self.c_proj = Conv1D(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        h = self.c_fc(x)
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return self.c_proj(gelu)


class LlamaAttention(Attention):
    def __init__(self, config, scheme, number):
        super().__init__(config, scheme, number)
        C, NH, KVH, HS = config.hidden_size, self.heads, self.kv_heads, self.HS
        bias = config.architecture == "qwen2" or config.attention_bias
        self.config = config
        self.rotated = not config.rotated_layers or config.rotated_layers[number - 1]
        windowed = not config.window_layers or config.window_layers[number - 1]
        self.window = config.sliding_window if windowed else 0
        self.q_proj = nn.Linear(C, NH * HS, bias=bias)
        self.k_proj = nn.Linear(C, KVH * HS, bias=bias)
        self.v_proj = nn.Linear(C, KVH * HS, bias=bias)
        self.o_proj = nn.Linear(NH * HS, C, bias=config.attention_bias)

    def forward(self, x):
        q, k, v = self.prepared(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if self.rotated:
            q, k = (rotate(y, self.config.rope_theta, self.config.rope_scaling) for y in (q, k))
        return self.o_proj(attend(q, k, v, self.window))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, H, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, H, bias=config.mlp_bias)
        self.down_proj = nn.Linear(H, C, bias=config.mlp_bias)

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class StreamMaps(nn.Module):
    """mHC's maps of a sublayer (arXiv 2512.24880) from n streams of C channels."""

    def __init__(self, n, channels):
        super().__init__()
        self.n = n
        self.weight = nn.Parameter(torch.zeros(n * (n + 2), n * channels))
        self.bias = nn.Parameter(torch.zeros(n * (n + 2)))
        self.scale = nn.Parameter(torch.zeros(3))

    def forward(self, streams):
        """Of (B,T,n,C): weights to read (B,T,n) and write (B,T,n), and to mix (B,T,n,n)."""
        n, x = self.n, streams.flatten(-2)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-20)
        read, write, mix = (x @ self.weight.T).split([n, n, n * n], -1)
        read_bias, write_bias, mix_bias = self.bias.split([n, n, n * n])
        read = torch.sigmoid(self.scale[0] * read + read_bias)
        write = 2 * torch.sigmoid(self.scale[1] * write + write_bias)
        mix = torch.exp(self.scale[2] * mix + mix_bias).unflatten(-1, (n, n))
        for _ in range(20):
            mix = mix / mix.sum(-2, keepdim=True)
            mix = mix / mix.sum(-1, keepdim=True)
        return read, write, mix


class SourceAttention(nn.Module):
    """Attention residuals (arXiv 2603.15031): an average over earlier outputs."""

    def __init__(self, config):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.architecture != "olmo")

    def forward(self, sources):
        values = torch.stack(sources)
        weights = (self.norm(values) @ self.query).softmax(0)
        return (weights[..., None] * values).sum(0)


def sources_of(start, branches, block):
    """The embedding, and the sums of each `block` branches so far."""
    return [start] + [sum(branches[i : i + block]) for i in range(0, len(branches), block)]


class Streams:
    """What passes through the layers: r, the second stream y if there is one, and x₀."""

    def __init__(self, r, x0, y=None):
        self.r, self.x0, self.y = r, x0, y
        self.branches = []  # of all sublayers so far
        self.mixed = None  # mHC's streams, (B,T,n,C)


class Layer(nn.Module):
    """Attention, then the MLP, each with the scheme's norms and scales around it."""

    def __init__(self, config, scheme, number):
        super().__init__()
        self.scheme, self.number = scheme, number  # number is 1..L
        self.modules_of = {"attn": "attn" if config.is_gpt2 else "self_attn", "mlp": "mlp"}
        self.norms_of = {}
        gpt2, row = config.is_gpt2, scheme.row
        if scheme.x0:
            self.x0_skip = nn.Parameter(torch.ones(1))
            self.x0_weight = nn.Parameter(torch.zeros(1))
        if scheme.gates == "layer":
            self.gate = nn.Parameter(torch.zeros(1))
        for kind, f in {
            "attn": (GPT2Attention if gpt2 else LlamaAttention)(config, scheme, number),
            "mlp": (GPT2MLP if gpt2 else LlamaMLP)(config),
        }.items():
            k = sublayer_index(number, kind)
            self.add_module(self.modules_of[kind], f)
            names = norm_names(config.is_gpt2, any(row["branch_norm"]), kind)
            roles = [role for role in ("branch", "out", "in") if row[f"{role}_norm"][k]]
            if "in" in roles and "out" in roles:
                names["out"] = f"{kind}_out_norm"
            if row["reads_second"][k]:
                roles.append("second")
                names["second"] = f"{kind}_second_norm"
            self.norms_of[kind] = {role: names[role] for role in roles}
            for name in self.norms_of[kind].values():
                self.add_module(name, make_norm(config, scheme))
            if row["gamma"] != "none":
                size = config.hidden_size if row["gamma"] == "vector" else 1
                self.register_parameter(f"{kind}_gamma", nn.Parameter(torch.ones(size)))
            if row["omega_init"] is not None:
                self.register_parameter(
                    f"{kind}_omega", nn.Parameter(torch.ones(config.hidden_size)))
            if row["mixing"] == "streams":
                self.add_module(f"{kind}_streams", StreamMaps(scheme.number, config.hidden_size))
            if row["mixing"] == "sources" and k > 0:
                self.add_module(f"{kind}_sources", SourceAttention(config))
            if scheme.gates == "sublayer":
                self.register_parameter(f"{kind}_gate", nn.Parameter(torch.zeros(1)))

    def sublayer(self, kind, streams, stop):
        """Replaces the streams before a sublayer by those after it."""
        scheme, row, r = self.scheme, self.scheme.row, streams.r
        k = sublayer_index(self.number, kind)
        norms = {role: getattr(self, name) for role, name in self.norms_of[kind].items()}
        if row["mixing"] == "sources":
            if k > 0:
                attention = getattr(self, f"{kind}_sources")
                r = attention(sources_of(streams.x0, streams.branches, scheme.source_block))
            u = norms["in"](r)
            streams.branches.append(getattr(self, self.modules_of[kind])(u))
            return
        if row["mixing"] == "streams":
            read, write, mix = getattr(self, f"{kind}_streams")(streams.mixed)
            u = norms["in"]((read[..., None] * streams.mixed).sum(-2))
            b = getattr(self, self.modules_of[kind])(u)
            streams.mixed = mix @ streams.mixed + write[..., None] * b[..., None, :]
            return
        u = r + norms["second"](streams.y) if "second" in norms else r
        if "in" in norms:
            u = norms["in"](u * scheme.depth_factor("input", self.number, kind))
            u = u * scheme.depth_factor("output", self.number, kind)
        b = getattr(self, self.modules_of[kind])(u)
        if "branch" in norms:
            b = norms["branch"](b)
        if hasattr(self, f"{kind}_gamma"):
            b = getattr(self, f"{kind}_gamma") * b
        if scheme.two_streams:
            streams.y = streams.y + b

        def shrink(x):  # GPAS: smaller activations, unchanged gradients to the layers below
            if not scheme.gates:
                return x
            gate = self.gate if scheme.gates == "layer" else getattr(self, f"{kind}_gate")
            return x - gate * torch.sigmoid(gate) * stop(x)

        b = b * row["beta"][k] * scheme.depth_factor("branch", self.number, kind)
        skip = row["skip"][k]
        if row["omega_init"] is not None:
            skip = skip * getattr(self, f"{kind}_omega")
        if "out" in norms:
            streams.r = norms["out"](skip * shrink(r) + b)
        else:
            total = (skip * r + b) * scheme.depth_factor("residual", self.number, kind)
            streams.r = shrink(total)

    def forward(self, streams, stop):
        if self.scheme.x0:
            streams.r = self.x0_skip * streams.r + self.x0_weight * streams.x0
        self.sublayer("attn", streams, stop)
        self.sublayer("mlp", streams, stop)


class Model(nn.Module):
    def __init__(self, config, scheme):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        gpt2 = config.is_gpt2
        self.names = (
            dict(trunk="transformer", embed="wte", layers="h", final="ln_f")
            if gpt2
            else dict(trunk="model", embed="embed_tokens", layers="layers", final="norm")
        )
        trunk = nn.Module()
        self.add_module(self.names["trunk"], trunk)
        trunk.add_module(self.names["embed"], nn.Embedding(V, C))
        if gpt2:
            trunk.wpe = nn.Embedding(config.max_position_embeddings, C)
        self.scheme = scheme
        if config.norm_type == "dyt":
            trunk.embed_scale = nn.Parameter(torch.ones(1))
        self.has_embed_norm = scheme.row["embed_norm"]
        if self.has_embed_norm:
            trunk.embed_norm = make_norm(config, scheme)
        layers = [Layer(config, scheme, n + 1) for n in range(config.num_hidden_layers)]
        attentions = [getattr(layer, layer.modules_of["attn"]) for layer in layers]
        for attention in attentions[1:]:
            attention.first.append(attentions[0])
        trunk.add_module(self.names["layers"], nn.ModuleList(layers))
        trunk.add_module(self.names["final"], make_norm(config, scheme))
        if scheme.row["mixing"] == "sources":
            trunk.final_sources = SourceAttention(config)
        if scheme.row["reads_second"][-1] and not scheme.row["plain_head"]:
            trunk.second_norm = make_norm(config, scheme)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(C, V, bias=False)
        # Stops gradients in GPAS; checks by finite differences substitute constants.
        self.stop = torch.Tensor.detach

    def forward(self, inputs):
        """Logits (B,T,V) of tokens (B,T)."""
        trunk = getattr(self, self.names["trunk"])
        embed = getattr(trunk, self.names["embed"])
        r = embed(inputs)
        if self.config.is_gpt2:
            r = r + trunk.wpe(torch.arange(inputs.shape[1]))
        if self.config.norm_type == "dyt":
            r = trunk.embed_scale * r
        y = r if self.scheme.two_streams else None
        if self.has_embed_norm:
            r = trunk.embed_norm(r)
        streams = Streams(r, r, y)
        if self.scheme.row["mixing"] == "streams":
            streams.mixed = torch.stack([r] * self.scheme.number, -2)
        for layer in getattr(trunk, self.names["layers"]):
            layer(streams, self.stop)
        if self.scheme.row["mixing"] == "streams":
            streams.r = streams.mixed.mean(-2)
        if self.scheme.row["mixing"] == "sources":
            streams.r = trunk.final_sources(
                sources_of(streams.x0, streams.branches, self.scheme.source_block))
        final, r = getattr(trunk, self.names["final"]), streams.r
        if hasattr(trunk, "second_norm"):
            r = final(r + trunk.second_norm(streams.y))
        elif self.scheme.row["plain_head"]:
            r = r + final(streams.y)
        else:
            r = final(r)
        if self.scheme.row["depth_transfer"]:
            r = r * (self.scheme.base_width / self.config.hidden_size)
        head = embed.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return r @ head.T

    def load(self, parameters):
        """Sets exactly all parameters from {name: array}; returns self."""
        own = dict(self.named_parameters())
        if set(own) != set(parameters):
            raise ValueError(f"missing parameters {sorted(set(own) - set(parameters))}, "
                             f"unknown parameters {sorted(set(parameters) - set(own))}")
        with torch.no_grad():
            for name, parameter in own.items():
                value = torch.tensor(parameters[name], dtype=parameter.dtype)
                if value.shape != parameter.shape:
                    raise ValueError(f"{name} is {tuple(value.shape)}, expected "
                                     f"{tuple(parameter.shape)}")
                parameter.copy_(value)
        return self


def loss_of(logits, targets):
    """Mean cross-entropy in nats over targets other than −1."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def forward_backward(config, scheme, parameters, inputs, targets, dtype=torch.float64):
    """{"loss", "logits", "grad.NAME"…} as numpy arrays of `dtype`."""
    model = Model(config, scheme).to(dtype).load(parameters)
    logits = model(torch.tensor(inputs, dtype=torch.long))
    loss = loss_of(logits, torch.tensor(targets, dtype=torch.long))
    loss.backward()
    result = {"loss": loss.detach().numpy(), "logits": logits.detach().numpy()}
    for name, parameter in model.named_parameters():
        result["grad." + name] = parameter.grad.numpy()
    return result
