"""A run as its log tells it: what the page draws and findings judges.

    run = Run.load("checkpoints")
    run.steps, run.loss  # float64 arrays, one entry per logged step, nan where a line lacks the
    number run.status()         # "finished", "still going (resumed once)", ...

Everything but metrics.jsonl is optional: a run that began a second ago has no config.json and no
evaluation. Fields and events that are not known here are passed over.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import files
from pretrain.errors import UserError, reason
from pretrain.report.runlog import FILE_NAME, last_per_step, read_log
from pretrain.report.schema import Record, clean, flat, is_regular, loads, number, text

__all__ = ["Record", "Run", "RunError", "column", "number", "smooth", "task_results"]
# Without a new line a run is only called dead after this, and 5 times its longest silence.
QUIET_SECONDS = 600.0
LOCK = ".lock"  # train_gpt2.py holds it while it runs
HARNESS = "lm_eval.jsonl"  # what adapters/lm_eval.py found, in "eval" lines as those of the log


class RunError(UserError):
    """The folder holds no log that can be shown; one line for the user."""


@dataclass
class Run:
    """`train`, `evals`, `samples`: records by step, without those that a resume went back
    behind."""

    name: str
    folder: Path
    records: list[Record]
    train: list[Record]
    evals: list[Record]
    samples: list[Record]
    config: dict[str, Any]  # flat, "model.n_layer": 12; from config.json, else from the last start
    harness: list[Record] = field(default_factory=list)  # by step, from HARNESS

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Raises RunError for a folder without a readable log."""
        folder = Path(folder)
        if folder.name == FILE_NAME:
            folder = folder.parent
        if not folder.is_dir():
            raise RunError(f"{folder}: no such folder; give the --out_dir of a training run")
        path = folder / FILE_NAME
        try:
            if not is_regular(path):
                raise RunError(f"{path}: not a file; give the --out_dir of a training run")
            records = [record for line in read_log(path) if (record := clean(line))]
        except FileNotFoundError:
            message = f"{folder}: no {FILE_NAME} there; give the --out_dir of a training run"
            raise RunError(message) from None
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise RunError(f"{text(path)}: {reason(error)}") from None
        if not records:
            raise RunError(f"{path}: no readable line in it (yet); it is written by train_gpt2.py")
        valid = _not_superseded(records)
        return cls(
            name=text(folder.resolve().name or folder),
            folder=folder,
            records=records,
            train=last_per_step(valid, "train"),
            evals=last_per_step(valid, "eval"),
            samples=[record for record in valid if record.get("event") == "sample"],
            config=_config(folder, records),
            harness=harness_records(folder),
        )

    @property
    def steps(self) -> np.ndarray:
        return column(self.train, "step")

    @property
    def loss(self) -> np.ndarray:
        return column(self.train, "loss")

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Tokens trained on by each step, from the training lines around it; nan where none
        tells."""
        tokens = column(self.train, "tokens")
        known = np.isfinite(tokens)
        if not known.any():
            return np.full(len(steps), np.nan)
        return np.interp(steps, np.r_[0.0, self.steps[known]], np.r_[0.0, tokens[known]])

    @property
    def starts(self) -> list[Record]:
        return [record for record in self.records if record.get("event") == "start"]

    @property
    def resumed_at(self) -> list[float]:
        """Steps at which a later process took over; nan where its line does not say."""
        return [number(record.get("step")) for record in self.starts[1:]]

    @property
    def sources(self) -> dict[str, Record]:
        """Of a mixture: {source: the last numbers of it, tokens, epochs and losses}."""
        found: dict[str, Record] = {}
        for record in (*self.evals[-1:], *self.train[-1:]):
            for name, part in record.get("sources", {}).items():
                found[name] = found.get(name, {}) | part
        return found

    @property
    def last_step(self) -> int | None:
        steps = [record["step"] for record in (*self.train[-1:], *self.evals[-1:])]
        return int(max(steps)) if steps else None

    @property
    def max_iters(self) -> int | None:
        value = self.setting("max_iters")
        return int(value) if math.isfinite(value) and value > 0 else None

    def setting(self, name: str) -> float:
        """A number from the configuration by the last part of its name; nan where there is none."""
        found = (value for key, value in self.config.items() if key.rsplit(".", 1)[-1] == name)
        return next((number(value) for value in found), math.nan)

    def processes(self) -> list[list[Record]]:
        """The records of one process after the other, cut at every "start"."""
        parts: list[list[Record]] = [[]]
        for record in self.records:
            if record.get("event") == "start" and parts[-1]:
                parts.append([])
            parts[-1].append(record)
        return parts

    @property
    def seconds_running(self) -> float:
        """First line to last line of every process, added up: the time between processes does not
        count."""
        return sum(float(np.ptp(times)) for times in map(_times, self.processes()) if len(times))

    def status(self, now: float | None = None) -> str:
        """How the run stands at `now` (seconds since 1970), with how often it was resumed."""
        resumes = len(self.resumed_at)
        resumed = (
            f" (resumed {resumes} times)" if resumes > 1 else " (resumed once)" if resumes else ""
        )
        if self.stop is not None:
            reason = str(self.stop.get("reason", "stopped"))
            return f"{'stopped by ' * reason.startswith('signal')}{reason}{resumed}"
        if (is_held := files.is_locked(self.folder / LOCK)) is not None:
            return (
                f"still going{resumed}" if is_held else f"interrupted: its process is gone{resumed}"
            )
        times = _times(self.processes()[-1])
        silence = (time.time() if now is None else now) - times[-1] if len(times) else 0.0
        if silence > max(QUIET_SECONDS, 5 * float(np.max(np.diff(times), initial=0.0))):
            return f"interrupted: the log breaks off{resumed}"
        return f"still going{resumed}"

    @property
    def is_going(self) -> bool:
        return self.status().startswith("still going")

    @property
    def stop(self) -> Record | None:
        return self.records[-1] if self.records[-1].get("event") == "stop" else None


def column(records: list[Record], key: str) -> np.ndarray:
    """One field of all records as float64, nan where a record lacks it."""
    return np.array([number(record.get(key)) for record in records], dtype=np.float64)


def _times(records: list[Record]) -> np.ndarray:
    times = column(records, "time")
    return times[np.isfinite(times)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running median over `smoothing_window` values, fewer towards the ends; nan stays nan, beside
    the rest.

    A median, because it does not smear a spike, and follows the steep beginning of a loss without a
    bias.
    """
    known = values[np.isfinite(values)]
    half = smoothing_window(len(values)) // 2
    medians = known.copy()
    for i in (*range(min(half, len(known))), *range(max(half, len(known) - half), len(known))):
        width = min(half, i)
        medians[i] = np.median(known[i - width : i + width + 1])
    for begin in range(half, len(known) - half, 10_000):  # in parts: each copies its windows
        end = min(begin + 10_000, len(known) - half)
        windows = np.lib.stride_tricks.sliding_window_view(
            known[begin - half : end + half], 2 * half + 1
        )
        medians[begin:end] = np.median(windows, axis=1)
    smoothed = np.full(len(values), np.nan)
    smoothed[np.isfinite(values)] = medians
    return smoothed


