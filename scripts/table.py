#!/usr/bin/env python3
"""Prints a table of runs, best first.

    scripts/table.py RUN... [--paper TABLE] [--scale SIZE]

RUN is a directory that ./train_gpt -o wrote, finished or not. A run counts as diverged if a loss was
not finite (scripts/compare.sh records that in RUN/outcome), if it ended above its first loss, or if
its last validation loss is more than half a nat above its best; and as stuck if that is more than
1.5 nats above the best run of the same size on the same data.

Below, if there are several learning rates or seeds: each scheme at its best rate, with a paired test
against Pre-LN. --paper adds what scripts/paper.tsv has of TABLE, of models of that SIZE or of all.

The report takes its groups from here: runs that differ only by their seed, with their mean, spread
and label, and what a reader should know before comparing them.
"""

import argparse
import math
import os
import re
import statistics
import sys
from dataclasses import dataclass

from runs import DATA, Run, RunError, judge_together, number

# Flags that do not change the result of a run, or change it no more than a seed does.
HARMLESS = {"--seed", "--threads", "--device", "--keep", "--save-every", "--val-every", "--batch"}
HARMLESS |= {"--sample-every", "--sample-tokens", "--prompt", "--temperature", "--top-k", "--top-p"}
HARMLESS |= {"--recompute", "--probe-every", "--probe-tokens", "--probes", "--profile"}
MANY = 8  # with more groups, pictures show only the best learning rate of each scheme
NOISE, NOISY = 0.05, "within noise"  # what a difference of a larger p is called
# Flags that name a group before others do, if several tell it apart.
TELLING = ["--model", "--layers", "--width", "--embed-std", "--dtype"]


class Group:
    """Runs that differ only by seed. label: in tables; tag: in pictures; colour, line and marker: the
    indices of the scheme, the learning rate, and the scheme and other flags; tokenizer: groups with
    equal keys have comparable perplexities."""

    def __init__(self, runs):
        self.runs = runs
        self.scheme = runs[0].scheme
        self.flags = {k: v for k, v in runs[0].flags.items() if k not in HARMLESS}
        self.label = self.tag = self.scheme
        self.tokenizer = None
        self.colour = self.line = self.marker = 0
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
    def loss_by_seed(self):
        return {run.seed: run.validations[-1][1] for run in self.finished if run.validations}

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
    def layers(self):
        told = number(self.flags.get("--layers"))
        return int(told) if told > 0 else self.runs[0].layers

    @property
    def setting(self):
        """A key that is equal for groups that differ only in the scheme and the learning rate."""
        return tuple(item for item in self.but_lr[1:] if item[0] != "--norm")

    @property
    def lr(self):
        return number(self.flags.get("--lr"))

    @property
    def rank(self):
        """The best first: rates at which more seeds finished, then the lower loss."""
        return (-len(self.losses), self.loss if self.losses else 0)


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def mean_and_spread(values, digits=2):
    """ "9.31 ± 0.04"; the ± is the sample standard deviation."""
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


@dataclass
class Difference:
    """Of the losses of two groups, seed by seed, in nats a token. p: of a paired t-test, two-sided; NaN
    of fewer than two seeds."""

    mean: float
    seeds: int
    p: float

    @property
    def is_noise(self):
        return self.p > NOISE

    def __str__(self):
        change = f"{signed(self.mean)}, "
        if math.isnan(self.p):
            return change + ("one seed" if self.seeds else "no common seed")
        p = f"p = {self.p:.2g}" if self.p >= 0.001 else "p < 0.001"
        return change + p + (f", {NOISY}" if self.is_noise else "")


def signed(nats):
    """A difference of losses as one of perplexities: "−3.1%", "70×"."""
    if nats > math.log(10):
        return f"{math.exp(min(nats, 700)):.0f}×"
    return f"{100 * math.expm1(min(nats, 700)):+.1f}%".replace("-", "−")


def difference(group, other):
    """None if either has no result."""
    if not group.losses or not other.losses:
        return None
    left, right = group.loss_by_seed, other.loss_by_seed
    values = [loss - right[seed] for seed, loss in left.items() if seed in right]
    if len(values) < 2:
        return Difference(group.loss - other.loss, len(values), math.nan)
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if spread == 0:
        return Difference(mean, len(values), 1.0 if mean == 0 else 0.0)
    t = mean / spread * math.sqrt(len(values))
    return Difference(mean, len(values), t_test(t, len(values) - 1))


