#!/usr/bin/env python3
"""Sends runs to Weights & Biases, or writes them to be sent later: the same curves as
to_tensorboard.py, and each run's flags.

    scripts/to_wandb.py RUN... [--project NAME] [--offline] [-o DIR]

RUN is a directory that ./train_gpt -o wrote, finished or not. A run keeps its id, so that the same
command adds the steps that are new. --offline needs no account and no network: `wandb sync` sends
the folder wandb/ in DIR (default: here) later. The package wandb is needed: pip install wandb.
"""

import argparse
import hashlib
import os
import sys

from runs import Run, RunError
from to_tensorboard import names_of, scalars_of, start_time


def id_of(run):
    """The same for the same run, wherever its directory lies."""
    return hashlib.sha256(f"{start_time(run)} {run.flags}".encode()).hexdigest()[:16]


def send(wandb, run, name, args):
    """Returns the number of steps."""
    sent = wandb.init(
        project=args.project,
        name=name,
        id=id_of(run),
        resume="allow",
        mode="offline" if args.offline else "online",
        dir=args.out,
        config={**run.flags, "layers": run.layers, "width": run.width},
    )
    for line in run.log:
        sent.log(dict(scalars_of(line)), step=max(0, int(line["step"])))
    sent.finish()
    return len(run.log)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--project", metavar="NAME", default="lns.cpp")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("-o", "--out", metavar="DIR", default=".")
    args = parser.parse_args()
    runs = [Run(path) for path in args.runs]
    for run in runs:
        if not run.log:
            raise RunError(f"{run.path}/log.jsonl holds no whole step yet: train the run first")
    try:
        import wandb  # only now: what is wrong with a run is said without it
    except ImportError:
        raise RunError("the package wandb is not installed: pip install wandb") from None
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {args.out}: {error.strerror}") from None
    for run, name in zip(runs, names_of(runs)):
        try:
            steps = send(wandb, run, name, args)
        except Exception as error:  # wandb has many, of the network, the account, the disk
            raise RunError(f"{run.path} is not sent: {error}") from None
        print(f"{'wrote' if args.offline else 'sent'} {name}: {steps} steps")
    if args.offline:
        print(f"send it with: wandb sync {os.path.join(args.out, 'wandb')}/offline-run-*")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"to_wandb.py: {error}")
