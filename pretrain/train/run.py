"""A run in its folder: who may write there, where it begins, what it says, logs and saves.

    with Run(settings, ranks) as run:               # locked; run.saved is the checkpoint or None
        state = TrainState(model, optimizer, scaler)
        run.restore(settings, state, identity)
        run.start(setup)                            # config.json, metrics.jsonl, the console
        run.evaluate_if_due()
        while not run.is_over():
            ...                                     # one update
            run.advance(loss, grad_norm)
            run.evaluate_if_due()
        return run.finish()

Every rank makes the same calls in the same order. Rank 0 alone reads and writes the folder and
decides what depends on it; the others are told.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from pretrain import __version__, distributed, files
from pretrain.distributed import Ranks
from pretrain.errors import lasting_output
from pretrain.models.source import source_of
from pretrain.report.console import Console, columns
from pretrain.report.lines import eval_line
from pretrain.report.runlog import Measured, RunLog, Stopwatch, eval_values, start_block
from pretrain.report.trackers import PACKAGES, open_trackers
from pretrain.train import best
from pretrain.train import checkpoint as checkpoints
from pretrain.train.best import Record
from pretrain.train.checkpoint import CheckpointError
from pretrain.train.costs import Meter, throughput
from pretrain.train.describe import changed_flags, warnings_of
from pretrain.train.loader import BatchLoader
from pretrain.train.parallel import is_sharded
from pretrain.train.saving import Saver
from pretrain.train.schema import problem_in_continued
from pretrain.train.settings import TrainSettings
from pretrain.train.state import TrainState, read_on_first
from pretrain.train.stopping import StopSignal

T = TypeVar("T")


class Run:
    """See the top of the file. Attributes: settings, ranks, out_dir, saved, state, signal."""

    state: TrainState
    loader: BatchLoader  # once the data is open

    def __init__(self, settings: TrainSettings, ranks: Ranks):
        self.settings, self.ranks = settings, ranks
        self.out_dir = Path(settings.out_dir)
        self.saved: dict[str, Any] | None = None  # the checkpoint from which the run begins
        self.path: Path | None = None  # its file, on rank 0's disk
        self.signal = 0  # the one that ended the run
        self.stop = StopSignal(ranks)
        self.watch = Stopwatch()
        self.log: RunLog | None = None
        self.console: Console | None = None
        self._stack = ExitStack()
        self._about: dict[str, Any] = {}  # what a checkpoint holds besides the state

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            stack.enter_context(lasting_output())
            stack.enter_context(self.stop)
            self._stack = stack.pop_all()
        try:
            self._find_beginning()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.log:
            self._saver.close()
            self.log.close(self.state.step, error)
        self._stack.__exit__(kind, error, trace)

    def _find_beginning(self) -> None:
        """Lock out_dir and find the checkpoint to go on from, on rank 0, for all."""
        settings = self.settings
        if settings.eval_only and "init_from" in settings.given:
            return
        if not settings.eval_only:
            self.ranks.on_first(self._lock)
        self.path = self.ranks.on_first(self._find)
        if self.path:
            self.saved = read_on_first(self.ranks, self._load, whole=not is_sharded(settings))
        elif settings.resume == "auto":
            rank, nodes = self.ranks.rank, self.ranks.nodes
            is_elsewhere = nodes[rank] != nodes[0]
            self.ranks.on_all(checkpoints.refuse_here, self.out_dir, rank * is_elsewhere)

    def _lock(self) -> None:
        self._stack.enter_context(checkpoints.lock(self.out_dir))

    def _find(self) -> Path | None:
        settings = self.settings
        if settings.eval_only:
            return checkpoints.find_to_evaluate(self.out_dir, settings.resume)
        flags = settings.flags | {"processes": settings.world_size}
        return checkpoints.find(self.out_dir, settings.resume, flags)

    def _load(self) -> dict[str, Any]:
        assert self.path
        saved = checkpoints.load(self.path, verify=False)  # _find has verified it
        if self.settings.eval_only:
            return saved
        if problem := problem_in_continued(saved):
            raise CheckpointError(f"{self.path}: {problem}")
        record, problem = best.reconcile(self.out_dir, self.path, saved)
        if problem:
            self.warn(problem)
        return saved | asdict(record)

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enter something that is left when the run is."""
        return self._stack.enter_context(context)

    # ---- what it says

    def say(self, text: str) -> None:
        """A line on rank 0's console."""
        if self.console:
            self.console.say(text)
        elif self.ranks.is_first:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A line on rank 0's stderr."""
        if self.ranks.is_first:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    # ---- from a checkpoint to the first update

    def restore(
        self,
        settings: TrainSettings,
        state: TrainState,
        identity: dict[str, Any],
        architecture: str = "gpt2",
    ) -> None:
        """Bring `state` to where the run begins. identity: what no part of a run may change. Raises
        CheckpointError for the checkpoint of another run."""
        self.settings, self.state = settings, state
        if self.saved and self.path:
            # Before there was a choice, these were it.
            before = {"model": "gpt2", "optimizer": "adamw"} | self.saved["run"]
            checkpoints.refuse_other_run(self.path, before, identity)
            try:
                state.load_state_dict(self.saved)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{self.path}: its optimizer does not fit: {error}") from None
            changed = changed_flags(self.saved.get("config") or {}, settings)
            if changed and state.step:
                self.warn(f"from step {state.step:,} on: {'; '.join(changed)}")
        self.saved = None  # unmaps the file
        self._about = {
            "format": checkpoints.FORMAT,
            "version": __version__,
            "architecture": architecture,
            "config": settings.flags,
            "processes": self.ranks.world_size,
            "run": identity,
            "rng": {"seed": settings.seed},
            "model_config": asdict(state.model.config),
            "model_source": source_of(state.model),
        }

    def was_finished(self) -> bool:
        """Whether an earlier part of the run has ended it already; says so."""
        state, settings = self.state, self.settings
        is_finished = self._length_is_reached() and self.ranks.on_first(
            checkpoints.is_finished, self.out_dir, state.step
        )
        if is_finished:
            is_early = state.step < settings.max_iters
            limit = "early_stopping" if is_early else "epochs" if settings.epochs else "max_iters"
            reached = f"{self.out_dir}: finished at step {state.step:,}"
            self.say(f"{reached}; with a higher --{limit} it goes on")
        return is_finished

    def start(
        self,
        setup: dict[str, Any],
        measure: Callable[[], Measured] | None,
        sample: Callable[[], dict[str, Any] | None],
    ) -> None:
        """From here on the run is in its folder's log. measure: an evaluation (None: there are
        none). sample: a "sample" record's values; both are called by every rank."""
        self.setup, self._measure, self._sample = setup, measure, sample
        self._about["data_fingerprint"] = setup["data_fingerprint"]
        state, settings = self.state, self.settings
        for warning in warnings_of(settings, setup["steps_per_epoch"]):
            self.warn(warning)
        log = RunLog(self.out_dir, enabled=self.ranks.is_first)
        self._saver = Saver(settings, self.ranks, state, log)
        self._meter = Meter(settings.price_per_hour, self.ranks, log.path)
        self.log = log
        if self.ranks.is_first:
            files.write_json(self.out_dir / "config.json", setup)
            self.log.write("start", step=state.step, resumed_from=self.path, **setup)
            origin = f"continues {self.path}, step {state.step:,}" if self.path else "begins anew"
            print(start_block(setup, origin))
            wanted = [name for name in PACKAGES if getattr(settings, name)]
            for tracker in open_trackers(wanted, self.log.path, state.step, setup):
                self.log.follow(self._stack.enter_context(closing(tracker)))
        console = Console(settings.max_iters, state.step, enabled=self.ranks.is_first)
        self.console = self._stack.enter_context(closing(console))
        self.watch, self._lap_step = Stopwatch(), state.step

    # ---- while it goes on

    def _length_is_reached(self) -> bool:
        state, patience = self.state, self.settings.early_stopping
        return (
            state.step >= self.settings.max_iters or 0 < patience <= state.record.evals_since_best
        )

    def is_over(self) -> bool:
        """Whether no update is left to make: all of them are made, patience is at its end, or a
        signal came."""
        return bool(self.signal) or self._length_is_reached()

    def is_told_to_stop(self) -> bool:
        """Whether a signal has come to any rank; the same on all. Every rank asks equally often."""
        self.signal = self.stop.agreed()
        return bool(self.signal)

    def evaluate_if_due(self) -> None:
        """Evaluate, log and save, where this step is one for it. An evaluation that a signal cuts
        short counts for nothing: it is made anew when the run goes on."""
        state, settings = self.state, self.settings
        interval = settings.eval_interval
        is_due = state.step >= settings.max_iters or (interval and state.step % interval == 0)
        if not (self._measure and is_due) or self.signal or state.last_eval_step == state.step:
            return
        distributed.synchronize(self.ranks.device)
        self.watch.pause()
        scores, tasks = self._measure()
        self.signal = self.stop.agreed_now()
        if self.signal:
            return
        self._saver.end()
        val, train = scores["val"], scores["train"]
        before, state.record = state.record, state.record.after(state.step, val["loss"])
        state.last_eval_step, state.loss, state.val_loss = state.step, train["loss"], val["loss"]
        progress = self.loader.progress(state.step)
        values = eval_values((scores, tasks), progress, is_counted=bool(settings.val_tokens))
        record = self._write("eval", best_val_loss=state.record.best_val_loss, **values)
        self.say(eval_line(record, settings.max_iters, columns()))
        self._save_evaluation(before)
        every = settings.sample_interval * interval
        if every and state.step and (self._length_is_reached() or state.step % every == 0):
            self._write_sample()
        self.watch.resume()

    def _save_evaluation(self, before: Record) -> None:
        """Save this step's evaluation under all its names. before: the record without it."""
        state, is_last = self.state, self._length_is_reached()
        names = [checkpoints.iter_name(state.step, state.val_loss)]
        names += [checkpoints.FINAL] * is_last
        self.save(*names, prune=True, at_once=is_last, otherwise=before)
        if is_last:
            self._saver.end()

    def _write_sample(self) -> None:
        values = self._sample()
        if values is not None and self.log and self.console:
            self.console.sample(self.log.write("sample", step=self.state.step, **values))

    def advance(self, loss: Tensor, grad_norm: Tensor) -> None:
        """An update is made: count it, log it and save it, where it is time. loss: this rank's, (),
        on the device, as is grad_norm, which all ranks share."""
        state, settings = self.state, self.settings
        state.step += 1
        self.stop.at_once = False  # there is something to save now
        if state.step % settings.log_interval == 0 or state.step == settings.max_iters:
            self._log_update(loss, grad_norm)
        self._saver.report()
        if self._saver.is_due():
            self.watch.pause()
            self.save(checkpoints.RESUME)
            self.watch.resume()

    def _log_update(self, loss: Tensor, grad_norm: Tensor) -> None:
        state, setup = self.state, self.setup
        state.loss = self.ranks.sum(loss.item())[0] / self.ranks.world_size
        seconds, steps = self.watch.lap(), state.step - self._lap_step
        self._lap_step = state.step
        sources = self.loader.progress(state.step)
        record = self._write(
            "train",
            loss=state.loss,
            epoch=state.step / setup["steps_per_epoch"],
            learning_rate=state.learning_rate,
            grad_norm=grad_norm.item(),
            **throughput(state.model, setup, steps, seconds, self.ranks),
            **self._meter.values(),
            **({"sources": sources} if sources else {}),
        )
        if self.console:
            self.console.train(record)

    def shares(self) -> dict[str, float]:
        """What each source of a mixture has of the batch that comes next."""
        step = self.saved["step"] if self.saved else self.state.step if self.log else 0
        return self.loader.shares(step)

    def _write(self, event: str, **values: Any) -> dict[str, Any]:
        assert self.log
        step, tokens = self.state.step, self.state.step * self.setup["tokens_per_step"]
        return self.log.write(event, step=step, tokens=tokens, **values)

    # ---- saving and ending

    def save(self, *names: str, **options: Any) -> None:
        """Write this point of the run under these names in out_dir: see Saver.begin. A full disk
        stops nothing: it is said, and the checkpoints that are there stay."""
        self._saver.end()  # the one before
        tokens = self.state.step * self.setup["tokens_per_step"]
        content = self._about | {"tokens": tokens} | self.state.state_dict()
        self._saver.begin(content, names, **options)

    def finish(self) -> int:
        """Save and say how the run ended: the exit status. Raises CheckpointError: not saved."""
        state = self.state
        assert self.log
        if self.signal:
            self.say(
                f"signal {self.signal} at step {state.step:,}: saving; the same command continues"
            )
            self.save(checkpoints.RESUME, at_once=True)
            if not self._saver.end():
                raise checkpoints.end_not_saved(self.out_dir)
            self.log.write("stop", step=state.step, reason=f"signal {self.signal}")
            return 128 + self.signal
        self._saver.end()
        if not self.ranks.on_first(checkpoints.is_finished, self.out_dir, state.step):
            self.save(checkpoints.FINAL, at_once=True)
            if not self._saver.end():
                raise checkpoints.end_not_saved(self.out_dir)
        record = state.record
        if state.step < self.settings.max_iters:
            ago = f"{record.evals_since_best} evaluations ago"
            self.say(f"stopped early: the validation loss was lowest {ago}")
        self.log.write("stop", step=state.step, reason="finished")
        lowest = f"; the lowest validation loss was {record.best_val_loss:.4f}"
        self.say(f"finished: {self.out_dir / checkpoints.FINAL}{lowest if self._measure else ''}")
        return 0
