#!/usr/bin/env python3
"""Prints a table of runs, best first.

    scripts/table.py RUN...

RUN is a directory that ./train_gpt -o wrote, finished or not. A run counts as diverged if a loss was
not finite (scripts/compare.sh records that in RUN/outcome), if it ended above its first loss, or if
its last validation loss is more than half a nat above its best; and as stuck if that is more than
1.5 nats above the best run of the same size on the same data.

The report takes its groups from here: runs that differ only by their seed, with their mean, spread
and label, and what a reader should know before comparing them.
"""

import argparse
import math
import statistics
import sys

from runs import DATA, Run, RunError, judge_together, number

# Flags that do not change the result of a run, or change it no more than a seed does.
HARMLESS = {"--seed", "--threads", "--device", "--keep", "--save-every", "--val-every", "--batch"}
HARMLESS |= {"--sample-every", "--sample-tokens", "--prompt", "--temperature", "--top-k", "--top-p"}
HARMLESS |= {"--recompute", "--probe-every", "--probe-tokens", "--probes", "--profile"}
MANY = 8  # with more groups, pictures show only the best learning rate of each scheme


class Group:
    """Runs that differ only by seed. label: in tables; tag: in pictures; index: of colour and line;
    tokenizer: groups with equal keys have comparable perplexities."""

    def __init__(self, runs):
        self.runs = runs
        self.scheme = runs[0].scheme
        self.flags = {k: v for k, v in runs[0].flags.items() if k not in HARMLESS}
        self.label = self.tag = self.scheme
        self.tokenizer = None
        self.index = 0
        self.outcomes = [run.outcome() if run.log else ("none", "no log") for run in runs]

    @property
    def finished(self):
        return [run for run, (word, _) in zip(self.runs, self.outcomes) if word == "finished"]

    @property
    def diverged(self):
        """Whether every run that has a log diverged."""
        words = {word for word, _ in self.outcomes} - {"none"}
        return words == {"diverged"}

    @property
    def logged(self):
        return [run for run in self.runs if run.log]

    @property
    def losses(self):
        """The last validation losses of the finished runs, in nats per token."""
        return [run.validations[-1][1] for run in self.finished if run.validations]

    @property
    def loss(self):
        return statistics.fmean(self.losses) if self.losses else math.nan

    @property
    def perplexities(self):
        return [perplexity(loss) for loss in self.losses]

    @property
    def tokens(self):
        return max((run.tokens for run in self.logged), default=0)

    @property
    def tokens_per_s(self):
        speeds = [run.tokens_per_s for run in self.logged if run.tokens_per_s]
        return statistics.fmean(speeds) if speeds else math.nan

    @property
    def counted(self):
        """The runs that have a log and did not diverge; all, if all diverged."""
        judged = zip(self.runs, self.outcomes)
        return [run for run, (word, _) in judged if word in ("finished", "short")] or self.logged

    @property
    def curve(self):
        """[(tokens, validation losses of the counted runs)], at tokens where all have one."""
        curves = [dict(run.validations) for run in self.counted if run.validations]
        if not curves:
            return []
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        return [(tokens, [curve[tokens] for curve in curves]) for tokens in common]

    @property
    def bits_per_byte(self):
        """Of each finished run; None if a log lacks it. With the byte tokenizer a token is a byte
        (end-of-text counts as one)."""
        found = []
        for run in self.finished:
            if run.validations and run.tokenizer.get("kind") == "bytes":
                found.append(run.validations[-1][1] / math.log(2))
            else:
                told = [number(record.get("val_bits_per_byte")) for record in run.log]
                told = [value for value in told if math.isfinite(value)]
                if not told:
                    return None
                found.append(told[-1])
        return found or None

    @property
    def probe(self):
        """The probe of the first run that has one."""
        return next((run.probe for run in self.runs if run.probe), None)

    @property
    def probed_run(self):
        return next((run for run in self.runs if run.probe), None)

    @property
    def but_lr(self):
        """A key that is equal for groups that differ only in the learning rate."""
        return (self.scheme, *sorted((k, v) for k, v in self.flags.items() if k != "--lr"))

    @property
    def lr(self):
        return number(self.flags.get("--lr"))


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def mean_and_spread(values, digits=2):
    """"9.31 ± 0.04"; the ± is the sample standard deviation."""
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def tokens_to_reach(curve, loss):
    """The tokens at which a curve first reaches the loss, interpolated linearly; None if it never
    does."""
    before = None
    for tokens, values in curve:
        value = statistics.fmean(values)
        if value <= loss:
            if before is None or before[1] <= value:
                return tokens
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None