def t_test(t, degrees):
    """The probability of Student's t beyond ±t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def baseline_of(group, groups, scheme="pre"):
    """The best group of the scheme with the flags of this one but for the learning rate, or with the
    usual flags; None if there is none, or if it is this group's own scheme and flags."""
    same = [other for other in groups if other.scheme == scheme and other.losses]
    own = [other for other in same if other.setting == group.setting]
    best = min(own, key=lambda other: other.rank) if own else reference(groups, scheme)
    return best if best and best.but_lr != group.but_lr else None


def verdicts(groups, scheme="pre"):
    """Sentences: which groups are better or worse than their baselines, and which only seem so."""
    told = {}
    for group in sorted(groups, key=lambda g: g.loss if g.losses else math.inf):
        base = baseline_of(group, groups, scheme)
        found = base and difference(group, base)
        if found and not math.isnan(found.p):
            kind = NOISY if found.is_noise else "better" if found.mean < 0 else "worse"
            kinds = told.setdefault((base.label, found.seeds), {})
            words = str(found).removesuffix(f", {NOISY}")
            kinds.setdefault(kind, []).append(f"{group.label} ({words})")
    sentences = []
    for (label, seeds), kinds in told.items():
        parts = [f"{kind}: {', '.join(names)}" for kind, names in sorted(kinds.items())]
        sentences.append(f"Against {label}, paired by {seeds} seeds: {'; '.join(parts)}.")
    return sentences


def edge_note(groups, best):
    """Names the groups whose best learning rate is the smallest or the largest tried; "" if there are
    none, or only one rate."""
    names = []
    for group in best:
        tried = [other.lr for other in groups if other.but_lr == group.but_lr]
        if group.losses and len(set(tried)) > 1 and group.lr in (min(tried), max(tried)):
            names.append(group.label)
    if not names:
        return ""
    if len(names) == len(best) > 1:
        names = ["all"]
    return (
        f"At an edge of the learning rates tried, so that others may be better: {', '.join(names)}."
    )


def comparison_note(groups, scheme="pre"):
    """What a reader should know of verdicts' p; "" if there are none."""
    counts = []
    for group in groups:
        base = baseline_of(group, groups, scheme)
        found = base and difference(group, base)
        if found and not math.isnan(found.p):
            counts.append(found.seeds)
    if not counts:
        return ""
    few = min(counts)
    return (
        f"p is of a paired t-test, which assumes that the differences are normally distributed; by their "
        f"signs alone, {few} seeds cannot show a p below {2 / 2**few:.2g}. Each of the {len(counts)} "
        f"comparisons is tested by itself, at {NOISE}: about one in 20 seems real by chance."
    )


@dataclass
class Published:
    """What the paper has of a scheme. values: {size of the model, or percent of training: perplexity}."""

    name: str
    values: dict


def published(table):
    """{scheme: Published} of a table of scripts/paper.tsv; the first is the one to compare with."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "paper.tsv")
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("\t") for line in file if not line.startswith("#")]
    found = {}
    for of, scheme, name, values in lines:
        if of == table:
            pairs = (value.split("=") for value in values.split())
            found[scheme] = Published(name, {key: float(value) for key, value in pairs})
    if not found:
        names = ", ".join(dict.fromkeys(of for of, *_ in lines))
        raise RunError(f"scripts/paper.tsv has no table '{table}'; it has {names}")
    return found


class Paper:
    """The paper's columns beside ours: of one size if it has that one, else of all sizes."""

    def __init__(self, table=None, scale=None):
        self.rows = published(table) if table else {}
        self.baseline = next(iter(self.rows), "pre")
        keys = list(dict.fromkeys(key for row in self.rows.values() for key in row.values))
        self.percents = [key for key in keys if key.endswith("%")]
        self.sizes = [scale] if scale in keys else [key for key in keys if key not in self.percents]

    def name(self, scheme):
        return self.rows[scheme].name if scheme in self.rows else ""

    def cells(self, scheme):
        """ "25.76 (−3.6%)" of each size; the percentage is against the baseline."""
        cells = []
        for size in self.sizes:
            value = self.rows[scheme].values.get(size) if scheme in self.rows else None
            base = self.rows[self.baseline].values.get(size)
            change = ""
            if value and base and scheme != self.baseline:
                change = f" ({signed(math.log(value / base))})"
            cells.append(f"{value:.2f}{change}" if value else "")
        return cells


