"""Repeats the steps of runs with --overfit-batch in PyTorch, in float64, and compares.

    dev/oracles/muon.py BASE STATE RUN...

BASE holds the weights that the runs began with, STATE is a --dump-state with their batch. Each RUN's flags
say which optimizer it had. What torch.optim.Muon has (Muon by Newton-Schulz, with either scale) is compared
with that, too; it computes in float64 where it would convert to bfloat16.
"""

import copy
import glob
import json
import sys
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

base, state, *runs = sys.argv[1:]
original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
conv1d = original.config.model_type == "gpt2"  # its matrices are (inputs, outputs)
batch = load_file(state)
inputs, targets = batch["inputs"].long(), batch["targets"].long()

POLAR_EXPRESS = [  # Amsel et al., arXiv 2505.16932, listing 1
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


def orthogonalized(u, how):
    if how == "polar-express":
        x = u / (u.norm() * 1.01).clamp(min=1e-7)
        coefficients = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS]
    else:
        x = u / u.norm().clamp(min=1e-7)  # as torch.optim.Muon; Jordan adds 1e-7
        coefficients = [(3.4445, -4.7750, 2.0315)] * 5
    for a, b, c in coefficients:
        xxx = x @ x.T @ x
        x = a * x + b * xxx + c * x @ x.T @ xxx
    return x


class Update:
    """One parameter's optimizer."""

    def __init__(self, p, by_muon, flags):
        self.p, self.by_muon, self.flags = p, by_muon, flags
        self.m, self.v, self.steps = torch.zeros_like(p), torch.zeros_like(p), 0
        self.v_rows = 0.0

    def step(self, lr, muon_lr):
        f, p, g = self.flags, self.p, self.p.grad
        if self.by_muon:
            lr = muon_lr
            self.m = f["--momentum"] * self.m + (1 - f["--momentum"]) * g
            u = f["--momentum"] * self.m + (1 - f["--momentum"]) * g
            u = self.direction(u.T).T if conv1d else self.direction(u)
        else:
            self.steps += 1
            b1, b2 = f["--beta1"], f["--beta2"]
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g * g
            u = self.m / (1 - b1**self.steps) / ((self.v / (1 - b2**self.steps)).sqrt() + f["--eps"])
        decay = f["--weight-decay"] * p if p.ndim == 2 else torch.zeros_like(p)
        if f["--cautious-decay"]:
            decay = torch.where(u * p >= 0, decay, 0)
        p -= lr * (u + decay)

    def direction(self, u):  # (outputs, inputs)
        f = self.flags
        rows, columns = u.shape
        moonlight = f["--muon-scale"] == "moonlight"
        o = orthogonalized(u, f["--orthogonalize"])
        if f["--optimizer"] == "normuon":
            self.v_rows = f["--beta2"] * self.v_rows + (1 - f["--beta2"]) * o.square().mean(1, keepdim=True)
            divided = o / (self.v_rows.sqrt() + 1e-10)
            if moonlight:  # the paper's algorithm 1
                return 0.2 * (rows * columns) ** 0.5 / divided.norm() * divided
            o = divided * (o.norm() / divided.norm())  # its code
        return o * (0.2 * max(rows, columns) ** 0.5 if moonlight else max(1, rows / columns) ** 0.5)


def torch_muon(parameters, flags):
    if flags["--optimizer"] != "muon" or flags["--orthogonalize"] != "newton-schulz" or conv1d:
        return None
    return torch.optim.Muon(parameters, momentum=flags["--momentum"], weight_decay=flags["--weight-decay"],
                            adjust_lr_fn={"moonlight": "match_rms_adamw", "jordan": "original"}[flags["--muon-scale"]])  # fmt: skip


def trained(run, flags, with_torch):
    """The model after the run's steps, and the largest error of a loss or norm in its log."""
    model, worst = copy.deepcopy(original), 0.0
    in_layers = {p for name, p in model.named_parameters() if p.ndim == 2 and (".layers." in name or ".h." in name)}
    muon = flags["--optimizer"] != "adamw"
    updates = [Update(p, muon and p in in_layers, flags) for p in model.parameters()]
    theirs = torch_muon([u.p for u in updates if u.by_muon], flags) if with_torch else None
    if with_torch and theirs is None:
        return None, worst
    for line in map(json.loads, open(f"{run}/log.jsonl")):
        logits = model(inputs).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon_lr = line["lr"] * (flags["--muon-lr"] or flags["--lr"]) / flags["--lr"]
        with torch.no_grad():
            for u in updates:
                if not (theirs and u.by_muon):
                    u.step(line["lr"], muon_lr)
        if theirs:
            theirs.param_groups[0]["lr"] = muon_lr
            with mock.patch.object(torch, "bfloat16", torch.float64):
                theirs.step()
        model.zero_grad()
        for name, value in ("loss", loss), ("grad_norm", norm):
            worst = max(worst, abs(line[name] / value.item() - 1))
    return model, worst


def error(found, expected):
    with torch.no_grad():
        return max(((p - q).norm() / q.norm()).item() for p, q in zip(found.parameters(), expected.parameters()))


failed = False
for run in runs:
    checkpoint = sorted(glob.glob(f"{run}/step-*"))[-1]
    flags = json.load(open(f"{checkpoint}/trainer_state.json"))["flags"]
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    for with_torch in False, True:
        model, worst = trained(run, flags, with_torch)
        if model is None:
            continue
        weights = error(found, model)
        assert error(found, original) > 1e-2, "the run did not train"
        print(f"{run.split('/')[-1]:16}{'torch.optim.Muon' if with_torch else 'definition':18}"
              f"losses and norms {worst:.1e}, weights {weights:.1e}")  # fmt: skip
        failed |= not max(worst, weights) < 1e-5
sys.exit(failed)
