"""The report's pictures. A panel is as wide as a phone's screen shows without shrinking its letters,
so a page sets as many side by side as it has room for."""

import math
import warnings
from dataclasses import dataclass, field

import numpy
from matplotlib import colors as mcolors
from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

from groups import best_of_each, by_tokenizer, perplexity, tokenizer_name
from plotting import COLOURS, GRID, MONO, TEXT, count, line_style, plain, pyplot, scale_axis
from plotting import spread, use_style

FONT_SIZE, LABEL_SIZE = 11, 9.5  # points
WIDTH, HEIGHT = 4.7, 3.3  # inches
LETTER = 0.602 * LABEL_SIZE / 72  # inches that a letter of MONO is wide
GAP = 1.2 * LABEL_SIZE / 72  # inches between two labels
LONGEST = 22  # letters of a label
MANY = 8  # groups, from where on only the best learning rate of each scheme is drawn
POINTS = 300  # of a training curve; a panel has fewer pixels for it
PIXELS = 192  # of a drawn matrix's side


@dataclass
class Panel:
    name: str  # of its file
    title: str
    figure: object


@dataclass
class Picture:
    """One or more panels, and what to look for in them."""

    title: str
    look: str
    panels: list = field(default_factory=list)


def prepare():
    use_style(FONT_SIZE, {"svg.fonttype": "none", "xtick.labelsize": 10, "ytick.labelsize": 10})
    warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")


def name_of(*words):
    """"lns+scaled-init" -> "lns-scaled-init", for a file's name."""
    text = "-".join(words)
    text = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in text)
    return "-".join(part for part in text.split("-") if part)


def short(label):
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"


def new_panel(title, labels=(), height=HEIGHT, right=0.15):
    """Figure and axes, with room on the right for labels."""
    height = max(height, 1 + GAP * len(labels))
    figure = pyplot.figure(figsize=(WIDTH, height))
    if labels:
        right = 0.3 + LETTER * max(map(len, labels))
    left, bottom, top = 0.66, 0.56, 0.38
    box = (left / WIDTH, bottom / height)
    box += ((WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    axes = figure.add_axes(box)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    figure.text(0.1 / WIDTH, 1 - 0.08 / height, title, va="top", fontweight="bold")
    return figure, axes


def label_ends(axes, ends):
    """ends: [(x, y, text, colour)]. Each text stands to the right of the axes, and a thin line leads
    to it from its point; from the frame where the point lies outside."""
    figure = axes.figure
    figure.canvas.draw()  # fixes the axes, so that points can be placed
    size, box = figure.bbox, axes.bbox
    gap = GAP * figure.dpi
    points = [axes.transData.transform((x, y)) for x, y, *_ in ends]
    points = [
        (numpy.clip(x, box.x0, box.x1), numpy.clip(y, box.y0, box.y1) if y == y else box.y1)
        for x, y in points
    ]
    heights = spread([y for _, y in points], gap, box.y0)
    limit = box.y1 + gap / 2
    for i in sorted(range(len(heights)), key=lambda i: -heights[i]):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    for (x, y), height, (_, _, text, colour) in zip(points, heights, ends):
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
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 1, "shrinkB": 0},
        )


def colour_of(group):
    return line_style(group.index)["color"]


def draw_line(axes, group, xs, ys, marks=True, **more):
    style = {**line_style(group.index), "linewidth": 1.8, "markersize": 4.5, **more}
    if not marks:
        style["marker"] = ""
    elif len(xs) > 14:
        style["markevery"] = max(1, len(xs) // 8)
    axes.plot(xs, ys, **style)


def finite(values):
    return [value for value in values if math.isfinite(value)]


def limits(axes, values, log=True, ratio=30):
    """The y axis from the least to the greatest of the values, logarithmic if they span much."""
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
    axes.set_xlim(low, high)
    axes.set_xlabel("training tokens")
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))


def layer_axis(axes, first, last, label="layer", room=0.0):
    axes.set_xlabel(label)
    axes.set_xlim(first - room, last + room)
    step = max(1, math.ceil((last - first) / 6))
    ticks = [first, *range(first - first % step + step, last + 1, step)]
    if len(ticks) > 1 and ticks[1] - ticks[0] < step / 2:
        del ticks[1]
    axes.set_xticks(ticks)


# Loss


