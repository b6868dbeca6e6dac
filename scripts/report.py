#!/usr/bin/env python3
"""Writes one HTML file about runs: the table of schemes, loss and perplexity, and the diagnostics of
each layer. It needs no network, and can be read on a phone, in dark mode and on paper.

    scripts/report.py RUN... [-o report.html] [--png DIR] [--pdf DIR] [--paper TABLE]

RUN is a directory that ./train_gpt -o wrote, finished or not, perhaps with a probe.json from
./train_gpt probe, or a directory with only a probe.json. Runs that differ only by seed form a group,
shown as mean and standard deviation, and are compared with Pre-LN's by seed. --paper adds what
scripts/paper.tsv has of a table, --pdf writes figures for a paper. The same runs and Matplotlib version give the same bytes.
"""

import argparse
import html
import io
import math
import os
import re
import statistics
import sys

import figures
from figures import COLOURS, GRID, TEXT, count, matplotlib, pyplot
from runs import RISE, STUCK, Run, RunError, judge_together
from table import (
    add_paper_flags,
    baseline_of,
    best_rates,
    by_tokenizer,
    check,
    comparison_note,
    depth_rows,
    difference,
    drawn_of,
    edge_note,
    group_runs,
    mean_and_spread,
    Paper,
    perplexity,
    reference,
    tokenizer_name,
    tokens_to_reach,
    training_rows,
    verdicts,
)

# Colours of the SVGs that the page replaces by variables: they are lighter in dark mode.
VARIABLES = {TEXT: "ink", GRID: "grid", **{c: f"c{i}" for i, c in enumerate(COLOURS)}}
DARK = ["#F08A3C", "#5AA9E0", "#2BC39A", "#E0A0C4", "#DDDDDD", "#7CC8F2", "#F0B93A"]
DARK += ["#D0709A", "#C2C25C", "#9A8CE8", "#6FD0C0", "#C4907F", "#F2D06B", "#A8A8A8"]

CSS = """
:root { color-scheme: light dark; --ink: #222222; --paper: #ffffff; --soft: #5a5a5a;
  --grid: #dddddd; --warn: #fff3d6; --line: #d0d0d0; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --soft: #a8a8a8;
  --grid: #3a3d42; --warn: #43371a; --line: #44474c; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1300px; padding: 12px; color: var(--ink);
  background: var(--paper);
  font: 16px/1.5 system-ui, "DejaVu Sans", Verdana, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6em; line-height: 1.2; margin: .5em 0 }
h2 { font-size: 1.35em; margin: 2em 0 .4em; border-bottom: 2px solid var(--line) }
h3 { font-size: 1.1em; margin: 1.6em 0 .2em }
p { margin: .4em 0; max-width: 46em } .soft { color: var(--soft) } nav a { margin-right: 1em }
a { color: inherit }
.warn { background: var(--warn); padding: .6em .9em; border-radius: 6px; max-width: none }
.panels { display: grid; gap: 8px 20px; grid-template-columns: repeat(6, 1fr); align-items: start }
.panels > div { grid-column: span 2; min-width: 0; break-inside: avoid }
.panels > .half { grid-column: span 3 }
@media (max-width: 1050px) { .panels > div { grid-column: span 3 } }
@media (max-width: 700px) { .panels > div, .panels > .half { grid-column: span 6 } }
.panels svg { display: block; width: 100%; height: auto }
.panels text { fill: var(--ink) }
.scroll { overflow-x: auto; margin: .6em 0 }
table { border-collapse: collapse; font-size: .94em; font-variant-numeric: tabular-nums }
th, td { padding: .28em .7em; text-align: right; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; white-space: nowrap }
th { vertical-align: bottom; font-weight: 600; white-space: normal; min-width: 6.4em }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); font-family: ui-monospace, "DejaVu Sans Mono", monospace }
td:last-child.words { text-align: left; white-space: normal; min-width: 13em }
tr.best td { font-weight: 600 } tr.diverged td, tr.under td { color: var(--soft) }
tr.under td:first-child { padding-left: 2em }
.key { display: inline-block; width: 1.6em; height: 0; border-top: 3px; margin-right: .5em;
  vertical-align: middle }
.cross { color: var(--c0); font-weight: 700 }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace }
@media print { :root { --ink: #000000; --paper: #ffffff; --soft: #444444; --grid: #dddddd;
    --warn: #ffffff; --line: #bbbbbb; color-scheme: light; LIGHT }
  body { max-width: none; padding: 0; font-size: 10pt } nav { display: none }
  .panels > div { grid-column: span 3 } .warn { border: 1px solid #000000 }
  h2, h3, .look { break-after: avoid } table, tr { break-inside: avoid }
  .scroll { overflow: visible } th, td { padding: .2em .4em } details { display: block } }
@media (max-width: 480px) { body { padding: 10px } th, td { padding: .25em .45em }
  th:first-child, td:first-child { white-space: normal; min-width: 8em; max-width: 10.5em;
    overflow-wrap: anywhere } }
"""


