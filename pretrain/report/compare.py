"""Several runs side by side: what differs between them and how far they came, the best run first.

    table = compare([Run.load("a"), Run.load("b")])
    table.header, table.rows       # ["run", "learning_rate", "validation loss", ...], [["b", ...]]

The same table is on the page, in --csv and in --md.
"""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.report.known import title
from pretrain.report.runs import Run, column, headline, number, task_results

# Settings that differ between any two runs and tell nothing of them.
OWN = ("out_dir", "resumed_from", "config", "resume", "git_revision", "git_changed", "data_dir")
# What follows from flags that differ, and would say it a second time.
DERIVED = ("last_learning_rate", "max_tokens", "steps_per_epoch")
LEFT_OUT = (
    *("versions.", "memory.", "flags.async_save"),
    *("flags.wandb", "flags.tensorboard", "flags.trackio"),
)


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]
    runs: list[Run]  # of the rows
    best: set[tuple[int, int]] = field(default_factory=set)  # (row, column) of best values


@dataclass(frozen=True)
class Measure:
    """A number of every run; `better`: min, max, or None where none is better than another."""

    name: str
    of: Callable[[Run], float]
    form: str
    better: Callable[[list[float]], float] | None


def best_evaluation(run: Run) -> dict[str, Any]:
    """The "eval" record with the lowest validation loss; empty where there is none."""
    losses = column(run.evals, "val_loss")
    if not np.isfinite(losses).any():
        return {}
    return run.evals[int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))]


def perplexity(run: Run) -> float:
    return math.exp(min(number(best_evaluation(run).get("val_loss")), 700.0))


def tokens(run: Run) -> float:
    step = run.last_step
    return math.nan if step is None else float(run.tokens_at(np.array([float(step)]))[0])


def speed(run: Run) -> float:
    rates = column(run.train, "tokens_per_second")
    return float(np.nanmedian(rates)) if np.isfinite(rates).any() else math.nan


def so_far(run: Run, name: str) -> float:
    """The last value of something that adds up; nan where there is none."""
    values = column(run.train, name)
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else math.nan


def _of_best(name: str) -> Callable[[Run], float]:
    return lambda run: number(best_evaluation(run).get(name))


def _of_task(key: tuple[str, str]) -> Callable[[Run], float]:
    def last(run: Run) -> float:
        results = task_results(run).get(key)
        found = headline(results[-1][1]) if results else None
        return found[1] if found else math.nan

    return last


def measures(runs: list[Run]) -> list[Measure]:
    """What is compared, without what no run has."""
    keys = sorted({key for run in runs for key in task_results(run)})
    found = [
        Measure("validation loss", _of_best("val_loss"), ".4f", min),
        Measure("at step", _of_best("step"), ",.0f", None),
        Measure("perplexity", perplexity, ",.2f", min),
        Measure("bits per byte", _of_best("bits_per_byte"), ".4f", min),
        *(
            Measure(f"{title(name)} {style}", _of_task((name, style)), ".2%", max)
            for name, style in keys
        ),
        Measure("tokens", tokens, ",.0f", None),
        Measure("tokens/s", speed, ",.0f", max),
        Measure("dollars", lambda run: so_far(run, "dollars"), ",.2f", None),
        Measure("kWh", lambda run: so_far(run, "kilowatt_hours"), ",.2f", None),
        Measure("seconds", lambda run: run.seconds_running, ",.0f", None),
    ]
    return [m for m in found if any(math.isfinite(m.of(run)) for run in runs)]


def differing(runs: list[Run]) -> list[str]:
    """The names of the settings that are not equal in all runs, flags first. A setting that a run
    does not know differs only among those that do."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    found = []
    for name in sorted(names, key=lambda name: not name.startswith("flags.")):
        own = name.rsplit(".", 1)[-1] in OWN + DERIVED or name.startswith(LEFT_OUT)
        values = {shown(run.config[name]) for run in runs if name in run.config}
        if not own and len(values) > 1:
            found.append(name)
    flags = {name.removeprefix("flags.") for name in found if name.startswith("flags.")}
    # What follows from a flag under another heading says the same again.
    return [n for n in found if n.startswith("flags.") or n.rsplit(".", 1)[-1] not in flags]


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def by_loss(runs: list[Run]) -> list[Run]:
    """The runs, that of the lowest validation loss first, those without one last."""
    losses = {id(run): number(best_evaluation(run).get("val_loss")) for run in runs}
    return sorted(runs, key=lambda run: (math.isnan(losses[id(run)]), losses[id(run)]))


def compare(runs: list[Run]) -> Table:
    """One row a run, by validation loss: its name, the settings that differ, the measures, how it
    stands."""
    runs = by_loss(runs)
    settings, compared = differing(runs), measures(runs)
    short = [name.rsplit(".", 1)[-1] for name in settings]
    names = [s if short.count(s) == 1 else name for s, name in zip(short, settings, strict=True)]
    header = ["run", *names, *(measure.name for measure in compared), "status"]
    rows = [
        [run.name, *(shown(run.config[n]) if n in run.config else "" for n in settings)]
        for run in runs
    ]
    best = set()
    for measure in compared:
        values = [measure.of(run) for run in runs]
        known = [value for value in values if math.isfinite(value)]
        for row, value in enumerate(values):
            if measure.better and len(known) > 1 and value == measure.better(known):
                best.add((row, len(rows[row])))
            rows[row].append(format(value, measure.form) if math.isfinite(value) else "")
    for cells, run in zip(rows, runs, strict=True):
        cells.append(run.status())
    return Table(header, rows, runs, best)


def seeds(runs: list[Run]) -> list[str]:
    """A line for each setting that was run with several seeds: mean and spread of the best
    validation losses."""
    names = [name for name in differing(runs) if name.rsplit(".", 1)[-1] != "seed"]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        key = tuple(f"{n.rsplit('.', 1)[-1]} {shown(run.config.get(n))}" for n in names)
        groups.setdefault(key, []).append(run)
    lines = []
    for key, group in groups.items():
        losses = [number(best_evaluation(run).get("val_loss")) for run in group]
        losses = [loss for loss in losses if math.isfinite(loss)]
        of_seeds = {run.setting("seed") for run in group}
        if len(losses) > 1 and len(of_seeds) == len(group):
            spread = float(np.std(losses, ddof=1))
            what = ", ".join(key) or "one setting"
            lines.append(
                f"{what}: validation loss {np.mean(losses):.4f} +- {spread:.4f}"
                f" (mean and standard deviation of {len(losses)} seeds)"
            )
    return lines


def to_csv(table: Table) -> str:
    """The table for a spreadsheet or pandas; numbers without separators."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    for row in table.rows:
        writer.writerow([_plain(cell) for cell in row])
    return text.getvalue()


def _plain(cell: str) -> str:
    """1,234.5 -> 1234.5; 29.55% -> 0.2955; a cell that a spreadsheet would compute is kept text."""
    digits = cell.replace(",", "")
    try:
        if digits.endswith("%"):
            return f"{float(digits[:-1]) / 100:.6g}"
        float(digits)
        return digits if not cell.startswith(",") else cell
    except ValueError:
        return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t") else cell


def to_markdown(table: Table) -> str:
    """The table for a README or an issue, best values in bold."""
    lines = [table.header, ["---"] * len(table.header)]
    for r, row in enumerate(table.rows):
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in row]
        lines.append([f"**{c}**" if (r, i) in table.best else c for i, c in enumerate(cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
