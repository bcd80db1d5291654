"""Parts of a report's page, as HTML: what looks wrong, samples, configuration, and tables that a
phone can show.

    findings(runs, [(run, finding), ...]), samples(runs), configuration(runs)

Everything that comes from a log or a path is escaped.
"""

import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np

from pretrain.report.compare import differing
from pretrain.report.drawing import Look, looks
from pretrain.report.findings import MIN_POINTS, Finding
from pretrain.report.runs import Record, Run

SAMPLED_STEPS = 12  # that the page shows samples of, first and last among them


def table(header: list[str], rows: list[str], kind: str = "card") -> str:
    """A table that a phone and paper show as a list, where its columns would be cut: the cells of
    `rows` say what they are of in data-of."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    many = " many" if len(header) > 7 else ""
    return (
        f'<div class="{kind} scroll"><table class="folds{many}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def run_looks(runs: list[Run]) -> list[Look]:
    return [look for _, look in looks(len(runs))]


def swatch(look: Look) -> str:
    """A piece of the line, as pictures have it."""
    dash = " ".join(f"{2.5 * length:g}" for length in look.dash)
    return (
        '<svg class="swatch" width="28" height="8" aria-hidden="true"><line x1="0" x2="28" y1="4"'
        f' y2="4" stroke="{look.color}" stroke-width="2.5" stroke-dasharray="{dash}"/></svg>'
    )


def findings(runs: list[Run], found: list[tuple[Run, Finding]]) -> str:
    """A card a finding; those of one title in several runs share a card."""
    groups: dict[str, list[tuple[Run, Finding]]] = {}
    for run, finding in found:
        groups.setdefault(finding.title, []).append((run, finding))
    cards = [_finding(title, group, len(runs) > 1) for title, group in groups.items()]
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


def _finding(title: str, group: list[tuple[Run, Finding]], named: bool) -> str:
    advice = list(dict.fromkeys(finding.advice for _, finding in group))
    where = ", ".join(
        f"{f'{escape(run.name)} at ' if named else ''}step {finding.step:,}"
        for run, finding in group
    )
    texts = [
        f"<p>{f'{escape(run.name)}: ' if len(group) > 1 else ''}{_prose(finding.text)}</p>"
        for run, finding in group
    ]
    body = texts[0]
    if len(group) > 1:
        body = f"<details><summary>In {len(group)} runs</summary>{''.join(texts)}</details>"
    tips = "".join(f"<p><b>What to try:</b> {_prose(one)}</p>" for one in advice)
    return (
        f'<div class="card finding"><h3>{escape(title)}</h3><p class="soft">{where}</p>'
        f"{body}{tips}</div>"
    )


def _prose(text: str) -> str:
    """Escaped, with the names of flags and files set as code, which also keeps them on one line."""
    return re.sub(r"--[a-z][a-z0-9_]*|\b\w+\.(?:py|pt)\b", r"<code>\g<0></code>", escape(text))


def samples(runs: list[Run]) -> str:
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


def configuration(runs: list[Run]) -> str:
    """All settings of a run; of several those that differ, and the others folded away."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return '<p class="soft">Not in the log yet.</p>'
    keys.sort(key=lambda key: not key.startswith("flags."))
    if len(runs) == 1:
        return f'<div class="card">{_settings(runs, keys)}</div>'
    apart = [key for key in keys if len({_setting(run, key) for run in runs}) > 1]
    named = [key for key in differing(runs) if key in apart]
    rows = [_setting_row(runs, key, key) for key in named]
    same = [key for key in keys if key not in named]
    shown = table(["", *(run.name for run in runs)], rows, "card settings") if rows else ""
    return (
        f'{shown}<div class="card"><details><summary>Equal in all, or of no weight'
        f" ({len(same)} settings)</summary>{_settings(runs, same)}</details></div>"
    )


def _settings(runs: list[Run], keys: list[str]) -> str:
    """Settings in groups, the first of them open."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split(".")[0] if "." in key else "", []).append(key)
    tables: list[str] = []
    for group, names in groups.items():
        rows = [_setting_row(runs, name, name.removeprefix(f"{group}.")) for name in names]
        opened = "" if tables else " open"
        summary = f"<summary>{escape(group) or 'all else'}</summary>"
        header = ["", *(run.name for run in runs)] if len(runs) > 1 else []
        tables.append(f"<details{opened}>{summary}{table(header, rows, 'settings')}</details>")
    return "".join(tables)


def _setting_row(runs: list[Run], key: str, name: str) -> str:
    shown = [_setting(run, key) for run in runs]
    differs = ' class="differs"' if len(set(shown)) > 1 else ""
    cells = "".join(
        f'<td data-of="{escape(run.name) if len(runs) > 1 else ""}">{escape(value)}</td>'
        for run, value in zip(runs, shown, strict=True)
    )
    return f"<tr{differs}><th>{escape(name)}</th>{cells}</tr>"


def _setting(run: Run, key: str) -> str:
    value: Any = run.config.get(key, "")
    return value if isinstance(value, str) else json.dumps(value)