def style_sheet():
    light = " ".join(f"--c{i}: {c};" for i, c in enumerate(COLOURS))
    dark = " ".join(f"--c{i}: {c};" for i, c in enumerate(DARK))
    return CSS.replace("LIGHT", light).replace("DARK", dark)


def escape(text):
    return html.escape(str(text))


def svg(panel):
    """The figure as an element of the page, with the page's fonts and colours."""
    matplotlib.rcParams["svg.hashsalt"] = panel.name  # ids are unique and reproducible
    text = io.StringIO()
    panel.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    text = text.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<g id="[A-Za-z]+[\w.]*_\d+"', "<g", text)  # unused ids
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    view = re.search(r'viewBox="([^"]*)"', text).group(1)
    head = f'<svg viewBox="{view}" role="img" aria-label="{escape(panel.title)}">'
    text = head + text[text.index(">") + 1 :]
    for colour, name in VARIABLES.items():
        text = re.sub(colour, f"var(--{name})", text, flags=re.I)
    text = text.replace("'DejaVu Sans Mono'", "ui-monospace, 'DejaVu Sans Mono', monospace")
    text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', Verdana, sans-serif")
    return re.sub(r"\n\s*", "\n", text)


def cells(row, tag="td", words=False):
    last = len(row) - 1
    return "".join(
        f"<{tag}{' class=words' if words and i == last else ''}>{cell}</{tag}>"
        for i, cell in enumerate(row)
    )


