"""The metrics of a run in TensorBoard, Weights & Biases and trackio: what metrics.jsonl gets, under
the same names.

    log.follow(TensorBoard(out_dir, step=0))       # train/loss, train/learning_rate, eval/val_loss,
    ...

No package of them is needed by anything else; `missing` says what to install.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import UserError, first_line
from pretrain.report.runlog import read_log

PACKAGES = ("tensorboard", "wandb", "trackio")


class TrackerError(UserError):
    """A tracker that does not start; one line for the user."""


def missing(package: str) -> str | None:
    """What to do about a package of PACKAGES that is not installed; None when it is."""
    return None if importlib.util.find_spec(package) else f"needs a package: pip install {package}"


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record of the run log by name: {"eval/val_loss": 3.2, "eval/hellaswag/acc":
    0.28}."""
    if record["event"] not in ("train", "eval"):
        return {}
    values = {
        name: value for name, value in record.items() if name not in ("event", "time", "step")
    }
    values |= values.pop("tasks", None) or {}
    return dict(_flat(values, f"{record['event']}/"))


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


class TensorBoard:
    """Event files in out_dir/tensorboard, for `tensorboard --logdir OUT_DIR`."""

    def __init__(self, out_dir: str | Path, *, step: int):
        """step: where this process goes on; what a killed one logged after it is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(
            str(Path(out_dir) / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, record: dict[str, Any]) -> None:
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])
        if record["event"] == "sample":
            self.writer.add_text("sample", record["prompt"] + record["text"], record["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; one that resumes goes on in the same. WANDB_PROJECT,
    WANDB_MODE=offline and the like work as its documentation says."""

    def __init__(self, out_dir: str | Path, *, config: dict[str, Any], started: float):
        """started: time of the run's first "start" record, which with out_dir tells it from other
        runs. Raises TrackerError, for instance when nobody is logged in."""
        import wandb

        out_dir = Path(out_dir).resolve()
        run_id = hashlib.sha256(f"{out_dir} {started}".encode()).hexdigest()[:16]
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "gpt2"),
                name=out_dir.name,
                id=run_id,
                resume="allow",
                dir=str(out_dir),
                config=config,
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise TrackerError(
                f"--wandb: {first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self.run.define_metric("*", step_metric="step")  # steps may be repeated after a resume

    def write(self, record: dict[str, Any]) -> None:
        values = numbers(record)
        if record["event"] == "sample":
            values = {"sample": record["prompt"] + record["text"]}
        if values:
            self.run.log({"step": record["step"], **values})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, Hugging Face's local-first tracker: a database in ~/.cache/huggingface or
    where TRACKIO_DIR says, shown by `trackio show`. TRACKIO_PROJECT names the project; one that
    resumes goes on in the same run."""

    def __init__(self, out_dir: str | Path, *, config: dict[str, Any], started: float):
        """started: as for WandB."""
        import trackio

        out_dir = Path(out_dir).resolve()
        tail = hashlib.sha256(f"{out_dir} {started}".encode()).hexdigest()[:6]
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # how to open it, at length
                self.run = trackio.init(
                    project=os.environ.get("TRACKIO_PROJECT", "gpt2"),
                    name=f"{out_dir.name}-{tail}",
                    config=config,
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise TrackerError(f"--trackio: {first_line(error)}") from None

    def write(self, record: dict[str, Any]) -> None:
        values: dict[str, Any] = numbers(record)
        if record["event"] == "sample":
            values = {"sample": record["prompt"] + record["text"]}
        if values:
            self.run.log(values, step=record["step"])

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


def open_trackers(
    wanted: Collection[str], log_path: Path, step: int, config: dict[str, Any]
) -> list[TensorBoard | WandB | Trackio]:
    """Those of PACKAGES that are wanted, for the run whose metrics.jsonl, with a "start" record, is
    at log_path."""
    trackers: list[TensorBoard | WandB | Trackio] = []
    if "tensorboard" in wanted:
        trackers.append(TensorBoard(log_path.parent, step=step))
    for name, tracker in (("wandb", WandB), ("trackio", Trackio)):
        if name in wanted:
            started = read_log(log_path)[0]["time"]
            trackers.append(tracker(log_path.parent, config=config, started=started))
    return trackers
