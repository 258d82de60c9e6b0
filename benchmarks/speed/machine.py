"""What the machine is and can do: its name, its GEMM and copy rates, and the floor these set for a piece of work."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory, and the versions that do the arithmetic."""
    cpu = Path("/proc/cpuinfo").read_text()
    build = torch.__config__.show()
    return {
        "cpu": _first(r"model name\s*: (.+)", cpu),
        "cores": os.cpu_count(),
        "ram_gib": round(int(_first(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())) / 2**20, 1),
        "torch": torch.__version__,
        "blas": _first(r"BLAS_INFO=(\w+)", build) + ", " + _first(r"(Math Kernel Library Version [\d.]+)", build),
        "threads": torch.get_num_threads(),
    }


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1].strip() if match else "unknown"


@dataclass(frozen=True)
class Rates:
    """What one CPU-second of one thread gave just now: GFLOP of matrix products, GB read plus written by a copy."""

    gemm: dict[str, float]
    copy: float

    def floor(self, cpu_s: float, dtype: str = "fp64", flops: float = 0.0, moved: float = 0.0) -> dict[str, Any]:
        """The least seconds that work can take (the larger of arithmetic and traffic), and the measured over it."""
        arithmetic, traffic = flops / self.gemm[dtype] / 1e9, moved / self.copy / 1e9
        seconds = max(arithmetic, traffic)
        figures = {
            "gflop": flops / 1e9,
            "gb": moved / 1e9,
            "arithmetic_s": arithmetic,
            "traffic_s": traffic,
            "seconds": seconds,
            "ratio": cpu_s / seconds,
        }
        return {"dtype": dtype} | {key: float(f"{value:.4g}") for key, value in figures.items()}


def measure_rates(size: int = 1536, megabytes: int = 256) -> Rates:
    """The best of a few square products in each precision, and of a few copies too large for the cache."""
    found = {}
    for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(size, size, dtype=dtype)
        out = torch.empty_like(a)
        found[name] = round(2 * size**3 / _best(lambda a=a, out=out: torch.mm(a, a, out=out)) / 1e9, 1)  # type: ignore[misc]
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    copy = 2 * 4 * source.numel() / _best(lambda: target.copy_(source)) / 1e9
    return Rates(found, round(copy, 2))


def _best(action: Callable[[], object], repeats: int = 8) -> float:
    """CPU-seconds, for that is what the floors are held against; the first call warms up."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        seconds.append(max(1e-9, time.process_time() - start))
    return min(seconds[1:])


def available_gib() -> float:
    """Memory that can be had without swapping."""
    return int(_first(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())) / 2**20
