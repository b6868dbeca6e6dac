"""What picture.py and the report's figures share: Matplotlib, colours, fonts, axes.

Okabe and Ito's colours can be told apart by colour-blind eyes; line styles and markers differ too.
"""

import math
import os
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def use_own_python():
    """Goes on as a program of the environment that `make deps` made, where there is one, whatever
    python3 came first in PATH: its versions are the ones that are tested."""
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
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
    from matplotlib.ticker import SymmetricalLogLocator
except ImportError as error:
    sys.exit(
        f"{os.path.basename(sys.argv[0])}: Matplotlib is needed to draw, and {sys.executable} has "
        f"none that works ({error}): `make deps` installs it under build/"
    )

COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"]
LINES = ["-", "--", "-.", (0, (1, 1.2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
TEXT, GRID = "#222222", "#DDDDDD"
MONO = "DejaVu Sans Mono"  # in which "lns" is not "Ins"; it comes with Matplotlib too
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


def use_style(font_size, more=()):
    matplotlib.use("Agg")
    sizes = {"font.size": font_size, "axes.titlesize": font_size}
    matplotlib.rcParams.update({**STYLE, **sizes, **dict(more)})
    if "text.parse_math" in matplotlib.rcParams:
        matplotlib.rcParams["text.parse_math"] = False  # a $ in a directory's name is a $


def line_style(index):
    """Of the index-th of many lines. 28 differ, and the first 4 also without colour."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def count(n):
    """2097152 -> "2.1M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.2g}{name}" if n < 100 * unit else f"{n / unit:.0f}{name}"
    return f"{n:.0f}"


def spread(heights, gap, low):
    """The heights, moved so that no two are nearer than gap and none is below low."""
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
    """Makes the axis logarithmic if the positive numbers from low to high span more than ratio."""
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