def group_runs(runs):
    """The groups, `pre` and `lns` first, and notes for the reader."""
    notes = []
    keyed = {}
    for run in runs:
        flags = tuple(sorted((k, v) for k, v in run.flags.items() if k not in HARMLESS))
        key = (run.scheme, flags) if run.flags and run.log else (run.scheme, run.path)
        keyed.setdefault(key, []).append(run)
    groups = []
    for same in keyed.values():
        kept = {}
        for run in same:
            key = run.seed if run.seed is not None else run.path
            if key in kept:
                less, more = run, kept[key]
                if len(less.log) > len(more.log):
                    less, more = more, less
                notes.append(
                    f"{less.path} is not counted: it has the flags and the seed of {more.path}."
                )
                kept[key] = more
            else:
                kept[key] = run
        groups.append(Group(list(kept.values())))
    first = {"pre": 0, "lns": 1}
    groups.sort(key=lambda g: first.get(g.scheme, 2))  # stable: else in the order given
    label_groups(groups)
    set_tokenizers(groups)
    for index, group in enumerate(drawn_of(groups)):
        for other in groups if len(groups) > MANY else [group]:
            if other.scheme == group.scheme:
                other.index = index
    for index, group in enumerate(drawn_of(groups)):
        group.index = index
    return groups, notes + notes_on(groups)


def label_groups(groups):
    """Labels groups by scheme and, if several share a scheme, by the learning rate and by flags that
    most groups do not have."""
    usual = usual_flags(groups)
    for scheme in {group.scheme for group in groups}:
        same = [group for group in groups if group.scheme == scheme]
        if len(same) == 1:
            continue
        names = differing_flags(same)
        for group in same:
            words = [
                f"{name.lstrip('-')} {rounded(group.flags.get(name))}"
                for name in names
                if name == "--lr" or group.flags.get(name) != usual.get(name, "")
            ]
            if group.flags and len(words) <= 2 and sum(map(len, words)) <= 24:
                group.label = " ".join([scheme, *words])
            else:
                group.label = group.runs[0].name
        for way in (lambda group: group.runs[0].name, lambda group: group.runs[0].path):
            if len({group.label for group in same}) < len(same):
                for group in same:
                    group.label = way(group)
    for group in groups:  # a name need not be UTF-8
        group.label = group.label.encode("utf-8", "replace").decode()


def rounded(value):
    """The value of a flag, with long numbers shortened: 0.632455532034 becomes 0.632."""
    text = str(value or "–")
    return f"{number(text):.3g}" if len(text) > 8 and math.isfinite(number(text)) else text


def usual_flags(groups):
    """{flag: the value that more than half of the groups have}."""
    flagged = [group.flags for group in groups if group.flags]
    usual = {}
    for name in {name for flags in flagged for name in flags}:
        values = [flags.get(name) for flags in flagged]
        value = max(values, key=values.count)
        if 2 * values.count(value) > len(values):
            usual[name] = value
    return usual


def differing_flags(groups):
    names = sorted({name for group in groups for name in group.flags} - {"--norm"})
    return [name for name in names if len({group.flags.get(name) for group in groups}) > 1]


def set_tokenizers(groups):
    """A run without a checkpoint gets the tokenizer of a run on the same data."""
    by_data = {}
    for group in groups:
        for run in group.logged:
            data = tuple(run.flags.get(name) for name in DATA)
            if run.tokenizer.get("kind"):
                t = run.tokenizer
                group.tokenizer = (t.get("kind"), t.get("vocab_size"), t.get("fingerprint"))
            elif run.config.get("vocab_size"):
                group.tokenizer = ("vocabulary", run.config["vocab_size"], None)
            if group.tokenizer and run.flags:
                by_data.setdefault(data, group.tokenizer)
    for group in groups:
        for run in group.logged:
            if not group.tokenizer:
                data = tuple(run.flags.get(name) for name in DATA)
                group.tokenizer = by_data.get(data)
    known = {group.tokenizer for group in groups if group.tokenizer}
    for group in groups:
        if not group.tokenizer and len(known) == 1:
            group.tokenizer = next(iter(known))


