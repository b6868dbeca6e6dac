#!/usr/bin/env python3
"""Prints a table of runs, best first.

    scripts/table.py RUN...

RUN is a directory that ./train_gpt -o wrote, finished or not. A run counts as diverged if it
stopped at a number that is not finite (scripts/compare.sh leaves that in RUN/outcome), if it ended
above the loss that it began with, if its last validation loss lies more than half a nat above its
best, or if that lies more than 1.5 nats above the best of the runs of this size on the same data.
"""

import argparse
import math
import sys

from runs import Run, RunError, judge_together


def row(run):
    """The table's cells, and what it is sorted by."""
    losses = [loss for _, loss in run.validations]
    word, sentence = run.outcome()
    cells = [run.scheme, "-", "-", "-", "-", sentence]
    if losses:
        loss = losses[-1]
        perplexity = f"{math.exp(loss):.2f}" if loss < 700 else "inf"
        cells[1:4] = [f"{loss:.4f}", perplexity, f"{min(losses):.4f}"]
    if run.tokens_per_s:
        cells[4] = f"{run.tokens_per_s:.0f}"
    not_finite = "not finite" in sentence
    return (not_finite or not losses, losses[-1] if losses else 0, word == "diverged"), cells


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+")
    args = parser.parse_args()
    runs = [Run(path) for path in args.runs]
    judge_together(runs)
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
