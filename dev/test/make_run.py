#!/usr/bin/env python3
"""Makes a run directory as ./train_gpt writes it, with losses and probes that formulas give.

    make_run.py DIR SCHEME [--seed N] [--final LOSS] [--lr LR] [--layers L] [--probe] …

The validation loss falls from 5.5 to --final, as exp(−5 tokens / all tokens) does."""

import argparse
import json
import math
import os
import random

parser = argparse.ArgumentParser()
parser.add_argument("dir")
parser.add_argument("scheme")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--final", type=float, default=2.0)
parser.add_argument("--lr", default="0.001")
parser.add_argument("--embed-std", default="0")
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--stop", type=int, help="the last step that was logged")
parser.add_argument("--end", choices=["whole", "cut", "nan", "rise", "none"], default="whole")
parser.add_argument("--tokenizer", default="gpt2:50257")
parser.add_argument("--bits", action="store_true", help="val_bits_per_byte, half the loss")
parser.add_argument("--probe", action="store_true")
parser.add_argument("--tasks", action="store_true", help="accuracies that rise from chance")
parser.add_argument("--no-log", action="store_true")
args = parser.parse_args()
L, width, per_step = args.layers, 24, 1000
random.seed(f"{args.scheme} {args.seed}")
lns = args.scheme.startswith("lns")
# Pre-LN grows as e^(0.3 ℓ), LNS as ℓ.
variance = [0.01] + [layer if lns else math.exp(0.3 * layer) for layer in range(1, L + 1)]


def loss_at(step):
    fall = (math.exp(-5 * step / args.steps) - math.exp(-5)) / (1 - math.exp(-5))
    rise = 5 * step / args.steps if args.end == "rise" else 0
    return args.final + (5.5 - args.final) * fall + rise


def write(name, values):
    path = os.path.join(args.dir, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file)


os.makedirs(args.dir, exist_ok=True)
flags = {"--norm": args.scheme, "--lr": args.lr, "--seed": str(args.seed)}
flags.update({"--steps": str(args.steps), "--model": "made", "--train": args.tokenizer})
flags.update({"--embed-std": args.embed_std, "--layers": str(args.layers)})
if not args.no_log:
    last = args.stop or args.steps
    with open(os.path.join(args.dir, "log.jsonl"), "w", encoding="utf-8") as file:
        for step in range(1, last + 1):
            record = {"step": step, "loss": loss_at(step) + random.gauss(0, 0.05)}
            if step % 10 == 0 or step == last:
                record["val_loss"] = loss_at(step)
                if args.tasks:
                    record["tasks"] = {
                        name: {"acc": chance + 0.3 * step / args.steps, "acc_stderr": 0.02,
                               "chance": chance, "questions": 100}
                        for name, chance in (("arc_easy", 0.25), ("boolq", 0.5))}  # fmt: skip
                record["residual_variance"] = [v ** (step / args.steps) for v in variance]
                if args.bits:
                    record["val_bits_per_byte"] = loss_at(step) / 2
            record.update({"lr": float(args.lr), "grad_norm": 1.0, "tokens": step * per_step})
            record.update({"tokens_per_s": 500.0, "mfu": None, "seconds": step * per_step / 500})
            if args.end == "nan" and step == last:
                record["loss"] = math.nan
            line = json.dumps(record) + "\n"
            file.write(line[:40] if args.end == "cut" and step == last else line)
    write("run.json", {"starts": [{"command": f"./train_gpt -n '{args.scheme}'",
                                   "time": "2025-01-01T00:00:00Z"}], "options": flags})  # fmt: skip
    if args.end != "none":
        kind, vocabulary = args.tokenizer.split(":")
        at = f"step-{last:06d}/"
        write(at + "config.json", {"model_type": "llama", "num_hidden_layers": L,
              "hidden_size": width, "vocab_size": int(vocabulary),
              "lns_cpp": {"scheme": args.scheme, "preset": "made"}})  # fmt: skip
        write(at + "trainer_state.json", {"flags": flags, "tokenizer": {
              "kind": kind, "vocab_size": int(vocabulary), "eot": 0, "fingerprint": 1}})  # fmt: skip

if args.probe:
    layers = range(1, L + 1)
    fade = [1 / layer if lns else math.exp(-0.4 * layer) for layer in layers]
    write("probe.json", {
        "version": 1, "checkpoint": args.dir, "step": args.steps, "model": "made",
        "scheme": args.scheme, "layers": L, "width": width, "tokens": 4096, "loss": args.final,
        "variance": {"residual": variance, "attention": [v * f for v, f in zip(variance[1:], fade)],
                     "mlp": [2 * v * f for v, f in zip(variance[1:], fade)],
                     "power_exponent": 1.0 if lns else 1.3, "power_r2": 1.0 if lns else 0.85,
                     "exponential_rate": 0.2 if lns else 0.3,
                     "exponential_r2": 0.9 if lns else 1.0},
        "gradient_norm": {"residual": [0.1 * (1 + f) for f in [1.5, *fade]],
                          "attention": fade, "mlp": [0.7 * f for f in fade],
                          "norm": [0.1 * f for f in fade]},
        "angular_distance": {kind: [[scale * sum(fade[i : i + n]) / (1 + sum(fade[i : i + n]))
                                     for i in range(L - n + 1)] for n in layers]
                             for kind, scale in (("last_token", 0.45), ("all_tokens", 0.4))},
        "removal": {"single": [args.final + f - 0.005 for f in fade],
                    "blocks": [[args.final + 2 * sum(fade[i : i + n]) - 0.003
                                for i in range(L - n + 1)] for n in layers]},
        "jacobian": {"deviation": fade, "deviation_error": [0.1 * f for f in fade],
                     "norm": [1 + f for f in fade], "norm_error": [0.02] * L, "probes": 8,
                     "full": {"layer": L // 2, "matrix": [
                         [(i == j) + random.gauss(0, 0.3 if lns else 0.02) for j in range(width)]
                         for i in range(width)]}},
        "usefulness": {"linear_loss": [args.final + 0.6 * f for f in fade],
                       "share": sum(0.6 * f > 0.1 * args.final for f in fade) / L},
        "permutation": [args.final + 0.5 * f for f in fade[1:]],
        **({"task_removal": {"arc_easy": {
            "questions": 100, "accuracy": 0.55, "change": [-0.3 * f for f in fade],
            "change_error": [0.02] * L}}} if args.tasks else {}),
    })  # fmt: skip
