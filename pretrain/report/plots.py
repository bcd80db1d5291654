"""The pictures of a report: runs in, matplotlib figures out.

    for plot in plots([Run.load("checkpoints")]):
        print(plot.name, len(to_svg(plot)), len(to_png(plot)))

Each function below draws all runs into one axes and returns the caption, None where no run has such
numbers.
"""

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.report.drawing import (
    COLORS,
    INK,
    Plot,
    curve,
    evaluations,
    labels,
    legend,
    line_kinds,
    new_axes,
    plain_log_ticks,
    run_colors,
    style,
    whole,
)
from pretrain.report.known import KNOWN, MODELS, published, title
from pretrain.report.runs import Run, column, number, smooth, smoothing_window, task_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHED: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}


def plots(runs: list[Run]) -> list[Plot]:
    """All pictures; those for which no run has a number are left out."""
    kinds = (
        ("loss", "Loss against steps", loss_by_steps),
        ("loss-tokens", "Loss against tokens", loss_by_tokens),
        ("sources", "Validation loss by source", loss_by_sources),
        ("perplexity", "Validation perplexity", perplexity),
        ("accuracy", "Next-token accuracy", accuracy),
        ("learning-rate", "Learning rate", learning_rate),
        ("gradient-norm", "Gradient norm", gradient_norm),
        ("throughput", "Throughput", throughput),
        ("mfu", "Model FLOPs utilisation", mfu),
    )
    drawn = []
    with style():
        for name, heading, draw in kinds:
            axes = new_axes()
            if (caption := draw(axes, runs)) is not None:
                drawn.append(Plot(name, heading, caption, whole(axes)))
        for name, scoring in sorted({key for run in runs for key in task_results(run)}):
            axes = new_axes()
            caption = task(axes, runs, name, scoring)
            file = re.sub(r"[^A-Za-z0-9-]", "_", f"{name}-{scoring}")[:50]
            while any(plot.name == file for plot in drawn):  # two names that differ in a sign
                file += "_"
            drawn.append(Plot(file, f"{title(name)}, {scoring} style", caption, whole(axes)))
    return drawn


