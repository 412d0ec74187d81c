"""The device that a benchmark runs on: what it is, and how fast it moves bytes and multiplies matrices."""

import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.evaluation.throughput.session import Clock

# Settings in the environment that speed depends on; they are shown before the command.
VARIABLES = ("OMP_NUM_THREADS", "JET_HF_KERNELS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF")
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "flash-attn", "megatron-core")
REPEATS = 10


@dataclass(frozen=True)
class Rates:
    """Measured on this device: the best of several tries, since they are limits."""

    bytes_per_second: float
    flops_per_second: float


@usage_errors()
def find_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU if there is one. Raises UserError when it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # torch knows more than this project runs on
        raise UserError(f"--device {name}: no such device; cpu, cuda and cuda:N are")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here; use --device cpu")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def limit_memory(gib: float | None, device: torch.device) -> int | None:
    """Bytes that may be used, or None for all. On a GPU the allocator then refuses more."""
    if gib is None:
        return None
    if not 0 < gib < math.inf:
        raise UserError(f"--memory-limit {gib}: give a number of GiB above 0")
    limit = int(gib * 2**30)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return limit


def record(kind: str, device: torch.device) -> dict[str, Any]:
    """The head of a result file: what, when, where, with what, by which command."""
    settings = [f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES if name in os.environ]
    return {
        "schema_version": 1,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([*settings, shlex.join(["python", *sys.argv])]),
        "device": describe(device),
        "versions": {"python": platform.python_version(), **versions()},
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Name and size of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return {"type": "cpu", "name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of the packages that speed depends on, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Bytes per second of a large copy or a large read, whichever is faster; FLOPs per second of a matrix product."""
    return Rates(max(_copy_rate(device), _read_rate(device)), _matmul_rate(device, dtype))


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_large(device), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(device, lambda: target.copy_(source))


def _read_rate(device: torch.device) -> float:
    source = torch.ones(_large(device), device=device)
    return source.nbytes / _best_seconds(device, source.sum)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")  # equal numbers would draw less power
    return 2.0 * size**3 / _best_seconds(device, lambda: a @ b)


def _large(device: torch.device) -> int:
    """fp32 elements that no cache holds: 2 GiB on a GPU, 256 MiB on a CPU."""
    return 2**29 if device.type == "cuda" else 2**26


def _best_seconds(device: torch.device, work) -> float:
    work()  # memory touched, kernels loaded
    best = float("inf")
    for _ in range(REPEATS):
        clock = Clock(device)
        work()
        clock.lap()
        best = min(best, clock.intervals()[0])
    return best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
