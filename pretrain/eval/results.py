"""What hellaswag.py says and writes of a result: the lines on the screen, and two files.

    print(report_lines(result, model=about, data=describe(path), settings=settings))

Both files are whole or not there.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.eval.hellaswag import PUBLISHED_FILES, Example, data_sha256
from pretrain.eval.scoring import Result
from pretrain.report.known import published, title


def describe(data: Path) -> dict[str, Any]:
    """A data file for the record: its name, its hash, and which published file it is."""
    sha256 = data_sha256(data)
    split = next((split for split, (_, known) in PUBLISHED_FILES.items() if known == sha256), None)
    return {"file": str(data), "sha256": sha256, "published_split": split}


def report_lines(
    result: Result,
    model: dict[str, Any],
    data: dict[str, Any],
    settings: dict[str, Any],
    task: str = "hellaswag",
) -> str:
    """The accuracies with their standard errors, and what they can be compared with."""
    known = published(task, result.style).items()
    others = ", ".join(f"{name} {acc:.4f} / {norm:.4f}" for name, (acc, norm) in known)
    unit = "token" if result.style == "completion" else "character"
    lines = [
        f"{title(task)}, {result.n:,} examples of {data['published_split'] or data['file']},"
        f" {result.style} style",
        f"model     {model['name']}, {model['parameters'] / 1e6:.1f}M parameters,"
        f" {settings['dtype']} on {settings['device']}",
        f"acc       {result.acc:.4f} +- {result.acc_stderr:.4f}   lowest loss",
        f"acc_norm  {result.acc_norm:.4f} +- {result.acc_norm_stderr:.4f}   lowest loss per {unit}",
        *([f"published, acc / acc_norm of all val: {others}"] if others else []),
        f"{result.seconds:.1f} s, {result.n / max(result.seconds, 1e-9):.1f} examples/s",
    ]
    if result.truncated:
        lines.insert(
            1, f"note      {result.truncated} endings had their context cut to fit into the model"
        )
    return "\n".join(lines)


def example_lines(example: Example, result: Result, i: int) -> str:
    """An example with the losses of its endings: * marks the right one, > the pick by acc_norm."""
    lines = [f"\n[{example.ind}] {example.activity_label}: {example.ctx}"]
    for k, ending in enumerate(example.endings):
        marks = ("*" if k == example.label else " ") + (">" if k == result.picks_norm[i] else " ")
        lines.append(
            f"  {marks} {result.losses[i, k]:8.3f} {result.losses_norm[i, k]:7.4f}  {ending}"
        )
    return "\n".join(lines)


def per_example(examples: Sequence[Example], result: Result) -> Iterator[dict[str, Any]]:
    """A record for each example."""
    columns = (result.losses, result.losses_norm, result.picks, result.picks_norm)
    for example, losses, norm, pick, pick_norm in zip(
        examples, *(column.tolist() for column in columns), strict=True
    ):
        yield {
            "ind": example.ind,
            "label": example.label,
            "losses": losses,
            "losses_norm": norm,
            "pick": pick,
            "pick_norm": pick_norm,
        }


def json_lines(records: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
