"""What a machine can do, by what it says of itself: peaks, a compiler, the energy it has used.

peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)    # 9.89e14, None for what is not known
compiler_problem(torch.device("cuda"))                 # "no C compiler ...", None: none
energy_joules(torch.device("cuda", 0))                 # since the driver was loaded, or None
"""

import ctypes
import functools
import os
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

# Dense peak TFLOP/s in (bfloat16, float16 with float32 accumulation, float32 as TF32 where there is
# one). Where a source states figures with sparsity, half of them. From NVIDIA's data sheets: GB200
# NVL72 and GB300 NVL72 (360 PFLOPS sparse of 72 GPUs), HGX B200 and HGX B300 (36 of 8), GH200,
# H200, H100, A100, A10, A40, L4, L40, L40S, RTX 6000 Ada, V100, T4; for GeForce cards the
# architecture whitepapers, appendix A: Ampere GA102, Ada, RTX Blackwell, where float32 accumulation
# halves what tensor cores do; RTX PRO 6000: NVIDIA RTX Blackwell PRO whitepaper, the Server Edition
# by its 120 of 126 TFLOP/s in float32; MI300X: AMD's data sheet. AWS states 70 for its A10G.
_PEAK_TFLOPS: dict[str, tuple[float | None, float, float]] = {
    "GB300": (2500, 2500, 1250),
    "GB200": (2500, 2500, 1250),
    "B300": (2250, 2250, 1125),
    "B200": (2250, 2250, 1125),
    "GH200": (989, 989, 494),
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
    "RTX PRO 6000 Blackwell Max-Q": (438.9, 438.9, 219.4),
    "RTX PRO 6000 Blackwell Server": (480, 480, 240),
    "RTX PRO 6000 Blackwell": (503.8, 503.8, 251.9),
    "RTX 6000 Ada": (364.2, 364.2, 182.1),
    "RTX 5090": (209.5, 209.5, 104.8),
    "RTX 5080": (112.6, 112.6, 56.3),
    "RTX 5070 Ti": (87.9, 87.9, 43.9),
    "RTX 5070": (61.7, 61.7, 30.9),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 3090": (71, 71, 35.6),
    "MI300X": (1307, 1307, 654),
}
# What makes of a known name another device: a part of one (MIG, a vGPU profile such as -10C), or a
# chip of the same number with fewer units or less power.
_OTHERS = re.compile(r"\b(MIG|Laptop|Mobile|Max-Q|SUPER|Ti|D|vGPU)\b|-\d+[ABCQ]\b", re.IGNORECASE)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of one device in FLOP/s, the denominator of MFU; None where it is not known."""
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}[dtype]
    for name, peaks in _PEAK_TFLOPS.items():
        # "A10" must not be found in "A100", nor "L4" in "L40".
        before, found, after = device_name.partition(name)
        if found and not after[:1].isalnum() and not before[-1:].isalnum():
            peak = None if _OTHERS.search(before + " " + after) else peaks[column]
            return peak * 1e12 if peak else None
    return None


# ---- torch.compile


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton is missing, or too old a GPU for it"
        # Triton compiles a launcher for each kernel and finds its compiler like this.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "no C compiler (gcc, clang or the one that CC names) was found"
        return _header_problem()
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:  # of several kinds, by platform
            return "no C++ compiler (g++ or clang++) was found"
        return _header_problem()
    return None


def _header_problem() -> str | None:
    """What is compiled is called from Python, and includes its headers."""
    folder = Path(sysconfig.get_paths()["include"])
    if (folder / "Python.h").is_file():
        return None
    return (
        f"{folder / 'Python.h'} is missing: install Python's headers (python3-dev, python3-devel)"
    )


# ---- Energy


def energy_joules(device: torch.device) -> float | None:
    """What a GPU has used since its driver was loaded, as NVML counts it; None where there is no
    such counter: another device, a part of a GPU (MIG), one older than Volta."""
    if device.type != "cuda":
        return None
    library = _nvml()
    if library is None:
        return None
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return _counted(library, f"GPU-{uuid.removeprefix('GPU-')}")


@functools.cache
def _nvml() -> Any:
    """NVIDIA's management library, which comes with the driver, initialized; None without it."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1" if os.name != "nt" else "nvml.dll")
        return None if library.nvmlInit_v2() else library
    except (OSError, AttributeError):
        return None


def _counted(library: Any, uuid: str) -> float | None:
    """The counter of the GPU with this UUID; the library gives millijoules."""
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    try:
        failed = library.nvmlDeviceGetHandleByUUID(
            ctypes.c_char_p(uuid.encode()), ctypes.byref(handle)
        ) or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    except AttributeError:  # a library of before there was the counter
        return None
    return None if failed else millijoules.value / 1000
