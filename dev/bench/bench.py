#!/usr/bin/env python3
"""`make bench`: training speed of ./train_gpt on this machine, compared with PyTorch if installed.

A case is a model, shape, dtype and number of threads. Cases with a bar to meet are timed over
several rounds, alternating between train_gpt and PyTorch; other cases run in the first round only.
The table shows medians. In the first round PyTorch runs in all of its modes (at intermediate sizes,
in the best ones so far), later only in those within a fifth of the best. Of several measurements of
a peak, the highest counts.

PyTorch runs with its best settings: glibc keeps freed memory (page faults cost PyTorch up to half of
its speed on CPUs); threads are pinned, unless unpinned ones were faster in the first case of a
dtype, which runs both ways; a PyTorch whose float matmuls use the system's BLAS, such as Debian's,
gets an OpenBLAS with the same OpenMP threads if installed (one with its own threads cannot be pinned
beside them, and the reference BLAS is single-threaded, no fair comparison).

BENCH_TORCH=python1,python2 or --torch names Pythons with PyTorch; the default is /usr/bin/python3
and build/torch, into which `make bench TORCH=new` installs the newest version from PyPI."""

import argparse
import glob
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NEWEST = os.path.join(ROOT, "build", "torch")  # a virtual environment
GIB = 2**30


class Case:
    def __init__(self, model, batch, seq_len, dtype, threads=2):
        self.model, self.batch, self.seq_len = model, batch, seq_len
        self.dtype, self.threads = dtype, threads
        self.ours, self.torch, self.missing = [], {}, None  # torch: {python: {mode: [result]}}

    @property
    def name(self):
        return f"{self.model}:{self.batch}x{self.seq_len}:{self.dtype}"

    def __str__(self):
        return f"{self.name} on {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def has_bar(self):
        return any((self.name + ":").startswith(name + ":")
                   and (self.threads == 2 or "over 1" in what) for name, what in BARS)


SHAPES = [("gpt2-124m", 4, 64), ("gpt2-124m", 4, 512), ("gpt2-124m", 4, 1024),
          ("llama-130m", 16, 256), ("tiny", 16, 128)]
INTERMEDIATE = SHAPES[2:4]  # PyTorch's best modes are known from the other shapes
DTYPES = ["float32", "bf16"]
MODES = {"float32": ["eager", "compile"],
         "bf16": ["pure", "autocast", "pure+compile", "autocast+compile"]}

# The required performance on 2 cores: (case, what) -> at least.
BARS = {
    ("gpt2-124m:4x512:bf16", "MFU"): 0.75,
    ("gpt2-124m:4x512:bf16", "against PyTorch 1.13"): 1.8,
    ("gpt2-124m:4x512:bf16", "against the newest PyTorch"): 1.25,
    ("gpt2-124m:4x64:bf16", "tokens/s (8 x llm.c's 51)"): 8 * 51,
    ("llama-130m:16x256:bf16", "MFU"): 0.75,
    ("gpt2-124m:4x512:float32", "MFU"): 0.80,
    ("gpt2-124m:4x512:float32", "against PyTorch 1.13"): 1.3,
    ("gpt2-124m:4x512:float32", "against the newest PyTorch"): 1.3,
    ("tiny:16x128", "against PyTorch 1.13, the faster dtype of each"): 3,
    ("tiny:16x128", "against the newest PyTorch, the faster dtype of each"): 3,
    ("gpt2-124m:4x512:bf16", "2 threads over 1"): 1.85,
    ("gpt2-124m:4x512:float32", "2 threads over 1"): 1.85,
    ("gpt2-124m:4x512:bf16", "peak memory, GiB, at most"): 3.2,
}


def median(values):
    values = list(values)
    return statistics.median(values) if values else None


def say(text):
    print(text, flush=True)


