#!/usr/bin/env python3
"""Prints a table of runs, best first.

    scripts/table.py RUN...

RUN is a directory that ./train_gpt -o wrote, finished or not. A run counts as diverged if it
stopped at a number that is not finite (scripts/compare.sh leaves that in RUN/outcome), or if its
last validation loss lies more than half a nat above its best.
"""

import argparse
import math
import os
import sys

from runs import Run, RunError

RISE = 0.5  # nats above the best that count as diverged


def state(run):
    """What became of the run, in a few words, and whether it diverged."""
    outcome = ""
    path = os.path.join(run.path, "outcome")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            outcome = file.read().strip()
    step = run.log[-1]["step"] if run.log else 0
    if "not finite" in outcome:
        return f"diverged: not finite after step {step}", True
    losses = [loss for _, loss in run.validations]
    if losses and losses[-1] > min(losses) + RISE:
        return f"diverged: {losses[-1] - min(losses):.2f} above its best", True
    if run.variances is None:
        return f"not finished: at step {step}", False
    return "finished", False


def row(run):
    """The table's cells, and what it is sorted by."""
    losses = [loss for _, loss in run.validations]
    words, diverged = state(run)
    cells = [run.scheme, "-", "-", "-", "-", words]
    if losses:
        loss = losses[-1]
        perplexity = f"{math.exp(loss):.2f}" if loss < 700 else "inf"
        cells[1:4] = [f"{loss:.4f}", perplexity, f"{min(losses):.4f}"]
    if run.log and run.log[-1].get("seconds"):
        cells[4] = f"{run.tokens / run.log[-1]['seconds']:.0f}"
    not_finite = "not finite" in words
    return (not_finite or not losses, losses[-1] if losses else 0, diverged), cells


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+")
    args = parser.parse_args()
    runs = [Run(path) for path in args.runs]
    names = [run.scheme for run in runs]
    rows = []
    for run in runs:
        key, cells = row(run)
        if names.count(run.scheme) > 1:
            cells[0] = run.path
        rows.append((key, cells))
    rows.sort(key=lambda item: item[0])
    table = [["scheme", "val loss", "perplexity", "best", "tokens/s", ""]]
    table += [cells for _, cells in rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(5)]
    for cells in table:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:5], widths[1:])]
        print("  ".join([cells[0].ljust(widths[0])] + numbers + cells[5:]).rstrip())


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"table.py: {error}")
