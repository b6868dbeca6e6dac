#!/usr/bin/env python3
"""`make bench DEVICE=cuda`: training speed of ./train_gpt on this machine's GPU, and of PyTorch.

Every model is trained with the largest batch that fits and with the 131,072 tokens per step of arXiv
2502.05795, in two ways: `mixed` (bf16 with float master weights and moments; PyTorch's autocast)
and `pure` (everything in bf16; PyTorch's model and AdamW in bf16). Then attention is timed alone,
and the parts of a step. train_gpt runs first, PyTorch in the time that --minutes leaves; its batch
is halved until it fits.

PyTorch is found as by bench.py (BENCH_TORCH, --torch, build/torch), and must see the GPU."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from bench import GIB, ROOT, find_torch, install_newest, run_json, say, table

PAPER = 131072  # tokens per step
SHAPES = [("llama-130m", 1024), ("gpt2-124m", 1024), ("llama-1b", 1024), ("llama-350m", 1024),
          ("llama-130m", 256), ("gpt2-124m", 256)]
QUICK = SHAPES[:3]
WAYS = {
    "mixed": ["--dtype", "bf16"],
    "pure": ["--dtype", "bf16", "--master-weights", "no", "--moments", "bf16"],
}
MODES = {"mixed": ["autocast+compile", "autocast", "autocast+max"],
         "pure": ["pure+compile", "pure", "pure+max"]}
LENGTHS = [1024, 2048, 4096, 8192]
ATTENTION_TOKENS, HEADS, HEAD_SIZE = 16384, 12, 64

# The required performance on an H100, at least.
MFU_BARS = {("llama-130m", 1024): 0.50, ("llama-1b", 1024): 0.60}
TORCH_BAR, ATTENTION_BAR, LIMIT_BAR = 1.15, 0.9, 0.85
# Parts of a step and their names in the profile.
PARTS = {"junction": ["junctions"], "head and loss": ["head", "loss"], "optimizer": ["AdamW"]}


class Case:
    def __init__(self, model, seq_len, batch, way):
        self.model, self.seq_len, self.batch, self.way = model, seq_len, batch, way
        self.ours, self.missing = None, None
        self.torch = []  # a result per mode that ran

    @property
    def largest(self):
        return self.batch == 0

    @property
    def name(self):
        batch = self.ours["batch"] if self.ours else self.batch or "largest"
        return f"{self.model} {batch} x {self.seq_len} {self.way}"

    def best(self):
        return max(self.torch, key=lambda r: r["tokens_per_s"], default=None)


class Budget:
    def __init__(self, minutes):
        self.started, self.minutes = time.time(), minutes

    def left(self):
        """Seconds left."""
        return self.started + 60 * self.minutes - time.time()


def bench(o, arguments, timeout):
    command = [o.program, "bench", "--device", "cuda", "--json"] + [str(a) for a in arguments]
    result, why = run_json(command, dict(os.environ), timeout)
    return result, why and why.replace("train_gpt: ", "")


def run_ours(case, o, budget):
    if budget.left() < 20:
        case.missing = "no time left"
        return
    case.ours, case.missing = bench(
        o, ["-m", case.model, "-t", case.seq_len, "-b", case.batch, "--steps", o.steps]
        + WAYS[case.way], budget.left())
    if case.ours:
        say(f"{case.name:<36} {case.ours['tokens_per_s']:9.0f} tokens/s  "
            f"MFU {100 * case.ours['mfu']:.1f}%")
    else:
        say(f"{case.name:<36} {case.missing}")


# --------------------------------------------------------------------------- PyTorch


def run_torch(case, torch, mode, o, budget):
    """Appends a result to case.torch, with at most train_gpt's batch; None if it failed or there was
    no time."""
    batch, label = case.ours["batch"], f"  {torch.name} {mode}"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(case.ours["config"], config)
        config.flush()
        while batch > 0:
            if budget.left() < 60:
                say(f"{label:<36} no time left")
                return None
            command = [torch.python, os.path.join(ROOT, "dev", "bench", "torch_step.py"),
                       "--device", "cuda", "--config", config.name, "--batch", str(batch),
                       "--seq-len", str(case.seq_len), "--threads", str(os.cpu_count() or 1),
                       "--mode", mode, "--steps", "3", "--group", str(o.steps)]
            result, why = run_json(command, dict(os.environ), budget.left())
            if result or "out of memory" not in why:
                break
            batch //= 2
    if not result:
        say(f"{label:<36} {why}")
        return None
    result["batch"] = batch
    note = "" if batch == case.ours["batch"] else f"  ({batch} sequences: more do not fit)"
    if result["parameters"] != case.ours["parameters"]:
        note += f"  NOT THE SAME MODEL: {result['parameters']} parameters"
    say(f"{label:<36} {result['tokens_per_s']:9.0f} tokens/s{note}")
    case.torch.append(result)
    return result


def sees_gpu(torch):
    return subprocess.run([torch.python, "-c", "import torch; exit(not torch.cuda.is_available())"],
                          stderr=subprocess.DEVNULL).returncode == 0


# --------------------------------------------------------------------------- attention and parts


def attention_model(folder):
    """Writes a config.json whose cost is mostly attention, without RoPE, for lengths up to 8192."""
    width = HEADS * HEAD_SIZE
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 512,
                   "n_embd": width, "n_layer": 4, "n_head": HEADS, "n_inner": 64,
                   "n_positions": max(LENGTHS), "layer_norm_epsilon": 1e-5,
                   "activation_function": "gelu_new", "tie_word_embeddings": True}, file)
    return folder


def measure_attention(o, torch, budget):
    """[{T, direction, ours, torch: FLOP/s, backend}]"""
    rows, theirs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        model = attention_model(folder)
        for T in LENGTHS:
            if budget.left() < 20:
                break
            result, why = bench(o, ["-m", model, "-t", T, "-b", ATTENTION_TOKENS // T, "--steps", 10,
                                    "--profile"] + WAYS["mixed"], budget.left())
            if not result:
                say(f"attention of {T}: {why}")
                continue
            for direction in ["forward", "backward"]:
                part = next((p for p in result.get("profile") or []
                             if (p["part"], p["group"]) == ("attention", direction)), None)
                if part:
                    rows.append({"T": T, "direction": direction,
                                 "flops": part["flops"] / part["calls"],
                                 "ours": part["flops"] / part["seconds"]})
    if torch and rows and budget.left() > 20:
        theirs, why = run_json([torch.python, os.path.join(ROOT, "dev", "bench",
                                                           "torch_attention.py"),
                                "--tokens", str(ATTENTION_TOKENS), "--heads", str(HEADS),
                                "--head-size", str(HEAD_SIZE),
                                "--lengths", ",".join(map(str, LENGTHS))],
                               dict(os.environ), budget.left())
        if not theirs:
            say(f"{torch.name}'s attention: {why}")
    for row in rows:
        of_length = (theirs or {}).get(str(row["T"]), {})
        speeds = {name: row["flops"] / times[row["direction"]]
                  for name, times in of_length.items() if row["direction"] in times}
        if speeds:
            row["backend"] = max(speeds, key=speeds.get)
            row["torch"] = speeds[row["backend"]]
    return rows


def measure_parts(o, budget):
    """The parts of a step of the first shape: seconds, and the least seconds by hardware limits."""
    if budget.left() < 20:
        return []
    model, T = SHAPES[0]
    result, why = bench(o, ["-m", model, "-t", T, "-b", 0, "--steps", 10, "--profile"]
                        + WAYS["mixed"], budget.left())
    if not result:
        say(f"parts of a step: {why}")
        return []
    flops, bandwidth = result["peak_flops"]["bf16"], result["bandwidth"]["update"]
    parts = []
    for name, names in PARTS.items():
        of = [p for p in result.get("profile") or [] if p["part"] in names and p["seconds"] > 0]
        if of:
            limit = sum(max(p["flops"] / flops, p["bytes"] / bandwidth) for p in of)
            parts.append({"part": name, "seconds": sum(p["seconds"] for p in of), "limit": limit})
    return parts


# --------------------------------------------------------------------------- report


def case_rows(cases):
    rows = []
    for c in cases:
        if not c.ours:
            rows.append([c.model, c.batch or "largest", c.seq_len, c.way, "none"] + [""] * 7)
            continue
        r, best = c.ours, c.best()
        row = [c.model, r["batch"], c.seq_len, c.way, f"{r['tokens_per_s']:.0f}",
               f"{100 * r['mfu']:.1f}%",
               "-" if r["mfu_measured"] is None else f"{100 * r['mfu_measured']:.1f}%",
               f"{r['peak_memory'] / GIB:.1f}"]
        row += [f"{best['tokens_per_s']:.0f}", best["mode"], f"{best['peak_memory'] / GIB:.1f}",
                f"{r['tokens_per_s'] / best['tokens_per_s']:.2f}x"] if best else [""] * 4
        rows.append(row)
    return rows


def judged(cases, attention, parts):
    """[what, bar, measured, verdict]"""
    rows = []

    def judge(what, bar, value):
        rows.append([what, f"{bar:.2f}", f"{value:.3f}", "met" if value >= bar else "not met"])

    for (model, seq_len), bar in MFU_BARS.items():
        ran = [c.ours["mfu"] for c in cases if c.ours and (c.model, c.seq_len) == (model, seq_len)]
        if ran:
            judge(f"MFU of {model} at {seq_len}", bar, max(ran))
    for c in cases:
        if c.ours and c.best():
            judge(f"{c.name} against PyTorch", TORCH_BAR,
                  c.ours["tokens_per_s"] / c.best()["tokens_per_s"])
    for row in attention:
        if "torch" in row:
            judge(f"attention {row['direction']} of {row['T']} against SDPA", ATTENTION_BAR,
                  row["ours"] / row["torch"])
    for part in parts:
        judge(f"{part['part']}, of its limit", LIMIT_BAR, part["limit"] / part["seconds"])
    return rows


def report(cases, attention, parts, torch, o):
    done = [c.ours for c in cases if c.ours]
    if done:
        r = done[0]
        p, m = ({k: max(d[key][k] for d in done) for k in r[key]}
                for key in ("peak_flops", "bandwidth"))
        say(f"\n{r['gpu']}: {p['bf16'] / 1e12:.0f} TFLOP/s in bf16 measured, "
            f"{r['data_sheet_flops'] / 1e12:.0f} by the data sheet, {p['float32'] / 1e12:.1f} in "
            f"float32; memory {m['read'] / 1e9:.0f} GB/s read, {m['write'] / 1e9:.0f} written, "
            f"{m['update'] / 1e9:.0f} updated")
    headers = ["model", "batch", "length", "way", "tokens/s", "MFU", "of measured", "GiB",
               torch.name if torch else "PyTorch", "mode", "GiB", "ratio"]
    say("\n" + table(headers, case_rows(cases)))
    for c in cases:
        if c.missing:
            say(f"{c.name}: {c.missing}")
    if attention:
        say("\n" + table(["attention", "length", "TFLOP/s", "SDPA", "backend", "ratio"], [
            [r["direction"], r["T"], f"{r['ours'] / 1e12:.1f}"]
            + ([f"{r['torch'] / 1e12:.1f}", r["backend"], f"{r['ours'] / r['torch']:.2f}x"]
               if "torch" in r else ["", "", ""]) for r in attention]))
    rows = judged(cases, attention, parts)
    if rows:
        say("\nThe bars\n" + table(["what", "bar", "measured", ""], rows))
    with open(o.out, "w") as file:
        json.dump({
            "torch": torch and {"python": torch.python, "version": torch.version},
            "cases": [{"model": c.model, "seq_len": c.seq_len, "largest": c.largest, "way": c.way,
                       "missing": c.missing, "ours": c.ours, "torch": c.torch} for c in cases],
            "attention": attention,
            "parts": parts,
            "bars": [dict(zip(["what", "bar", "measured", "verdict"], row)) for row in rows],
        }, file, indent=1)
    say(f"\nAll results: {os.path.relpath(o.out)}")


def selected(o):
    cases = []
    for model, seq_len in QUICK if o.quick else SHAPES:
        if o.only and not any(f"{model}:{seq_len}:".startswith(only + ":") for only in o.only):
            continue
        for batch in [0] if o.quick else [0, PAPER // seq_len]:
            cases += [Case(model, seq_len, batch, way) for way in WAYS]
    if not cases:
        sys.exit("bench_gpu.py: --only " + ",".join(o.only) + " selects no case; the cases are "
                 + ", ".join(f"{model}:{seq_len}" for model, seq_len in SHAPES))
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.path.join(ROOT, "train_gpt"))
    parser.add_argument("--only", action="append", default=[], metavar="MODEL[:LENGTH]",
                        help="run these cases; may be repeated or separated by commas")
    parser.add_argument("--steps", type=int, default=20, help="timed steps [%(default)s]")
    parser.add_argument("--quick", action="store_true",
                        help="few models, the largest batch, PyTorch compiled")
    parser.add_argument("--minutes", type=float, help="start nothing after this time "
                        "[quick: 9, else 60]")
    parser.add_argument("--torch", default=os.environ.get("BENCH_TORCH", ""), metavar="PYTHON",
                        help="a Python with PyTorch; none: no PyTorch")
    parser.add_argument("--install-torch", action="store_true",
                        help="install the newest from PyPI into build/torch")
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "bench-cuda.json"))
    o = parser.parse_args()
    o.only = [only for word in o.only for only in word.split(",") if only]
    cases = selected(o)
    if o.install_torch:
        install_newest()
    budget = Budget(o.minutes or (9 if o.quick else 60))
    torch = next((t for t in reversed([] if o.torch == "none" else find_torch(o))
                  if not t.old and sees_gpu(t)), None)
    say(f"{torch.name} ({torch.python})" if torch else "There is no PyTorch that sees the GPU.")
    os.makedirs(os.path.dirname(os.path.abspath(o.out)), exist_ok=True)

    for case in cases:
        run_ours(case, o, budget)
    if not any(c.ours for c in cases):
        sys.exit("bench_gpu.py: nothing ran")
    parts = measure_parts(o, budget)
    attention = measure_attention(o, torch, budget)
    for mode in range(1 if o.quick else 3):  # the most promising mode of every case first
        for case in cases if torch else []:
            if case.ours and budget.left() > 60:
                say(case.name)
                run_torch(case, torch, MODES[case.way][mode], o, budget)
    report(cases, attention, parts, torch, o)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
