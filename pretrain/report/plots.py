"""The pictures of a report: runs in, matplotlib figures out.

    for plot in plots([Run.load("checkpoints")]):
        print(plot.name, len(to_svg(plot)), len(to_png(plot)))

Each function below draws all runs into one panel and returns the caption, None where no run has
such numbers.
"""

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.report.drawing import (
    COLORS,
    DASHES,
    INK,
    Look,
    Panel,
    Plot,
    labels,
    legend,
    line_kinds,
    plain_log_ticks,
    style,
)
from pretrain.report.known import KNOWN, MODELS, published, title
from pretrain.report.runs import (
    Run,
    column,
    headline,
    number,
    smooth,
    smoothing_window,
    task_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHED: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}


def plots(runs: list[Run]) -> list[Plot]:
    """All pictures; those for which no run has a number are left out."""
    kinds = (
        ("loss", "Loss against steps", loss_by_steps, "lowest"),
        ("loss-tokens", "Loss against tokens", loss_by_tokens, "lowest"),
        ("sources", "Validation loss by source", loss_by_sources, "lowest"),
        ("perplexity", "Validation perplexity", perplexity, "lowest"),
        ("bits-per-byte", "Bits per byte", bits_per_byte, "lowest"),
        ("accuracy", "Next-token accuracy", accuracy, "highest"),
        ("learning-rate", "Learning rate", learning_rate, "highest"),
        ("gradient-norm", "Gradient norm", gradient_norm, "highest"),
        ("throughput", "Throughput", throughput, "highest"),
        ("mfu", "Model FLOPs utilisation", mfu, "highest"),
    )
    drawn: list[Plot] = []

    def add(panel: Panel, name: str, heading: str, caption: str, best: str) -> None:
        kept = (panel.figure, panel.lines, panel.marks, panel.moments, best, name == "loss")
        drawn.append(Plot(name, heading, caption, *kept))

    with style():
        for name, heading, draw, best in kinds:
            panel = Panel(runs)
            if (caption := draw(panel)) is not None:
                add(panel, name, heading, caption, best)
        for name, scoring in sorted({key for run in runs for key in task_results(run)}):
            panel = Panel(runs)
            caption = task(panel, name, scoring)
            file = re.sub(r"[^A-Za-z0-9-]", "_", f"{name}-{scoring}")[:50]
            while any(plot.name == file for plot in drawn):  # two names that differ in a sign
                file += "_"
            add(panel, file, f"{title(name)}, {scoring} style", caption, "highest")
    return drawn


