"""Compares `train_gpt eval --tasks` with lm-evaluation-harness, question by question.

tasks.py MODEL DATA TASKS [--limit N] [--fewshot N] [--batch N] [--program ./train_gpt]

MODEL is a Hugging Face folder, DATA a folder of NAME.jsonl or NAME.jsonl.xz. lm_eval reads the same
files: they replace what it would download. Exits 1 unless both ask the same questions and give the
same answers, but for questions whose two best choices differ by less than 1e-4 nats.
"""

import argparse
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("tasks")
parser.add_argument("--limit", type=int)
parser.add_argument("--fewshot", type=int, default=0)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--program", default="./train_gpt")
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()


def records(name):
    for ending, opener in ((".jsonl", open), (".jsonl.xz", lzma.open)):
        path = os.path.join(args.data, name + ending)
        if os.path.exists(path):
            with opener(path, "rt", encoding="utf-8") as file:
                return [json.loads(line) for line in file if line.strip()]
    sys.exit(f"there is no {name}.jsonl in {args.data}")


import datasets  # noqa: E402
import lm_eval  # noqa: E402
import torch  # noqa: E402

FILES = {"Rowan/hellaswag": "hellaswag", "baber/piqa": "piqa", "ARC-Easy": "arc_easy",
         "ARC-Challenge": "arc_challenge", "boolq": "boolq", "allenai/openbookqa": "openbookqa",
         "allenai/winogrande": "winogrande"}


def load_dataset(path, name=None, **_):
    def dataset(rows):
        return datasets.Dataset.from_list(rows)

    if path == "cais/mmlu":
        return {split: dataset([r for r in records(f"mmlu_{split}") if r["subject"] == name])
                for split in ("test", "dev")}
    rows = records(FILES[path] if path in FILES else FILES[name])
    if name == "boolq":
        rows = [r if "label" in r else {**r, "label": int(r["answer"])} for r in rows]
    return {split: dataset(rows) for split in ("train", "validation", "test")}


datasets.load_dataset = load_dataset
datasets.disable_progress_bars()
torch.set_num_threads(args.threads)

start = time.time()
theirs = lm_eval.simple_evaluate(
    model="hf", tasks=args.tasks.split(","), limit=args.limit, num_fewshot=args.fewshot or None,
    model_args={"pretrained": args.model, "dtype": "float32"}, batch_size=args.batch, device="cpu",
    log_samples=True, bootstrap_iters=100)
their_seconds = time.time() - start

with tempfile.TemporaryDirectory() as folder:
    command = [args.program, "eval", args.model, "--tasks", args.tasks, "--task-data", args.data,
               "--fewshot", str(args.fewshot), "--dtype", "float32", "--device", "cpu",
               "--threads", str(args.threads), "--limit", str(args.limit or 0), "--json",
               "--log-samples", f"{folder}/samples.jsonl"]
    start = time.time()
    ours = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL).stdout)
    our_seconds = time.time() - start
    samples = [json.loads(line) for line in open(f"{folder}/samples.jsonl", encoding="utf-8")]

by_task = {}
for sample in samples:
    by_task.setdefault(sample["task"], []).append(sample)
failed = set(by_task) ^ set(theirs["samples"])
for task in sorted(failed):
    print(f"{task}: not in both")
totals = [0, 0, 0]
largest = 0.0
for task, mine in by_task.items():
    other = sorted(theirs["samples"].get(task, []), key=lambda s: s["doc_id"])
    differ = near = 0
    if len(mine) != len(other):
        print(f"{task}: {len(mine)} questions, lm_eval has {len(other)}")
        failed.add(task)
    for a, b in zip(mine, other):
        requests = [list(pair) for pair in b["arguments"]]
        if a["arguments"] != requests:
            print(f"{task} {a['doc_id']}: asks\n  {a['arguments']}\nlm_eval asks\n  {requests}")
            failed.add(task)
            break
        scores = [response[0] for response in b["filtered_resps"]]
        largest = max([largest] + [abs(x - y) for x, y in zip(a["resps"], scores)])
        for metric in ("acc", "acc_norm"):
            if metric not in a or a[metric] == b[metric]:
                continue
            lengths = [1] * len(scores) if metric == "acc" else [len(c) - 1 for _, c in requests]
            best = sorted((s / n for s, n in zip(scores, lengths)), reverse=True)
            near += best[0] - best[1] < 1e-4
            differ += best[0] - best[1] >= 1e-4
    totals = [x + y for x, y in zip(totals, (len(mine), near, differ))]
    if differ:
        failed.add(task)
    if near or differ:
        print(f"{task}: {differ} of {len(mine)} answers differ, and {near} that are nearly equal")
for name, result in ours["results"].items():
    for key, value in result.items():
        expected = theirs["results"].get(name, {}).get(key)
        if key in ("name", "alias"):
            continue
        if expected is None or (abs(value - expected) > 1e-9 if value != "N/A" else expected != value):
            print(f"{name} {key}: {value}, lm_eval has {expected}")
            if totals[1] == 0:
                failed.add(name)
for key in ("versions", "n-shot", "n-samples", "group_subtasks", "higher_is_better"):
    for name, expected in theirs[key].items():
        if (expected or expected == 0) and ours[key].get(name) != expected:
            print(f"{key} of {name}: {ours[key].get(name)}, lm_eval has {expected}")
            failed.add(name)
print(f"{totals[0]} questions: {totals[2]} answers differ, {totals[1]} of nearly equal choices; "
      f"largest difference of a log-probability {largest:.1e}; lm_eval {lm_eval.__version__}")
print(f"{our_seconds:.1f} s ({ours['scoring_seconds']:.1f} s of scoring), lm_eval {their_seconds:.1f} s")
sys.exit(bool(failed))
