#!/usr/bin/env python3
"""Times training steps of a GPT-2 or LLaMA in PyTorch, for `make bench`.

Unlike the reference in dev/reference, the model is written for speed: q, k and v share a matrix, as
do gate and up, and attention, RMSNorm and AdamW are fused if this PyTorch has them fused. A step is
the same as train_gpt's: zero gradients, forward, backward, clip the gradient norm to 1, AdamW.
Requires Python 3.8 and PyTorch 1.13; prints one JSON object.

Modes: eager and compile; for bf16 autocast (float parameters, bf16 matmuls) or pure (model and
moments in bf16, which is less work than train_gpt's default with float master weights).

On a GPU (--device cuda) steps are enqueued without waiting and timed --group at a time, and the head
is padded to a multiple of 128 rows, as is common for GPT-2: matmuls with 50,257 columns are slow.
The padding is not counted as parameters."""

import argparse
import contextlib
import json
import os
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if hasattr(F, "rms_norm"):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight


def attention(q, k, v):
    """(B, heads, T, size) each, causal."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    T = q.shape[-2]
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    causal_mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(causal_mask, float("-inf")).softmax(-1) @ v


def rotate(x, cos, sin):
    """RoPE: x (B, heads, T, size); cos, sin (T, size / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Sizes:
    """The sizes in a Hugging Face config.json."""

    def __init__(self, c):
        self.gpt2 = c["model_type"].endswith("gpt2")
        if not self.gpt2 and not c["model_type"].endswith("llama"):
            raise SystemExit(f"torch_step.py supports GPT-2 and LLaMA, not {c['model_type']!r}")
        name = (lambda gpt2, llama: c[gpt2 if self.gpt2 else llama])
        self.vocab = c["vocab_size"]
        self.width = name("n_embd", "hidden_size")
        self.layers = name("n_layer", "num_hidden_layers")
        self.heads = name("n_head", "num_attention_heads")
        self.kv_heads = self.heads if self.gpt2 else c.get("num_key_value_heads") or self.heads
        self.head = c.get("head_dim") or self.width // self.heads
        self.hidden = (c.get("n_inner") or 4 * self.width) if self.gpt2 else c["intermediate_size"]
        self.positions = name("n_positions", "max_position_embeddings")
        self.eps = c.get("layer_norm_epsilon", 1e-5) if self.gpt2 else c["rms_norm_eps"]
        self.theta = c.get("rope_theta", 10000.0)
        self.tied = c.get("tie_word_embeddings", self.gpt2)

    def norm(self):
        return (nn.LayerNorm if self.gpt2 else RMSNorm)(self.width, self.eps)

    def linear(self, inputs, outputs):
        return nn.Linear(inputs, outputs, bias=self.gpt2)


class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.norm1, self.norm2 = s.norm(), s.norm()
        self.widths = [n * s.head for n in (s.heads, s.kv_heads, s.kv_heads)]
        self.qkv = s.linear(s.width, sum(self.widths))
        self.out = s.linear(self.widths[0], s.width)
        self.mlp_in = s.linear(s.width, s.hidden if s.gpt2 else 2 * s.hidden)
        self.mlp_out = s.linear(s.hidden, s.width)

    def forward(self, x, cos, sin):
        s, (B, T, _) = self.s, x.shape
        q, k, v = (y.view(B, T, -1, s.head).transpose(1, 2)
                   for y in self.qkv(self.norm1(x)).split(self.widths, -1))
        if not s.gpt2:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if s.kv_heads != s.heads:
            k, v = (y.repeat_interleave(s.heads // s.kv_heads, 1) for y in (k, v))
        x = x + self.out(attention(q, k, v).transpose(1, 2).reshape(B, T, -1))
        h = self.mlp_in(self.norm2(x))
        if s.gpt2:
            h = F.gelu(h, approximate="tanh")
        else:
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        return x + self.mlp_out(h)


class Model(nn.Module):
    def __init__(self, s, T, vocab):
        """vocab: the vocabulary's size including padding."""
        super().__init__()
        self.s = s
        self.vocab = vocab
        self.wte = nn.Embedding(vocab, s.width)
        if s.gpt2:
            self.wpe = nn.Embedding(s.positions, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = s.norm()
        self.head = nn.Linear(s.width, vocab, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        if s.tied:
            self.head.weight = self.wte.weight
        angle = torch.arange(T)[:, None] * s.theta ** -(torch.arange(0, s.head, 2) / s.head)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.float_loss = False

    def forward(self, inputs, targets):
        x = self.wte(inputs)
        if self.s.gpt2:
            x = x + self.wpe.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).view(-1, self.vocab)
        return F.cross_entropy(logits.float() if self.float_loss else logits, targets.view(-1))


def adamw(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    try:
        return torch.optim.AdamW(groups, fused=True, **settings), "fused"
    except (TypeError, RuntimeError):
        return torch.optim.AdamW(groups, **settings), "not fused"


def peak_memory(device):
    """Bytes; None if unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a Hugging Face config.json")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--group", type=int, default=1,
                        help="steps per synchronization with the GPU [%(default)s]")
    parser.add_argument("--mode", required=True, choices=[
        "eager", "compile", "autocast", "autocast+compile", "autocast+max", "pure", "pure+compile",
        "pure+max"], help="max: compile with mode=max-autotune-no-cudagraphs")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30, help="start no step after this time")
    o = parser.parse_args()

    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    with open(o.config) as file:
        sizes = Sizes(json.load(file))
    T, cuda = o.seq_len, o.device == "cuda"
    vocab = (sizes.vocab + 127) // 128 * 128 if cuda else sizes.vocab
    model = Model(sizes, T, vocab)
    padding = (vocab - sizes.vocab) * sizes.width * (1 if sizes.tied else 2)
    parameters = sum(p.numel() for p in model.parameters()) - padding
    model = model.to(o.device, torch.bfloat16 if "pure" in o.mode else torch.float32)
    optimizer, kind = adamw(model)
    step_model = model
    if "compile" in o.mode:
        step_model = torch.compile(model)
    elif "max" in o.mode:
        step_model = torch.compile(model, mode="max-autotune-no-cudagraphs")
    if "autocast" in o.mode:
        context = lambda: torch.autocast(o.device, dtype=torch.bfloat16)
    else:
        context = contextlib.nullcontext
    tokens = torch.randint(sizes.vocab, (o.batch, T + 1), device=o.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        """Runs a group of steps; returns seconds per step and the last loss."""
        start = time.perf_counter()
        for _ in range(o.group):
            optimizer.zero_grad(set_to_none=True)
            with context():
                loss = step_model(inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / o.group, loss.item()

    started = time.perf_counter()
    try:
        warmup = [step()]
    except RuntimeError as error:  # PyTorch 1.13 has no bf16 cross-entropy
        if "out of memory" in str(error):
            raise SystemExit("out of memory")
        model.float_loss = True
        warmup = [step()]
    if "compile" in o.mode or "max" in o.mode:
        warmup.append(step())
        started = time.perf_counter()
    steps = []
    while len(steps) < o.steps and (not steps or time.perf_counter() - started < o.seconds):
        if not steps and warmup[-1][0] > o.seconds:
            steps = warmup[-1:]  # too slow for another step
            break
        steps.append(step())
    seconds = [s for s, _ in steps]
    print(json.dumps({
        "version": torch.__version__,
        "mode": o.mode,
        "optimizer": kind,
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "first_loss": warmup[0][1],
        "last_loss": steps[-1][1],
        "first_seconds": warmup[0][0],
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "tokens_per_s": o.batch * T / statistics.median(seconds),
        "peak_memory": peak_memory(o.device),
    }))


if __name__ == "__main__":
    main()
