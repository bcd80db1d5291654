"""Peaks by what devices call themselves, what torch.compile needs, and NVML's counter of energy."""

import ctypes
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from pretrain import hardware
from pretrain.hardware import compiler_problem, energy_joules, peak_flops

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, 156),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.float16, 362),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA B300 SXM6 AC", torch.bfloat16, 2250),
        ("NVIDIA GB200", torch.bfloat16, 2500),
        ("NVIDIA GB300", torch.float32, 1250),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA GeForce RTX 5090", torch.bfloat16, 209.5),
        ("NVIDIA GeForce RTX 5070 Ti", torch.bfloat16, 87.9),
        ("NVIDIA GeForce RTX 5070", torch.bfloat16, 61.7),
        ("NVIDIA RTX 6000 Ada Generation", torch.bfloat16, 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", torch.bfloat16, 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", torch.bfloat16, 480),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", torch.bfloat16, 438.9),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce GT 1030", torch.float32, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_the_peak_is_that_of_the_device_and_number_format_or_unknown(name, dtype, teraflops):
    peak = peak_flops(name, dtype)
    assert peak == (teraflops and pytest.approx(teraflops * 1e12))


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5080 SUPER",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A40-48Q",
        "GRID A100-10C",
    ],
)
def test_a_part_of_a_gpu_or_a_smaller_one_of_its_number_has_no_peak_rather_than_a_wrong_one(name):
    assert peak_flops(name, torch.bfloat16) is None


def test_compiling_for_a_gpu_needs_triton_a_c_compiler_and_pythons_headers(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(shutil, "which", lambda name: name == "clang" and "/usr/bin/clang")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "Triton" in compiler_problem(CUDA)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert compiler_problem(CUDA) is None
    (tmp_path / "Python.h").unlink()
    assert str(tmp_path / "Python.h") in compiler_problem(CUDA)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in compiler_problem(CUDA)
    monkeypatch.setenv("CC", "cc")
    assert "Python.h" in compiler_problem(CUDA)


def test_compiling_for_a_cpu_needs_pythons_headers_besides_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in compiler_problem(CPU)
    (tmp_path / "Python.h").touch()
    assert compiler_problem(CPU) is None


class Nvml:
    """libnvidia-ml as far as it is asked, with one GPU. It gives what is written here."""

    def __init__(self, failure=0):
        self.failure = failure

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 7
        return 0 if uuid.value == b"GPU-12ab" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        assert handle.value == 7
        ctypes.cast(value, ctypes.POINTER(ctypes.c_ulonglong))[0] = 2**40 + 500
        return self.failure


def test_energy_is_nvmls_counter_in_joules_and_unknown_where_there_is_none(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab")
    )
    monkeypatch.setattr(hardware, "_nvml", Nvml)
    assert energy_joules(CUDA) == (2**40 + 500) / 1000
    monkeypatch.setattr(hardware, "_nvml", lambda: Nvml(failure=3))
    assert energy_joules(CUDA) is None
    monkeypatch.setattr(hardware, "_nvml", SimpleNamespace)
    assert energy_joules(CUDA) is None
    monkeypatch.setattr(hardware, "_nvml", lambda: None)
    assert energy_joules(CUDA) is None
    assert energy_joules(CPU) is None
