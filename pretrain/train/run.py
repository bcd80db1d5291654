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
import time
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
from pretrain.report.console import Console
from pretrain.report.runlog import RunLog, Stopwatch, eval_line, perplexity, start_block
from pretrain.report.trackers import open_trackers
from pretrain.train import best
from pretrain.train import checkpoint as checkpoints
from pretrain.train.checkpoint import CheckpointError
from pretrain.train.schema import problem_in_continued
from pretrain.train.settings import TrainSettings, changed_flags, warnings_of
from pretrain.train.state import TrainState, read_on_first, source_of, source_problem
from pretrain.train.stopping import StopSignal

T = TypeVar("T")
# Loss and accuracy by set of windows, and the summaries of tasks by their names.
Measured = tuple[dict[str, dict[str, float]], dict[str, Any]]


class Run:
    """See the top of the file. Attributes: settings, ranks, out_dir, saved, state, signal."""

    state: TrainState

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
            self.saved = read_on_first(self.ranks, self._load)
        elif settings.resume == "auto":
            rank, nodes = self.ranks.rank, self.ranks.nodes
            is_elsewhere = nodes[rank] != nodes[0]
            self.ranks.together(checkpoints.refuse_here, self.out_dir, rank * is_elsewhere)

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
        source = source_of(state.model)
        if self.saved and self.path:
            # Before there was a choice, these were it.
            before = {"model": "gpt2", "optimizer": "adamw"} | self.saved["run"]
            checkpoints.refuse_other_run(self.path, before, identity)
            try:
                state.load_state_dict(self.saved)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{self.path}: its optimizer does not fit: {error}") from None
            if problem := source_problem(source, self.saved.get("model_source") or {}):
                self.warn(f"{self.path}: {problem}")
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
            "model_source": source,
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
        self.log = RunLog(self.out_dir, enabled=self.ranks.is_first)
        if self.ranks.is_first:
            files.write_json(self.out_dir / "config.json", setup)
            self.log.write("start", step=state.step, resumed_from=self.path, **setup)
            origin = f"continues {self.path}, step {state.step:,}" if self.path else "begins anew"
            print(start_block(setup, origin))
            for tracker in open_trackers(
                settings.tensorboard, settings.wandb, self.log.path, state.step, setup
            ):
                self.log.follow(self._stack.enter_context(closing(tracker)))
        console = Console(settings.max_iters, state.step, enabled=self.ranks.is_first)
        self.console = self._stack.enter_context(closing(console))
        self.watch, self._lap_step, self._saved_at = Stopwatch(), state.step, time.monotonic()

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
        val, train = scores["val"], scores["train"]
        before, state.record = state.record, state.record.after(state.step, val["loss"])
        state.last_eval_step, state.loss, state.val_loss = state.step, train["loss"], val["loss"]
        record = self._write(
            "eval",
            train_loss=state.loss,
            val_loss=state.val_loss,
            best_val_loss=state.record.best_val_loss,
            perplexity=perplexity(state.val_loss),
            **{name: val[name] for name in ("accuracy", "bits_per_byte") if name in val},
            **({"tasks": tasks} if tasks else {}),
        )
        self.say(eval_line(record, settings.max_iters))
        if not self._save_evaluation():
            state.record = before  # what no file holds is no record
        every = settings.sample_interval * interval
        if every and state.step and (self._length_is_reached() or state.step % every == 0):
            self._write_sample()
        self.watch.resume()

    def _save_evaluation(self) -> bool:
        """Save this step's evaluation under all its names."""
        state = self.state
        names = [checkpoints.iter_name(state.step, state.val_loss)]
        names += [checkpoints.FINAL] * self._length_is_reached()
        is_saved = self.save(*names)
        if is_saved and self.ranks.is_first:
            try:
                best.link_best(self.out_dir, state.record)
                checkpoints.prune(self.out_dir, self.settings.keep_checkpoints)
            except CheckpointError as error:  # the one that it should name stays, and is named then
                self.warn(str(error))
            except OSError as error:
                self.warn(f"{self.out_dir}: old checkpoints stay: {error.strerror}")
        return is_saved

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
        if self._save_is_due():
            self.watch.pause()
            self.save(checkpoints.RESUME)
            self.watch.resume()

    def _save_is_due(self) -> bool:
        """Whether resume.pt is to be saved now; by rank 0's clock, where it is by time."""
        settings = self.settings
        if settings.checkpoint_interval and self.state.step % settings.checkpoint_interval == 0:
            return True
        seconds = 60 * settings.checkpoint_minutes
        if not seconds or (self.ranks.world_size > 1 and self.state.step % self._asked_every):
            return False
        return self.ranks.broadcast(time.monotonic() - self._saved_at > seconds)

    @property
    def _asked_every(self) -> int:
        """Steps from one look at rank 0's clock to the next, since each is a wait for it."""
        return min(10, self.settings.log_interval)

    def _log_update(self, loss: Tensor, grad_norm: Tensor) -> None:
        state, setup = self.state, self.setup
        state.loss = self.ranks.sum(loss.item())[0] / self.ranks.world_size
        seconds, steps = self.watch.lap(), state.step - self._lap_step
        self._lap_step = state.step
        speed = steps * setup["tokens_per_step"] / seconds  # tokens per second
        flops_per_token = state.model.flops_per_token(setup["run"]["block_size"])
        flops, peak = speed * flops_per_token / self.ranks.world_size, setup["peak_flops"]
        record = self._write(
            "train",
            loss=state.loss,
            epoch=state.step / setup["steps_per_epoch"],
            learning_rate=state.learning_rate,
            grad_norm=grad_norm.item(),
            tokens_per_second=speed,
            milliseconds_per_step=1000 * seconds / steps,
            mfu=flops / peak if peak else None,
            memory_bytes=distributed.peak_memory(self.ranks.device),
        )
        if self.console:
            self.console.train(record)

    def _write(self, event: str, **values: Any) -> dict[str, Any]:
        assert self.log
        step = self.state.step
        tokens = step * self.setup["tokens_per_step"]
        return self.log.write(event, step=step, tokens=tokens, **values)

    # ---- saving and ending

    def save(self, *names: str) -> bool:
        """Write this point of the run under these names in out_dir; whether that worked, on every
        rank. A full disk stops nothing: it is said, and the checkpoints that are there stay."""
        tokens = self.state.step * self.setup["tokens_per_step"]
        content = self._about | {"tokens": tokens} | self.state.state_dict()
        is_saved = self.ranks.broadcast(self.ranks.is_first and self._write_names(content, names))
        self._saved_at = time.monotonic()
        return is_saved

    def _write_names(self, content: dict[str, Any], names: tuple[str, ...]) -> bool:
        try:
            checkpoints.save(self.out_dir / names[0], content)
        except CheckpointError as error:
            self.warn(str(error))
            return False
        for name in names[1:]:
            try:
                checkpoints.link(self.out_dir / names[0], self.out_dir / name)
            except CheckpointError as error:  # it is saved all the same
                self.warn(str(error))
        return True

    def finish(self) -> int:
        """Save and say how the run ended: the exit status. Raises CheckpointError: not saved."""
        state = self.state
        assert self.log
        if self.signal:
            self.say(
                f"signal {self.signal} at step {state.step:,}: saving; the same command continues"
            )
            if not self.save(checkpoints.RESUME):
                raise checkpoints.end_not_saved(self.out_dir)
            self.log.write("stop", step=state.step, reason=f"signal {self.signal}")
            return 128 + self.signal
        is_done = self.ranks.on_first(checkpoints.is_finished, self.out_dir, state.step)
        if not is_done and not self.save(checkpoints.FINAL):
            raise checkpoints.end_not_saved(self.out_dir)
        record = state.record
        if state.step < self.settings.max_iters:
            ago = f"{record.evals_since_best} evaluations ago"
            self.say(f"stopped early: the validation loss was lowest {ago}")
        self.log.write("stop", step=state.step, reason="finished")
        lowest = f"; the lowest validation loss was {record.best_val_loss:.4f}"
        self.say(f"finished: {self.out_dir / checkpoints.FINAL}{lowest if self._measure else ''}")
        return 0
