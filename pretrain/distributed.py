"""Ranks, devices and number formats: what a training process must know of the machine it runs on.

    ranks = Ranks.start("auto")        # under torchrun one of many, otherwise alone
    ranks.device                       # cuda:3
    total, = ranks.sum(loss_sum)       # float64, over all ranks

Gradients travel over NCCL (GPUs) or gloo (CPUs). Everything else, a few numbers at a time, goes
through a gloo group of its own, so that asking for it never waits for a GPU.
"""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import UserError
from pretrain.rendezvous import (
    Place,
    Watch,
    environment,
    hang_seconds,
    meeting_point,
    name_those_who_hang,
    start_seconds,
)

LONG = timedelta(days=7)  # for what one rank does while others wait: a Watch knows better


class DeviceError(UserError, ValueError):
    """A device that does not exist here."""


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """A device by name: auto (cuda, else mps, else cpu), cuda (the local_rank-th), cuda:N, mps or
    cpu. Raises DeviceError when it does not exist here."""
    if name == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, is_here in found.items() if is_here), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is not a device; use auto, cuda, cuda:N, mps or cpu") from None
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise DeviceError(
                f"cuda:{index} does not exist: {torch.cuda.device_count()} GPUs are visible here"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("mps is not available here")
    if device.type not in ("cpu", "mps"):
        raise DeviceError(f"{name!r} is not supported; use auto, cuda, cuda:N, mps or cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32, bfloat16 or float16 by name; auto is bfloat16 where the device computes in it
    natively, else float16 on GPUs, else float32. (A CPU without AVX512-BF16 or AMX is slower in
    bfloat16 than in float32.)"""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's generators for one micro-batch, micro_batch counted over all ranks. So dropout
    depends neither on what was drawn before (a resumed run has no generator states to restore) nor
    on the number of ranks."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    seed = int(words[0])
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # which would write down, for devices to come, who called it: half a millisecond
        torch.default_generator.manual_seed(seed)


def leave(status: int) -> NoReturn:
    """sys.exit(status), also for a rank that ends without Ranks.stop(): after an error the threads
    of gloo could abort the process while the interpreter ends, and the status be lost."""
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on a GPU so far, or that this process held in main
    memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors leave, rather than return it to the kernel.

    glibc returns blocks of some megabytes at once, so that training on a CPU fetches its gigabytes
    anew in each step, a page fault per 4 KiB: 10 to 20 % of its time. Other C libraries are left as
    they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; the last on Windows
        return
    mallopt(mmap_threshold, 1 << 30)  # smaller blocks come from the heap
    mallopt(trim_threshold, -1)  # which does not shrink


@dataclass
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without it."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = field(default=None, repr=False)  # gloo group for numbers on the CPU
    nodes: list[str] = field(default_factory=lambda: [""])  # the machine of each rank
    watch: Watch | None = field(default=None, repr=False)
    store: Any = field(default=None, repr=False)
    _turn: int = field(default=0, repr=False)  # calls of _results_of

    @classmethod
    def start(cls, device: str = "auto") -> "Ranks":
        """Join the process groups that torchrun's environment describes; on a CPU,
        keep_freed_memory(). Raises DeviceError for a missing device, RankError when the ranks do
        not come together."""
        place = Place.from_environment()
        rank, world_size = place.rank, place.world_size
        chosen = pick_device(device, environment("LOCAL_RANK", 0))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        elif chosen.type == "cpu":
            keep_freed_memory()
        if world_size == 1:
            return cls(rank, world_size, chosen)
        watch = Watch(rank)
        store = meeting_point(place, watch)
        watch.within(
            start_seconds(),
            lambda: f"rank {rank}: no connection to all ranks; is one of them gone?",
        )
        is_cuda = chosen.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=chosen if is_cuda else None,
            # Past the Watch's limit, which says more than NCCL does.
            timeout=timedelta(seconds=hang_seconds() + 120) if is_cuda else LONG,
        )
        ranks = cls(rank, world_size, chosen, dist.new_group(backend="gloo", timeout=LONG))
        ranks.nodes, ranks.watch, ranks.store = ranks.gather(place.node), watch, store
        watch.relax()
        return ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def node_ranks(self) -> list[int]:
        """The ranks on this machine; their disk is the same."""
        return [rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank]]

    def beat(self, position: int) -> None:
        """Say that this rank goes on. position: how often it has been where all ranks come by. When
        no beat follows within hang_seconds(), the process ends with a message that names the ranks
        which lag behind."""
        if self.watch:
            explain = partial(name_those_who_hang, self.store, self.rank, self.world_size, position)
            self.watch.within(hang_seconds(), explain)

    def rest(self) -> None:
        """No beat follows for now."""
        if self.watch:
            self.watch.relax()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def on_first(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), called by rank 0 alone: its result, or what it raises, on every
        rank."""
        outcome = _outcome(function, arguments) if self.is_first else None
        result, error = self.broadcast(outcome)
        if error:
            error.on_all_ranks = True
            raise error
        return result

    def on_every_disk(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), called by the first rank of each machine, for as long as it takes:
        its result on the ranks of that machine, or what the first to fail raises, on all.

        Rank 0 goes first and the other machines follow when it is done: on a disk that all share
        they find what it has left there, on one of their own they do it too.
        """
        here = self._results_of([0], function, arguments)[0]
        others = sorted({self.nodes.index(node) for node in self.nodes} - {0})
        results = self._results_of(others, function, arguments) if others else {}
        return results.get(self.node_ranks[0], here)

    def _results_of(self, doers: list[int], function: Callable, arguments: tuple) -> dict[int, Any]:
        """What function(*arguments) returns on each of these ranks, on all. The others wait awake:
        in a collective they would not hear a signal."""
        outcome = _outcome(function, arguments) if self.rank in doers else (None, None)
        if self.store:
            self._turn += 1
            if self.rank in doers:
                self.store.set(f"done/{self._turn}/{self.rank}", "")
            while not self.store.check([f"done/{self._turn}/{rank}" for rank in doers]):
                time.sleep(0.1)
        outcomes = self.gather(outcome)
        for _, error in outcomes:
            if error:
                error.on_all_ranks = True
                raise error
        return {rank: outcomes[rank][0] for rank in doers}

    def broadcast_state(self, state: Any) -> Any:
        """Rank 0's nested dicts and lists of tensors and plain values, on every rank, with the
        tensors on the CPU. Tensors travel as they are, one by one, and are in memory once."""
        tensors: list[Tensor] = []
        sent = self.broadcast(_take_tensors(state, tensors) if self.is_first else None)
        if self.world_size == 1:
            return state
        received = None if self.is_first else _put_tensors(sent, tensors)
        for tensor in tensors:
            if tensor.numel():
                dist.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=self.control)
        return state if self.is_first else received

    def on_all(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), called by every rank: its own result, or what the first to fail
        raises, on all."""
        result, error = _outcome(function, arguments)
        for problem in self.gather(error):
            if problem:
                problem.on_all_ranks = True
                raise problem
        return result

    def stop(self) -> None:
        """Leave the process groups. Only when all ranks do: it waits for work that is under way."""
        if self.world_size > 1:
            self.rest()
            dist.destroy_process_group()
            # Its threads end here: at the interpreter's end they could abort the process.
            self.control = None


def _outcome(function: Callable, arguments: tuple) -> tuple[Any, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:
        return None, error


@dataclass(frozen=True)
class _Sent:
    """Stands for a tensor in what is sent of a state."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _take_tensors(state: Any, tensors: list[Tensor]) -> Any:
    """The state with a _Sent for each tensor; the tensors, in this order, go to `tensors`."""
    if isinstance(state, Tensor):
        tensors.append(state.detach().cpu().contiguous())
        return _Sent(tuple(state.shape), state.dtype)
    if isinstance(state, dict):
        return {key: _take_tensors(value, tensors) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_take_tensors(value, tensors) for value in state)
    return state


def _put_tensors(sent: Any, tensors: list[Tensor]) -> Any:
    """The state with an empty tensor for each _Sent; they go to `tensors` in the same order."""
    if isinstance(sent, _Sent):
        tensors.append(torch.empty(sent.shape, dtype=sent.dtype))
        return tensors[-1]
    if isinstance(sent, dict):
        return {key: _put_tensors(value, tensors) for key, value in sent.items()}
    if isinstance(sent, list | tuple):
        return type(sent)(_put_tensors(value, tensors) for value in sent)
    return sent