def through_training(groups):
    """[(group, [perplexity at each tenth of the steps, or None])] of the groups with a tenth and more."""
    rows = []
    for group in groups:
        run = group.counted[0] if group.counted else None
        tokens = group.tokens if group.losses else run and run.planned_tokens
        curve = {round(10 * at / tokens, 6): losses for at, losses in group.curve} if tokens else {}
        row = [curve.get(tenth) for tenth in range(1, 11)]
        if sum(losses is not None for losses in row) > 1:
            rows.append(
                (group, [losses and perplexity(statistics.fmean(losses)) for losses in row])
            )
    return rows


def training_rows(groups, paper):
    """Cells of through_training: after each group its distance from its baseline; last the paper's."""
    rows = []
    found = through_training(groups)
    known = {id(group): values for group, values in found}

    def add(label, values, base, base_label):
        rows.append([label] + [f"{v:.1f}" if v and v < 1e5 else "" for v in values])
        if base:
            pairs = zip(values, base)
            changes = [signed(math.log(v / b)) if v and b else "" for v, b in pairs]
            rows.append([f"  against {base_label}", *changes])

    for group, values in found:
        base = baseline_of(group, groups, paper.baseline) if group.losses else None
        if not base:  # unfinished: the same flags, the same rate
            base = next(
                (
                    g
                    for g, _ in found
                    if g.scheme == paper.baseline != group.scheme
                    and g.setting == group.setting
                    and g.lr == group.lr
                ),
                None,
            )
        add(group.label, values, known.get(id(base)), base.label if base else "")
    if paper.percents:
        tenths = [f"{10 * tenth}%" for tenth in range(1, 11)]
        first = [paper.rows[paper.baseline].values.get(key) for key in tenths]
        for scheme, row in paper.rows.items():
            values = [row.values.get(key) for key in tenths]
            add(
                f"{scheme}, published",
                values,
                first if scheme != paper.baseline else None,
                paper.baseline,
            )
    return rows


def depth_rows(best):
    """Of the best groups: a head and a row a scheme, of perplexity by the number of layers and its
    difference from the shallowest model's; [] if there is only one depth."""
    depths = sorted({group.layers for group in best if group.layers and group.losses})
    if len(depths) < 2:
        return []
    rows = [["layers", *map(str, depths)]]
    for scheme in dict.fromkeys(group.scheme for group in best):
        cells, first = [], None
        for depth in depths:
            same = [g for g in best if g.scheme == scheme and g.layers == depth and g.losses]
            group = min(same, key=lambda g: g.rank, default=None)
            change = f" ({difference(group, first)})" if group and first else ""
            cells.append(mean_and_spread(group.perplexities) + change if group else "")
            first = first or group
        rows.append([scheme, *cells])
    return rows


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
    drawn_of(groups)
    schemes = list(dict.fromkeys(group.scheme for group in groups))
    usual = [group.lr for group in best_rates(groups)]
    rates = {group.lr for group in groups if math.isfinite(group.lr)}
    rates = sorted(rates, key=lambda lr: (-usual.count(lr), lr))  # the most usual is a solid line
    for scheme in schemes:
        same = [group for group in groups if group.scheme == scheme]
        variants = list(dict.fromkeys(group.but_lr for group in same))
        for group in same:
            group.colour = schemes.index(scheme)
            group.line = rates.index(group.lr) if group.lr in rates else 0
            group.marker = group.colour + variants.index(group.but_lr)
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
        few = telling_flags(same, names)
        for group in same:
            for chosen in (names, few):
                words = [
                    f"{name.lstrip('-')} {rounded(group.flags.get(name))}"
                    for name in chosen
                    if name == "--lr" or group.flags.get(name) != usual.get(name, "")
                ]
                if group.flags and len(words) <= 2 and sum(map(len, words)) <= 24:
                    group.label = " ".join([scheme, *words])
                    break
            else:
                group.label = group.runs[0].name
        for way in (lambda group: group.runs[0].name, lambda group: group.runs[0].path):
            if len({group.label for group in same}) < len(same):
                for group in same:
                    group.label = way(group)
    for group in groups:  # a name need not be UTF-8
        group.label = group.label.encode("utf-8", "replace").decode()


