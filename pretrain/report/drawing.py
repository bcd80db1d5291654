"""What the pictures of a report are made of: axes, curves, legends, and SVG or PNG bytes in the
end.

matplotlib is loaded by the first figure, draws without a display, and gives the same bytes for the
same log.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pretrain.report.runs import Run, smooth, smoothing_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2f80d0", "#e0762a", "#2f9e6b", "#c44f8f", "#8a6fd1", "#b08a1e", "#3aa5b8", "#d0504e")
INK, GRID = "#3d4450", "#d9dde3"  # on white
DARK = {INK: "#c6ccd5", GRID: "#343a44"}  # what they become on a dark page
POINTS = 600  # that a curve is drawn with at most: more than its pixels add nothing but bytes

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # names of runs may hold a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.4,
    "svg.fonttype": "path",
    "svg.hashsalt": "pretrain.report",
}


@dataclass
class Plot:
    name: str  # within the PNG's: "loss" for report-loss.png
    title: str
    caption: str
    figure: "Figure"


@contextmanager
def style() -> Iterator[None]:
    """The look of the pictures; the user's own matplotlib settings stay out of it and as they
    were."""
    logging.getLogger("matplotlib.font_manager").setLevel(
        logging.ERROR
    )  # "building the font cache"
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # a run's name in any script
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def to_svg(plot: Plot) -> str:
    """A transparent SVG without dates, its identifiers made from its content."""
    buffer = io.StringIO()
    with style():
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        plot.figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return re.sub(
        r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL
    )  # they hold the labels as text


def darkened(svg: str) -> str:
    """The same picture for a dark page."""
    for light, dark in DARK.items():
        svg = svg.replace(light, dark)
    return svg


def to_png(plot: Plot) -> bytes:
    """A PNG on white, 1,080 pixels wide."""
    buffer = io.BytesIO()
    with style():
        plot.figure.savefig(
            buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def new_axes() -> "Axes":
    """Small enough that its text can be read on a phone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(5.4, 3.4), layout="constrained").add_subplot()


def whole(axes: "Axes") -> "Figure":
    """The figure of new_axes."""
    return cast("Figure", axes.figure)


def run_colors(runs: list[Run]) -> list[tuple[str, str, str]]:
    """Per run (colour of training, colour of validation, line style of validation)."""
    if len(runs) == 1:
        return [(COLORS[0], COLORS[1], "-")]
    colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]
    return [(color, color, "--") for color in colors]


def curve(
    axes: "Axes", x: np.ndarray, y: np.ndarray, color: str, *, smoothed: bool = False
) -> None:
    """Draw one number per logged step; `smoothed`: faint, with the median of neighbours. nan: no
    point."""
    strong = smooth(y)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y, strong = x[keep], y[keep], strong[keep]
    if len(y) == 1:
        axes.plot(x, y, "o", color=color, markersize=4)
    elif len(y) and (not smoothed or smoothing_window(len(keep)) == 1):
        axes.plot(*thin(x, y), color=color)
    elif len(y):
        axes.plot(*thin(x, y), color=color, alpha=0.3, linewidth=0.8)
        axes.plot(*thin(x, strong), color=color)


def evaluations(axes: "Axes", x: np.ndarray, y: np.ndarray, color: str, line: str = "-") -> None:
    """Draw one number per evaluation, with dots while there are few. nan: no point."""
    keep = np.isfinite(x) & np.isfinite(y)
    if keep.any():
        marker = "o" if keep.sum() <= 40 else None
        axes.plot(*thin(x[keep], y[keep]), line, color=color, marker=marker, markersize=3.5)


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the points: of each stretch the lowest and the highest, so no spike gets
    lost."""
    if len(x) <= points:
        return x, y
    parts = np.array_split(np.arange(len(x)), points // 2)
    kept = np.unique(
        [part[extreme(y[part])] for part in parts for extreme in (np.argmin, np.argmax)]
    )
    return x[kept], y[kept]


def labels(
    axes: "Axes", x: str, y: str, *, compact_x: bool = False, compact_y: bool = False
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    compact = FuncFormatter(lambda value, _: compact_number(value))
    if compact_x:
        axes.xaxis.set_major_formatter(compact)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if compact_y:
        axes.yaxis.set_major_formatter(compact)


def compact_number(value: float) -> str:
    """12,345 -> "12.3K", 9.99e9 -> "9.99B"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def plain_log_ticks(axes: "Axes") -> None:
    """A logarithmic y axis with 20, 50, 100 instead of powers of ten: one or two decades at
    most."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def legend(axes: "Axes", runs: list[Run], kinds: tuple[dict, ...] = ()) -> None:
    """Above the axes: the runs by colour where there are several, and the kinds of lines."""
    from matplotlib.lines import Line2D

    named = zip(runs if len(runs) > 1 else (), run_colors(runs), strict=False)
    # A label that begins with an underscore would be left out.
    entries = [{"label": f" {run.name}"[:40], "color": color} for run, (color, _, _) in named]
    handles = [Line2D([], [], **entry) for entry in (*entries, *kinds)]
    if handles:
        axes.figure.legend(handles=handles, loc="outside upper left", ncols=2)


def line_kinds(runs: list[Run]) -> tuple[dict, ...]:
    """The legend's entries for training and validation."""
    train, val, line = run_colors(runs)[0] if len(runs) == 1 else (INK, INK, "--")
    marked = {
        "label": "validation",
        "color": val,
        "linestyle": line,
        "marker": "o",
        "markersize": 3.5,
    }
    return {"label": "training", "color": train}, marked
