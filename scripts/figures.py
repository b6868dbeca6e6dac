"""Pictures of runs: shared parts (Matplotlib, colours, axes), and the pictures of the report.

Colour says the scheme and line style the learning rate; seeds share both. Okabe and Ito's colours remain
distinct for colour-blind readers, Tol's follow them; markers differ too. A panel is as wide as a phone
can show without shrinking the text, so a page places several side by side.
"""

import math
import os
import re
import sys
import warnings
from dataclasses import dataclass, field

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def use_own_python():
    """Restarts the program under the Python environment that `make deps` made, if there is one: its
    versions are the tested ones."""
    for build in dict.fromkeys((os.environ.get("BUILD") or "build", "build")):
        venv = os.path.join(PROJECT, build, "venv")
        python = os.path.join(venv, "bin", "python3")
        if os.path.realpath(sys.prefix) == os.path.realpath(venv):
            return
        if os.access(python, os.X_OK) and os.path.isfile(sys.argv[0]):
            sys.stdout.flush()
            os.execv(python, [python, *sys.argv])


use_own_python()
try:
    import matplotlib
    import numpy
    from matplotlib import colors as mcolors
    from matplotlib import pyplot
    from matplotlib.collections import QuadMesh
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
    from matplotlib.ticker import SymmetricalLogLocator
except ImportError as error:
    sys.exit(
        f"{os.path.basename(sys.argv[0])}: Matplotlib is needed to draw, and {sys.executable} has "
        f"none that works ({error}): `make deps` installs it under build/"
    )

from table import best_rates, by_tokenizer, differing_flags, drawn_of, perplexity, tokenizer_name

COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"]
COLOURS += ["#882255", "#999933", "#332288", "#44AA99", "#8C564B", "#DDAA33", "#7F7F7F"]
LINES = ["-", "--", "-.", (0, (1, 1.2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
TEXT, GRID = "#222222", "#DDDDDD"
MONO = "DejaVu Sans Mono"  # distinguishes "lns" from "Ins"; comes with Matplotlib
STYLE = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

FONT_SIZE, LABEL_SIZE = 11.5, 10  # points
WIDTH, HEIGHT = 4.5, 3.3  # inches
LETTER = 0.602 * LABEL_SIZE / 72  # inches that a letter of MONO is wide
GAP = 1.2 * LABEL_SIZE / 72  # inches between two labels
LONGEST = 22  # letters of a label
POINTS = 300  # of a training curve: more than the pixels of a panel
PIXELS = 192  # of a drawn matrix's side


def use_style(font_size, more=()):
    matplotlib.use("Agg")
    sizes = {"font.size": font_size, "axes.titlesize": font_size}
    matplotlib.rcParams.update({**STYLE, **sizes, **dict(more)})
    if "text.parse_math" in matplotlib.rcParams:
        matplotlib.rcParams["text.parse_math"] = False  # a $ in a directory's name is a $


def line_style(group):
    """The look of a group's lines: colour by scheme, line by learning rate, marker by scheme and other
    flags."""
    return {
        "color": COLOURS[group.colour % len(COLOURS)],
        "linestyle": LINES[group.line % len(LINES)],
        "marker": MARKERS[group.marker % len(MARKERS)],
    }


def count(n):
    """2097152 -> "2.1M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.2g}{name}" if n < 100 * unit else f"{n / unit:.0f}{name}"
    return f"{n:.0f}"


def spread(heights, gap, low):
    """The heights, moved so that they are at least gap apart and none is below low."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _ in range(100):
        placed[0] = max(placed[0], low)
        for i in range(1, len(placed)):
            lack = gap - (placed[i] - placed[i - 1])
            if lack > 0:
                placed[i - 1] -= lack / 2
                placed[i] += lack / 2
    result = [0.0] * len(heights)
    for i, height in zip(order, placed):
        result[i] = height
    return result


def plain(value, _=None):
    """1000 -> "1000", 0.001 -> "0.001", 1e-06 -> "1e-6"."""
    if value != 0 and not 1e-4 < abs(value) < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:g}"


def scale_axis(axis, low, high, ratio=30):
    """Makes the axis logarithmic if low and high are positive and their ratio exceeds ratio."""
    set_scale = axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale
    axis.set_minor_formatter(NullFormatter())
    if not (0 < low < high and high > ratio * low):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(plain))
        return False
    set_scale("log")
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.axes.minorticks_off()
    return True


@dataclass
class Panel:
    name: str  # of its file
    title: str
    figure: object


@dataclass
class Picture:
    """Panels, and what to look for in them."""

    title: str
    look: str
    panels: list = field(default_factory=list)


def prepare():
    use_style(FONT_SIZE, {"svg.fonttype": "none", "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
                          "pdf.fonttype": 42})  # fmt: skip
    warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")


def name_of(*words):
    """ "lns+scaled-init" -> "lns-scaled-init", for a file's name."""
    text = "-".join(words)
    text = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in text)
    return "-".join(part for part in text.split("-") if part)


def short(label):
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"