def smoothed(points):
    """[(tokens, loss)] -> tokens, the mean of the loss over 2% of the steps around, thinned."""
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
    """The end of a run that diverged."""
    axes.plot([x], [y], marker="x", markersize=9, markeredgewidth=2.4, color=colour_of(group),
              clip_on=False, zorder=5)  # fmt: skip


def stopped_runs(group):
    """The runs that diverged, and are not in the group's curve unless all did."""
    return [run for run, (word, _) in zip(group.runs, group.outcomes) if word == "diverged"]


def training_panel(groups, title, name):
    ends, seen, starts = [], [], []
    curves = []
    for group in groups:
        diverged = stopped_runs(group)
        for run in group.logged:
            if run.losses:
                curves.append((group, run, run in diverged, *smoothed(run.losses)))
    if not curves:
        return None
    labels = [short(group.label) for group in groups]
    figure, axes = new_panel(title, labels)
    labelled = set()
    for group, run, diverged, xs, ys in curves:
        draw_line(axes, group, xs, ys, marks=False, linewidth=1.5,
                  alpha=0.9 if group.label not in labelled else 0.5)  # fmt: skip
        if diverged:
            mark_end(axes, group, xs[-1], min(finite(ys) or [0], key=lambda y: abs(y - ys[-1])))
        else:
            seen += finite(ys)
            starts.append(finite(ys)[len(finite(ys)) // 20] if finite(ys) else 0)
        if group.label not in labelled:
            labelled.add(group.label)
            ends.append((xs[-1], ys[-1], short(group.label), colour_of(group)))
    tokens_axis(axes, 0, max(xs[-1] for *_, xs, _ in curves))
    values = seen or [y for *_, ys in curves for y in finite(ys)]
    top = max(starts) if starts else max(values, default=1)
    limits(axes, [v for v in values if v <= top], log=False)
    axes.set_ylabel("nats a token")
    label_ends(axes, ends)
    return Panel(name, title, figure)


def validation_panel(groups, title, name, of=lambda loss: loss, unit="nats a token", from_=0.0):
    """The mean over seeds, and a band from the least to the greatest."""
    curves = [(group, group.curve) for group in groups]
    curves = [(group, curve) for group, curve in curves if curve]
    if not curves:
        return None
    end = max(curve[-1][0] for _, curve in curves)
    begin = from_ * end
    good = [(g, c) for g, c in curves if not g.diverged] or curves
    texts = [f"{short(g.label)} {of(curve[-1][1]):.2f}" for g, curve in curves]
    figure, axes = new_panel(title, texts)
    ends = []
    for (group, curve), text in zip(curves, texts):
        tokens, mean, low, high = (list(column) for column in zip(*curve))
        mean, low, high = ([of(value) for value in values] for values in (mean, low, high))
        draw_line(axes, group, tokens, mean)
        if low != high:
            axes.fill_between(tokens, low, high, color=colour_of(group), alpha=0.2, linewidth=0)
        if group.diverged:
            mark_end(axes, group, tokens[-1], mean[-1])
        ends.append((tokens[-1], mean[-1], text, colour_of(group)))
        for run in stopped_runs(group) if not group.diverged else ():
            if run.validations:
                xs, ys = zip(*((t, of(loss)) for t, loss in run.validations))
                draw_line(axes, group, xs, ys, marks=False, linewidth=1, alpha=0.6)
    # Every loss falls from about log(vocabulary) in the first steps; what differs comes after.
    values = []
    for _, curve in good:
        later = [of(v) for t, *three in curve[len(curve) // 8 :] for v in three if t >= begin]
        values += later or [of(curve[-1][1])]
    limits(axes, values, log=False)
    # A run that stopped early keeps its marks: they are in the panel that begins at 0.
    tokens_axis(axes, begin, end)
    axes.set_ylabel(unit)
    shown = [end for end in ends if end[0] >= begin]
    label_ends(axes, shown)
    return Panel(name, title, figure)


def learning_rate_panel(groups, name):
    schemes = {}
    for group in groups:
        if math.isfinite(group.lr):
            schemes.setdefault(group.scheme, []).append(group)
    schemes = {s: gs for s, gs in schemes.items() if len({group.lr for group in gs}) > 1}
    values = [p for gs in schemes.values() for g in gs for p in g.perplexities]
    if not values:
        return None
    labels = [short(scheme) for scheme in schemes]
    figure, axes = new_panel("Final perplexity by learning rate", labels)
    median = sorted(values)[len(values) // 2]
    limits(axes, [v for v in values if v < 3 * median], log=True, ratio=4)
    ends, lrs = [], set()
    for scheme, same in schemes.items():
        points = {}
        for group in same:
            lrs.add(group.lr)
            if group.losses:
                points.setdefault(group.lr, []).extend(group.perplexities)
            elif group.diverged:
                axes.plot([group.lr], [0.97], transform=axes.get_xaxis_transform(), marker="x",
                          color=colour_of(same[0]), markersize=8, markeredgewidth=2)  # fmt: skip
        if points:
            xs = sorted(points)
            ys = [sum(points[x]) / len(points[x]) for x in xs]
            draw_line(axes, same[0], xs, ys)
            ends.append((xs[-1], ys[-1], short(scheme), colour_of(same[0])))
    axes.set_xscale("log")
    axes.set_xlim(min(lrs) / 1.15, max(lrs) * 1.15)
    axes.set_xticks(sorted(lrs))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"{lr:g}"))
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("perplexity")
    label_ends(axes, ends)
    return Panel(name, "Final perplexity by learning rate", figure)


def loss_pictures(groups):
    pictures = []
    classes = by_tokenizer(groups)
    for key, same in classes:
        apart = f" ({tokenizer_name(key)})" if len(classes) > 1 else ""
        tag = name_of(str(classes.index((key, same)) + 1)) if len(classes) > 1 else ""
        drawn = best_of_each(same, MANY)
        chosen = "" if len(drawn) == len(same) else " Of each scheme the best learning rate is drawn."
        panels = [
            training_panel(drawn, "Training loss, smoothed", name_of("training-loss", tag)),
            validation_panel(drawn, "Validation loss", name_of("validation-loss", tag)),
        ]
        pictures.append(
            Picture(
                f"Loss{apart}",
                "Look at the order of the curves at the right end, and whether the gaps there still "
                "grow or close; the marks are validations, a band spans the seeds, a cross ends a "
                f"run that diverged.{chosen}",
                panels,
            )
        )
        panels = [
            validation_panel(drawn, "Validation perplexity", name_of("perplexity", tag),
                             perplexity, "perplexity"),
            validation_panel(drawn, "Its second half", name_of("perplexity-end", tag),
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
                f"Learning rates{apart}",
                "Look for a scheme whose best learning rate is not the others': compared at one "
                "rate alone it would be wronged; a cross at the top is a run that diverged.",
                [learning_rate_panel(same, name_of("learning-rates", tag))],
            )
        )
    return kept(pictures)


# Probes


def line_panel(groups, get, title, name, first=1, axis="layer", unit="", errors=None, log=True):
    """get(probe) -> a list, a number a layer from the layer `first` on; drawn for all groups."""
    curves = [(group, get(group.probe)) for group in groups]
    curves = [(group, ys) for group, ys in curves if ys and finite(ys)]
    if not curves:
        return None
    labels = [short(group.label) for group, _ in curves]
    figure, axes = new_panel(title, labels)
    ends = []
    for group, ys in curves:
        xs = list(range(first, first + len(ys)))
        draw_line(axes, group, xs, ys)
        error = errors(group.probe) if errors else None
        if error:
            axes.errorbar(xs, ys, yerr=[e if math.isfinite(e) else 0 for e in error], fmt="none",
                          ecolor=colour_of(group), elinewidth=1, capsize=2)  # fmt: skip
        at = max(i for i, y in enumerate(ys) if math.isfinite(y))
        ends.append((xs[at], ys[at], short(group.label), colour_of(group)))
    limits(axes, [y for _, ys in curves for y in ys], log=log)
    layer_axis(axes, first, first + max(len(ys) for _, ys in curves) - 1, axis)
    axes.set_ylabel(unit)
    label_ends(axes, ends)
    return Panel(name, title, figure)


def residual_variance(group):
    """After each layer, of the probe or of the log's last validation; None if neither has it."""
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
    """(power, exponential) over the layers 1 … L: the probe's numbers, or our own least squares
    where it has none. None if there is no variance to fit."""
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
        spread_ = ((logs - logs.mean()) ** 2).sum()
        own_r2 = 1 - ((logs - own_constant - own_slope * xs) ** 2).sum() / spread_ if spread_ else 1
        told = group.probe.number("variance", slope) if group.probe else math.nan
        told_r2 = group.probe.number("variance", r2) if group.probe else math.nan
        if math.isfinite(told):
            fits.append(Fit(told, logs.mean() - told * xs.mean(), told_r2))
        else:
            fits.append(Fit(own_slope, own_constant, own_r2))
    return fits


def fit_panel(group, values, bounds):
    fits = variance_fits(group)
    title = f"{short(group.label)}: variance and its fits"
    figure, axes = new_panel(title)
    layers = numpy.arange(1, len(values) + 1)
    axes.plot(layers, values, color=colour_of(group), marker=line_style(group.index)["marker"],
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
    return Panel(name_of("variance-fit", group.label), title, figure)


def history_panel(group, history, bounds, tokens_most):
    """The variance by layer at up to 10 times of the training, from dark to bright."""
    at = numpy.unique(numpy.linspace(0, len(history) - 1, min(len(history), 10)).astype(int))
    title = f"{short(group.label)}: variance through training"
    figure, axes = new_panel(title, right=0.85)
    norm = mcolors.Normalize(0, tokens_most)
    map_ = pyplot.get_cmap("viridis")
    for i in at:
        tokens, values = history[i]
        axes.plot(range(1, len(values)), values[1:], color=map_(norm(tokens)), linewidth=1.6)
    limits(axes, bounds)
    layer_axis(axes, 1, len(history[-1][1]) - 1, "after layer")
    bar = colour_bar(axes, norm, map_, "training tokens")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    return Panel(name_of("variance-history", group.label), title, figure)


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
    """rows[n − 1][i]: a triangle, drawn with n upwards; i counts from `first`."""
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
    """From where on a scale that holds these numbers of both signs is logarithmic, or None if it
    need not be."""
    sizes = sorted(abs(v) for v in finite(values) if v)
    if not sizes or sizes[-1] < 30 * sizes[len(sizes) // 2]:
        return None
    return 10.0 ** math.floor(math.log10(max(sizes[len(sizes) // 4], sizes[-1] * 1e-4)))


def bar_panel(group, values, bounds, name, title, axis="layer"):
    figure, axes = new_panel(title)
    layers = range(1, len(values) + 1)
    axes.bar(layers, values, color=colour_of(group), width=0.72)
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
    axes.set_ylabel("loss, nats above the whole")
    return Panel(name, title, figure)


def increases(probe, *keys):
    """The losses under these keys above the whole model's."""
    values, loss = probe.series(*keys), probe.number("loss")
    return [value - loss for value in values] if values and math.isfinite(loss) else None


def bar_panels(groups, get, kind, title):
    """A panel for each group, on one scale."""
    found = [(group, get(group.probe)) for group in groups]
    found = [(group, values) for group, values in found if values and finite(values)]
    bounds = finite([value for _, values in found for value in values])
    return [
        bar_panel(g, v, bounds, name_of(kind, g.label), title(g)) for g, v in found
    ]  # fmt: skip


def variance_pictures(groups):
    values = [(group, residual_variance(group)) for group in groups]
    values = [(group, v) for group, v in values if v and finite(v)]
    bounds = [v for _, vs in values for v in finite(vs) if v > 0]
    probed = [group for group in groups if group.probe]

    shown = {id(group): v for group, v in values}
    overlay = [group for group, _ in values]
    panels = [
        any_line_panel(overlay, lambda g: shown[id(g)], "Residual stream", "variance", "after layer"),
        line_panel(probed, lambda p: p.series("variance", "attention"), "What attention adds",
                   "variance-attention"),
        line_panel(probed, lambda p: p.series("variance", "mlp"), "What the MLP adds",
                   "variance-mlp"),
    ]  # fmt: skip
    pictures = [
        Picture(
            "Variance by layer",
            "Look at how far the residual stream rises with depth, and whether what each layer adds "
            "keeps pace with it: a branch that is small beside the stream changes little.",
            panels,
        ),
        Picture(
            "Power or exponential?",
            "Look which line the marks follow on the logarithmic axis: the straight dashed one is "
            "exponential growth, the bending solid one a power of the layer's number ℓ (the paper's "
            "Theorem 3.3 predicts up to exponential growth for Pre-LN, a power for LNS).",
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


def any_line_panel(groups, get, title, name, axis):
    """line_panel of numbers that need not come from a probe."""

    @dataclass
    class Shown:
        label: str
        index: int
        probe: object

    return line_panel(
        [Shown(g.label, g.index, g) for g in groups], get, title, name, axis=axis
    )  # fmt: skip


def gradient_picture(groups):
    def panel(kind, title, first):
        return line_panel(groups, lambda p: p.series("gradient_norm", kind), title,
                          f"gradient-{kind}", first)  # fmt: skip

    return Picture(
        "Gradient norms",
        "Look for a slope: gradients that shrink or grow by orders of magnitude from layer to layer "
        "train some layers much faster than others; level curves are healthy.",
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
    found.sort(key=lambda item: item[0].index)  # a group's two beside each other
    values = [v for *_, rows in found for row in rows for v in finite(row)]
    norm = mcolors.Normalize(0, max(values, default=1) or 1)
    return Picture(
        "Angular distance",
        "Look at the lowest rows toward the right: dark there means that a deep layer, or a run of n "
        "of them, hardly turns the residual stream, and could be left out (0: same direction, 0.5: "
        "orthogonal; one colour scale for all).",
        [
            heat_panel(name_of("angular", key, g.label), f"{short(g.label)}: {words}", rows, norm,
                       "angle between them / π", "from after layer ℓ", "to n layers on", 0)
            for g, key, words, rows in found
        ],
    )  # fmt: skip


def removal_pictures(groups):
    pictures = [
        Picture(
            "Removal of one layer",
            "Look at the bars of the deep half: near zero, the model does not need those layers; the "
            "scale, logarithmic where the bars span much, is the same for all.",
            bar_panels(groups, lambda p: increases(p, "removal", "single"), "removal",
                       lambda g: f"{short(g.label)}: one layer removed"),
        )
    ]  # fmt: skip
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
            "Look how far up the dark region reaches: that many consecutive layers, from ℓ on, can "
            "be skipped at little cost; a model that uses its depth is bright throughout.",
            [
                heat_panel(name_of("removal-blocks", g.label), f"{short(g.label)}: n layers removed",
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
    if block > 1:  # the largest of each block
        size = math.ceil(len(cells) / block) * block
        padded = numpy.zeros((size, size))
        padded[: len(cells), : len(cells)] = cells
        side = size // block
        cells = padded.reshape(side, block, side, block).max(axis=(1, 3))
    title = f"{short(group.label)}: |J| of layer {layer:g}" if layer == layer else f"{short(group.label)}: |J|"
    figure, axes = new_panel(title, height=3.9, right=0.95)
    map_ = pyplot.get_cmap("viridis")
    axes.imshow(numpy.maximum(cells, norm.vmin), cmap=map_, norm=norm, aspect="auto",
                extent=(0.5, len(rows) + 0.5, len(rows) + 0.5, 0.5), interpolation="none")  # fmt: skip
    axes.grid(False)
    axes.set_xlabel("channel in")
    axes.set_ylabel("channel out")
    axes.locator_params(nbins=5)
    bar = colour_bar(axes, norm, map_, "|∂r out / ∂r in|")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
    return Panel(name_of("jacobian-matrix", group.label), title, figure)


def jacobian_pictures(groups):
    def panel(kind, title):
        return line_panel(groups, lambda p: p.series("jacobian", kind), title, f"jacobian-{kind}",
                          errors=lambda p: p.series("jacobian", f"{kind}_error"))  # fmt: skip

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
            [panel("deviation", "‖J − I‖ / √C"), panel("norm", "‖J‖")],
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
        return f"{short(group.label)}: made linear{told}"

    return [
        Picture(
            "Usefulness",
            "Look how many bars are tall: each is the loss added when a layer is replaced by its best "
            "linear fit, and a layer that costs little so does nothing that a matrix could not.",
            bar_panels(groups, lambda p: increases(p, "usefulness", "linear_loss"), "usefulness",
                       title),
        ),
        Picture(
            "Permutation",
            "Look for layers whose order does not matter: near zero, neighbours ℓ and ℓ + 1 can be "
            "swapped, as if they worked side by side and not one on the other.",
            [
                line_panel(groups, lambda p: increases(p, "permutation"), "Neighbours swapped",
                           "permutation", axis="layer ℓ, swapped with the next",
                           unit="loss, nats above the whole")
            ],
        ),
    ]  # fmt: skip


def probe_pictures(groups):
    drawn = best_of_each(groups, MANY)
    probed = [group for group in drawn if group.probe]
    pictures = variance_pictures(drawn)
    pictures += [gradient_picture(probed), angular_picture(probed), *removal_pictures(probed)]
    pictures += [*jacobian_pictures(probed), *use_pictures(probed)]
    return kept(pictures)


def kept(pictures):
    """Those that have a panel."""
    for picture in pictures:
        picture.panels = [panel for panel in picture.panels if panel]
    return [picture for picture in pictures if picture.panels]
