"""What a GPU can be told to do faster, each behind a flag of its own: attention's kernels, how code
is compiled, and a look at where the time goes.

    run.enter(attention("cudnn", device))             # --attention
    compiler = choose_compiler(settings, device, warn)
    forward = compiler(model) if compiler else model  # --compile, --compile_mode
    profile = run.enter(Profile(5, folder, say))      # --profile 5
    profile.step()                                    # after each update

None of them changes what is computed, but for rounding.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from pretrain.errors import first_line
from pretrain.hardware import compiler_problem
from pretrain.train.settings import SettingsError, TrainSettings

# Kernels by --attention, the first that can do what is asked for: FlashAttention knows no masks,
# which evaluations need.
FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
KERNELS = {
    "flash": [FLASH, EFFICIENT, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, FLASH, EFFICIENT, SDPBackend.MATH],
    "efficient": [EFFICIENT, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}
# What stands in for torch's FlashAttention 2, and the package that brings it.
IMPLEMENTATIONS = {"flash3": ("FA3", "flash_attn_interface"), "flash4": ("FA4", "flash_attn.cute")}
# Without CUDA graphs: gradients that accumulate, and the exchange between ranks, do not go along
# with them.
MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}


@contextlib.contextmanager
def attention(name: str, device: torch.device) -> Iterator[None]:
    """Attention by the kernels of this name (--attention), for what is compiled or run meanwhile.
    Raises SettingsError where they cannot be had."""
    if name == "auto":
        yield
        return
    if name not in ("flash", "math") and device.type != "cuda":
        raise SettingsError(f"--attention {name}: needs a GPU of NVIDIA; this device is {device}")
    if name in IMPLEMENTATIONS:
        _activate(name)
    try:
        with sdpa_kernel(KERNELS.get(name, KERNELS["flash"]), set_priority=True):
            yield
    finally:
        if name in IMPLEMENTATIONS:
            restore_flash_attention_impl()


def _activate(name: str) -> None:
    implementation, package = IMPLEMENTATIONS[name]
    try:
        activate_flash_attention_impl(implementation)
    except Exception as error:  # not installed, not for this GPU, not known to this torch
        raise SettingsError(
            f"--attention {name}: {first_line(error)}; it needs the package {package}, built for"
            " this GPU, and --attention flash needs none"
        ) from None


def residual_dtype(is_bfloat16: bool, dtype: torch.dtype) -> torch.dtype | None:
    """What models take as residual_dtype; dtype: of the computation. Raises SettingsError where
    that is not bfloat16: float16 would overflow, float32 has nothing to gain."""
    if is_bfloat16 and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise SettingsError(f"--bfloat16_residual: computes in {name}; give --dtype bfloat16 too")
    return torch.bfloat16 if is_bfloat16 else None


def configure(model: Any, settings: TrainSettings, dtype: torch.dtype) -> None:
    """Tell a model how to compute what it computes. Raises SettingsError like residual_dtype."""
    model.gradient_checkpointing = settings.gradient_checkpointing
    model.residual_dtype = residual_dtype(settings.bfloat16_residual, dtype)
    model.head_rows = settings.head_rows


def choose_compiler(
    settings: TrainSettings, device: torch.device, warn: Callable[[str], None]
) -> Callable[[Any], Any] | None:
    """What compiles a module or a function, by --compile and --compile_mode; None where nothing is
    to be compiled, or cannot be, which is warned of."""
    is_wanted = device.type == "cuda" if settings.compile is None else settings.compile
    if not is_wanted:
        return None
    if problem := compiler_problem(device):
        warn(f"--compile left out: {problem}")
        return None
    mode = MODES[settings.compile_mode]
    return lambda what: torch.compile(what, mode=mode) if mode else torch.compile(what)


class Profile(contextlib.AbstractContextManager):
    """A trace of some updates by torch.profiler, for chrome://tracing or ui.perfetto.dev.

    The first updates are left out: they compile, and fill memory. steps 0: none, at no cost.
    """

    SKIPPED = 4  # the last of them with the profiler warming up

    def __init__(self, steps: int, folder: Path, say: Callable[[str], None]):
        """say: what is told where the trace is, or why there is none."""
        self.steps, self.path, self._say = steps, folder / "trace.json.gz", say
        self._profiler: Any = None
        self._seen = 0

    def __enter__(self) -> "Profile":
        if self.steps:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = torch.profiler.profile(
                activities=kinds,
                schedule=torch.profiler.schedule(
                    wait=self.SKIPPED - 1, warmup=1, active=self.steps, repeat=1
                ),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profiler.__enter__()
        return self

    def step(self) -> None:
        """An update is made."""
        if self._profiler:
            self._seen += 1
            self._profiler.step()
            if self._seen == self.SKIPPED + self.steps:
                self._close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profiler:
            self._close()

    def _close(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        if self._seen <= self.SKIPPED:
            self._say(f"--profile: no trace, as the run ended within {self.SKIPPED} updates")

    def _write(self, profiler: Any) -> None:
        steps = min(self.steps, self._seen - self.SKIPPED)
        if steps < 1:
            return
        try:
            profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:  # a full disk stops no run
            self._say(f"--profile: {self.path}: not written: {first_line(error)}")
            return
        self._say(f"profile: {steps} updates in {self.path}; open it in ui.perfetto.dev")