def new_panel(title, labels=(), height=HEIGHT, right=0.15):
    """A figure and its axes, with room for labels on the right."""
    height = max(height, 1.1 + GAP * len(labels))
    figure = pyplot.figure(figsize=(WIDTH, height))
    if labels:
        right = 0.3 + LETTER * (max(map(len, labels)) + 1)
    left, bottom, top = 0.7, 0.56, 0.38
    box = (left / WIDTH, bottom / height)
    box += ((WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    axes = figure.add_axes(box)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    # A fixed position, independent of the width of the tick labels.
    axes.yaxis.set_label_coords(0.2 / WIDTH, box[1] + box[3] / 2, transform=figure.transFigure)
    figure.text(0.1 / WIDTH, 1 - 0.08 / height, title, va="top", fontweight="bold")
    return figure, axes


def label_ends(axes, ends):
    """ends: [(x, y, text, colour)]. Writes each text to the right of the axes, with a thin line from
    its point, and an arrow if the point is above the frame."""
    figure = axes.figure
    figure.canvas.draw()  # fixes the axes, so that positions are known
    size, box = figure.bbox, axes.bbox
    gap = GAP * figure.dpi
    points = [axes.transData.transform((x, y)) for x, y, *_ in ends]
    texts = [f"{end[2]} ↑" if y > box.y1 + 1 else end[2] for end, (_, y) in zip(ends, points)]
    points = [(numpy.clip(x, box.x0, box.x1), numpy.clip(y, box.y0, box.y1)) for x, y in points]
    heights = spread([y for _, y in points], gap, box.y0)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for bound, indices, step, keep in (
        (box.y0, order, gap, max),
        (box.y1 + gap / 2, order[::-1], -gap, min),
    ):
        for i in indices:
            heights[i] = keep(heights[i], bound)
            bound = heights[i] + step
    for (x, y), height, text, (*_, colour) in zip(points, heights, texts, ends):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 1, "shrinkB": 0}
        arrow["relpos"] = (0, 0.5)
        if x < box.x1 - 0.1 * box.width:  # a long line must not look like a curve
            arrow.update(linestyle=(0, (1, 2)), alpha=0.8)
        axes.annotate(
            text,
            (x / size.width, y / size.height),
            (box.x1 / size.width + 0.16 / WIDTH, height / size.height),
            xycoords="figure fraction",
            textcoords="figure fraction",
            va="center",
            family=MONO,
            fontsize=LABEL_SIZE,
            annotation_clip=False,
            arrowprops=arrow,
        )


def colour_of(group):
    return line_style(group)["color"]


def key_of_rates(axes, groups):
    """A legend of line styles, if the groups have several learning rates."""
    styles = {g.lr: line_style(g)["linestyle"] for g in groups if math.isfinite(g.lr)}
    if len(styles) > 1:
        lines = [Line2D([], [], color=TEXT, linestyle=styles[lr], label=f"lr {plain(lr)}")
                 for lr in sorted(styles)]  # fmt: skip
        axes.legend(handles=lines, fontsize=LABEL_SIZE, frameon=False, loc="best")


def draw_line(axes, group, xs, ys, marks=True, **more):
    style = {**line_style(group), "linewidth": 1.8, "markersize": 4.5, **more}
    if not marks:
        style["marker"] = ""
    elif len(xs) > 14:
        style["markevery"] = max(1, len(xs) // 8)
    axes.plot(xs, ys, **style)


def finite(values):
    return [value for value in values if math.isfinite(value)]


def limits(axes, values, log=True, ratio=30):
    """Sets the y axis to the range of the values, logarithmic if that is wide."""
    values = finite(values)
    if not values:
        return
    positive = [v for v in values if v > 0]
    low, high = min(values), max(values)
    if log and len(positive) == len(values) and scale_axis(axes.yaxis, low, high, ratio):
        room = (high / low) ** 0.05
        axes.set_ylim(low / room, high * room)
        return
    scale_axis(axes.yaxis, 0, 0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    axes.set_ylim(low - room, high + room)


def tokens_axis(axes, low, high):
    high = max(high, low + 1)
    room = 0.015 * (high - low)
    axes.set_xlim(low - (room if low else 0), high + room)
    axes.set_xlabel("training tokens")
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))


def layer_axis(axes, first, last, label="layer", room=0.0):
    axes.set_xlabel(label)
    axes.set_xlim(first - room, last + room)
    step = max(1, math.ceil((last - first) / 6))
    ticks = [first, *range(first - first % step + step, last + 1, step)]
    if len(ticks) > 2 and ticks[1] - ticks[0] <= step / 2:
        del ticks[1]
    axes.set_xticks(ticks)


# Loss


def smoothed(points):
    """[(tokens, loss)] -> tokens and losses, averaged over a window of 2% of the steps, thinned."""
    tokens = numpy.array([t for t, _ in points], float)
    losses = numpy.array([loss for _, loss in points], float)
    half = len(losses) // 100
    if half:
        kernel = numpy.ones(2 * half + 1)
        known = numpy.isfinite(losses)
        total = numpy.convolve(numpy.where(known, losses, 0), kernel, "same")
        with numpy.errstate(invalid="ignore", divide="ignore"):
            losses = total / numpy.convolve(known.astype(float), kernel, "same")
    keep = numpy.unique(numpy.linspace(0, len(losses) - 1, min(len(losses), POINTS)).astype(int))
    return tokens[keep], losses[keep]


def mark_end(axes, group, x, y):
    """Marks the end of a diverged run."""
    axes.plot([x], [y], marker="x", markersize=9, markeredgewidth=2.4, color=colour_of(group),
              zorder=5)  # fmt: skip


def diverged_runs(group):
    return [run for run, (word, _) in zip(group.runs, group.outcomes) if word == "diverged"]


def training_panel(groups, title, name):
    """A line per run; the first seed of a group is labelled, the others are paler."""
    curves = []
    for group in groups:
        for run in sorted(group.logged, key=lambda run: run not in group.counted):
            tokens, losses = smoothed(run.losses)
            known = numpy.isfinite(losses)
            if known.any():
                curves.append((group, run, tokens[known], losses[known]))
    if not curves:
        return None
    labels = dict.fromkeys(short(group.tag) for group, *_ in curves)
    figure, axes = new_panel(title, list(labels))
    ends, good, starts = {}, [], []
    for group, run, xs, ys in curves:
        first = group.label not in ends
        alpha = 0.95 if first else 0.5
        draw_line(axes, group, xs, ys, marks=len(xs) < 3, linewidth=1.5, alpha=alpha)
        if run in diverged_runs(group):
            mark_end(axes, group, xs[-1], ys[-1])
        else:
            good += list(ys)
            starts.append(ys[len(ys) // 20])
        ends.setdefault(group.label, (xs[-1], ys[-1], short(group.tag), colour_of(group)))
    tokens_axis(axes, 0, max(xs[-1] for *_, xs, _ in curves))
    # All losses fall from about log(vocabulary) in the first steps; differences come later.
    every = [y for *_, ys in curves for y in ys]
    limits(axes, [y for y in good if y <= max(starts)] or every, log=False)
    axes.set_ylabel("nats a token")
    key_of_rates(axes, [group for group, *_ in curves])
    label_ends(axes, list(ends.values()))
    return Panel(name, title, figure)


def validation_panel(groups, others, title, name, of=lambda loss: loss, unit="nats a token",
                     from_=0.0):  # fmt: skip
    """of(loss): the mean over seeds, and a band from minimum to maximum, starting at the fraction
    from_ of training. The others, at learning rates that are not their best, are pale."""
    end = max((group.tokens for group in groups), default=0)
    begin = from_ * end
    curves = []
    for group in groups:
        curve = [(tokens, [of(loss) for loss in losses]) for tokens, losses in group.curve]
        shown = [point for point in curve if point[0] >= begin]
        if len(shown) > (1 if from_ else 0):
            curves.append((group, curve, shown))
    if not curves:
        return None
    texts = [f"{short(g.tag)} {numpy.mean(curve[-1][1]):.2f}" for g, curve, _ in curves]
    figure, axes = new_panel(title, texts)
    for group in others:
        if not group.diverged:
            points = [
                (tokens, numpy.mean([of(v) for v in losses])) for tokens, losses in group.curve
            ]
            draw_line(axes, group, *zip(*points) if points else ((), ()), marks=False, linewidth=1,
                      alpha=0.4)  # fmt: skip
    ends = []
    for (group, curve, _), text in zip(curves, texts):
        tokens = [t for t, _ in curve]
        mean = [numpy.mean(values) for _, values in curve]
        draw_line(axes, group, tokens, mean)
        if len(curve[0][1]) > 1:
            low, high = [min(v) for _, v in curve], [max(v) for _, v in curve]
            axes.fill_between(tokens, low, high, color=colour_of(group), alpha=0.2, linewidth=0)
        ends.append((tokens[-1], mean[-1], text, colour_of(group)))
        for run in diverged_runs(group):
            if run.validations:
                xs, ys = zip(*((t, of(loss)) for t, loss in run.validations))
                draw_line(axes, group, xs, ys, marks=False, linewidth=1, alpha=0.6)
                mark_end(axes, group, xs[-1], ys[-1])
    values = []
    for group, curve, shown in [c for c in curves if not c[0].diverged] or curves:
        later = shown if from_ else curve[len(curve) // 8 :]
        values += [v for _, several in later for v in several]
    limits(axes, values, log=False)
    tokens_axis(axes, begin, end)
    axes.set_ylabel(unit)
    key_of_rates(axes, [*(group for group, *_ in curves), *others])
    label_ends(axes, ends)
    return Panel(name, title, figure)


def accuracy_panel(groups, task, name):
    """A line per run, with standard errors; dotted: chance."""
    curves = []
    for group in groups:
        for run in sorted(group.logged, key=lambda run: run not in group.counted):
            if run.accuracies.get(task):
                curves.append((group, run.accuracies[task]))
    if not curves:
        return None
    title = f"Accuracy on {task}"
    figure, axes = new_panel(title, list(dict.fromkeys(short(group.tag) for group, _ in curves)))
    ends, values = {}, []
    for group, points in curves:
        xs, ys, errors, chances = zip(*points)
        first = group.label not in ends
        draw_line(axes, group, xs, ys, alpha=0.95 if first else 0.5)
        axes.errorbar(xs, ys, yerr=numpy.nan_to_num(errors), fmt="none", ecolor=colour_of(group),
                      elinewidth=1, capsize=2, alpha=0.5)  # fmt: skip
        ends.setdefault(group.label, (xs[-1], ys[-1], short(group.tag), colour_of(group)))
        values += [y + sign * e for y, e in zip(ys, numpy.nan_to_num(errors)) for sign in (-1, 1)]
        if math.isfinite(chances[-1]):
            axes.axhline(chances[-1], color=TEXT, linewidth=0.8, linestyle=":")
            values.append(chances[-1])
    limits(axes, values, log=False)
    tokens_axis(axes, 0, max(points[-1][0] for _, points in curves))
    axes.set_ylabel("accuracy")
    label_ends(axes, list(ends.values()))
    return Panel(name, title, figure)


def accuracy_picture(groups):
    tasks = list(dict.fromkeys(task for g in groups for run in g.logged for task in run.accuracies))
    return Picture(
        "Benchmarks",
        "Look whether a curve leaves the dotted line, which is chance, by more than its bars, the "
        "standard errors; where it does not, the benchmark cannot tell the schemes apart.",
        [accuracy_panel(groups, task, name_of("accuracy", task)) for task in tasks],
    )


def final_panel(lines, of, title, name, axis):
    """The final perplexity, mean and deviation over seeds, by of(group): lines are {label: groups}. A
    cross at the top is a group that diverged."""
    values = [p for same in lines.values() for group in same for p in group.perplexities]
    if not values:
        return None
    figure, axes = new_panel(title, [short(label) for label in lines])
    median = sorted(values)[len(values) // 2]
    limits(axes, [v for v in values if v < 3 * median], log=True, ratio=4)
    ends = []
    for label, same in lines.items():
        points = {}
        for group in same:
            if group.losses:
                points.setdefault(of(group), []).extend(group.perplexities)
            elif group.diverged:
                axes.plot([of(group)], [0.97], transform=axes.get_xaxis_transform(), marker="x",
                          color=colour_of(group), markersize=8, markeredgewidth=2)  # fmt: skip
        if points:
            xs = sorted(points)
            ys = [numpy.mean(points[x]) for x in xs]
            draw_line(axes, same[0], xs, ys, linestyle="-")
            spreads = [numpy.std(points[x], ddof=1) if len(points[x]) > 1 else 0 for x in xs]
            axes.errorbar(xs, ys, yerr=spreads, fmt="none", ecolor=colour_of(same[0]), elinewidth=1,
                          capsize=2, alpha=0.7)  # fmt: skip
            ends.append((xs[-1], ys[-1], short(label), colour_of(same[0])))
    ticks = sorted({of(group) for same in lines.values() for group in same})
    axes.set_xscale("log")
    axes.set_xlim(min(ticks) / 1.15, max(ticks) * 1.15)
    axes.set_xticks(ticks)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel(axis)
    axes.set_ylabel("perplexity")
    label_ends(axes, ends)
    return Panel(name, title, figure)


def learning_rate_panel(groups, name):
    found = {}
    for group in groups:
        if math.isfinite(group.lr) and (group.losses or group.diverged):
            found.setdefault(group.but_lr, []).append(group)
    lines = {}
    several = [same for same in found.values() if len({group.lr for group in same}) > 1]
    schemes = [same[0].scheme for same in several]
    for scheme, same in zip(schemes, several):
        label = re.sub(r" lr \S+$", "", same[0].label)
        lines[label if schemes.count(scheme) > 1 else scheme] = same
    return final_panel(lines, lambda group: group.lr, "Final perplexity by learning rate", name,
                       "peak learning rate")  # fmt: skip


def depth_panel(groups, name):
    """Each scheme at its best learning rate, by the number of layers."""
    lines = {}
    for group in best_rates(groups):
        if group.layers and (group.losses or group.diverged):
            lines.setdefault(group.scheme, []).append(group)
    lines = {k: same for k, same in lines.items() if len({group.layers for group in same}) > 1}
    return final_panel(
        lines, lambda group: group.layers, "Final perplexity by depth", name, "layers"
    )


def loss_pictures(groups):
    pictures = []
    classes = by_tokenizer(groups)
    for key, same in classes:
        apart = f" ({tokenizer_name(key)})" if len(classes) > 1 else ""
        tag = name_of(str(classes.index((key, same)) + 1)) if len(classes) > 1 else ""
        drawn = drawn_of(same)
        others = [group for group in same if group not in drawn]
        chosen = (
            " Colour says the scheme, line style the learning rate."
            if "--lr" in differing_flags(same)
            else ""
        )
        if others:
            chosen += " Each scheme's best is labelled; validations at the others are pale."
        panels = [
            training_panel(drawn, "Training loss, smoothed", name_of("training-loss", tag)),
            validation_panel(drawn, others, "Validation loss", name_of("validation-loss", tag)),
        ]
        pictures.append(
            Picture(
                f"Training and validation loss{apart}",
                "Look at the order of the curves at the right end, and whether the gaps there "
                "still grow or close; the marks are validations, a band spans the seeds, a cross "
                f"ends a run that diverged.{chosen}",
                panels,
            )
        )
        panels = [
            validation_panel(drawn, others, "Validation perplexity", name_of("perplexity", tag),
                             perplexity, "perplexity"),
            validation_panel(drawn, others, "Its second half", name_of("perplexity-end", tag),
                             perplexity, "perplexity", 0.5),
        ]  # fmt: skip
        pictures.append(
            Picture(
                f"Perplexity{apart}",
                "Look at the last marks, which are the table's numbers: differences smaller than a "
                f"band of seeds is wide say nothing about the schemes.{chosen}",
                panels,
            )
        )
        pictures.append(
            Picture(
                f"Learning rates and depth{apart}",
                "Look for a scheme whose best learning rate is not the others', compared at one rate "
                "alone it would be wronged; and, where there are models of several depths, whether "
                "a curve falls with depth. Bars are deviations over seeds; a cross at the top is a "
                "run that diverged.",
                [
                    learning_rate_panel(same, name_of("learning-rates", tag)),
                    depth_panel(same, name_of("depth", tag)),
                ],
            )
        )
    return kept([*pictures, accuracy_picture(drawn_of(groups))])


# Layer diagnostics


def series(groups, *keys):
    """[(group, one number per layer)] of the groups whose probe.json has it."""
    return [(group, group.probe.series(*keys)) for group in groups if group.probe.series(*keys)]


def line_panel(curves, title, name, first=1, axis="layer", unit="", errors=None):
    """curves: [(group, one number per layer, from layer `first`)]; errors: their standard errors,
    likewise."""
    curves = [(group, ys) for group, ys in curves if finite(ys)]
    if not curves:
        return None
    figure, axes = new_panel(title, [short(group.tag) for group, _ in curves])
    ends = []
    for group, ys in curves:
        xs = list(range(first, first + len(ys)))
        draw_line(axes, group, xs, ys)
        at = max(i for i, y in enumerate(ys) if math.isfinite(y))
        ends.append((xs[at], ys[at], short(group.tag), colour_of(group)))
    for group, error in errors or ():
        ys = dict((id(g), ys) for g, ys in curves).get(id(group))
        if ys:
            axes.errorbar(range(first, first + len(ys)), ys, yerr=numpy.nan_to_num(error),
                          fmt="none", ecolor=colour_of(group), elinewidth=1, capsize=2)  # fmt: skip
    limits(axes, [y for _, ys in curves for y in ys])
    layer_axis(axes, first, first + max(len(ys) for _, ys in curves) - 1, axis, 0.3)
    axes.set_ylabel(unit)
    key_of_rates(axes, [group for group, _ in curves])
    label_ends(axes, ends)
    return Panel(name, title, figure)


def residual_variance(group):
    """After each layer, from the probe or the last validation in the log; or None."""
    if group.probe and group.probe.series("variance", "residual"):
        return group.probe.series("variance", "residual")[1:]
    for run in group.runs:
        if run.variance_history:
            return run.variance_history[-1][1][1:]
    return None


@dataclass
class Fit:
    """log variance = constant + slope · x, x = ℓ (exponential) or log ℓ (power)."""

    slope: float
    constant: float
    r2: float

    def __call__(self, xs):
        return numpy.exp(self.constant + self.slope * xs)


def variance_fits(group):
    """(power, exponential) over layers 1 … L: the probe's fit, or a least-squares fit if it has none.
    None if there is no variance."""
    values = residual_variance(group)
    if not values or len(values) < 3 or not all(math.isfinite(v) and v > 0 for v in values):
        return None
    layers = numpy.arange(1, len(values) + 1)
    logs = numpy.log(values)
    fits = []
    for xs, slope, r2 in (
        (numpy.log(layers), "power_exponent", "power_r2"),
        (layers, "exponential_rate", "exponential_r2"),
    ):
        own_slope, own_constant = numpy.polyfit(xs, logs, 1)
        total = ((logs - logs.mean()) ** 2).sum()
        left = ((logs - own_constant - own_slope * xs) ** 2).sum()
        own_r2 = 1 - left / total if total else 1
        told = group.probe.number("variance", slope) if group.probe else math.nan
        told_r2 = group.probe.number("variance", r2) if group.probe else math.nan
        if math.isfinite(told):
            fits.append(Fit(told, logs.mean() - told * xs.mean(), told_r2))
        else:
            fits.append(Fit(own_slope, own_constant, own_r2))
    return fits


def fit_panel(group, values, bounds):
    fits = variance_fits(group)
    title = f"{short(group.tag)}: variance and its fits"
    figure, axes = new_panel(title)
    layers = numpy.arange(1, len(values) + 1)
    axes.plot(layers, values, color=colour_of(group), marker=line_style(group)["marker"],
              linestyle="", markersize=5.5, label="measured")  # fmt: skip
    if fits:
        xs = numpy.linspace(1, len(values), 100)
        power, exponential = fits
        for fit, at, line, text in (
            (power, numpy.log(xs), "-", f"ℓ^{power.slope:.2f}"),
            (exponential, xs, "--", f"e^({exponential.slope:.3f} ℓ)"),
        ):
            r2 = f", R² {fit.r2:.3f}" if math.isfinite(fit.r2) else ""
            axes.plot(xs, fit(at), color=TEXT, linestyle=line, linewidth=1.3, label=text + r2)
    limits(axes, bounds, ratio=5)
    layer_axis(axes, 1, len(values), "after layer", 0.3)
    axes.legend(fontsize=LABEL_SIZE, frameon=False, loc="best")
    return Panel(name_of("variance-fit", group.tag), title, figure)


def history_panel(group, history, bounds, tokens_most):
    """The variance by layer at up to 10 points of training, from dark to bright."""
    at = numpy.unique(numpy.linspace(0, len(history) - 1, min(len(history), 10)).astype(int))
    title = f"{short(group.tag)}: variance through training"
    figure, axes = new_panel(title, right=0.85)
    norm = mcolors.Normalize(0, tokens_most)
    map_ = pyplot.get_cmap("viridis")
    for i in at:
        tokens, values = history[i]
        axes.plot(range(1, len(values)), values[1:], color=map_(norm(tokens)), linewidth=1.6)
    limits(axes, bounds)
    layer_axis(axes, 1, len(history[-1][1]) - 1, "after layer", 0.3)
    bar = colour_bar(axes, norm, map_, "training tokens")
    bar.ax.locator_params(nbins=5)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    return Panel(name_of("variance-history", group.tag), title, figure)


def colour_bar(axes, norm, map_, label):
    box = axes.get_position()
    place = axes.figure.add_axes((box.x1 + 0.1 / WIDTH, box.y0, 0.12 / WIDTH, box.height))
    bar = axes.figure.colorbar(pyplot.cm.ScalarMappable(norm, map_), cax=place)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, pad=3, labelsize=LABEL_SIZE)
    bar.ax.minorticks_off()
    bar.set_label(label, fontsize=LABEL_SIZE)
    return bar


def heat_panel(name, title, rows, norm, label, x_label, y_label, first, map_name="viridis"):
    """rows[n − 1][i] form a triangle, drawn with n upwards; i counts from `first`."""
    width = len(rows[0])
    cells = numpy.full((len(rows), width), numpy.nan)
    for i, row in enumerate(rows):
        cells[i, : len(row)] = row
    figure, axes = new_panel(title, right=0.95)
    map_ = pyplot.get_cmap(map_name)
    extent = (first - 0.5, first + width - 0.5, 0.5, len(rows) + 0.5)
    axes.imshow(cells, cmap=map_, norm=norm, origin="lower", aspect="auto", extent=extent,
                interpolation="none")  # fmt: skip
    axes.grid(False)
    layer_axis(axes, first, first + width - 1, x_label, 0.5)
    step = max(1, math.ceil(len(rows) / 6))
    axes.set_yticks([1, *range(max(2, step), len(rows) + 1, step)][: 1 + len(rows)])
    axes.set_ylabel(y_label)
    bar = colour_bar(axes, norm, map_, label)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
    return Panel(name, title, figure)


def threshold(values):
    """Where a symmetric scale for these numbers becomes logarithmic; None if it can be linear."""
    sizes = sorted(abs(v) for v in finite(values) if v)
    if not sizes or sizes[-1] < 30 * sizes[len(sizes) // 2]:
        return None
    return 10.0 ** math.floor(math.log10(max(sizes[len(sizes) // 4], sizes[-1] * 1e-4)))


def bar_panel(group, values, bounds, name, title, axis="layer", unit=None, errors=None):
    figure, axes = new_panel(title)
    layers = range(1, len(values) + 1)
    axes.bar(layers, values, color=colour_of(group), width=0.72, yerr=errors, ecolor=TEXT)
    axes.axhline(0, color=TEXT, linewidth=0.8)
    low, high = min(0, *bounds), max(0, *bounds)
    start = threshold(bounds)
    if start:
        axes.set_yscale("symlog", linthresh=start)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=start, base=10))
        axes.minorticks_off()
        axes.set_ylim(low * 1.3 if low < -start else -start / 3 if low < 0 else 0, high * 1.5)
    else:
        room = 0.06 * (high - low) or 1
        axes.set_ylim(low - room if low < 0 else 0, high + room)
        axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    layer_axis(axes, 1, len(values), axis, 0.6)
    axes.set_ylabel(unit or "loss, nats above the whole")
    return Panel(name, title, figure)


def increases(groups, *keys):
    """[(group, the losses under these keys minus the loss of the whole model)]."""
    return [
        (group, [value - group.probe.number("loss") for value in values])
        for group, values in series(groups, *keys)
        if math.isfinite(group.probe.number("loss"))
    ]


def bar_panels(values, kind, title, axis="layer"):
    """A panel for each of [(group, one number per layer)], on a common scale."""
    values = [(group, bars) for group, bars in values if finite(bars)]
    bounds = finite([bar for _, bars in values for bar in bars])
    return [bar_panel(g, bars, bounds, name_of(kind, g.tag), title(g), axis) for g, bars in values]


def variance_pictures(groups):
    values = [(group, residual_variance(group)) for group in groups]
    values = [(group, v) for group, v in values if v and finite(v)]
    bounds = [v for _, vs in values for v in finite(vs) if v > 0]
    probed = [group for group in groups if group.probe]

    panels = [
        line_panel(values, "Residual stream", "variance", axis="after layer"),
        line_panel(series(probed, "variance", "attention"), "What attention adds",
                   "variance-attention"),
        line_panel(series(probed, "variance", "mlp"), "What the MLP adds", "variance-mlp"),
    ]  # fmt: skip
    pictures = [
        Picture(
            "Variance by layer",
            "Look at how far the residual stream rises with depth, and whether what each layer "
            "adds keeps pace with it: a branch that is small beside the stream changes little.",
            panels,
        ),
        Picture(
            "Power or exponential?",
            "Look which line the marks follow on the logarithmic axis: the straight dashed one is "
            "exponential growth, the bending solid one a power of the layer's number ℓ (the "
            "paper's Theorem 3.3 predicts up to exponential growth for Pre-LN, a power for LNS).",
            [fit_panel(group, v, bounds) for group, v in values],
        ),
    ]
    histories = []
    for group in groups:
        found = next((run.variance_history for run in group.runs if run.variance_history), [])
        if len(found) > 1:
            histories.append((group, found))
    bounds = [v for _, h in histories for _, vs in h for v in finite(vs[1:]) if v > 0]
    most = max((h[-1][0] for _, h in histories), default=0)
    pictures.append(
        Picture(
            "Variance through training",
            "Look whether the deep end of the curves climbs as training goes on (dark: early, "
            "bright: late), or the whole profile settles.",
            [history_panel(group, h, bounds, most) for group, h in histories],
        )
    )
    return pictures


def gradient_picture(groups):
    def panel(kind, title, first):
        curves = series(groups, "gradient_norm", kind)
        return line_panel(curves, title, f"gradient-{kind}", first)

    return Picture(
        "Gradient norms",
        "Look for a slope: gradients that shrink or grow by orders of magnitude from layer to "
        "layer train some layers much faster than others; level curves are healthy.",
        [
            panel("residual", "‖∂loss/∂r‖ after each layer", 0),
            panel("attention", "Attention's parameters", 1),
            panel("mlp", "The MLP's parameters", 1),
            panel("norm", "The norms' parameters", 1),
        ],
    )


def angular_picture(groups):
    found = []
    for key, words in (("last_token", "last token"), ("all_tokens", "all tokens")):
        for group in groups:
            rows = group.probe.rows("angular_distance", key)
            if rows:
                found.append((group, key, words, rows))
    values = [v for *_, rows in found for row in rows for v in finite(row)]
    norm = mcolors.Normalize(0, max(values, default=1) or 1)
    return Picture(
        "Angular distance",
        "Look at the lowest rows toward the right: dark there means that a deep layer, or a run of "
        "n of them, hardly turns the residual stream, and could be left out (0: same direction, "
        "0.5: orthogonal; one colour scale for all).",
        [
            heat_panel(name_of("angular", key, g.tag), f"{short(g.tag)}: {words}", rows, norm,
                       "angle between them / π", "from after layer ℓ", "to n layers on", 0)
            for g, key, words, rows in found
        ],
    )  # fmt: skip


def removal_pictures(groups):
    pictures = [
        Picture(
            "Removal of one layer",
            "Look at the bars of the deep half: near zero, the model does not need those layers; "
            "the scale, logarithmic where the bars span much, is the same for all.",
            bar_panels(increases(groups, "removal", "single"), "removal",
                       lambda g: f"{short(g.tag)}: one layer removed"),
        )
    ]  # fmt: skip
    changes = []
    for group in groups:
        for task in group.probe.removal_tasks:
            values = group.probe.series("task_removal", task, "change")
            errors = group.probe.series("task_removal", task, "change_error")
            if values and not any(
                task.startswith(f"{other}_") for other in group.probe.removal_tasks
            ):
                changes.append((group, task, values, errors))
    bounds = finite([v for *_, values, _ in changes for v in values])
    pictures.append(
        Picture(
            "Accuracy without one layer",
            "Look at the bars of the deep half, as above: an accuracy that does not fall says that "
            "the benchmark can be answered without the layer; thin lines are standard errors.",
            [
                bar_panel(g, values, bounds, name_of("removal", task, g.tag),
                          f"{short(g.tag)}: {task}, one layer removed",
                          unit="change of accuracy", errors=errors)
                for g, task, values, errors in changes
            ],
        )
    )  # fmt: skip
    found = []
    for group in groups:
        rows, loss = group.probe.rows("removal", "blocks"), group.probe.number("loss")
        if rows and math.isfinite(loss):
            found.append((group, [[value - loss for value in row] for row in rows]))
    values = finite([v for _, rows in found for row in rows for v in row])
    top = max(values, default=1)
    start = threshold(values)
    if start and top > 0:
        norm = mcolors.SymLogNorm(start, vmin=min(0, *values), vmax=top, base=10)
    else:
        norm = mcolors.Normalize(min([0, *values]), top if top > 0 else 1)
    pictures.append(
        Picture(
            "Removal of a run of layers",
            "See how far up the dark region reaches: that many consecutive layers, from ℓ on, can "
            "be skipped at little cost; a model that uses its depth is bright throughout.",
            [
                heat_panel(name_of("removal-blocks", g.tag), f"{short(g.tag)}: n layers removed",
                           rows, norm, "loss, nats above the whole", "first layer removed, ℓ",
                           "layers removed, n", 1, "cividis")
                for g, rows in found
            ],
        )
    )  # fmt: skip
    return pictures


def matrix_panel(group, layer, rows, norm):
    cells = numpy.abs(numpy.array(rows, float))
    block = math.ceil(len(cells) / PIXELS)
    if block > 1:  # draw the maximum of each block
        size = math.ceil(len(cells) / block) * block
        padded = numpy.zeros((size, size))
        padded[: len(cells), : len(cells)] = cells
        side = size // block
        cells = padded.reshape(side, block, side, block).max(axis=(1, 3))
    title = f"{short(group.tag)}: |J|" + (f" of layer {layer:g}" if layer == layer else "")
    figure, axes = new_panel(title, height=3.9, right=0.95)
    map_ = pyplot.get_cmap("viridis")
    axes.imshow(numpy.maximum(cells, norm.vmin), cmap=map_, norm=norm, aspect="auto",
                extent=(0.5, len(rows) + 0.5, len(rows) + 0.5, 0.5),
                interpolation="none")  # fmt: skip
    axes.grid(False)
    axes.set_xlabel("channel in")
    axes.set_ylabel("channel out")
    axes.locator_params(nbins=5)
    bar = colour_bar(axes, norm, map_, "|∂r out / ∂r in|")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
    return Panel(name_of("jacobian-matrix", group.tag), title, figure)


def jacobian_pictures(groups):
    def panel(kind, title):
        return line_panel(series(groups, "jacobian", kind), title, f"jacobian-{kind}",
                          errors=series(groups, "jacobian", f"{kind}_error"))  # fmt: skip

    found = []
    for group in groups:
        rows = group.probe.rows("jacobian", "full", "matrix", triangle=False)
        if rows:
            found.append((group, group.probe.number("jacobian", "full", "layer"), rows))
    top = max([abs(v) for *_, rows in found for row in rows for v in finite(row)], default=1) or 1
    norm = mcolors.LogNorm(top * 1e-3, top)
    return [
        Picture(
            "Jacobian of each layer",
            "Look for curves that sink toward 0 with depth: ‖J − I‖/√C near 0 says that the layer "
            "is nearly the identity; the bars are standard errors of the estimate.",
            [panel("deviation", "‖J − I‖ / √C"), panel("norm", "‖J‖ / √C")],
        ),
        Picture(
            "One layer's Jacobian",
            "Look at the contrast between the diagonal and the rest: a lone bright diagonal is the "
            "identity, a bright field is a layer that mixes channels.",
            [matrix_panel(group, layer, rows, norm) for group, layer, rows in found],
        ),
    ]


def use_pictures(groups):
    def title(group):
        share = group.probe.number("usefulness", "share")
        told = f", {share:.0%} matter" if math.isfinite(share) else ""
        return f"{short(group.tag)}: made linear{told}"

    return [
        Picture(
            "Usefulness",
            "Look how many bars are tall: each is the loss added when a layer is replaced by its "
            "best linear fit, and a layer that costs little so does nothing that a "
            "matrix could not.",
            bar_panels(increases(groups, "usefulness", "linear_loss"), "usefulness", title),
        ),
        Picture(
            "Permutation",
            "Look for layers whose order does not matter: near zero, neighbours ℓ and ℓ + 1 can be "
            "swapped, as if they worked side by side and not one on the other.",
            bar_panels(increases(groups, "permutation"), "permutation",
                       lambda g: f"{short(g.tag)}: neighbours swapped",
                       "layer ℓ, swapped with the next"),
        ),
    ]  # fmt: skip


def probe_pictures(groups):
    drawn = drawn_of(groups)
    probed = [group for group in drawn if group.probe]
    pictures = variance_pictures(drawn)
    pictures += [gradient_picture(probed), angular_picture(probed), *removal_pictures(probed)]
    pictures += [*jacobian_pictures(probed), *use_pictures(probed)]
    return kept(pictures)


def make_vectors(figures):
    """Replaces images, of matrices and colour bars, by rectangles."""
    for axes in (axes for figure in figures for axes in figure.axes):
        for image in list(axes.images):
            cells = image.get_array()
            left, right, bottom, top = image.get_extent()
            if image.origin == "upper":
                bottom, top = top, bottom
            axes.pcolormesh(numpy.linspace(left, right, cells.shape[1] + 1),
                            numpy.linspace(bottom, top, cells.shape[0] + 1), cells,
                            cmap=image.cmap, norm=image.norm)  # fmt: skip
            image.remove()
        for mesh in axes.collections:
            if isinstance(mesh, QuadMesh):
                mesh.set(rasterized=False, edgecolor="face", linewidth=0.3)  # no gaps between them


def kept(pictures):
    """The pictures that have panels."""
    for picture in pictures:
        picture.panels = [panel for panel in picture.panels if panel]
    return [picture for picture in pictures if picture.panels]
