"""metrics.jsonl, what a run leaves behind to look at: one writer, one reader, and the console's
lines.

    log = RunLog("checkpoints")
    log.write("train", step=10, loss=9.72, learning_rate=3e-6)
    read_log("checkpoints/metrics.jsonl")  # [{"event": "train", "time": 1760000000.0, "step": 10,
    ...}]

One JSON object a line, appended, never rewritten. Events:
    start    a process began or resumed here: every flag, the data, the device
    train    one line per --log_interval: step, loss, learning_rate, grad_norm, tokens,
    tokens_per_second, ...
    eval     train_loss, val_loss, perplexity, accuracy, bits_per_byte, and tasks: {name: {"n": ...,
             "acc": ..., "acc_norm": ..., "style": ...}} for those that could be scored
    sample   prompt, and text: how the model continues it
    stop     why a run ended: finished, signal, not finite
`step` counts the updates made so far; `tokens` the tokens they were made from. A run that was
killed repeats the steps after its last checkpoint, so a step can be in the file twice:
`last_per_step` keeps the last.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.report import schema
from pretrain.report.known import title
from pretrain.report.schema import tasks_of

FILE_NAME = "metrics.jsonl"


class RunLog:
    """Appends to `out_dir/metrics.jsonl`. A line goes out in one write, so a reader of a live run
    sees whole lines. A full disk stops no run: lines wait in memory and go out with a later one."""

    def __init__(self, out_dir: str | Path, *, enabled: bool = True):
        """enabled=False writes nothing: for all ranks but the first."""
        self.enabled = enabled
        self.path = Path(out_dir) / FILE_NAME
        self._trackers: list[Any] = []
        self._pending = b""
        self._waiting = False  # for room on the disk
        if enabled and self.path.exists() and self.path.stat().st_size:
            with open(self.path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if (
                    file.read() != b"\n"
                ):  # a process was killed in the middle of a line: keep ours apart
                    self._pending = b"\n"

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        """Append {"event": event, "time": seconds since 1970, **values}; return it."""
        record = {"event": event, "time": round(time.time(), 3), **values}
        if not self.enabled:
            return record
        self._pending += json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                self._pending = self._pending[file.write(self._pending) :]
            self._waiting = False
        except OSError as error:
            if not self._waiting:
                self._waiting = True
                print(
                    f"warning: {self.path}: {error.strerror}; lines wait for room", file=sys.stderr
                )
        for tracker in list(self._trackers):
            try:
                tracker.write(record)
            except (
                Exception
            ) as error:  # whatever a package for looking on does is no reason to stop
                self._trackers.remove(tracker)
                print(f"warning: {type(tracker).__name__} is left out: {error}", file=sys.stderr)
        return record

    def close(self, step: int, error: BaseException | None = None) -> None:
        """End the log. An exception that ends the run is its last record; lines that found no room
        are lost now, and that is said."""
        if isinstance(error, Exception):
            reason = getattr(error, "reason", type(error).__name__)
            self.write("stop", step=step, reason=f"{reason}: {error}")
        if lost := len(self._pending.strip().splitlines()):
            self._pending = b""
            print(f"warning: {self.path}: no room for its last {lost} lines", file=sys.stderr)

    def follow(self, tracker: Any) -> None:
        """From now on tracker.write gets every record too; see pretrain/report/trackers.py."""
        self._trackers.append(tracker)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl as they are, in file order. Lines that a kill left unfinished
    are skipped."""
    records = []
    for line in Path(path).read_bytes().splitlines():
        try:
            record = schema.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def last_per_step(records: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """The records of one event, one per step and by step: of steps that were repeated, the last
    time."""
    by_step = {
        record["step"]: record
        for record in records
        if record.get("event") == event and "step" in record
    }
    return [by_step[step] for step in sorted(by_step)]


class Stopwatch:
    """Seconds spent training: pause() before an evaluation or a save, resume() after it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._t0: float | None = time.perf_counter()

    def pause(self) -> None:
        if self._t0 is not None:
            self._seconds += time.perf_counter() - self._t0
            self._t0 = None

    def resume(self) -> None:
        if self._t0 is None:
            self._t0 = time.perf_counter()

    def lap(self) -> float:
        """Running seconds since the last lap (or the start); keeps running."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        self.resume()
        return seconds


def provenance() -> dict[str, Any]:
    """What a run was made with: versions, the commit of this program and whether files differ from
    it."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None

    def git(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(Path(__file__).parent), *words]
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None  # not a checkout, or no git

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "versions": versions,
        "git_revision": git("rev-parse", "HEAD"),
        "git_changed": bool(changed),
    }


def start_block(setup: dict[str, Any], origin: str) -> str:
    """What a run is about to do, from the values of its "start" record; `origin` says where it
    begins."""
    flags, model = setup["flags"], setup["model_config"]
    block_size, epochs = setup["run"]["block_size"], flags["max_iters"] / setup["steps_per_epoch"]
    windows = setup["evaluated_windows"]
    evaluated = "none"
    if windows:
        evaluated = ", ".join(f"{count:,} windows of {split}" for split, count in windows.items())
        evaluated += f" every {flags['eval_interval']:,} updates"
    known = setup["unigram_entropy"]
    unigram = (
        "" if known is None else f"; {known:.2f} nats a token by frequency alone (unigram entropy)"
    )
    peak = (
        f"peak {setup['peak_flops'] / 1e12:,.0f} TFLOP/s"
        if setup["peak_flops"]
        else "peak unknown: no MFU"
    )
    return "\n".join(
        [
            f"model       {setup['parameters'] / 1e6:,.1f}M parameters: {model['n_layer']} layers,"
            f" {model['n_head']} heads, width {model['n_embd']}, context {block_size}",
            f"data        {flags['data_dir']}: {setup['train_tokens']:,} tokens in"
            f" {setup['train_shards']} shard{'s' * (setup['train_shards'] != 1)}{unigram}",
            f"batch       {setup['tokens_per_step']:,} tokens: {flags['batch_size']} sequences x "
            f"{block_size}"
            f" x {setup['micro_steps']} micro-steps x {setup['processes']} process(es)",
            f"schedule    {flags['max_iters']:,} updates, {setup['max_tokens']:,} tokens, "
            f"{epochs:.2f}"
            f" epochs; learning rate {setup['last_learning_rate']:.1e} at the end",
            f"evaluation  {evaluated}",
            f"device      {setup['device']}, {setup['dtype']}{', compiled' * setup['compiled']}, "
            f"{peak}",
            f"output      {flags['out_dir']}: {origin}",
        ]
    )


def perplexity(loss: float) -> float:
    """exp(loss), inf where that is beyond float64 (from 709 nats on)."""
    return math.exp(loss) if loss < 709 else math.inf if loss >= 709 else math.nan


def scores_block(
    scores: dict[str, dict[str, float]], tasks: dict[str, dict[str, Any]] | None = None
) -> str:
    """An evaluation that stands alone, as a small table. scores: {"val": {"loss", "accuracy",
    "tokens"}, ...}, bits_per_byte too where it is known; tasks: {name: {"acc", "acc_norm", "n",
    "style"}}."""
    lines = []
    for split, part in scores.items():
        bits = part.get("bits_per_byte")
        lines.append(
            f"{split:5s}  loss {part['loss']:.4f}  perplexity {perplexity(part['loss']):.2f}"
            + (f"  bits per byte {bits:.4f}" if bits is not None else "")
            + f"  token accuracy {part['accuracy']:.2%}  ({part['tokens']:,} tokens)"
        )
    for name, result in (tasks or {}).items():
        lines.append(
            f"{title(name)}  acc {result['acc']:.4f}  acc_norm {result['acc_norm']:.4f}"
            f"  ({result['n']:,} examples, {result['style']} style)"
        )
        if result.get("truncated"):
            lines.append(f"{title(name)}  {contexts_cut(result)}")
    return "\n".join(lines)


def contexts_cut(result: dict[str, Any]) -> str:
    """What is said of a task whose contexts the model cannot hold."""
    return f"{result['truncated']:,} endings had their context cut to fit into the model"


def train_line(record: dict[str, Any], max_iters: int) -> str:
    """The console's line of a "train" record.

    step   1000/600000 | loss  6.1234 | lr 3.00e-04 | norm   0.91 |   123,457 tok/s |    265.4 ms |
    12.3 GB

    with "mfu 41.2%" before the memory where the device's peak is known.
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
    return " | ".join([*parts, f"{record['memory_bytes'] / 1e9:5.1f} GB"])


def eval_line(record: dict[str, Any], max_iters: int) -> str:
    """The console's line of an "eval" record.

    step   2000/600000 | val loss  3.2912 | train loss  3.2544 | ppl    26.87 | accuracy 38.1%

    with "hellaswag 29.5% (10042)", acc_norm and the number of examples, for each task that there
    is, and how many contexts were cut to fit into the model.
    """
    parts = [
        _step(record, max_iters),
        f"val loss {record['val_loss']:7.4f}",
        f"train loss {record['train_loss']:7.4f}",
        f"ppl {schema.number(record['perplexity']):8.2f}",
        f"accuracy {record['accuracy']:5.1%}",
    ]
    for name, result in tasks_of(record).items():
        cut = f", {result['truncated']} contexts cut" if result.get("truncated") else ""
        parts.append(f"{name} {result['acc_norm']:5.1%} ({result['n']}{cut})")
    return " | ".join(parts)


def _step(record: dict[str, Any], max_iters: int) -> str:
    width = len(str(max_iters))
    return f"step {record['step']:{width}d}/{max_iters}"


def _plain(value: Any) -> Any:
    """What JSON can hold: nan and inf become the strings "nan" and "inf", everything unknown its
    str()."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)
