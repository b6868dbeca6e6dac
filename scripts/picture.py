#!/usr/bin/env python3
"""Draws runs side by side: the variance of the residual stream after each layer, and the validation
loss during training.

    scripts/picture.py RUN_PRE RUN_LNS -o docs/lns.svg [--png FILE.png]

RUN is the directory of a finished run. The same runs and Matplotlib version give the same bytes.
"""

import argparse
import sys

from figures import COLOURS, GRID, MONO, LogLocator, count, pyplot, spread, use_style
from runs import Run, RunError
from table import HARMLESS, differing_flags

FONT_SIZE = 12  # points; at its own width the picture fits a README's column
WIDTH, HEIGHT = 8.6, 3.7  # inches
LOG_RATIO = 30  # the axis is logarithmic if the variances span more


def labels_of(runs):
    """The schemes, or the names of the directories if a scheme occurs twice."""
    schemes = [run.scheme for run in runs]
    if len(set(schemes)) == len(schemes):
        return schemes
    return [run.name for run in runs]


def check(run):
    if run.variances is None:
        raise RunError(
            f"{run.path}/log.jsonl does not end with a line that has residual_variance: the run "
            f"has not finished. Continue it with: ./train_gpt -o {run.path} -y"
        )
    if len(run.validations) < 2:
        raise RunError(
            f"{run.path} has fewer than 2 validations, too few for a curve: train with a "
            "smaller --val-every"
        )


def warn_of_differences(runs):
    """Warns about differences other than the scheme: they make the comparison meaningless."""
    names = set(differing_flags(runs)) - (HARMLESS - {"--seed"})
    if names:
        print(f"picture.py: note: the runs differ in {', '.join(sorted(names))}", file=sys.stderr)


def label_ends(axes, ends, labels):
    """Writes each label to the right of its line's last point, in the line's colour."""
    figure = axes.figure
    figure.canvas.draw()  # fixes the axes, so that positions in pixels are known
    pixels = [axes.transData.transform(end) for end in ends]
    gap = 1.25 * FONT_SIZE * figure.dpi / 72
    heights = spread([y for _, y in pixels], gap, axes.bbox.y0 + gap / 2)
    for (x, _), height, label, colour in zip(pixels, heights, labels, COLOURS):
        place = axes.transData.inverted().transform((x + 0.5 * gap, height))
        axes.text(*place, label, color=colour, va="center", family=MONO, fontweight="bold")


def plot(axes, curves):
    """Draws (xs, ys). Later lines are thinner, so that overlapping ones remain visible."""
    for i, (xs, ys) in enumerate(curves):
        width = 2.2 if len(curves) < 3 else 3.6 - 2 * i / (len(curves) - 1)
        axes.plot(xs, ys, color=COLOURS[i], linewidth=width)


def draw_variance(axes, runs, labels):
    # Without the embedding: its variance is a thousand times smaller and would compress the rest.
    curves = [run.variances[1:] for run in runs]
    plot(axes, [(range(1, len(curve) + 1), curve) for curve in curves])
    low, high = min(map(min, curves)), max(map(max, curves))
    if low > 0 and high > LOG_RATIO * low:
        axes.set_yscale("log")
        steps = (1, 2, 5) if high < 300 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)
    axes.set_title("Variance of the residual stream")
    axes.set_xlabel("after layer")
    layers = max(map(len, curves))
    axes.set_xlim(1, layers)
    step = max(1, round(layers / 4))
    axes.set_xticks([1, *range(max(step, 2), layers + 1, step)])
    label_ends(axes, [(len(c), c[-1]) for c in curves], labels)


def draw_losses(axes, runs, labels):
    curves = [run.validations for run in runs]
    plot(axes, [tuple(zip(*curve)) for curve in curves])
    axes.set_title("Validation loss")
    axes.set_xlabel("training tokens")
    axes.set_xlim(0, max(curve[-1][0] for curve in curves))
    # All losses fall from about log(vocabulary) in the first steps; differences come later.
    low = min(loss for curve in curves for _, loss in curve)
    high = max(curve[len(curve) // 8][1] for curve in curves)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda tokens, _: count(tokens))
    ends = [curve[-1] for curve in curves]
    label_ends(axes, ends, [f"{label} {loss:.2f}" for label, (_, loss) in zip(labels, ends)])


def subject(runs):
    """What all runs have in common, in a line."""
    facts = {(run.preset, run.layers, run.tokens) for run in runs}
    if len(facts) > 1:
        return ""
    preset, layers, tokens = facts.pop()
    return f"The model {preset}, {layers} layers, after training on {count(tokens)} tokens"


def draw(runs):
    labels = labels_of(runs)
    figure = pyplot.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    # Room for labels: an em is FONT_SIZE points, and a letter is 0.6 em wide.
    letter = 0.602 * FONT_SIZE / 72 / WIDTH
    longest = max(map(len, labels))
    room_left, room_right = (longest + 2) * letter, (longest + 7) * letter
    axis = 0.075  # room for numbers such as 0.150 beside a panel
    width = (1 - 2 * axis - room_left - room_right) / 2
    bottom, height = 0.15, 0.65
    left = figure.add_axes((axis, bottom, width, height))
    right = figure.add_axes((2 * axis + width + room_left, bottom, width, height))
    for axes in (left, right):
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6)
    draw_variance(left, runs, labels)
    draw_losses(right, runs, labels)
    figure.text(axis, 0.97, subject(runs), va="top")
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("-o", "--out", metavar="FILE.svg", default="runs.svg")
    parser.add_argument("--png", metavar="FILE.png", help="write a PNG, too")
    args = parser.parse_args()
    if len(args.runs) > len(COLOURS):
        raise RunError(f"{len(args.runs)} runs are too many to tell apart, at most {len(COLOURS)}")
    runs = [Run(path) for path in args.runs]
    for run in runs:
        check(run)
    warn_of_differences(runs)
    use_style(FONT_SIZE, {"svg.hashsalt": "lns.cpp"})  # ids in the SVG are random otherwise
    figure = draw(runs)
    try:
        figure.savefig(args.out, metadata={"Date": None})
        if args.png:
            figure.savefig(args.png, dpi=100)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write {args.out}: {error}") from None
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"picture.py: {error}")
