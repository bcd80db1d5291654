"""A report's HTML: key figures, findings, curves, samples, settings, in one document that loads
nothing.

    html_page(runs, found, pictures)

Everything that comes from a log or a path is escaped. One script may run, page.js, known to the
page's policy by its hash; without it the page shows the same pictures and numbers.
"""

import base64
import hashlib
import json
import math
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.report import values
from pretrain.report.compare import compare, seeds, so_far
from pretrain.report.drawing import Plot, compact_number, darkened, looks, to_svg
from pretrain.report.findings import Finding
from pretrain.report.known import title
from pretrain.report.runlog import duration
from pretrain.report.runs import Run, column, headline, number, smooth, task_results
from pretrain.report.sections import configuration, findings, run_looks, samples, swatch, table

# Nothing is loaded, and no script runs but the one of this hash.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}';"
    " base-uri 'none'; form-action 'none'"
)
KINDS = ("training", "validation")


class Figure(NamedTuple):
    label: str
    value: str
    note: str = ""


def html_page(
    runs: list[Run],
    found: list[tuple[Run, Finding]],
    pictures: list[Plot],
    *,
    renewed_every: int = 0,
) -> str:
    """The whole document; `found`: what findings.find says of each run; `pictures`: from
    plots.plots. renewed_every: seconds after which a browser loads it again (0: never)."""
    names = ", ".join(escape(run.name) for run in runs)
    folders = ", ".join(escape(str(run.folder)) for run in runs)
    css, script = (
        Path(__file__).with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    renewal = f'<meta http-equiv="refresh" content="{renewed_every}">\n' if renewed_every else ""
    parts = [
        f'<h1>Training report</h1><p class="soft names">{names}{_as_of(runs)}</p>',
        _key_figures(runs[0]) if len(runs) == 1 else _comparison(runs),
        f"<h2>What looks wrong</h2>{findings(runs, found)}",
        f"<h2>Curves</h2>{_curves(runs, pictures)}",
        samples(runs),
        f"<h2>Configuration</h2>{configuration(runs)}",
        f"<footer>Made by python -m pretrain.report from {folders}.</footer>",
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY.format(hash=digest)}">
{renewal}<title>Training report: {names}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body><main>
{"".join(f"<section>{part}</section>" + chr(10) for part in parts if part)}</main>
{_numbers(runs, pictures)}
<script>{script}</script></body>
</html>
"""


def _as_of(runs: list[Run]) -> str:
    last = max((number(run.records[-1].get("time")) for run in runs), default=math.nan)
    if not math.isfinite(last):
        return ""
    return f" · log until {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"


def _numbers(runs: list[Run], pictures: list[Plot]) -> str:
    """What the script draws from, as data that no browser runs."""
    data = values.for_script(pictures, [run.name for run in runs])
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # Nothing in it can end the element, or begin a comment in it.
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="numbers">{text}</script>'


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
        if math.isfinite(of_bytes := number(run.evals[best].get("bits_per_byte"))):
            figures.append(Figure("Bits per byte", f"{of_bytes:.4f}", at))
    else:
        figures += [Figure("Best validation loss", "–"), Figure("Best perplexity", "–")]
    loss = smooth(run.loss)
    loss = loss[np.isfinite(loss)]
    figures.append(
        Figure("Training loss", f"{loss[-1]:.4f}" if len(loss) else "–", "the last, smoothed")
    )
    for (task, scoring), results in task_results(run).items():
        last_step, result = results[-1]
        metric, accuracy = headline(result) or ("acc_norm", math.nan)
        note = f"{metric} at step {last_step:,}"
        if math.isfinite(examples := number(result.get("n"))):
            note += f", {examples:,.0f} examples"
        figures.append(Figure(f"{title(task)}, {scoring}", f"{100 * accuracy:.2f} %", note))
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
    return figures + _spent(run, tokens)


def _spent(run: Run, tokens: float) -> list[Figure]:
    """Dollars and energy so far, where the log has them."""
    figures = []
    dollars, energy = so_far(run, "dollars"), so_far(run, "kilowatt_hours")
    if math.isfinite(dollars):
        each = f"${dollars / tokens * 1e9:,.2f} a billion tokens" if tokens > 0 else ""
        figures.append(Figure("Cost", f"${dollars:,.2f}", each))
    if math.isfinite(energy):
        figures.append(Figure("Energy", f"{energy:,.2f} kWh", "of the GPUs, as NVML counts"))
    return figures


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
    compared = compare(runs)
    rows = []
    for r, (run, row) in enumerate(zip(compared.runs, compared.rows, strict=True)):
        look = next(look for other, look in zip(runs, run_looks(runs), strict=True) if other is run)
        cells = [f"<th>{swatch(look)}{escape(row[0])}</th>"]
        for c, cell in enumerate(row[1:], start=1):
            marked = ' class="best"' if (r, c) in compared.best else ""
            name = escape(compared.header[c])
            cells.append(f'<td{marked} data-of="{name}">{escape(cell) or "–"}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    spread = "".join(f'<p class="soft">{escape(line)}</p>' for line in seeds(runs))
    return f"<h2>What differs</h2>{table(compared.header, rows)}{spread}"


def _words(value: str) -> str:
    return ' class="words"' if len(value) > 14 else ""


def _curves(runs: list[Run], pictures: list[Plot]) -> str:
    if not pictures:
        return '<p class="soft">Nothing to draw yet.</p>'
    names = [run.name for run in runs]
    figures = "".join(_picture(plot, names) for plot in pictures)
    return f'{_legend(runs)}<div class="grid">{figures}</div>'


def _legend(runs: list[Run]) -> str:
    """Which line is what, once for all pictures; the script makes switches of the entries."""
    pairs = looks(len(runs))
    if len(runs) == 1:
        entries = [("training", "training", pairs[0][0]), ("validation", "validation", pairs[0][1])]
    else:
        entries = [
            (str(i), run.name, look)
            for i, (run, look) in enumerate(zip(runs, run_looks(runs), strict=True))
        ]
    shown = [
        f'<span data-of="{of}">{swatch(look)}{escape(name)}</span>' for of, name, look in entries
    ]
    if len(runs) > 1:
        shown += [
            '<span data-of="training">thin: training</span>',
            '<span data-of="validation">with dots: validation</span>',
        ]
    return f'<p class="legend" id="legend">{"".join(shown)}</p>'


def _picture(plot: Plot, names: list[str]) -> str:
    small = to_svg(plot, legend=False)
    shown = to_svg(plot, legend=False, wide=True) if plot.is_wide else small
    width, height = (1080, 390) if plot.is_wide else (540, 340)
    dark, narrow = "screen and (prefers-color-scheme: dark)", "(max-width: 640px)"
    sources = [(dark, darkened(shown))]
    if plot.is_wide:  # its text would be too small on a phone
        sources = [(f"{dark} and {narrow}", darkened(small)), (narrow, small), *sources]
    others = "".join(f'<source media="{when}" srcset="{_data(svg)}">' for when, svg in sources)
    header, rows = values.table(plot, names)
    cells = [
        f'<tr><th data-of="{escape(header[0])}">{row[0]}</th>'
        + "".join(
            f'<td data-of="{escape(name)}">{cell or "–"}</td>'
            for name, cell in zip(header[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return (
        f'<figure class="card{" wide" if plot.is_wide else ""}" id="plot-{escape(plot.name)}">'
        f'<div class="head"><h3>{escape(plot.title)}</h3></div><picture>{others}'
        f'<img alt="{escape(values.alt_text(plot, names))}" width="{width}" height="{height}"'
        f' src="{_data(shown)}"></picture>'
        f"{_sources(plot)}<figcaption>{escape(plot.caption)}</figcaption>"
        f'<details class="numbers"><summary>Numbers</summary>{table(header, cells, "")}</details>'
        "</figure>"
    )


def _sources(plot: Plot) -> str:
    """A legend of its own for a picture whose lines are of other kinds than all others'."""
    kinds = {line.kind: line.look for line in plot.lines if line.kind not in KINDS}
    shown = (f"<span>{swatch(look)}{escape(name)}</span>" for name, look in kinds.items())
    return f'<p class="legend">{"".join(shown)}</p>' if kinds else ""


def _data(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