def table(head, rows, words=False):
    """rows: (class, cells); cells are HTML."""
    body = "".join(
        f"<tr{f' class={kind}' if kind else ''}>{cells(row, words=words)}</tr>\n"
        for kind, row in rows
    )
    return (
        f"<div class=scroll><table><thead><tr>{cells(head, 'th')}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def label(group):
    line = ["solid", "dashed", "dotted", "double"][group.line % 4]
    colour = group.colour % len(COLOURS)
    key = f'<span class=key style="border-top-style:{line};border-color:var(--c{colour})"></span>'
    return key + escape(group.label)


def seeds(group):
    n = len([run for run in group.runs if run.log])
    return f"{len(group.losses)} of {n}" if len(group.losses) != n else str(n)


def outcome_words(group):
    """The outcomes of its runs that did not finish, as HTML."""
    told = []
    for run, (word, sentence) in zip(group.runs, group.outcomes):
        if word not in ("finished", "none"):
            seed = f"seed {run.seed}: " if len(group.runs) > 1 and run.seed is not None else ""
            mark = "<span class=cross>✗</span> " if word == "diverged" else ""
            told.append(mark + escape(seed + sentence))
    return "; ".join(told)


def has_comparison(groups, paper):
    return any(baseline_of(group, groups, paper.baseline) for group in groups)


def result_rows(groups, pre, with_bits, paper):
    """The best group first; groups without a result last."""
    ranked = sorted(groups, key=lambda g: (not g.losses, g.loss if g.losses else 0))
    rows = []
    compared = has_comparison(groups, paper)
    for group in ranked:
        base = baseline_of(group, groups, paper.baseline)
        row = [label(group), mean_and_spread(group.perplexities)]
        if compared:
            row.append(escape((base and difference(group, base)) or ""))
        row += map(escape, paper.cells(group.scheme))
        row.append(mean_and_spread(group.losses, 4))
        if not group.losses and group.curve:  # the last validation of an unfinished run
            loss = statistics.fmean(group.curve[-1][1])
            row[1], row[-1] = f"({perplexity(loss):.2f})", f"({loss:.4f})"
        if with_bits:
            row.append(mean_and_spread(group.bits_per_byte or [], 4))
        row.append(seeds(group))
        if pre:
            own = base or (group if group.losses else pre)
            tokens = tokens_to_reach(group.curve, own.loss)
            found = tokens and own.tokens
            row.append(f"{count(tokens)} ({tokens / own.tokens:.2f}×)" if found else "not reached")
        row.append(count(group.tokens))
        speed = group.tokens_per_s
        row += [f"{speed:,.0f}" if math.isfinite(speed) else "", outcome_words(group)]
        kind = (
            "diverged" if group.diverged else "best" if group is ranked[0] and group.losses else ""
        )
        rows.append((kind, [cell or "–" for cell in row[:-1]] + [row[-1]]))
    return rows


def result(groups, paper):
    """The table of schemes, one per tokenizer, and its summary."""
    classes = by_tokenizer(groups)
    logged = [group for group in groups if group.logged]
    finished = [group for group in logged if group.losses]
    with_bits = bool(finished) and all(group.bits_per_byte for group in finished)
    parts = []
    if len(classes) > 1:
        words = "; ".join(
            f"{tokenizer_name(key)}: {', '.join(g.label for g in same)}" for key, same in classes
        )
        ending = (
            "Bits per byte are, and stand in the tables."
            if with_bits
            else "The logs do not tell how many bytes a token is, so nothing else is compared."
        )
        parts.append(
            "<p class=warn><b>These runs do not share a tokenizer, and their perplexities are not "
            "comparable</b>: a token of a larger vocabulary is more text, and harder to predict. "
            "So tables and curves are apart, and losses in nats a token, also those of the probes, "
            f"are comparable within one only. {ending} ({escape(words)}.)</p>"
        )
    for key, same in classes:
        pre = reference(same, paper.baseline)
        if len(classes) > 1:
            parts.append(f"<h3>Tokenizer: {escape(tokenizer_name(key))}</h3>")
        parts.append(summary(same, pre))
        name = "Pre-LN" if paper.baseline == "pre" else escape(paper.baseline)
        head = ["scheme", "perplexity"]
        head += [f"against {name}, by seed"] if has_comparison(same, paper) else []
        head += [f"the paper’s, {size}" for size in paper.sizes] + ["loss, nats a token"]
        head += ["bits per byte"] if with_bits else []
        head += ["seeds"]
        head += [f"tokens to reach {name}’s result"] if pre else []
        head += ["tokens", "tokens/s", ""]
        drawn = drawn_of(same)
        best = best_rates(same)
        parts.append(table(head, result_rows(best, pre, with_bits, paper), words=True))
        told = verdicts(best, paper.baseline)
        told += filter(None, (edge_note(same, best), comparison_note(best, paper.baseline)))
        parts += [f"<p>{escape(sentence)}</p>" for sentence in told]
        if len(best) < len(same):
            every = table(head, result_rows(same, pre, with_bits, paper), words=True)
            parts.append(
                "<p>Of each scheme the best learning rate stands here.</p>"
                f"<details><summary>Every learning rate</summary>{every}</details>"
            )
    note = (
        "Perplexity and loss are the last validation’s, the mean ± the sample standard deviation "
        "over seeds of the runs that finished; in brackets, of a run that did not. A run diverged "
        "if a loss was not finite, if it ended above where it began, or more than "
        f"{RISE} nats above its best validation, or {STUCK} above the best run of its size on the same data."
    )
    if any(reference(same, paper.baseline) for _, same in classes):
        note += (
            " Tokens to reach a result are read off the validation curve between its "
            "points; before the end the learning rate is still high, so a small saving is no proof."
        )
    else:
        note += (
            f" There is no finished run of <code>{escape(paper.baseline)}</code>, so there is no "
            "comparison with it."
        )
    return "\n".join([*parts, f"<p class=soft>{note}</p>"])


def summary(groups, pre):
    """Which scheme is best, in a sentence."""
    finished = [group for group in groups if group.losses]
    failed = [group.label for group in groups if group.diverged]
    words = []
    if finished:
        best = min(finished, key=lambda group: group.loss)
        what = "Lowest" if len(finished) > 1 else "Final"
        words.append(f"{what} perplexity: {best.label}, {mean_and_spread(best.perplexities)}.")
        if pre and best is not pre:
            gain = 1 - statistics.fmean(best.perplexities) / statistics.fmean(pre.perplexities)
            words.append(f"That is {gain:.1%} below {pre.label}.")
        elif len(finished) > 1:
            second = sorted(finished, key=lambda group: group.loss)[1]
            gap = statistics.fmean(second.perplexities) / statistics.fmean(best.perplexities) - 1
            words.append(f"Next is {second.label}, {gap:.1%} above.")
        if len(finished) > 1 and all(len(group.losses) < 2 for group in finished):
            words.append("One seed each: the spread between seeds is not known.")
    if failed:
        words.append(f"Diverged: {', '.join(failed)}.")
    return f"<p>{escape(' '.join(words))}</p>" if words else ""


def depth(groups):
    """One row per model: the diagnostics of the deeper half."""

    def deep(values):
        values = [v for v in (values or [])[len(values or []) // 2 :] if math.isfinite(v)]
        return statistics.fmean(values) if values else math.nan

    def added(group, *keys):
        return deep(next((values for _, values in figures.increases([group], *keys)), None))

    rows = []
    for group in drawn_of(groups):
        fits = figures.variance_fits(group)
        variance = figures.residual_variance(group)
        if not group.probe and not variance:
            continue
        row = [math.nan] * 5
        if group.probe:
            distance = group.probe.rows("angular_distance", "all_tokens")
            distance = distance or group.probe.rows("angular_distance", "last_token")
            row = [
                deep(distance[0] if distance else None),
                added(group, "removal", "single"),
                deep(group.probe.series("jacobian", "deviation")),
                group.probe.number("usefulness", "share"),
                added(group, "permutation"),
            ]
        texts = [f"{v:.3g}" if math.isfinite(v) else "" for v in row]
        texts[3] = f"{row[3]:.0%}" if math.isfinite(row[3]) else ""
        growth = variance[-1] / variance[0] if variance and variance[0] else math.nan
        told = [f"{growth:.3g}×" if math.isfinite(growth) else ""]
        for fit, form in zip(fits or (), ("ℓ^{:.2f}", "e^({:.3f} ℓ)")):
            r2 = f" (R² {fit.r2:.3f})" if math.isfinite(fit.r2) else ""
            told.append(form.format(fit.slope) + r2)
        told += [""] * (3 - len(told))
        rows.append(("", [label(group)] + [cell or "–" for cell in told + texts]))
    if not rows:
        return ""
    head = ["", "variance, last layer over first", "its fit by a power", "by an exponential"]
    head += ["angular distance to the next layer", "loss added by removing one, nats"]
    head += ["‖J − I‖/√C", "layers that matter", "loss added by a swap, nats"]
    used = [i for i in range(len(head)) if i < 2 or any(row[i] != "–" for _, row in rows)]
    rows = [(kind, [row[i] for i in used]) for kind, row in rows]
    return (
        "<p>The variance is of all layers; the columns after its fits are means over the deeper "
        "half of the layers, but for the share of layers that matter.</p>"
        + table([head[i] for i in used], rows)
    )


def picture(item):
    """Its panels fill the page: three in a row, or two in the last rows; one stands beside its text."""
    n = len(item.panels)
    halves = {0: 0, 1: 4, 2: 2}[n % 3]
    panels = "".join(
        f"<div{' class=half' if i >= n - halves else ''}>{svg(panel)}</div>\n"
        for i, panel in enumerate(item.panels)
    )
    words = f"<h3>{escape(item.title)}</h3>\n<p class=look>{escape(item.look)}</p>\n"
    if n == 1:
        return f"<div class=panels><div class=half>\n{words}</div>\n{panels}</div>\n"
    return f"{words}<div class=panels>\n{panels}</div>\n"


def depth_table(groups):
    rows = depth_rows(best_rates(groups))
    if not rows:
        return ""
    look = "Look whether perplexity falls toward the right; in brackets, against the shallowest model, by seed."
    body = [("", [escape(cell) or "–" for cell in row]) for row in rows[1:]]
    return f"<h3>Perplexity by depth</h3>\n<p class=look>{look}</p>\n{table(rows[0], body)}"


def training_table(groups, paper):
    rows = training_rows(best_rates(groups), paper)
    if not rows:
        return ""
    head = ["of the steps", *(f"{10 * tenth}%" for tenth in range(1, 11))]
    rows = [("under" if row[0].startswith(" ") else "", map(escape, row)) for row in rows]
    rows = [(kind, [cell or "–" for cell in row]) for kind, row in rows]
    look = "Look whether the gap to the line that a row is compared with grows or closes."
    if paper.percents:
        look += " What was published is of another text: only its gaps can be compared."
    return (
        "<h3>Validation perplexity through training</h3>\n"
        f"<p class=look>{look}</p>\n{table(head, rows)}"
    )


def subject(groups):
    """What all runs have in common."""
    runs = [run for group in groups for run in group.runs if run.log]
    if not runs:
        return ""
    told = []
    facts = {(run.preset, run.layers, run.width) for run in runs if run.config}
    if len(facts) == 1:
        preset, layers, width = facts.pop()
        told.append(f"model {preset}, {layers} layer{'s' if layers != 1 else ''} of width {width}")
    tokens = {group.tokens for group in groups if group.losses}
    if len(tokens) == 1:
        told.append(f"{count(tokens.pop())} tokens of training")
    told.append(f"{len(runs)} run{'s' if len(runs) > 1 else ''}")
    return "; ".join(told) + "."


def run_list(groups):
    rows = []
    for group in groups:
        for run, (_, sentence) in zip(group.runs, group.outcomes):
            command = run.starts[-1].get("command", "") if run.starts else ""
            step = f"{run.log[-1]['step']:g}" if run.log else "–"
            seed = "–" if run.seed is None else escape(run.seed)
            words = f"{escape(sentence)}<br><code>{escape(command)}</code>"
            rows.append(("", [escape(run.path), escape(group.label), seed, step, words]))
    return table(["run", "group", "seed", "steps", ""], rows, words=True)


def page(groups, notes, pictures, paper):
    sections = []
    if any(group.logged for group in groups):
        sections.append(("result", "Result", result(groups, paper)))
    loss, probes = pictures
    if loss:
        told = depth_table(groups) + training_table(groups, paper)
        sections.append(("loss", "Loss", told + "".join(map(picture, loss))))
    told = depth(groups)
    if probes or told:
        sections.append(("layers", "What the layers do", told + "".join(map(picture, probes))))
    if notes:
        items = "".join(f"<p class=warn>{escape(note)}</p>" for note in notes)
        sections.append(("notes", "Notes", items))
    sections.append(("runs", "Runs", run_list(groups)))
    title = "Schemes side by side: " if len(groups) > 1 else ""
    names = list(dict.fromkeys(group.scheme for group in groups))
    title += ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    links = "".join(f'<a href="#{name}">{escape(head)}</a>' for name, head, _ in sections)
    body = "".join(
        f"<section id={name}><h2>{escape(head)}</h2>\n{text}</section>\n"
        for name, head, text in sections
    )
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style_sheet()}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n<p>{escape(subject(groups))}</p>\n<nav>{links}</nav>\n"
        f"{body}</body></html>\n"
    )


def write_files(directory, kind, pictures, **how):
    try:
        os.makedirs(directory, exist_ok=True)
        for item in pictures:
            for panel in item.panels:
                panel.figure.savefig(os.path.join(directory, f"{panel.name}.{kind}"), **how)
    except OSError as error:
        raise RunError(f"cannot write {directory}: {error.strerror}") from None


def unique_names(pictures):
    """Makes file names unique: two labels may give the same one."""
    taken = set()
    for item in pictures:
        for panel in item.panels:
            base, n = panel.name, 2
            while panel.name in taken:
                panel.name, n = f"{base}-{n}", n + 1
            taken.add(panel.name)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("-o", "--out", metavar="FILE.html", default="report.html")
    parser.add_argument("--png", metavar="DIR", help="write each picture there too, as PNG")
    parser.add_argument("--pdf", metavar="DIR", help="and as PDF, of vectors, for a paper")
    add_paper_flags(parser)
    args = parser.parse_args()
    paper = Paper(args.paper, args.scale)
    paths = list(dict.fromkeys(os.path.normpath(path) for path in args.runs))
    runs = [Run(path) for path in paths]
    check(runs)
    judge_together(runs)
    groups, notes = group_runs(runs)
    figures.prepare()
    pyplot.rcParams["figure.max_open_warning"] = 0
    pictures = figures.loss_pictures(groups), figures.probe_pictures(groups)
    every = [item for part in pictures for item in part]
    unique_names(every)
    text = page(groups, notes, pictures, paper)
    try:
        with open(args.out, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"cannot write {args.out}: {error.strerror}") from None
    if args.png:
        write_files(args.png, "png", every, dpi=150)
    if args.pdf:
        figures.make_vectors([panel.figure for item in every for panel in item.panels])
        write_files(args.pdf, "pdf", every, metadata={"CreationDate": None})
    panels = sum(len(item.panels) for item in every)
    print(f"wrote {args.out}: {len(runs)} runs, {panels} pictures, {len(text) / 1e6:.1f} MB")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"report.py: {error}")