def smoothing_window(n: int) -> int:
    """How many of n values `smooth` looks at: 1 (none but itself) for n < 20, else about 3 %, 5 to
    201."""
    return 1 if n < 20 else min(201, max(5, n // 33) | 1)


def task_results(run: Run) -> dict[tuple[str, str], list[tuple[int, Record]]]:
    """{(task, style): [(step, {"acc_norm": ..., "n": ...}), ...]} from the evaluations, and from
    what EleutherAI's harness found afterwards."""
    found: dict[tuple[str, str], list[tuple[int, Record]]] = {}
    for record in (*run.evals, *run.harness):
        for name, result in record.get("tasks", {}).items():
            if headline(result):
                task = name.removesuffix(f":{result.get('style')}")  # of logs with several styles
                key = task, str(result.get("style", "completion"))
                found.setdefault(key, []).append((record["step"], result))
    return found


def headline(result: Record) -> tuple[str, float] | None:
    """The metric by which a task is shown, and its value: acc_norm, or acc where the task has no
    other."""
    for name in ("acc_norm", "acc"):
        if math.isfinite(value := number(result.get(name))):
            return name, value
    return None


def harness_records(folder: str | Path) -> list[Record]:
    """What HARNESS in a run's folder holds, by step; nothing where there is none."""
    path = Path(folder) / HARNESS
    try:
        found = [clean(line) for line in read_log(path)] if is_regular(path) else []
    except (OSError, ValueError):
        return []
    # A task that was asked again is there twice: the later line wins.
    steps: dict[int, dict[str, Any]] = {}
    for record in found:
        if record and "step" in record:
            steps.setdefault(record["step"], {}).update(record.get("tasks", {}))
    return [{"event": "eval", "step": step, "tasks": steps[step]} for step in sorted(steps)]


def _step(record: Record) -> float:
    return number(record.get("step"))


def _not_superseded(records: list[Record]) -> list[Record]:
    """Records with a usable step, less those that lie after the step where a later process
    began."""
    kept: list[Record] = []
    for record in records:
        step = _step(record)
        if not math.isfinite(step):
            continue
        if record.get("event") == "start":
            kept = [earlier for earlier in kept if _step(earlier) <= step]
        kept.append(record)
    return kept


def _config(folder: Path, records: list[Record]) -> dict[str, Any]:
    """config.json, else what the last "start" record says."""
    path = folder / "config.json"
    try:
        config = loads(path.read_text(encoding="utf-8")) if is_regular(path) else None
    except (OSError, ValueError):  # not written yet, or being written
        config = None
    if isinstance(config, dict):
        return flat(config)
    starts = [record for record in records if record["event"] == "start"]
    return starts[-1]["settings"] if starts else {}
