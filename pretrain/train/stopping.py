"""Reasons to stop a run before its end: signals, and numbers that are not finite. Every rank stops
at the same point.

    with StopSignal(ranks) as stop:
        if signal_number := stop.agreed(): ...       # before each micro-step
        guard.check(step, loss, grad_norm)           # before each update
"""

import contextlib
import math
import signal
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed import Ranks, leave
from pretrain.errors import UserError


class NotFinite(UserError):
    """A loss or gradient norm that is nan or inf; the message names step and rank."""

    on_all_ranks = True
    reason = "not finite"  # in the log


# What ends a run: SIGTERM and Ctrl-C, a closed terminal, and what Slurm's --signal sends ahead.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has the first two
]


class StopSignal:
    """The signals of STOPPING, noted when they come and agreed upon by all ranks before each
    micro-step.

    Ranks are signalled at different moments, and a rank that stops alone leaves the others waiting
    for its gradients. So each call of agreed() starts a reduction of what this rank has seen and
    returns the result of the one that the call before started: by then it has long arrived, and no
    rank waits. All ranks must call it equally often. A rank that no longer comes by ends the run:
    see Ranks.beat().
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.number = 0  # the signal that this rank has received
        self.at_once = True  # exit in the handler, while there is nothing to save
        self._calls = 0  # of agreed(), the same on all ranks
        self._under_way: tuple[Any, Tensor] | None = None
        self._before: dict[int, Any] = {}

    def agreed_now(self) -> int:
        """Like agreed(), of what ranks have received by now; waits for all of them."""
        return max(self.ranks.gather(self.number))

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if self._is_wanted(number):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.ranks.rest()
        if self._under_way and exception[0] is None:
            self._under_way[0].wait()
        self._under_way = None

    @staticmethod
    def _is_wanted(number: int) -> bool:
        """Under nohup SIGHUP is ignored and stays so; a shell ignores SIGINT for what runs in its
        background, but who sends it there means it."""
        is_ignored = signal.getsignal(number) in (signal.SIG_IGN, None)
        return not is_ignored or number in (signal.SIGTERM, signal.SIGINT)

    def _note(self, number: int, frame: object) -> None:
        self.number = self.number or number
        if self.at_once:
            with contextlib.suppress(OSError, ValueError):  # the terminal may have gone away
                print(f"signal {number}: nothing to save yet", file=sys.stderr)
            leave(128 + number)

    def is_set(self) -> bool:
        """Whether this rank has received a signal; other ranks may not have yet."""
        if self._calls:
            self.ranks.beat(self._calls)
        return self.number > 0

    def agreed(self) -> int:
        """The signal that some rank had received by the call before, 0 for none: the same on every
        rank."""
        if self.ranks.world_size == 1:
            return self.number
        self._calls += 1
        self.ranks.beat(self._calls)
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

    The numbers are looked at before the step, so that it holds for any optimizer; on a GPU the host
    waits for them once an update. The norm is the same on all ranks, so all raise at the same step;
    a rank's loss reaches the norm because loss_weight turns a loss that is not finite into
    gradients that are not.
    """

    def __init__(self, ranks: Ranks, scaler: torch.amp.GradScaler):
        self.ranks, self.scaler = ranks, scaler

    @staticmethod
    def loss_weight(loss: Tensor, accumulation_steps: int) -> Tensor:
        """1 / accumulation_steps, or nan for a loss that is nan or inf."""
        return torch.where(loss.isfinite(), 1 / accumulation_steps, torch.nan)

    def check(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Before optimizer.step(), on every rank: loss and norm are this step's, detached scalars.
        Raises NotFinite."""
        # One wait for the device, not two.
        loss_here, norm = torch.stack([loss.float(), grad_norm.float()]).tolist()
        if math.isfinite(norm):
            return
        losses = self.ranks.gather(loss_here)
        bad = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        if self.scaler.is_enabled() and not bad and self.scaler.get_scale() > 1:
            # Gradients that float16 cannot hold: the scaler skips the update and scales less.
            return
        where = (
            ", ".join(f"{losses[rank]} on rank {rank}" for rank in bad)
            or f"{losses[0]:.4f} on rank 0"
        )
        raise NotFinite(
            f"step {step}: loss {where}, gradient norm {norm}; stopped before the update,"
            " which would have spoilt the weights: none are saved with it. Run again with a lower"
            " --learning_rate, more --warmup_iters or --dtype float32"
        )