def loss_by_steps(panel: Panel) -> str | None:
    late_tops, runs = [], panel.runs
    for i, run in enumerate(runs):
        panel.curve(i, run.steps, run.loss, smoothed=True)
        panel.evaluations(i, column(run.evals, "step"), column(run.evals, "val_loss"))
        late = smooth(run.loss)[len(run.loss) // 10 :]
        late = late[np.isfinite(late)]
        if len(late) >= 60:
            late_tops.append(late.max())
        for step in run.resumed_at if len(runs) == 1 else ():
            panel.axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
            panel.moments.append(step)
    if not panel.lines:
        return None
    windows = sorted({smoothing_window(len(run.loss)) for run in runs} - {1})
    notes = [
        f"Faint: as logged; strong: median over {' or '.join(map(str, windows))} logged steps."
    ] * bool(windows)
    low, high = panel.axes.get_ylim()
    top = max(late_tops, default=math.inf)
    top += 0.15 * (top - low)
    if top < high:
        panel.axes.set_ylim(low, top)
        notes.append("Higher values are cut off here, not against tokens.")
    if len(runs) == 1 and runs[0].resumed_at:
        notes.append("Dotted lines: a later process took over.")
    labels(panel.axes, "step", "loss, nats per token")
    legend(panel, line_kinds(panel))
    return " ".join(notes)


def loss_by_tokens(panel: Panel) -> str | None:
    for i, run in enumerate(panel.runs):
        tokens, eval_tokens = (run.tokens_at(x) for x in (run.steps, column(run.evals, "step")))
        panel.curve(i, np.where(tokens > 0, tokens, np.nan), run.loss, smoothed=True)
        # an evaluation before the first step has no place on a logarithmic axis
        eval_tokens = np.where(eval_tokens > 0, eval_tokens, np.nan)
        panel.evaluations(i, eval_tokens, column(run.evals, "val_loss"))
    if not panel.lines:
        return None
    panel.axes.set_xscale("log")
    labels(panel.axes, "tokens trained on", "loss, nats per token", compact_x=True)
    legend(panel, line_kinds(panel))
    return "Logarithmic in tokens, from the first step on."


def loss_by_sources(panel: Panel) -> str | None:
    """Of mixtures: a line for each source; several runs have the same colours for one source."""
    runs = panel.runs
    names = sorted({name for run in runs for name in run.sources})
    for i, run in enumerate(runs):
        for name in run.sources:
            values = column([r.get("sources", {}).get(name, {}) for r in run.evals], "val_loss")
            place = names.index(name)
            dash = DASHES[(i if len(runs) > 1 else place) % len(DASHES)]
            look = Look(COLORS[place % len(COLORS)], dash)
            panel.evaluations(i, column(run.evals, "step"), values, kind=name, look=look)
    if not panel.lines:
        return None
    labels(panel.axes, "step", "loss, nats per token")
    entries = (Look(COLORS[i % len(COLORS)], ()) for i in range(len(names)))
    kinds = ({"label": f" {n}"[:40], "color": e.color} for n, e in zip(names, entries, strict=True))
    legend(panel, tuple(kinds), named=False)
    apart = "; strokes: one run after another" if len(runs) > 1 else ""
    return f"On the validation windows of each source of the mixture{apart}."


def perplexity(panel: Panel) -> str | None:
    for i, run in enumerate(panel.runs):
        values = np.exp(np.minimum(column(run.evals, "val_loss"), 700.0))
        panel.evaluations(i, column(run.evals, "step"), values)
    if not panel.lines:
        return None
    plain_log_ticks(panel.axes)
    labels(panel.axes, "step", "perplexity")
    legend(panel)
    return "exp(validation loss), per token."


def bits_per_byte(panel: Panel) -> str | None:
    for i, run in enumerate(panel.runs):
        panel.evaluations(i, column(run.evals, "step"), column(run.evals, "bits_per_byte"))
    if not panel.lines:
        return None
    labels(panel.axes, "step", "bits per byte")
    legend(panel)
    return "Validation loss in bits, by the bytes of the text: comparable across vocabularies."


def accuracy(panel: Panel) -> str | None:
    for i, run in enumerate(panel.runs):
        panel.evaluations(i, column(run.evals, "step"), 100 * column(run.evals, "accuracy"))
    if not panel.lines:
        return None
    labels(panel.axes, "step", "correct, %")
    legend(panel)
    return "Validation tokens for which the most probable token was the right one."


def learning_rate(panel: Panel) -> str | None:
    for i, run in enumerate(panel.runs):
        panel.curve(i, run.steps, column(run.train, "learning_rate"))
    if not panel.lines:
        return None
    labels(panel.axes, "step", "learning rate")
    panel.axes.set_ylim(bottom=0)
    panel.axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    legend(panel)
    return ""


def gradient_norm(panel: Panel) -> str | None:
    for i, run in enumerate(panel.runs):
        panel.curve(i, run.steps, column(run.train, "grad_norm"), smoothed=True)
    if not panel.lines:
        return None
    plain_log_ticks(panel.axes)
    labels(panel.axes, "step", "norm of the gradient")
    legend(panel)
    clips = {run.setting("grad_clip") for run in panel.runs}
    if len(clips) > 1 or not (clip := clips.pop()) > 0:
        return "Before clipping."
    panel.axes.axhline(clip, **DASHED)
    panel.marks.append(("--grad_clip", clip, False))
    return f"Before clipping. Dashed: --grad_clip {clip:g}."


def throughput(panel: Panel) -> str | None:
    _rates(panel, "tokens_per_second", 1.0, "tokens/s")
    return "Without the time for evaluations and checkpoints." if panel.lines else None


def mfu(panel: Panel) -> str | None:
    _rates(panel, "mfu", 100.0, "MFU, %")
    share = "Share of the device's peak FLOP/s that the model's arithmetic uses."
    return share if panel.lines else None


def task(panel: Panel, name: str, scoring: str) -> str:
    """acc_norm (else acc) of a task, scored in one of its styles, with what others' models have."""
    counts: set[int] = set()
    names: set[str] = set()
    for i, run in enumerate(panel.runs):
        results = task_results(run).get((name, scoring), [])
        steps = np.array([step for step, _ in results], dtype=np.float64)
        found = [headline(result) or ("acc_norm", math.nan) for _, result in results]
        names |= {metric for metric, _ in found}
        percent = np.array([100 * value for _, value in found])
        errors = np.array([100 * _standard_error(result) for _, result in results])
        panel.evaluations(i, steps, percent, errors)
        counts |= {
            int(count) for _, result in results if math.isfinite(count := number(result.get("n")))
        }
    others = published(name, scoring)
    for model, (_, value) in others.items():
        _mark(panel, MODELS.get(model, model), value, on_left=True)
    if name in KNOWN:
        _mark(panel, "chance", KNOWN[name].chance, on_left=False)
    panel.axes.margins(y=0.12)
    labels(panel.axes, "step", f"{' or '.join(sorted(names))}, %")
    legend(panel)
    on = f" on {' or '.join(f'{count:,}' for count in sorted(counts))} examples" if counts else ""
    dashed = f" Dashed: published values on all {KNOWN[name].examples:,}." if others else ""
    kind = "Accuracy" if names == {"acc"} else "Length-normalised accuracy"
    return f"{kind}{on}; band: one standard error.{dashed}"


def _mark(panel: Panel, label: str, value: float, *, on_left: bool) -> None:
    """A dashed line with its value, written where the curve is not: that begins at chance, on the
    left."""
    axes: Axes = panel.axes
    axes.axhline(100 * value, **DASHED)
    panel.marks.append((label, 100 * value, on_left))
    axes.annotate(
        f"{label}: {100 * value:.4g}",
        (0 if on_left else 1, 100 * value),
        fontsize=9,
        ha="left" if on_left else "right",
        xycoords=axes.get_yaxis_transform(),
        xytext=(2, 3) if on_left else (-2, -11),
        textcoords="offset points",
    )


def _rates(panel: Panel, key: str, factor: float, label: str) -> None:
    for i, run in enumerate(panel.runs):
        panel.curve(i, run.steps, factor * column(run.train, key), smoothed=True)
    if not panel.lines:
        return
    panel.axes.set_ylim(bottom=0)
    labels(panel.axes, "step", label, compact_y=True)
    legend(panel)


def _standard_error(result: dict) -> float:
    """Standard error of the headline: the recorded one, else that of a share of n; 0 where n is
    unknown."""
    name, share = headline(result) or ("acc_norm", math.nan)
    recorded = [number(result.get(key)) for key in (f"{name}_stderr", "stderr")]
    n = number(result.get("n"))
    derived = math.sqrt(share * (1 - share) / n) if n > 0 and 0 <= share <= 1 else 0.0
    return next((value for value in recorded if math.isfinite(value)), derived)
