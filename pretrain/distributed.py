"""Ranks, devices and number formats: what a training process must know of the machine it runs on.

    ranks = Ranks.start("auto")        # under torchrun one of many, otherwise alone
    ranks.device                       # cuda:3
    total, = ranks.sum(loss_sum)       # float64, over all ranks

Gradients travel over NCCL (GPUs) or gloo (CPUs). Everything else, a few numbers at a time, goes
through a gloo group of its own, so that asking for it never waits for a GPU.
"""

import ctypes
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def environment(name: str, default: int) -> int:
    """An integer that torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, TORCHELASTIC_RESTART_COUNT."""
    return int(os.environ.get(name, default))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """A device by name: auto (cuda, else mps, else cpu), cuda (the local_rank-th), cuda:N, mps or
    cpu. Raises ValueError when it does not exist here."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is not a device; use auto, cuda, cuda:N, mps or cpu") from None
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"cuda:{index} does not exist: {torch.cuda.device_count()} GPUs are visible here"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("mps is not available here")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"{name!r} is not supported; use auto, cuda, cuda:N, mps or cpu")
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


# Dense peak TFLOP/s in (bfloat16, float16 with float32 accumulation, float32 as TF32 where there is
# one), from NVIDIA's and AMD's data sheets and architecture whitepapers. Where those state figures
# with sparsity, half of them. The first name that occurs in the device's name counts.
_PEAK_TFLOPS = {
    "B200": (2250, 2250, 1125),
    "H200 NVL": (835, 835, 417),
    "H200": (989, 989, 494),
    "H100 NVL": (835, 835, 417),
    "H100 PCIe": (756, 756, 378),
    "H100": (989, 989, 494),
    "A100": (312, 312, 156),
    "A10G": (70, 70, 35),
    "A10": (125, 125, 62.5),
    "A40": (149.7, 149.7, 74.8),
    "RTX A6000": (154.8, 154.8, 77.4),
    "L40S": (362, 362, 183),
    "L40": (181, 181, 90.5),
    "L4": (121, 121, 60),
    "V100-PCIE": (None, 112, 14),
    "V100": (None, 125, 15.7),
    "T4": (None, 65, 8.1),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 3090": (71, 71, 35.6),
    "MI300X": (1307, 1307, 654),
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of one device in FLOP/s, the denominator of MFU; None where it is not known."""
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}[dtype]
    for name, peaks in _PEAK_TFLOPS.items():
        # "A10" must not be found in "A100", nor "L4" in "L40".
        before, found, after = device_name.partition(name)
        if found and not after[:1].isalnum() and not before[-1:].isalnum():
            return peaks[column] and peaks[column] * 1e12
    return None


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is missing, or too old a GPU for it"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:  # of several kinds, by platform
            return "no C++ compiler (g++ or clang++) was found"
    return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's generators for one micro-batch, micro_batch counted over all ranks. So dropout
    depends neither on what was drawn before (a resumed run has no generator states to restore) nor
    on the number of ranks."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


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
    trim_threshold, mmap_threshold = (
        -1,
        -3,
    )  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; the last on Windows
        return
    mallopt(mmap_threshold, 1 << 30)  # smaller blocks come from the heap
    mallopt(trim_threshold, -1)  # which does not shrink


def meeting_point(rank: int, world_size: int) -> dist.Store:
    """A key-value store that holds nothing but what these processes write to it.

    The one that torchrun keeps for its workers outlives them, so that after a restart a process may
    find the address of a dead one there (torch 2.13: "Gloo connectFullMesh failed"), and restart
    counts differ between nodes. So the first rank gives out a new name, under which all then write:
    each other rank shows an id of its own, and a name that answers this id comes from a first rank
    that lives.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    name = uuid.uuid4().hex
    if rank > 0:
        answer = f"answer/{name}"
        while not store.check([answer]):
            store.set(f"ask/{rank}", name)
            time.sleep(0.01)
        name = store.get(answer).decode()
        store.set(f"{name}/{rank}", "")
    waited_for = set(range(1, world_size)) if rank == 0 else set()
    while waited_for:
        for other in list(waited_for):
            if store.check([f"{name}/{other}"]):
                waited_for.remove(other)
            elif store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


@dataclass
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without it."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = field(default=None, repr=False)  # gloo group for numbers on the CPU

    @classmethod
    def start(cls, device: str = "auto") -> "Ranks":
        """Join the process groups that torchrun's environment describes; on a CPU,
        keep_freed_memory(). Raises ValueError for a missing device."""
        rank, world_size = environment("RANK", 0), environment("WORLD_SIZE", 1)
        place = pick_device(device, environment("LOCAL_RANK", 0))
        if place.type == "cuda":
            torch.cuda.set_device(place)
        elif place.type == "cpu":
            keep_freed_memory()
        if world_size == 1:
            return cls(rank, world_size, place)
        where = {"store": meeting_point(rank, world_size), "rank": rank, "world_size": world_size}
        if place.type == "cuda":
            dist.init_process_group("nccl", device_id=place, **where)
        else:
            dist.init_process_group("gloo", **where)
        return cls(rank, world_size, place, dist.new_group(backend="gloo"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

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

    def together(self, function: Callable, *arguments: Any) -> Any:
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
            dist.destroy_process_group()
            self.control = (
                None  # its threads end here: at the interpreter's end they could abort the process
            )


def _outcome(function: Callable, arguments: tuple) -> tuple[Any, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:
        return None, error
