"""Reasons to stop a run before its end: signals, and numbers that are not finite. Every rank stops
at the same point.

    with StopSignal(ranks) as stop:
        if signal_number := stop.agreed(): ...       # before each micro-step
        guard.check(step, loss, grad_norm)           # before each update
"""

import math
import signal
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed import Ranks


class NotFinite(RuntimeError):
    """A loss or gradient norm that is nan or inf; the message names step and rank."""


class StopSignal:
    """SIGTERM and SIGINT, noted when they come and agreed upon by all ranks before each micro-step.

    Ranks are signalled at different moments, and a rank that stops alone leaves the others waiting
    for its gradients. So each call of agreed() starts a reduction of what this rank has seen and
    returns the result of the one that the call before started: by then it has long arrived, and no
    rank waits. All ranks must call it equally often.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.number = 0  # the signal that this rank has received
        self.at_once = True  # exit in the handler, while there is nothing to save
        self._under_way: tuple[Any, Tensor] | None = None
        self._before: dict[int, Any] = {}

    def agreed_now(self) -> int:
        """Like agreed(), of what ranks have received by now; waits for all of them."""
        return max(self.ranks.gather(self.number))

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._under_way and exception[0] is None:
            self._under_way[0].wait()
        self._under_way = None

    def _note(self, number: int, frame: object) -> None:
        self.number = self.number or number
        if self.at_once:
            print(f"signal {number}: nothing to save yet", file=sys.stderr)
            raise SystemExit(128 + number)

    def is_set(self) -> bool:
        """Whether this rank has received a signal; other ranks may not have yet."""
        return self.number > 0

    def agreed(self) -> int:
        """The signal that some rank had received by the call before, 0 for none: the same on every
        rank."""
        if self.ranks.world_size == 1:
            return self.number
        agreed = 0
        if self._under_way:
            work, seen = self._under_way
            work.wait()
            agreed = int(seen)
        seen = torch.tensor(self.number)
        work = dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.ranks.control, async_op=True)
        self._under_way = (work, seen)
        return agreed


class FiniteGuard:
    """Keeps an update with a nan or inf from being applied, and raises NotFinite for it.

    On a GPU nothing waits for the numbers: a flag on the device makes the fused optimizer leave
    this and every later update out, a copy of the numbers travels to the host meanwhile, and the
    next step's check (or flush) raises. Elsewhere the check comes first. The norm is the same on
    all ranks, so all raise at the same step; a rank's loss reaches the norm because loss_weight
    turns a loss that is not finite into gradients that are not.
    """

    def __init__(
        self,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        late: bool,
    ):
        """late: check one step later, as above; needs a fused optimizer."""
        self.ranks, self.optimizer, self.scaler, self.late = ranks, optimizer, scaler, late
        self._under_way: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._found = torch.zeros(
            (), device=ranks.device
        )  # 1 from the first update that was left out

    @staticmethod
    def loss_weight(loss: Tensor, accumulation_steps: int) -> Tensor:
        """1 / accumulation_steps, or nan for a loss that is nan or inf."""
        return torch.where(loss.isfinite(), 1 / accumulation_steps, torch.nan)

    def check(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Before optimizer.step(): loss and norm are this step's, detached scalars. Raises
        NotFinite."""
        if not self.late:
            self._raise_unless_finite(step, loss.item(), grad_norm.item())
            return
        if not self.scaler.is_enabled():  # the scaler tells the optimizer of its own overflows
            self._found = torch.maximum(self._found, (~grad_norm.isfinite()).to(self._found.dtype))
            self.optimizer.found_inf = self._found
        on_gpu = self.ranks.device.type == "cuda"
        numbers = torch.empty(2, pin_memory=on_gpu)
        numbers.copy_(torch.stack([loss.float(), grad_norm.float()]), non_blocking=True)
        event = torch.cuda.Event() if on_gpu else None
        if event:
            event.record()
        self.flush()
        self._under_way = (step, numbers, event)

    def flush(self) -> None:
        """Raise NotFinite for the step checked last, if need be. All ranks, before an evaluation or
        the end."""
        if self._under_way and not self.is_clean():
            step, numbers, _ = self._under_way
            self._raise_unless_finite(step, *numbers.tolist())
        self._under_way = None

    def is_clean(self) -> bool:
        """Whether the step checked last was finite; waits for its numbers. For rank 0 alone, before
        a save."""
        if self._under_way is None:
            return True
        _, numbers, event = self._under_way
        if event:
            event.synchronize()
        return bool(numbers.isfinite().all())

    def _raise_unless_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(grad_norm):
            return
        losses = self.ranks.gather(loss)
        bad = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        if self.scaler.is_enabled() and not bad and self.scaler.get_scale() > 1:
            return  # gradients that float16 cannot hold: the scaler skips the update and scales less
        where = (
            ", ".join(f"{losses[rank]} on rank {rank}" for rank in bad)
            or f"{losses[0]:.4f} on rank 0"
        )
        raise NotFinite(
            f"step {step}: loss {where}, gradient norm {grad_norm}; stopped before the update. The last"
            " checkpoint is good: continue with a lower --learning_rate or --grad_clip, or another --dtype"
        )
