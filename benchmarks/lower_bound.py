# SPDX-License-Identifier: Apache-2.0
"""The lower bound of inference time on this machine: read the files, run the network alone, write the mask.

The machine's rate of matrix products is measured too, to tell which share of it the network uses.
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
from scripts.runtime.engines import native_bf16

READING_THREADS = 2
MATRIX_SIZE = 2048  # rows and columns of the matrices whose product is timed
REPEATS = 3


def cpu_name(threads: int = 0) -> str:
    """Describe the CPU: model, number of cores and number of threads in use.

    Args:
        threads: the number of threads; 0 for PyTorch's choice.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    model = model or platform.processor() or "unknown CPU"
    return f"{model}, {os.cpu_count()} cores, {threads or torch.get_num_threads()} threads"


def _read_decompressed(path: Path) -> int:
    """Read and decompress a file, or every file of a folder; returns the number of bytes."""
    if path.is_dir():
        return sum(_read_decompressed(each) for each in sorted(path.iterdir()) if each.is_file())
    return len(read_bytes(path))


def median_seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of a call, after one call to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def reading_seconds(files: Sequence[Path], repeats: int = REPEATS) -> float:
    """Seconds to read and decompress the files of a case, two at a time."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return median_seconds(lambda: list(pool.map(_read_decompressed, files)), repeats)


def writing_seconds(mask: Path, repeats: int = REPEATS) -> float:
    """Seconds to compress an existing mask and write it to a temporary file in the same folder."""
    data, copy = read_bytes(mask), mask.with_name(f".timing.{mask.name}")
    try:
        return median_seconds(lambda: copy.write_bytes(gzip_module().compress(data, COMPRESSION)), repeats)
    finally:
        copy.unlink(missing_ok=True)


def network_flops(network: nn.Module, channels: int, window: Sequence[int]) -> float:
    """Floating point operations of one forward pass on one window."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, *window))
    return float(counter.get_total_flops())


def matrix_rates() -> dict[str, float]:
    """The machine's GFLOP/s by data type.

    bfloat16 is only measured on CPUs that support it: emulation takes minutes.
    """
    types = (torch.float32, torch.bfloat16) if native_bf16() else (torch.float32,)
    return {str(dtype).removeprefix("torch."): matrix_rate(dtype) for dtype in types}


def matrix_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """The machine's GFLOP/s in a product of large matrices, with PyTorch's number of threads."""
    a, b = torch.rand(2, MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    return 2 * MATRIX_SIZE**3 / median_seconds(lambda: torch.mm(a, b), repeats) / 1e9


def lower_bound(files: Sequence[Path], network: float, mask: Path, repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of the parts that every implementation needs, and their sum.

    Args:
        files: image files of a case.
        network: seconds of the network alone.
        mask: the mask of the case.
        repeats: repeats of reading and of writing; the medians are returned.

    Returns:
        ``{"unpacking", "network", "packing", "sum"}``.
    """
    parts = {
        "unpacking": reading_seconds(files, repeats),
        "network": network,
        "packing": writing_seconds(mask, repeats),
    }
    return {**parts, "sum": sum(parts.values())}


def rate_shares(seconds: float, gflops: float, rates: Mapping[str, float]) -> dict[str, float]:
    """The share of the machine's rates that a network uses.

    Args:
        seconds: time of the network.
        gflops: its floating point operations, in 10^9.
        rates: GFLOP/s by data type, see ``matrix_rates``.
    """
    return {name: gflops / seconds / rate for name, rate in rates.items()}