def tokenizer_name(key):
    """("bytes", 257, …) -> "bytes, vocabulary 257"."""
    if not key:
        return "an unknown tokenizer"
    kind, size, _ = key
    return f"a vocabulary of {size}" if kind == "vocabulary" else f"{kind}, vocabulary {size}"


def by_tokenizer(groups):
    """[(key, groups)] of the groups that have a log; perplexities are comparable within one only."""
    classes = {}
    for group in groups:
        if group.logged:
            classes.setdefault(group.tokenizer, []).append(group)
    return list(classes.items())


def reference(groups):
    """The Pre-LN result: the best finished group under `pre`, preferably with the flags that most
    groups have, except the learning rate; or None."""
    usual = usual_flags(groups)
    pre = [group for group in groups if group.scheme == "pre" and group.losses]

    def rank(group):
        others = [n for n in usual if n not in ("--lr", "--norm") and group.flags.get(n) != usual[n]]
        return bool(group.flags and others), group.loss

    return min(pre, key=rank, default=None)


def drawn_of(groups):
    """The groups that a picture shows: all, or if they are many, the best learning rate of each.
    Sets their tags."""
    best = {}
    for group in groups:
        key = group.label
        if group.flags and group.logged and len(groups) > MANY:
            key = group.but_lr
        rank = (not group.losses, group.loss if group.losses else 0)
        if key not in best or rank < best[key][0]:
            best[key] = (rank, group)
    drawn = [group for _, group in best.values()]
    schemes = [group.scheme for group in drawn]
    for group in drawn:
        group.tag = group.label if schemes.count(group.scheme) > 1 else group.scheme
    return drawn


def notes_on(groups):
    notes = []
    flagged = [group for group in groups if group.flags and group.logged]
    names = [name for name in differing_flags(flagged) if name != "--lr"]
    if names:
        notes.append(
            f"The runs differ in more than the scheme, the learning rate and the seed: in "
            f"{', '.join(names)}. That may explain differences between them."
        )
    if {"--train", "--val", "--val-tokens", "--seq-len"} & set(names):
        notes.append(
            "They were not validated on the same tokens in the same sequences; perplexities on "
            "different text are not comparable."
        )
    for group in groups:
        for run in group.runs:
            if run.cut:
                last = f"step {run.log[-1]['step']:g}" if run.log else "no whole step"
                notes.append(
                    f"{run.path}: the last line of log.jsonl is cut short, by a kill or because "
                    f"the run still writes it. It is left out; the last whole line is {last}."
                )
            step = run.probe.number("step") if run.probe and run.log else math.nan
            if math.isfinite(step) and step != run.log[-1]["step"]:
                notes.append(
                    f"{run.path}: its diagnostics are of step {step:g}, its log goes to step "
                    f"{run.log[-1]['step']:g}."
                )
    probed = [group.probe for group in groups if group.probe]
    if len({probe.layers for probe in probed}) > 1:
        notes.append("The probed models differ in depth: compare shapes, not layers.")
    tokens = {group.probe.number("tokens") for group in groups if group.probe}
    if len({t for t in tokens if math.isfinite(t)}) > 1:
        notes.append("The diagnostics were measured on different numbers of tokens.")
    several = [group.label for group in groups if len(group.runs) > 1 and group.probe]
    if several:
        notes.append(
            f"Diagnostics are from one run of each group of seeds: {', '.join(several)} "
            f"({', '.join(g.probed_run.path for g in groups if g.label in several)})."
        )
    return notes


def check(runs):
    """Raises RunError if a run has nothing to show."""
    for run in runs:
        if not run.log and not run.probe:
            raise RunError(
                f"{run.path}/log.jsonl holds no whole step yet: train the run first"
                + (" (its only line is cut short)" if run.cut else "")
            )


def row(run):
    """(sort key, cells) of a run."""
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
