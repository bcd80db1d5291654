"""metrics.jsonl, what a run leaves behind to look at: one writer, one reader, and the console's
lines.

    log = RunLog("checkpoints")
    log.write("train", step=10, loss=9.72, learning_rate=3e-6)
    read_log("checkpoints/metrics.jsonl")  # [{"event": "train", "time": 1760000000.0, "step": 10,
    ...}]

One JSON object a line, appended, never rewritten. Events:
    start    a process began or resumed here: every flag, the data, the device
    train    one line per --log_interval: step, loss, learning_rate, grad_norm, tokens,
    tokens_per_second, ...; dollars and kilowatt_hours so far where they are known
    eval     train_loss, val_loss, perplexity, accuracy, bits_per_byte, and tasks: {name: {"n": ...,
             "acc": ..., "acc_norm": ..., "style": ...}} for those that could be scored;
             val_tokens where --val_tokens set them
             Both have sources of a mixture: {name: {"tokens": ..., "epochs": ...}} that it was
             trained on, in eval with its val_loss, train_loss, accuracy and bits_per_byte
    save     a checkpoint is on the disk: step, file, bytes, pause_seconds that training waited for
             it, write_seconds that it took; the line may come some steps later
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

from pretrain.errors import UserError
from pretrain.report import schema
from pretrain.report.known import title

FILE_NAME = "metrics.jsonl"
# Loss and accuracy by set of windows, and the summaries of tasks by their names.
Measured = tuple[dict[str, dict[str, float]], dict[str, Any]]


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
        if not (enabled and self.path.exists()):
            return
        _refuse_other_than_a_file(self.path)
        if self.path.stat().st_size:
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
    are skipped. Raises UserError for a pipe or a device, OSError."""
    _refuse_other_than_a_file(Path(path))
    records = []
    for line in Path(path).read_bytes().splitlines():
        try:
            record = schema.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _refuse_other_than_a_file(path: Path) -> None:
    if not schema.is_regular(path):
        raise UserError(f"{path}: not a regular file; move it away, or use another --out_dir")


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
    means = "weighted mean of the sources' unigram" if "sources" in setup else "unigram"
    unigram = (
        "" if known is None else f"; {known:.2f} nats a token by frequency alone ({means} entropy)"
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
            *_data_lines(setup, unigram),
            f"batch       {setup['tokens_per_step']:,} tokens: {flags['batch_size']} sequences x "
            f"{block_size}"
            f" x {setup['micro_steps']} micro-steps x {setup['processes']} process(es)",
            f"schedule    {flags['max_iters']:,} updates, {setup['max_tokens']:,} tokens, "
            f"{epochs:.2f}"
            f" epochs{' of all sources together' * ('sources' in setup)}{_overlapping(setup)};"
            f" learning rate {setup['last_learning_rate']:.1e} at the end",
            f"evaluation  {evaluated}",
            f"device      {setup['device']}, {setup['dtype']}{', compiled' * setup['compiled']}, "
            f"{peak}",
            f"memory      {_memory(setup['memory'], setup['processes'])}",
            f"output      {flags['out_dir']}: {origin}",
        ]
    )


def _overlapping(setup: dict[str, Any]) -> str:
    """How many windows of an epoch have a token, where they overlap."""
    block_size, stride = setup["run"]["block_size"], setup["run"].get("stride") or 0
    if not 0 < stride < block_size:
        return ""
    return f" of windows that have each token {block_size / stride:.3g} times"


def _data_lines(setup: dict[str, Any], unigram: str) -> list[str]:
    tokens, shards = setup["train_tokens"], setup["train_shards"]
    sources = setup.get("sources") or {}
    where = f"{len(sources)} sources" if sources else setup["flags"]["data_dir"]
    lines = [
        f"data        {where}: {tokens:,} tokens in {shards} shard{'s' * (shards != 1)}{unigram}"
    ]
    width = max(map(len, sources), default=0)
    for name, source in sources.items():
        later = "".join(
            f", {share:.4g} from step {step:,}" for step, share in source["shares_later"].items()
        )
        lines.append(
            f"            {name:{width}s}  {source['share']:.4g} of each batch{later}:"
            f" {source['folder']}, {source['tokens']:,} tokens, {source['epochs']:.2f} epochs at"
            " the end"
        )
    return lines


def eval_values(
    measured: Measured, progress: dict[str, dict[str, float]], *, is_counted: bool
) -> dict[str, Any]:
    """The values of an "eval" record. measured: scores of "val" and "train", and in a mixture of
    "val/web" and so on; progress: {source: {"tokens", "epochs"}} of a mixture; is_counted: whether
    --val_tokens set how many tokens were scored, which is then told."""
    scores, tasks = measured
    val, names = scores["val"], ("accuracy", "bits_per_byte")
    values: dict[str, Any] = {
        "train_loss": scores["train"]["loss"],
        "val_loss": val["loss"],
        "perplexity": perplexity(val["loss"]),
        **{name: val[name] for name in names if name in val},
    }
    if is_counted:
        values["val_tokens"] = val["tokens"]
    if tasks:
        values["tasks"] = tasks
    if progress:
        values["sources"] = {
            source: {
                "val_loss": scores[f"val/{source}"]["loss"],
                "train_loss": scores[f"train/{source}"]["loss"],
                **{n: scores[f"val/{source}"][n] for n in names if n in scores[f"val/{source}"]},
                **done,
            }
            for source, done in progress.items()
        }
    return values


def _memory(parts: dict[str, int], processes: int) -> str:
    """Bytes by what they are for, and their "total", as a line: those that count in GB."""
    total = parts["total"]
    size = f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"
    listed = [f"{k} {v / 1e9:.1f}" for k, v in parts.items() if k != "total" and v >= 5e7]
    detail = f": {', '.join(listed)}" if listed and total >= 1e9 else ""
    return f"at least {size}{' in each process' * (processes > 1)}{detail}"


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
