"""A report's HTML: key figures, findings, curves, samples, settings, in one document that loads
nothing.

    html_page(runs, found, pictures)

Everything that comes from a log or a path is escaped; scripts are forbidden besides.
"""

import base64
import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.report.compare import compare, seeds
from pretrain.report.drawing import COLORS, Plot, compact_number, darkened, to_svg
from pretrain.report.findings import MIN_POINTS, Finding
from pretrain.report.known import title
from pretrain.report.runs import Record, Run, column, number, smooth, task_results

# No script runs, nothing is loaded.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SAMPLED_STEPS = 12  # that the page shows samples of, first and last among them


class Figure(NamedTuple):
    label: str
    value: str
    note: str = ""


def html_page(runs: list[Run], found: list[tuple[Run, Finding]], pictures: list[Plot]) -> str:
    """The whole document; `found`: what findings.find says of each run; `pictures`: from
    plots.plots."""
    names = ", ".join(escape(run.name) for run in runs)
    folders = ", ".join(escape(str(run.folder)) for run in runs)
    css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    last = max((number(run.records[-1].get("time")) for run in runs), default=math.nan)
    as_of = ""
    if math.isfinite(last):
        as_of = f" · log until {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"
    curves = "".join(map(_picture, pictures)) or '<p class="soft">Nothing to draw yet.</p>'
    parts = [
        f'<h1>Training report</h1><p class="soft names">{names}{as_of}</p>',
        _key_figures(runs[0]) if len(runs) == 1 else _comparison(runs),
        f"<h2>What looks wrong</h2>{_findings(runs, found)}",
        f'<h2>Curves</h2><div class="grid">{curves}</div>',
        _samples(runs),
        f"<h2>Configuration</h2>{_configuration(runs)}",
        f"<footer>Made by python -m pretrain.report from {folders}.</footer>",
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Training report: {names}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body><main>
{"".join(f"<section>{part}</section>" + chr(10) for part in parts if part)}</main></body>
</html>
"""


def key_figures(run: Run) -> list[Figure]:
    """What one wants to know first, as text; "–" for what the log does not hold (yet)."""
    step, last = run.last_step, run.max_iters
    figures = [Figure("Status", run.status(), _resumed_note(run))]
    done = f"{step:,}" if step is not None else "–"
    figures.append(Figure("Steps", done, f"of {last:,}" if last else ""))
    tokens = run.tokens_at(np.array([float(step)]))[0] if step is not None else math.nan
    figures.append(Figure("Tokens", compact_number(tokens) if math.isfinite(tokens) else "–"))
    for name, part in run.sources.items():
        val_loss, seen = number(part.get("val_loss")), number(part.get("tokens"))
        note = f"{number(part.get('epochs')):.2f} epochs"
        note += f"; validation loss {val_loss:.4f}" if math.isfinite(val_loss) else ""
        value = f"{compact_number(seen)} tokens" if math.isfinite(seen) else "–"
        figures.append(Figure(f"Source {name}", value, note))
    val = column(run.evals, "val_loss")
    if np.isfinite(val).any():
        best = int(np.nanargmin(np.where(np.isfinite(val), val, np.nan)))
        at = f"at step {run.evals[best]['step']:,}"
        figures.append(Figure("Best validation loss", f"{val[best]:.4f}", at))
        figures.append(Figure("Best perplexity", f"{math.exp(min(val[best], 700)):,.2f}", at))
        if math.isfinite(bits := number(run.evals[best].get("bits_per_byte"))):
            figures.append(Figure("Bits per byte", f"{bits:.4f}", at))
    else:
        figures += [Figure("Best validation loss", "–"), Figure("Best perplexity", "–")]
    loss = smooth(run.loss)
    loss = loss[np.isfinite(loss)]
    figures.append(
        Figure("Training loss", f"{loss[-1]:.4f}" if len(loss) else "–", "the last, smoothed")
    )
    for (task, scoring), results in task_results(run).items():
        last_step, result = results[-1]
        note = f"acc_norm at step {last_step:,}"
        if math.isfinite(count := number(result.get("n"))):
            note += f", {count:,.0f} examples"
        figures.append(
            Figure(f"{title(task)}, {scoring}", f"{100 * number(result['acc_norm']):.2f} %", note)
        )
    rate = column(run.train, "tokens_per_second")
    share = column(run.train, "mfu")
    note = (
        f"median; MFU {100 * np.nanmedian(share):.1f} %" if np.isfinite(share).any() else "median"
    )
    figures.append(Figure("Time", duration(run.seconds_running), "with evaluations and saves"))
    if saves := [record for record in run.records if record["event"] == "save"]:
        pause = np.nansum(column(saves, "pause_seconds"))
        figures.append(
            Figure("Saves", f"{len(saves):,}", f"training waited {pause:,.1f} s for them")
        )
    figures.append(
        Figure("Tokens/s", f"{np.nanmedian(rate):,.0f}" if np.isfinite(rate).any() else "–", note)
    )
    return figures


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    for size, unit, small, small_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // small)} {small_unit}"
    raise AssertionError(seconds)


def _resumed_note(run: Run) -> str:
    steps = [f"{int(step):,}" for step in run.resumed_at if math.isfinite(step)]
    return f"resumed at step {', '.join(steps[-3:])}" if steps else ""


def _key_figures(run: Run) -> str:
    tiles = (
        f'<div class="card"><small>{escape(label)}</small><b{_words(value)}>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for label, value, note in key_figures(run)
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _comparison(runs: list[Run]) -> str:
    """What differs and how far each run came, the best first, its best values marked."""
    table = compare(runs)
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = []
    for r, (run, row) in enumerate(zip(table.runs, table.rows, strict=True)):
        color = COLORS[next(i for i, other in enumerate(runs) if other is run) % len(COLORS)]
        cells = [
            f'<th><span class="swatch" style="background:{color}"></span>{escape(row[0])}</th>'
        ]
        for c, cell in enumerate(row[1:], start=1):
            marked = ' class="best"' if (r, c) in table.best else ""
            cells.append(f"<td{marked}>{escape(cell) or '–'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    spread = "".join(f'<p class="soft">{escape(line)}</p>' for line in seeds(runs))
    return (
        "<h2>What differs</h2>"
        f'<div class="card scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>{spread}'
    )


def _words(value: str) -> str:
    return ' class="words"' if len(value) > 14 else ""


def _names_row(runs: list[Run]) -> str:
    swatches = (COLORS[i % len(COLORS)] for i in range(len(runs)))
    names = (
        f'<th><span class="swatch" style="background:{color}"></span>{escape(run.name)}</th>'
        for run, color in zip(runs, swatches, strict=True)
    )
    return f"<tr><th></th>{''.join(names)}</tr>"


def _findings(runs: list[Run], found: list[tuple[Run, Finding]]) -> str:
    cards = [
        f'<div class="card finding"><h3>{escape(finding.title)}</h3>'
        f'<p class="soft">{f"{escape(run.name)}, " if len(runs) > 1 else ""}'
        f"step {finding.step:,}</p>"
        f"<p>{_prose(finding.text)}</p><p><b>What to try:</b> {_prose(finding.advice)}</p></div>"
        for run, finding in found
    ]
    if not cards:
        cards = [
            '<div class="card healthy"><p>Nothing. Looked for: loss or gradients not finite, '
            "validation loss rising while training loss falls, loss spikes, loss rising, loss not "
            "moving, gradient norm growing, throughput dropping.</p></div>"
        ]
    short = [run.name for run in runs if len(run.train) < MIN_POINTS]
    if short:
        names = f" in {escape(', '.join(short))}" if len(runs) > 1 else ""
        cards.append(
            f'<p class="soft">Fewer than {MIN_POINTS} logged steps{names}: too few to judge '
            "trends.</p>"
        )
    return "".join(cards)


def _prose(text: str) -> str:
    """Escaped, with the names of flags and files set as code, which also keeps them on one line."""
    return re.sub(r"--[a-z][a-z0-9_]*|\b\w+\.(?:py|pt)\b", r"<code>\g<0></code>", escape(text))


def _picture(plot: Plot) -> str:
    svg = to_svg(plot)
    light, dark = (base64.b64encode(image.encode()).decode() for image in (svg, darkened(svg)))
    source = "data:image/svg+xml;base64,"
    return (
        f'<figure class="card"><h3>{escape(plot.title)}</h3><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{source}{dark}">'
        f'<img alt="{escape(plot.title)}" width="540" height="340" src="{source}{light}"></picture>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _samples(runs: list[Run]) -> str:
    blocks = []
    for run in runs:
        by_step: dict[int, list[Record]] = {}
        for record in run.samples:
            by_step.setdefault(record["step"], []).append(record)
        if not by_step:
            continue
        steps = sorted(by_step)
        shown = sorted(
            {steps[round(i)] for i in np.linspace(0, len(steps) - 1, SAMPLED_STEPS)}, reverse=True
        )
        left_out = f"<p><small>{len(shown)} of {len(steps)} steps with samples.</small></p>"
        blocks.append(
            f'<div class="card">{f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""}'
            + "".join(_sampled_step(step, by_step[step], opened=step == shown[0]) for step in shown)
            + f"{left_out if len(shown) < len(steps) else ''}</div>"
        )
    return f'<h2>Samples</h2><div class="grid">{"".join(blocks)}</div>' if blocks else ""


def _sampled_step(step: int, records: list[Record], *, opened: bool) -> str:
    texts = [pair for record in records for pair in _prompts_and_texts(record)]
    body = "".join(
        f'<p class="sample"><b>{escape(prompt)}</b>{escape(text)}</p>' for prompt, text in texts
    )
    first = " ".join(f"{texts[0][0]}{texts[0][1]}".split())[:90] if texts else ""
    summary = f"<summary>Step {step:,} <small>{escape(first)}</small></summary>"
    return f"<details{' open' if opened else ''}>{summary}{body}</details>"


def _prompts_and_texts(record: Record) -> Iterator[tuple[str, str]]:
    for text in record["texts"]:
        yield record["prompt"], text.removeprefix(record["prompt"])


def _configuration(runs: list[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return '<p class="soft">Not in the log yet.</p>'
    groups: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda key: not key.startswith("flags.")):
        groups.setdefault(key.split(".")[0] if "." in key else "", []).append(key)
    head = _names_row(runs) if len(runs) > 1 else ""
    tables: list[str] = []
    for group, names in groups.items():
        rows = "".join(_setting_row(runs, name, group) for name in names)
        opened = "" if tables else " open"
        summary = f"<summary>{escape(group) or 'all else'}</summary>"
        tables.append(
            f'<details{opened}>{summary}<table class="settings">{head}{rows}</table></details>'
        )
    return f'<div class="card scroll">{"".join(tables)}</div>'


def _setting_row(runs: list[Run], key: str, group: str) -> str:
    values = [_setting(run.config[key]) if key in run.config else "" for run in runs]
    differs = ' class="differs"' if len(set(values)) > 1 else ""
    cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f"<tr{differs}><th>{escape(key.removeprefix(f'{group}.'))}</th>{cells}</tr>"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
