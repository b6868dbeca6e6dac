"""Repeats the steps of a run with --lisa --overfit-batch in PyTorch, and compares.

    dev/oracles/lisa.py BASE STATE RUN

BASE holds the weights that RUN began with, STATE is a --dump-state with its batch. As in the code of
LISA, the weights of layers that rest have requires_grad=False: clip_grad_norm_ and AdamW, which counts
steps for each tensor, skip them. Which layers train, and the learning rate, are taken from log.jsonl.
"""

import glob
import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

base, state, run = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
layers = model.model.layers if hasattr(model, "model") else model.transformer.h
start = {name: p.detach().clone() for name, p in model.named_parameters()}
batch = load_file(state)
inputs, targets = batch["inputs"].long(), batch["targets"].long()
optimizer = torch.optim.AdamW(
    [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
     {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0}],
    betas=(0.9, 0.95), eps=1e-8)  # fmt: skip

worst, counts = 0.0, set()
for line in map(json.loads, open(f"{run}/log.jsonl")):
    for l, layer in enumerate(layers):
        layer.requires_grad_(l + 1 in line["lisa"])
    counts.add(tuple(line["lisa"]))
    for group in optimizer.param_groups:
        group["lr"] = line["lr"]
    loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(),
                                             ignore_index=-1)  # fmt: skip
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for name, value in ("loss", loss), ("grad_norm", norm):
        worst = max(worst, abs(line[name] / value.item() - 1))

found = AutoModelForCausalLM.from_pretrained(sorted(glob.glob(f"{run}/step-*"))[-1], dtype=torch.float64)
for name, p in found.named_parameters():
    expected = dict(model.named_parameters())[name].detach() - start[name]
    change = p.detach() - start[name]
    size = expected.norm().item()
    if size == 0:  # a layer that was never drawn
        assert change.norm() == 0, f"{name} changed"
    else:
        worst = max(worst, (change - expected).norm().item() / size)
print(f"{len(counts)} sets of layers, largest error {worst:.1e}")
assert len(counts) > 2 and worst < 1e-3
