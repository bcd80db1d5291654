"""What the pictures of a report are made of: axes, lines, legends, and SVG or PNG bytes in the
end.

matplotlib is loaded by the first figure, draws without a display, and gives the same bytes for the
same log. What is drawn is kept as numbers too, for tables and for the page's script.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from pretrain.report.runs import Run, smooth, smoothing_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each at least 3:1 against a white and against a dark card, as WCAG 1.4.11 asks of graphics.
COLORS = ("#2b7bcb", "#d2661a", "#25915f", "#c44f8f", "#8a6fd1", "#a07c10", "#2690a3", "#d0504e")
# Lengths of strokes and gaps in widths of the line: for those who cannot tell the colours apart.
# Eight colours and five dashes repeat together after 40 runs.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.3, 1.5), (6, 1.7, 1.3, 1.7), (9, 2.5))
INK, GRID = "#3d4450", "#d9dde3"  # on white
DARK = {INK: "#c6ccd5", GRID: "#343a44"}  # what they become on a dark page
POINTS = 600  # that a curve is drawn with at most: more than its pixels add nothing but bytes
NARROW, WIDE = (5.4, 3.4), (10.8, 3.9)  # inches; narrow ones can be read on a phone
STRONG, THIN = 1.8, 1.0  # widths of lines

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


class Look(NamedTuple):
    """How a line is told from others."""

    color: str
    dash: tuple[float, ...]


@dataclass
class Line:
    """A line of a picture, as numbers. `faint`: behind another of the same numbers, smoothed."""

    run: int  # place among the runs
    kind: str  # training, validation, or the name of a source
    look: Look
    x: np.ndarray  # float64, finite
    y: np.ndarray
    faint: bool = False
    errors: np.ndarray | None = None  # half the height of a band around it


@dataclass
class Plot:
    name: str  # within the PNG's: "loss" for report-loss.png
    title: str
    caption: str
    figure: "Figure"
    lines: list[Line] = field(default_factory=list)
    # horizontal lines: (label, y, whether the label stands on the left)
    marks: list[tuple[str, float, bool]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)  # vertical: x
    best: str = ""  # "lowest" or "highest", where one end of y is what is wanted
    is_wide: bool = False


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


def to_svg(plot: Plot, *, wide: bool = False, legend: bool = True) -> str:
    """A transparent SVG without dates, its identifiers made from its content."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    _arrange(plot, WIDE if wide else NARROW, legend, "none")
    with style():
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        # Not savefig, which draws everything twice for a layout that drawing computes as well.
        FigureCanvasSVG(plot.figure).print_svg(buffer, metadata=metadata)
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    _arrange(plot, NARROW, True, "white")
    with style():
        plot.figure.set_dpi(200)
        FigureCanvasAgg(plot.figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _arrange(plot: Plot, size: tuple[float, float], legend: bool, background: str) -> None:
    for one in plot.figure.legends:
        one.set_visible(legend)
        one.set_in_layout(legend)
    plot.figure.set_size_inches(*size)
    plot.figure.set_facecolor(background)
    for axes in plot.figure.axes:
        axes.set_facecolor(background)


def looks(count: int) -> list[tuple[Look, Look]]:
    """Per run how training and validation look: with one run they differ, with several the runs
    do."""
    found = [Look(COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i in range(max(count, 2))]
    return [(found[0], found[1])] if count == 1 else [(look, look) for look in found[:count]]


class Panel:
    """A picture while it is drawn: all runs in one axes, and the same lines as numbers."""

    def __init__(self, runs: list[Run]):
        self.runs, self.looks = runs, looks(len(runs))
        self.lines: list[Line] = []
        self.marks: list[tuple[str, float, bool]] = []
        self.moments: list[float] = []

    @cached_property
    def axes(self) -> "Axes":
        """Made when something is drawn: most runs lack the numbers of some pictures, and empty axes
        take as long as others."""
        from matplotlib.figure import Figure

        return Figure(figsize=NARROW, layout="constrained").add_subplot()

    @property
    def figure(self) -> "Figure":
        return cast("Figure", self.axes.figure)

    def curve(self, run: int, x: np.ndarray, y: np.ndarray, *, smoothed: bool = False) -> None:
        """One number per logged step; `smoothed`: faint, with the median of neighbours. nan: no
        point."""
        strong = smooth(y)
        keep = np.isfinite(x) & np.isfinite(y)
        x, y, strong = x[keep], y[keep], strong[keep]
        if smoothed and smoothing_window(len(keep)) > 1:
            self._add(Line(run, "training", self.looks[run][0], *thin(x, y), faint=True))
            y = strong
        # Several runs are told apart by their validation: training stays behind it.
        width = THIN if len(self.runs) > 1 and smoothed else STRONG
        self._add(Line(run, "training", self.looks[run][0], *thin(x, y)), width)

    def evaluations(
        self,
        run: int,
        x: np.ndarray,
        y: np.ndarray,
        errors: np.ndarray | None = None,
        *,
        kind: str = "validation",
        look: Look | None = None,
    ) -> None:
        """One number per evaluation, with dots while there are few, in a band of `errors` up and
        down. nan: no point. look: another than the run's."""
        keep = np.isfinite(x) & np.isfinite(y)
        x, y = x[keep], y[keep]
        look = look or self.looks[run][1]
        if errors is not None:
            errors = errors[keep]
            low, high = y - errors, y + errors
            self.axes.fill_between(x, low, high, color=look.color, alpha=0.18, linewidth=0)
            self._add(Line(run, kind, look, x, y, errors=errors), dots=True)
        else:
            self._add(Line(run, kind, look, *thin(x, y)), dots=True)

    def _add(self, line: Line, width: float = STRONG, *, dots: bool = False) -> None:
        if not len(line.x):
            return
        self.lines.append(line)
        few = len(line.x) == 1 or (dots and len(line.x) <= 40)
        look: dict[str, Any] = {"linewidth": width, "marker": "o" if few else None}
        if line.faint:
            look = {"alpha": 0.25, "linewidth": 0.7}
        elif line.look.dash:
            look["linestyle"] = (0, line.look.dash)
        self.axes.plot(line.x, line.y, color=line.look.color, markersize=3.5, **look)


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


def legend(panel: Panel, kinds: tuple[dict, ...] = (), *, named: bool = True) -> None:
    """Above the axes: the runs where there are several and they are `named`, and the kinds of
    lines."""
    from matplotlib.lines import Line2D

    shown = panel.runs if named and len(panel.runs) > 1 else ()
    # A label that begins with an underscore would be left out.
    entries = [
        {"label": f" {run.name}"[:40], "color": color, "linestyle": (0, dash) if dash else "-"}
        for run, (_, (color, dash)) in zip(shown, panel.looks, strict=False)
    ]
    handles = [Line2D([], [], **entry) for entry in (*entries, *kinds)]
    if handles:
        panel.figure.legend(handles=handles, loc="outside upper left", ncols=2)


def line_kinds(panel: Panel) -> tuple[dict, ...]:
    """The legend's entries for training and validation."""
    several = len(panel.runs) > 1
    train, val = (Look(INK, ()), Look(INK, ())) if several else panel.looks[0]
    marked = {"marker": "o", "markersize": 3.5, "linewidth": STRONG}
    if val.dash:
        marked["linestyle"] = (0, val.dash)
    return (
        {"label": "training", "color": train.color, "linewidth": THIN if several else STRONG},
        {"label": "validation", "color": val.color, **marked},
    )