def telling_flags(groups, names):
    """The fewest of the names, greedily, that tell the groups apart."""
    order = [name for name in TELLING if name in names]
    order += [name for name in names if name not in order and name != "--lr"]
    chosen = ["--lr"] if "--lr" in names else []

    def apart():
        return len({tuple(group.flags.get(name) for name in chosen) for group in groups})

    for name in order:
        before = apart()
        chosen.append(name)
        if apart() == before:
            chosen.pop()
    return sorted(chosen)


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


def reference(groups, scheme="pre"):
    """The best finished group under the scheme, preferably with the flags that most groups have, except
    the learning rate; or None."""
    usual = usual_flags(groups)
    same = [group for group in groups if group.scheme == scheme and group.losses]

    def rank(group):
        others = [
            n for n in usual if n not in ("--lr", "--norm") and group.flags.get(n) != usual[n]
        ]
        return bool(group.flags and others), group.rank

    return min(same, key=rank, default=None)


def drawn_of(groups):
    """The groups that a picture shows: all, or if they are many, the best learning rate of each.
    Sets their tags."""
    drawn = best_rates(groups) if len(groups) > MANY else list(groups)
    schemes = [group.scheme for group in drawn]
    for group in drawn:
        group.tag = group.label if schemes.count(group.scheme) > 1 else group.scheme
    if len(groups) > MANY:  # the line's style says the learning rate
        short = [re.sub(r" lr \S+$", "", group.tag) for group in drawn]
        for group, tag in zip(drawn, short):
            group.tag = tag if short.count(tag) == 1 else group.tag
    return drawn


def best_rates(groups):
    """Each scheme, and each variant of one, at its best learning rate."""
    best = {}
    for group in groups:
        key = group.but_lr if group.flags and group.logged else group.label
        if key not in best or group.rank < best[key].rank:
            best[key] = group
    return list(best.values())


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
    several = [group for group in groups if len(group.runs) > 1 and group.probe]
    if several:
        paths = ", ".join(group.probed_run.path for group in several)
        which = f" ({paths})" if len(several) <= 4 else ", the first that has them"
        notes.append(f"Diagnostics are from one run of each group of seeds{which}.")
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


def aligned(table, words=()):
    """Lines of text; the first column and those in words are flush left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = [
            c.ljust(w) if i in (0, *words) else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths))
        ]
        yield "  ".join(cells).rstrip()


def scheme_table(groups, paper):
    """Lines: the best rate of each scheme and variant, its test, and the paper's columns."""
    best = best_rates(groups)
    table = [["scheme", "perplexity", "loss", "seeds", f"against {paper.baseline}"]]
    table[0] += [f"the paper's, {size}" for size in paper.sizes]
    for group in sorted(
        best, key=lambda group: (not group.losses, group.loss if group.losses else 0)
    ):
        base = baseline_of(group, best, paper.baseline)
        against = base and difference(group, base)
        row = [group.label, mean_and_spread(group.perplexities), mean_and_spread(group.losses, 4)]
        row += [f"{len(group.losses)} of {len(group.logged)}", str(against or "")]
        table.append([cell or "-" for cell in row + paper.cells(group.scheme)])
    yield "Each scheme at its best learning rate, mean ± standard deviation over seeds:"
    yield from aligned(table, words=(4,))
    yield from verdicts(best, paper.baseline)
    yield from filter(None, (edge_note(groups, best), comparison_note(best, paper.baseline)))
    rows = depth_rows(best)
    if rows:
        yield ""
        yield "Perplexity by depth, against the shallowest model by seed:"
        yield from aligned(rows)
    rows = training_rows(best, paper) if paper.percents else []
    if rows:
        yield ""
        yield "Validation perplexity at each tenth of the steps:"
        yield from aligned([["", *(f"{10 * tenth}%" for tenth in range(1, 11))], *rows])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+")
    add_paper_flags(parser)
    args = parser.parse_args()
    paper = Paper(args.paper, args.scale)
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
    for line in aligned(table, words=(5,)):
        print(line)
    groups, _ = group_runs([run for run in runs if run.log])
    if args.paper or len(groups) < len(runs) or len(best_rates(groups)) < len(groups):
        print()
        for line in scheme_table(groups, paper):
            print(line)


def add_paper_flags(parser):
    parser.add_argument("--paper", metavar="TABLE", help="of scripts/paper.tsv, beside these runs")
    parser.add_argument("--scale", metavar="SIZE", help="only the paper's models of this size")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"table.py: {error}")
