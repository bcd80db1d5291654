"""What a picture shows as numbers: its alternative text, the table under it, and what the page's
script draws from.

    for_script(pictures, ["a", "b"])    # {"runs": [...], "plots": [{"name": "loss", "lines": ...}]}

The numbers are those that the picture was drawn from, whatever shows them.
"""

import math
from typing import Any

import numpy as np

from pretrain.report.drawing import Line, Plot, compact_number

ROWS = 12  # of a table, besides first, last and best
SPOKEN = 10  # lines that an alternative text describes


def alt_text(plot: Plot, names: list[str]) -> str:
    """The picture in a sentence a line: first value, last, and the best.

    Loss against steps. run a, validation: first 10.82 at step 0, last 5.55 at 3,400, lowest ...
    """
    lines = [line for line in plot.lines if not line.faint]
    unit = plot.figure.axes[0].get_xlabel()
    parts = [f"{plot.title}."]
    for line in lines[:SPOKEN]:
        ends = [("first", 0), ("last", -1)] if len(line.x) > 1 else [("only value", 0)]
        if plot.best and len(line.x) > 1:
            ends.append((plot.best, best_index(plot, line)))
        said = ", ".join(f"{word} {short(line.y[i])} at {short(line.x[i])}" for word, i in ends)
        parts.append(f"{label(plot, line, names)}: {said}.")
    if len(lines) > SPOKEN:
        parts.append(f"{len(lines) - SPOKEN} more lines are in the table of numbers.")
    return " ".join([parts[0], f"Along {unit}.", *parts[1:]])


def label(plot: Plot, line: Line, names: list[str]) -> str:
    """Which line it is: its run where there are several, its kind where that is not clear."""
    kinds = {other.kind for other in plot.lines}
    words = [names[line.run]] * (len(names) > 1) + [line.kind] * (len(kinds) > 1)
    return ", ".join(words) or line.kind


def best_index(plot: Plot, line: Line) -> int:
    return int(line.y.argmin() if plot.best == "lowest" else line.y.argmax())


def short(value: float) -> str:
    """1234.0 -> "1,234"; 0.000612345 -> "0.00061234"; 5.5512 -> "5.5512"."""
    if value == int(value) and abs(value) < 1e9:
        return f"{value:,.0f}"
    return compact_number(value) if abs(value) >= 1e6 else f"{value:,.5g}"


def table(plot: Plot, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a column a line, rows at a choice of its points, first, last and best among
    them. A cell is the line's value there, else its last one before; empty outside of the line."""
    lines = [line for line in plot.lines if not line.faint]
    # Points of evaluations, where there are some: they are few, and what runs are compared by.
    chosen = [line for line in lines if line.kind == "validation"] or lines
    xs = np.unique(np.concatenate([line.x for line in chosen]))
    ends = [line.x[[0, -1, best_index(plot, line)]] for line in chosen]
    some = xs[np.linspace(0, len(xs) - 1, min(ROWS, len(xs))).round().astype(int)]
    header = [plot.figure.axes[0].get_xlabel(), *(label(plot, line, names) for line in lines)]
    rows = []
    for x in np.unique(np.concatenate([some, *ends])):
        at = [int(np.searchsorted(line.x, x, side="right")) - 1 for line in lines]
        inside = [i >= 0 and x <= line.x[-1] for i, line in zip(at, lines, strict=True)]
        if not any(inside):
            continue
        cells = zip(at, inside, lines, strict=True)
        rows.append([short(x), *(short(line.y[i]) if ok else "" for i, ok, line in cells)])
    return header, rows


def for_script(pictures: list[Plot], names: list[str]) -> dict[str, Any]:
    """All pictures as JSON takes them."""
    return {"runs": names, "plots": [_plot(plot) for plot in pictures]}


def _plot(plot: Plot) -> dict[str, Any]:
    axes = plot.figure.axes[0]
    limits = None if axes.get_autoscaley_on() else _numbers(np.array(axes.get_ylim()))
    return {
        "name": plot.name,
        "x": axes.get_xlabel(),
        "y": axes.get_ylabel(),
        "logX": axes.get_xscale() == "log",
        "logY": axes.get_yscale() == "log",
        "limits": limits,
        "marks": [[name, float(f"{y:.5g}"), on_left] for name, y, on_left in plot.marks],
        "moments": [x for x in plot.moments if math.isfinite(x)],
        "lines": [
            {
                "run": line.run,
                "kind": line.kind,
                "color": line.look.color,
                "dash": line.look.dash,
                "faint": line.faint,
                "x": _numbers(line.x, 9),
                "y": _numbers(line.y),
                "errors": None if line.errors is None else _numbers(line.errors, 3),
            }
            for line in plot.lines
        ],
    }


def _numbers(values: np.ndarray, digits: int = 5) -> list[float]:
    """With so many digits, whole ones without a point: they are most of a page's bytes."""
    rounded = (float(f"{value:.{digits}g}") for value in values.tolist())
    return [int(v) if v == int(v) else v for v in rounded]