def loss_by_steps(axes: "Axes", runs: list[Run]) -> str | None:
    late_tops = []
    for run, (color, val_color, line) in zip(runs, run_colors(runs), strict=True):
        curve(axes, run.steps, run.loss, color, smoothed=True)
        evaluations(axes, column(run.evals, "step"), column(run.evals, "val_loss"), val_color, line)
        late = smooth(run.loss)[len(run.loss) // 10 :]
        late = late[np.isfinite(late)]
        if len(late) >= 60:
            late_tops.append(late.max())
        for step in run.resumed_at if len(runs) == 1 else ():
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
    if not axes.lines:
        return None
    windows = sorted({smoothing_window(len(run.loss)) for run in runs} - {1})
    notes = [
        f"Faint: as logged; strong: median over {' or '.join(map(str, windows))} logged steps."
    ] * bool(windows)
    low, high = axes.get_ylim()
    top = max(late_tops, default=math.inf)
    top += 0.15 * (top - low)
    if top < high:
        axes.set_ylim(low, top)
        notes.append("Higher values are cut off here, not against tokens.")
    if len(runs) == 1 and runs[0].resumed_at:
        notes.append("Dotted lines: a later process took over.")
    labels(axes, "step", "loss, nats per token")
    legend(axes, runs, line_kinds(runs))
    return " ".join(notes)


def loss_by_tokens(axes: "Axes", runs: list[Run]) -> str | None:
    for run, (color, val_color, line) in zip(runs, run_colors(runs), strict=True):
        tokens, eval_tokens = (run.tokens_at(x) for x in (run.steps, column(run.evals, "step")))
        curve(axes, np.where(tokens > 0, tokens, np.nan), run.loss, color, smoothed=True)
        eval_tokens = np.where(
            eval_tokens > 0, eval_tokens, np.nan
        )  # an evaluation before the first step
        evaluations(axes, eval_tokens, column(run.evals, "val_loss"), val_color, line)
    if not axes.lines:
        return None
    axes.set_xscale("log")
    labels(axes, "tokens trained on", "loss, nats per token", compact_x=True)
    legend(axes, runs, line_kinds(runs))
    return "Logarithmic in tokens, from the first step on."


def loss_by_sources(axes: "Axes", runs: list[Run]) -> str | None:
    """Of mixtures: a line for each source; several runs have the same colours for one source."""
    names = sorted({name for run in runs for name in run.sources})
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    for i, run in enumerate(runs):
        for name in run.sources:
            values = column([r.get("sources", {}).get(name, {}) for r in run.evals], "val_loss")
            line = ("-", "--", ":", "-.")[i % 4]
            evaluations(axes, column(run.evals, "step"), values, colors[name], line)
    if not axes.lines:
        return None
    labels(axes, "step", "loss, nats per token")
    legend(axes, [], tuple({"label": f" {name}"[:40], "color": colors[name]} for name in names))
    kinds = "; solid, dashed, dotted: one run after another" if len(runs) > 1 else ""
    return f"On the validation windows of each source of the mixture{kinds}."


def perplexity(axes: "Axes", runs: list[Run]) -> str | None:
    for run, (_, color, _) in zip(runs, run_colors(runs), strict=True):
        values = np.exp(np.minimum(column(run.evals, "val_loss"), 700.0))
        evaluations(axes, column(run.evals, "step"), values, color)
    if not axes.lines:
        return None
    plain_log_ticks(axes)
    labels(axes, "step", "perplexity")
    legend(axes, runs)
    return "exp(validation loss), per token."


def accuracy(axes: "Axes", runs: list[Run]) -> str | None:
    for run, (_, color, _) in zip(runs, run_colors(runs), strict=True):
        evaluations(axes, column(run.evals, "step"), 100 * column(run.evals, "accuracy"), color)
    labels(axes, "step", "correct, %")
    legend(axes, runs)
    return (
        "Validation tokens for which the most probable token was the right one."
        if axes.lines
        else None
    )


def learning_rate(axes: "Axes", runs: list[Run]) -> str | None:
    for run, (color, _, _) in zip(runs, run_colors(runs), strict=True):
        curve(axes, run.steps, column(run.train, "learning_rate"), color)
    labels(axes, "step", "learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    legend(axes, runs)
    return "" if axes.lines else None


def gradient_norm(axes: "Axes", runs: list[Run]) -> str | None:
    for run, (color, _, _) in zip(runs, run_colors(runs), strict=True):
        curve(axes, run.steps, column(run.train, "grad_norm"), color, smoothed=True)
    if not axes.lines:
        return None
    plain_log_ticks(axes)
    labels(axes, "step", "norm of the gradient")
    legend(axes, runs)
    clips = {run.setting("grad_clip") for run in runs}
    if len(clips) > 1 or not (clip := clips.pop()) > 0:
        return "Before clipping."
    axes.axhline(clip, **DASHED)
    return f"Before clipping. Dashed: --grad_clip {clip:g}."


def throughput(axes: "Axes", runs: list[Run]) -> str | None:
    _rates(axes, runs, "tokens_per_second", 1.0, "tokens/s")
    return "Without the time for evaluations and checkpoints." if axes.lines else None


def mfu(axes: "Axes", runs: list[Run]) -> str | None:
    _rates(axes, runs, "mfu", 100.0, "MFU, %")
    return (
        "Share of the device's peak FLOP/s that the model's arithmetic uses."
        if axes.lines
        else None
    )


def task(axes: "Axes", runs: list[Run], name: str, scoring: str) -> str:
    """acc_norm of a task, scored in one of its styles, with what others' models have."""
    counts = set()
    for run, (color, _, _) in zip(runs, run_colors(runs), strict=True):
        results = task_results(run).get((name, scoring), [])
        steps = np.array([step for step, _ in results], dtype=np.float64)
        percent = np.array([100 * number(result["acc_norm"]) for _, result in results])
        errors = np.array([100 * _standard_error(result) for _, result in results])
        evaluations(axes, steps, percent, color)
        axes.fill_between(
            steps, percent - errors, percent + errors, color=color, alpha=0.18, linewidth=0
        )
        counts |= {
            int(count) for _, result in results if math.isfinite(count := number(result.get("n")))
        }
    others = published(name, scoring)
    for model, (_, value) in others.items():
        _mark(axes, MODELS.get(model, model), value, on_left=True)
    if name in KNOWN:
        _mark(axes, "chance", KNOWN[name].chance, on_left=False)
    axes.margins(y=0.12)
    labels(axes, "step", "acc_norm, %")
    legend(axes, runs)
    on = f" on {' or '.join(f'{count:,}' for count in sorted(counts))} examples" if counts else ""
    dashed = f" Dashed: published values on all {KNOWN[name].examples:,}." if others else ""
    return f"Length-normalised accuracy{on}; band: one standard error.{dashed}"


def _mark(axes: "Axes", label: str, value: float, *, on_left: bool) -> None:
    """A dashed line with its value, written where the curve is not: that begins at chance, on the
    left."""
    axes.axhline(100 * value, **DASHED)
    axes.annotate(
        f"{label}: {100 * value:.4g}",
        (0 if on_left else 1, 100 * value),
        fontsize=9,
        ha="left" if on_left else "right",
        xycoords=axes.get_yaxis_transform(),
        xytext=(2, 3) if on_left else (-2, -11),
        textcoords="offset points",
    )


def _rates(axes: "Axes", runs: list[Run], key: str, factor: float, label: str) -> None:
    for run, (color, _, _) in zip(runs, run_colors(runs), strict=True):
        curve(axes, run.steps, factor * column(run.train, key), color, smoothed=True)
    axes.set_ylim(bottom=0)
    labels(axes, "step", label, compact_y=True)
    legend(axes, runs)


def _standard_error(result: dict) -> float:
    """Standard error of acc_norm: the recorded one, else that of a share of n; 0 where n is
    unknown."""
    recorded = [number(result.get(key)) for key in ("acc_norm_stderr", "stderr")]
    share, n = number(result["acc_norm"]), number(result.get("n"))
    derived = math.sqrt(share * (1 - share) / n) if n > 0 and 0 <= share <= 1 else 0.0
    return next((value for value in recorded if math.isfinite(value)), derived)
