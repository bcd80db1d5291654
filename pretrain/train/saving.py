"""Checkpoints written behind training, which waits for a copy in memory and not for the disk.

    saver = Saver(settings, ranks, state, log)
    saver.begin(content, ["iter-2000-loss-3.2912.pt", "best_val_loss.pt"], prune=True)
    ...                                 # training goes on
    saver.end()                         # whether it worked, on every rank

One save is under way at a time. Its file is written and fsynced under a temporary name, then takes
its own, then its further names; only after that do older files go. So a kill at any moment leaves
this checkpoint or the one before.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain import distributed
from pretrain.distributed import Ranks
from pretrain.report.runlog import RunLog
from pretrain.train import checkpoint as checkpoints
from pretrain.train.best import Record, link_best
from pretrain.train.checkpoint import CheckpointError
from pretrain.train.parallel import whole
from pretrain.train.settings import TrainSettings
from pretrain.train.state import TrainState


class Snapshot:
    """Copies of a state's tensors in main memory, on rank 0, in buffers that the next copy reuses.

    They take as much memory as the file (GPT-2 124M with AdamW: 1.5 GB), from the first save to the
    end of the run. Where the tensors are on a GPU the buffers are pinned: the copy is as fast as
    the bus. Of pinned memory torch takes powers of two, so up to twice as much.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def of(self, state: Any) -> Any:
        """The state, nested dicts, lists and tuples, with a copy for each tensor. Every rank calls
        it, since each has a part of what is sharded; others than rank 0 get None for tensors.
        Raises MemoryError."""
        copied = self._copied(state, ())
        distributed.synchronize(self.ranks.device)
        return copied

    def _copied(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            tensor = whole(value)
            return self._buffer(tensor, path).copy_(tensor, True) if self.ranks.is_first else None
        if isinstance(value, dict):
            return {key: self._copied(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            inner = enumerate(value)
            return type(value)(self._copied(item, (*path, number)) for number, item in inner)
        return value

    def _buffer(self, tensor: Tensor, path: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            is_on_gpu = tensor.device.type == "cuda"
            try:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_on_gpu)
            except RuntimeError as error:
                raise MemoryError(str(error)) from None
            self._buffers[path] = buffer
        return buffer


class Saver:
    """See the top of the file. Every rank makes the same calls; rank 0 alone writes."""

    def __init__(self, settings: TrainSettings, ranks: Ranks, state: TrainState, log: RunLog):
        self.settings, self.ranks, self.state, self.log = settings, ranks, state, log
        self.out_dir = Path(settings.out_dir)
        self._in_background = settings.async_save
        self._snapshot = Snapshot(ranks)
        self._pool = ThreadPoolExecutor(1, "save")
        self._is_under_way = False  # the same on all ranks
        self._otherwise: Record | None = None
        self._work: Future[dict[str, Any] | None] | None = None  # rank 0's
        self._is_reported = True
        self._pause_seconds = 0.0
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether resume.pt is to be saved now; by rank 0's clock, where it is by time."""
        settings, step = self.settings, self.state.step
        if settings.checkpoint_interval and step % settings.checkpoint_interval == 0:
            return True
        seconds = 60 * settings.checkpoint_minutes
        asked_every = min(10, settings.log_interval)  # steps, since to ask is to wait for rank 0
        if not seconds or (self.ranks.world_size > 1 and step % asked_every):
            return False
        return self.ranks.broadcast(time.monotonic() - self._saved_at > seconds)

    def begin(
        self,
        content: dict[str, Any],
        names: Sequence[str],
        *,
        prune: bool = False,
        at_once: bool = False,
        otherwise: Record | None = None,
    ) -> None:
        """Write content under these names, and then, to prune, delete older checkpoints. at_once:
        nothing is left to do beside it, so wait and copy nothing. otherwise: the state's record
        where this fails, since what no file holds is none."""
        assert not self._is_under_way, "end() says what became of the one before"
        t0 = time.perf_counter()
        in_background = self._in_background and not at_once
        if in_background or _is_sharded(content):
            try:
                content = self._snapshot.of(content)
            except MemoryError as error:
                if _is_sharded(content):
                    raise
                in_background = self._in_background = False
                _warn(f"no memory for a copy of the checkpoint: training waits for saves ({error})")
        self._is_under_way, self._otherwise = True, otherwise
        if self.ranks.is_first:
            self._work = self._pool.submit(
                self._write, content, names, self.state.record if prune else None
            )
            self._is_reported = False
            if not in_background:
                wait([self._work])
        self._saved_at, self._pause_seconds = time.monotonic(), time.perf_counter() - t0

    def end(self) -> bool:
        """Wait for the save that is under way: whether it worked, on every rank; True without one.
        What the disk refuses has been said by then, anything else is raised, on every rank."""
        if not self._is_under_way:
            return True
        t0 = time.perf_counter()
        self._is_under_way = False
        is_saved = self.ranks.on_first(self._result)
        if not is_saved and self._otherwise:
            self.state.record = self._otherwise
        self._pause_seconds += time.perf_counter() - t0
        self.report()
        return is_saved

    def _result(self) -> bool:
        assert self._work
        return self._work.result() is not None

    def report(self) -> None:
        """Log a save that has worked, once it has: its step, file and bytes, for how long training
        waited for it and how long the writing took."""
        if self._is_reported or not self._work or not self._work.done():
            return
        self._is_reported = True
        written = None if self._work.exception() else self._work.result()
        if written:
            self.log.write("save", **written, pause_seconds=self._pause_seconds)

    def close(self) -> None:
        """Wait for what is under way, also after an error, when nobody calls end()."""
        self._pool.shutdown(wait=True)
        self.report()

    def _write(
        self, content: dict[str, Any], names: Sequence[str], record: Record | None
    ) -> dict[str, Any] | None:
        """The save itself; None where the disk refuses it, which is said. record: what
        best_val_loss.pt shall be, after which older checkpoints are deleted; None: neither."""
        t0, path = time.perf_counter(), self.out_dir / names[0]
        try:
            checkpoints.save(path, content)
        except CheckpointError as error:
            _warn(str(error))
            return None
        written = {"step": content["step"], "file": path.name, "bytes": path.stat().st_size}
        for name in names[1:]:
            try:
                checkpoints.link(path, self.out_dir / name)
            except CheckpointError as error:  # it is saved all the same
                _warn(str(error))
        try:
            if record:
                link_best(self.out_dir, record)
                checkpoints.prune(self.out_dir, self.settings.keep_checkpoints)
        except CheckpointError as error:  # the one that it should name stays, and is named then
            _warn(str(error))
        except OSError as error:
            _warn(f"{self.out_dir}: old checkpoints stay: {error.strerror}")
        return written | {"write_seconds": time.perf_counter() - t0}


def _is_sharded(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_is_sharded, value.values() if isinstance(value, dict) else value))
    return isinstance(value, DTensor)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