def busy_seconds():
    """CPU seconds of all processes, and of this one's children."""
    try:
        with open("/proc/stat") as file:
            user, nice, system = file.readline().split()[1:4]
    except OSError:
        return None
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ((int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK"),
            children.ru_utime + children.ru_stime)


def run_json(command, env, timeout):
    """(the JSON object on the last line of the command's output, None) or (None, reason). Adds
    "other_cores", the average number of cores that other processes kept busy."""
    before, started = busy_seconds(), time.time()
    result, why = run_program(command, env, timeout)
    if result and before:
        everyone, children = (b - a for a, b in zip(before, busy_seconds()))
        result["other_cores"] = max(0.0, everyone - children) / max(time.time() - started, 0.1)
    return result, why


def run_program(command, env, timeout):
    try:
        done = subprocess.run(command, env=env, timeout=timeout, text=True, cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        return None, error.strerror
    except subprocess.TimeoutExpired:
        return None, f"took longer than {timeout:.0f} s"
    if done.returncode == 0:
        try:
            return json.loads(done.stdout.strip().splitlines()[-1]), None
        except (ValueError, IndexError):
            return None, "printed no JSON"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return None, (lines[-1] if lines else f"exit status {done.returncode}")[:160]


# --------------------------------------------------------------------------- ours


def run_ours(case, o):
    command = [o.program, "bench", "--json", "--device", "cpu", "-m", case.model, "-b",
               str(case.batch), "-t", str(case.seq_len), "--dtype", case.dtype, "--threads",
               str(case.threads), "--steps", str(steps_of(case, o))]
    result, why = run_json(command, dict(os.environ), 600)
    if result is None:
        case.missing = why.replace("train_gpt: ", "")
        say(f"  train_gpt: {case.missing}")
        return
    case.ours.append(result)
    say(f"  train_gpt{'':<27} {result['tokens_per_s']:8.0f} tokens/s")


def steps_of(case, o):
    """Timed steps of a case; more for short ones."""
    steps = 30 if case.model == "tiny" else 10 if case.batch * case.seq_len < 1000 else 4
    return max(2, steps // 2) if o.quick or not case.has_bar else steps


# --------------------------------------------------------------------------- PyTorch


class Torch:
    def __init__(self, python, description):
        self.python = python
        self.version, self.config = description["version"], description["config"]
        self.blas = description["blas"]
        self.name = "PyTorch " + self.version.split("+")[0]

    @property
    def old(self):  # torch.compile came with 2.0
        return self.version.startswith("1.")


DESCRIBE = """
import json, os, re, torch
torch.ones(300, 300) @ torch.ones(300, 300)
mapped = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
blas = sorted({os.path.realpath(p) for p in re.findall(r"/\\S*(?:blas|mkl)\\S*\\.so\\S*", mapped)})
print(json.dumps({"version": torch.__version__, "config": torch.__config__.show(), "blas": blas}))
"""


def find_torch(o):
    """The Pythons with PyTorch, oldest version first."""
    wanted = [p for p in o.torch.split(",") if p]
    found = []
    usual = ["/usr/bin/python3", shutil.which("python3"), os.path.join(NEWEST, "bin", "python")]
    for python in wanted or dict.fromkeys(p for p in usual if p):
        if not os.path.exists(python) and not wanted:
            continue
        description, why = run_json([python, "-c", DESCRIBE], torch_environment(2, True), 120)
        if description:
            found.append(Torch(python, description))
        elif wanted:
            sys.exit(f"bench.py: {python} has no PyTorch that works: {why}")
    return sorted(found, key=lambda t: [int(n) for n in t.version.split(".")[:2]])


def install_newest():
    python = os.path.join(NEWEST, "bin", "python")
    if os.path.exists(python) and subprocess.run([python, "-c", "import torch"],
                                                 stderr=subprocess.DEVNULL).returncode == 0:
        return
    say(f"installing the newest PyTorch from PyPI into {os.path.relpath(NEWEST)} ...")
    try:
        subprocess.run([sys.executable, "-m", "venv", NEWEST], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch", "numpy"], check=True)
    except subprocess.CalledProcessError:
        sys.exit("bench.py: PyTorch could not be installed (Debian's Python needs python3-venv): "
                 "name a Python that has it with --torch, or use --torch none")


def torch_environment(threads, pinned):
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(threads)
    env.pop("OMP_PROC_BIND", None)
    if pinned:
        env["OMP_PROC_BIND"] = "true"
    # Keep freed memory, and use huge pages.
    env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:"
                   f"glibc.malloc.mmap_threshold={8 * GIB}:glibc.malloc.trim_threshold={16 * GIB}")
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if openblas := glob.glob("/usr/lib/*/openblas-openmp/libblas.so.3"):
        paths = [os.path.dirname(openblas[0]), env.get("LD_LIBRARY_PATH")]
        env["LD_LIBRARY_PATH"] = ":".join(p for p in paths if p)
    return env


def run_torch(case, torch, mode, pinned, o):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(case.config, config)
        config.flush()
        command = [torch.python, os.path.join(ROOT, "dev", "bench", "torch_step.py"), "--config",
                   config.name, "--batch", str(case.batch), "--seq-len", str(case.seq_len),
                   "--threads", str(case.threads), "--mode", mode, "--steps",
                   str(steps_of(case, o)), "--seconds", str(o.seconds)]
        result, why = run_json(command, torch_environment(case.threads, pinned), 300)
    label = f"{torch.name} {mode}{'' if pinned else ', unpinned'}"
    if result is None:
        say(f"  {label:<36} {why}")
        return None
    result["pinned"] = pinned
    note = ""
    if result["parameters"] != case.parameters:
        note = f"  NOT THE SAME MODEL: {result['parameters']} parameters, not {case.parameters}"
    say(f"  {label:<36} {result['tokens_per_s']:8.0f} tokens/s{note}")
    case.torch.setdefault(torch.name, {}).setdefault((mode, pinned), []).append(result)
    return result


def speed(results):
    return median(r["tokens_per_s"] for r in results)


def best_of(case, name):
    """((mode, pinned), tokens/s) of a PyTorch's fastest mode; None if none ran."""
    modes = case.torch.get(name)
    if not modes:
        return None
    return max(((mode, speed(results)) for mode, results in modes.items()), key=lambda m: m[1])


def first_round(case, torch, earlier, o):
    """earlier: the finished cases of this dtype."""
    modes = [m for m in MODES[case.dtype] if not (torch.old and "compile" in m)]
    pinned = True
    if earlier := [best_of(c, torch.name) for c in earlier if c.torch.get(torch.name)]:
        pinned = earlier[0][0][1]
        if (case.model, case.batch, case.seq_len) in INTERMEDIATE:
            modes = sorted({mode for (mode, _), _ in earlier})
    ran = {}
    for mode in modes:
        if o.quick and mode not in ("eager", "compile", "pure", "pure+compile"):
            continue
        result = run_torch(case, torch, mode, pinned, o)
        if result:
            ran[mode] = result["tokens_per_s"]
    if ran and not earlier and case.threads > 1 and not o.quick:
        run_torch(case, torch, max(ran, key=ran.get), False, o)


def later_round(case, torch, o):
    best = best_of(case, torch.name)
    for (mode, pinned), results in list(case.torch.get(torch.name, {}).items()):
        slow = results[0]["median_seconds"] > o.seconds
        if speed(results) >= 0.8 * best[1] and not slow:
            run_torch(case, torch, mode, pinned, o)


# --------------------------------------------------------------------------- report


def table(headers, rows):
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [headers] + rows) for i in range(len(headers))]
    left = [not any(row[i][:1].isdigit() for row in rows) for i in range(len(headers))]
    left[0] = True
    lines = []
    for row in [headers] + rows:
        cells = (c.ljust(w) if l else c.rjust(w) for c, w, l in zip(row, widths, left))
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def summarize(cases, torches):
    """Sets each case's figures; returns the peaks by number of threads."""
    peaks = {}
    for case in cases:
        for r in case.ours:
            p = peaks.setdefault(case.threads, {"float32": 0, "bf16": 0, "read": 0, "write": 0,
                                                "update": 0})
            for k, v in {**r["peak_flops"], **r["bandwidth"]}.items():
                p[k] = max(p[k], v)
    for case in cases:
        case.tokens_per_s = speed(case.ours)
        case.memory = median(r["peak_memory"] for r in case.ours)
        case.mfu = None
        if case.ours:
            case.mfu = (case.ours[0]["flops_per_token"] * case.tokens_per_s
                        / peaks[case.threads][case.dtype])
        case.best = {t.name: best_of(case, t.name) for t in torches}
    return peaks


def case_rows(cases, torches):
    rows = []
    for case in cases:
        row = [case.model, f"{case.batch}x{case.seq_len}", case.dtype, case.threads]
        if case.ours:
            row += [f"{case.tokens_per_s:.0f}", f"{100 * case.mfu:.1f}%",
                    f"{case.memory / GIB:.2f}" if case.memory else "?"]
        else:
            row += ["none", "", ""]
        for t in torches:
            best = case.best[t.name]
            if not best:
                row += ["", "", "", ""]
                continue
            (mode, pinned), tokens_per_s = best
            memory = median(r["peak_memory"] or 0 for r in case.torch[t.name][mode, pinned])
            ratio = f"{case.tokens_per_s / tokens_per_s:.2f}x" if case.ours else ""
            row += [f"{tokens_per_s:.0f}", f"{memory / GIB:.2f}",
                    mode + ("" if pinned else ", unpinned"), ratio]
        rows.append(row)
    return rows


def judged(cases, torches):
    """[case, what, bar, measured, verdict] of the bars whose cases ran."""
    two = {c.name: c for c in cases if c.threads == 2}
    one = {c.name: c for c in cases if c.threads == 1}
    old = next((t.name for t in torches if t.old), None)
    new = next((t.name for t in reversed(torches) if not t.old), None)

    def ratio(candidates, name):
        ours = [c.tokens_per_s for c in candidates if c.ours]
        theirs = [c.best[name][1] for c in candidates if name and c.best.get(name)]
        return max(ours) / max(theirs) if ours and theirs else None

    rows = []
    for (name, what), bar in BARS.items():
        candidates = [c for n, c in two.items() if n == name or n.startswith(name + ":")]
        case, value = (candidates or [None])[0], None
        if "against" in what:
            value = ratio(candidates, old if "1.13" in what else new)
        elif case and case.ours:
            if what == "MFU":
                value = case.mfu
            elif what.startswith("tokens/s"):
                value = case.tokens_per_s
            elif what.startswith("peak memory"):
                value = case.memory / GIB if case.memory else None
            elif name in one and one[name].ours:
                value = case.tokens_per_s / one[name].tokens_per_s
        if value is not None:
            met = value <= bar if "at most" in what else value >= bar
            rows.append([name, what, f"{bar:.4g}", f"{value:.4g}", "met" if met else "not met"])
    return rows


def report(cases, torches, o):
    peaks = summarize(cases, torches)
    say("\nMeasured peaks")
    for threads, p in sorted(peaks.items()):
        say(f"  {threads} thread{'s' if threads > 1 else ' '}: float32 "
            f"{p['float32'] / 1e9:.0f} GFLOP/s, bf16 {p['bf16'] / 1e9:.0f} GFLOP/s; "
            f"memory {p['read'] / 1e9:.1f} GB/s read, {p['write'] / 1e9:.1f} written, "
            f"{p['update'] / 1e9:.1f} updated in place")
    headers = ["model", "batch", "dtype", "threads", "tokens/s", "MFU", "GiB"]
    for t in torches:
        headers += [t.name, "GiB", "best mode", "ratio"]
    say("\n" + table(headers, case_rows(cases, torches)))
    for case in cases:
        if case.missing:
            say(f"{case}: {case.missing}")
    runs = [r for c in cases for r in c.ours + [r for modes in c.torch.values()
                                                for results in modes.values() for r in results]]
    disturbed = sum(r.get("other_cores", 0) > 0.1 for r in runs)
    if disturbed:
        say(f"WARNING: other programs kept more than a tenth of a core busy during {disturbed} of "
            f"{len(runs)} runs, which slows them down: measure on an idle machine.")
    say("pure: parameters, gradients and moments in bf16, without the float master weights that "
        "train_gpt keeps by default.\nGiB: peak resident memory.")
    rows = judged(cases, torches)
    if rows:
        say("\nThe bars\n" + table(["case", "what", "bar", "measured", ""], rows))
    with open(o.out, "w") as file:
        json.dump({
            "cpu": next((c.ours[0]["cpu"] for c in cases if c.ours), None),
            "version": next((c.ours[0]["version"] for c in cases if c.ours), None),
            "peaks": peaks,
            "torch": {t.name: {"python": t.python, "version": t.version, "blas": t.blas,
                               "config": t.config} for t in torches},
            "cases": [{
                "model": c.model, "batch": c.batch, "seq_len": c.seq_len, "dtype": c.dtype,
                "threads": c.threads, "tokens_per_s": c.tokens_per_s, "mfu": c.mfu,
                "peak_memory": c.memory, "missing": c.missing, "runs": c.ours,
                "torch": {name: [{"mode": mode, "pinned": pinned, "tokens_per_s": speed(results),
                                  "runs": results} for (mode, pinned), results in modes.items()]
                          for name, modes in c.torch.items()},
            } for c in cases],
            "bars": [dict(zip(["case", "what", "bar", "measured", "verdict"], r)) for r in rows],
        }, file, indent=1)
    say(f"\nAll results: {os.path.relpath(o.out)}")


def describe_torch(torches):
    for t in torches:
        blas = ", ".join("/".join(p.split("/")[-2:]) for p in t.blas if "cublas" not in p)
        built = [line.strip(" -").split(" Version")[0].split(" (Git")[0]
                 for line in t.config.splitlines()
                 if "Math Kernel" in line or "MKL-DNN" in line or "capability" in line]
        say(f"{t.name} ({t.python}): {', '.join(built)}" + (f"; BLAS {blas}" if blas else ""))
        if any("libblas.so.3" in p and "openblas" not in p for p in t.blas) and \
                not any("openblas" in p for p in t.blas):
            say("  its float matmuls use the reference BLAS, on one thread: install "
                "libopenblas0-openmp for a fair comparison")
    if not torches:
        say("There is no PyTorch to compare with: `make bench TORCH=new` installs one.")


def selected(o):
    cases = []
    for threads in o.threads:
        for model, batch, seq_len in SHAPES:
            for dtype in DTYPES:
                case = Case(model, batch, seq_len, dtype, threads)
                quick = (model, batch, seq_len) in [("gpt2-124m", 4, 64), ("tiny", 16, 128)]
                if any((case.name + ":").startswith(only + ":") for only in o.only) if o.only \
                        else quick or not o.quick:
                    cases.append(case)
    if not cases:
        sys.exit("bench.py: --only " + ",".join(o.only) + " selects no case; the cases are "
                 + ", ".join(f"{m}:{b}x{t}" for m, b, t in SHAPES)
                 + ", each followed by :float32 or :bf16")
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.path.join(ROOT, "train_gpt"))
    parser.add_argument("--only", action="append", default=[], metavar="MODEL[:BxT[:DTYPE]]",
                        help="run these cases; may be repeated or separated by commas")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")],
                        default=[2, 1] if os.cpu_count() > 1 else [1],
                        help="default: 2,1. PyTorch runs on the first only")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--quick", action="store_true",
                        help="small shapes, one round, the newest PyTorch only")
    parser.add_argument("--seconds", type=float, default=8,
                        help="PyTorch starts no timed step after this time; modes with longer steps "
                        "are timed once [%(default)s]")
    parser.add_argument("--torch", default=os.environ.get("BENCH_TORCH", ""),
                        metavar="PYTHON,...", help="Pythons with PyTorch; none: no PyTorch")
    parser.add_argument("--install-torch", action="store_true",
                        help="install the newest from PyPI into build/torch")
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "bench.json"))
    o = parser.parse_args()
    o.only = [only for word in o.only for only in word.split(",") if only]
    rounds = o.rounds or (1 if o.quick else 3)
    cases = selected(o)
    if o.install_torch:
        install_newest()
    torches = [] if o.torch == "none" else find_torch(o)[-1 if o.quick else 0:]
    describe_torch(torches)
    os.makedirs(os.path.dirname(os.path.abspath(o.out)), exist_ok=True)

    started = time.time()
    for number in range(rounds):
        for case in cases:
            if case.missing and number or number and not case.has_bar:
                continue
            say(f"round {number + 1} of {rounds}, {case}  ({time.time() - started:.0f} s)")
            run_ours(case, o)
            if case.threads != o.threads[0]:
                continue
            known = next((c.ours[0] for c in cases
                          if c.ours and (c.model, c.seq_len) == (case.model, case.seq_len)), None)
            if not known:
                continue
            case.config, case.parameters = known["config"], known["parameters"]
            for torch in torches:
                if number:
                    later_round(case, torch, o)
                else:
                    earlier = [c for c in cases[:cases.index(case)] if c.dtype == case.dtype]
                    first_round(case, torch, earlier, o)
    report(cases, torches, o)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
