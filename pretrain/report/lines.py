"""The console's lines of a run: one a record of the log, readable in a window of 80 columns.

train_line(record, max_iters=600_000), eval_line(record, max_iters=600_000)
"""

from typing import Any

from pretrain.report import schema
from pretrain.report.schema import tasks_of

COLUMNS = 80  # of a window that a log is read in


def train_line(
    record: dict[str, Any], max_iters: int, times: str = "", columns: int = COLUMNS
) -> str:
    """The console's line of a "train" record. times: what it says last, of elapsed and remaining.

    step   1000/600000 | loss  6.1234 | lr 3.00e-04 | norm   0.91 |   123,457 tok/s
    |    265.4 ms |  12.3 GB | 4 min 25 s, 1 d 20 h left

    in one line, with "mfu 41.2%" before the memory where the device's peak is known, and "$12.34"
    behind it with --price_per_hour.
    """
    parts = [
        _step(record, max_iters),
        f"loss {record['loss']:7.4f}",
        f"lr {record['learning_rate']:.2e}",
        f"norm {record['grad_norm']:6.2f}",
        f"{record['tokens_per_second']:9,.0f} tok/s",
        f"{record['milliseconds_per_step']:8.1f} ms",
    ]
    if record.get("mfu") is not None:
        parts.append(f"mfu {record['mfu']:5.1%}")
    parts.append(f"{record['memory_bytes'] / 1e9:5.1f} GB")
    if record.get("dollars") is not None:
        parts.append(f"${record['dollars']:,.2f}")
    return _in_columns(parts + [times] * bool(times), columns)


def eval_line(record: dict[str, Any], max_iters: int, columns: int = COLUMNS) -> str:
    """The console's line of an "eval" record.

    step   2000/600000 | val loss  3.2912 | train loss  3.2544 | ppl    26.87
    | bits per byte 0.9731 | token accuracy 38.1%

    in one line, with "hellaswag 29.5% (10042)", acc_norm and the number of examples, for each task
    that there is, and how many contexts were cut to fit into the model. token accuracy: share of
    validation tokens for which the most probable token was the right one.
    """
    parts = [
        _step(record, max_iters),
        f"val loss {record['val_loss']:7.4f}",
        f"train loss {record['train_loss']:7.4f}",
        f"ppl {schema.number(record['perplexity']):8.2f}",
        f"token accuracy {record['accuracy']:5.1%}",
    ]
    if record.get("bits_per_byte") is not None:
        parts.insert(-1, f"bits per byte {schema.number(record['bits_per_byte']):.4f}")
    for name, part in record.get("sources", {}).items():
        tokens = part["tokens"]
        size = f"{tokens / 1e6:,.1f}M" if tokens >= 1e6 else f"{tokens:,}"
        done = f"{size} tokens, {part['epochs']:.2f} epochs"
        parts.append(f"{name} {part['val_loss']:.4f} ({done})")
    for name, result in tasks_of(record).items():
        cut = f", {result['truncated']} contexts cut" if result.get("truncated") else ""
        parts.append(f"{name} {result['acc_norm']:5.1%} ({result['n']}{cut})")
    return _in_columns(parts, columns)


def _in_columns(parts: list[str], columns: int) -> str:
    """The parts in one line, between bars, with so many spaces that a window of `columns` breaks
    the line before a bar and never in a number."""
    line = parts[0]
    for part in parts[1:]:
        used = len(line) % columns
        if used + len(part) + 3 > columns:
            line += " " * (columns - used - 1)
        line += f" | {part}"
    return line


def _step(record: dict[str, Any], max_iters: int) -> str:
    width = len(str(max_iters))
    return f"step {record['step']:{width}d}/{max_iters}"
