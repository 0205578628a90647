# SPDX-License-Identifier: Apache-2.0
"""What inference cannot go below on this machine: its files unpacked, its network alone, its mask packed and written.

Beside it the machine's own rate of matrix products, of which the network's is a share.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.image_io.nifti import COMPRESSION, gzip_module, read_bytes
from scripts.inference.engines import native_bf16

THREADS = 2
SIDE = 2048  # of the matrices whose product is timed
REPEATS = 3


def cpu_name(threads: int = 0) -> str:
    """The CPU's model, its cores, and the threads in use: those asked for, or PyTorch's choice."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    model = model or platform.processor() or "unknown CPU"
    return f"{model}, {os.cpu_count()} cores, {threads or torch.get_num_threads()} threads"


def _unpack(path: Path) -> int:
    """Read a file, unpacked where it is packed, or every file of a folder; returns the bytes."""
    if path.is_dir():
        return sum(_unpack(each) for each in sorted(path.iterdir()) if each.is_file())
    return len(read_bytes(path))


def median_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of some work, after one time that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def unpacking_seconds(files: Sequence[Path], repeats: int = REPEATS) -> float:
    """Seconds to read and unpack a case's files, two at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return median_seconds(lambda: list(pool.map(_unpack, files)), repeats)


def packing_seconds(mask: Path, repeats: int = REPEATS) -> float:
    """Seconds to pack a mask that is there and to write it, beside itself."""
    data, beside = read_bytes(mask), mask.with_name(f".floor.{mask.name}")
    try:
        return median_seconds(lambda: beside.write_bytes(gzip_module().compress(data, COMPRESSION)), repeats)
    finally:
        beside.unlink(missing_ok=True)


def network_flops(network: nn.Module, channels: int, window: Sequence[int]) -> float:
    """Floating point operations of one window."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, *window))
    return float(counter.get_total_flops())


def matrix_rates() -> dict[str, float]:
    """The machine's GFLOP/s by type; bfloat16 only where the CPU has it, since emulated it takes minutes."""
    types = (torch.float32, torch.bfloat16) if native_bf16() else (torch.float32,)
    return {str(dtype).removeprefix("torch."): matrix_rate(dtype) for dtype in types}


def matrix_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """The machine's GFLOP/s in a product of large matrices, with PyTorch's threads."""
    a, b = torch.rand(2, SIDE, SIDE).to(dtype)
    torch.mm(a, b)
    return 2 * SIDE**3 / median_seconds(lambda: torch.mm(a, b), repeats) / 1e9


def floor(files: Sequence[Path], network: float, mask: Path, repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of every part that no implementation is spared, and their sum.

    Args:
        files: a case's images.
        network: seconds of the network alone.
        mask: the mask of the case.
        repeats: of reading and of writing; medians count.
    """
    parts = {
        "unpacking": unpacking_seconds(files, repeats),
        "network": network,
        "packing": packing_seconds(mask, repeats),
    }
    return {**parts, "sum": sum(parts.values())}


def shares(seconds: float, gflops: float, rates: Mapping[str, float]) -> dict[str, float]:
    """The part of each of the machine's rates (GFLOP/s, by name) that a network with so many GFLOPs uses."""
    return {name: gflops / seconds / rate for name, rate in rates.items()}
