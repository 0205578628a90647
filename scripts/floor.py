# SPDX-License-Identifier: Apache-2.0
"""What inference cannot go below on this machine: its files unpacked, its network alone, its mask packed and written.

Beside it the machine's own rate of matrix products, of which the network's is a share.
"""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from monai.data.utils import dense_patch_slices
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Network = Callable[[torch.Tensor], Any]
THREADS = 2
SIDE = 2048  # of the matrices whose product is timed
REPEATS = 3  # of reading and of writing
MOST = 10  # windows that are timed; more tell no more about the rate


def cpu_name(threads: int = 0) -> str:
    """The CPU's model, its cores, and the threads in use: those asked for, or PyTorch's choice."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    model = model or platform.processor() or "unknown CPU"
    return f"{model}, {os.cpu_count()} cores, {threads or torch.get_num_threads()} threads"


def _gzip() -> Any:
    """The fastest module for gzip at hand."""
    for name in ("isal.igzip", "gzip"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise RuntimeError("Python has no gzip.")


def _unpack(path: Path) -> int:
    """Read a file, unpacked where it is packed, or every file of a folder; returns the bytes."""
    if path.is_dir():
        return sum(_unpack(each) for each in sorted(path.iterdir()) if each.is_file())
    packed = path.read_bytes()
    return len(_gzip().decompress(packed)) if path.suffix == ".gz" else len(packed)


def _median(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def unpacking_seconds(files: Sequence[Path], repeats: int = REPEATS) -> float:
    """Seconds to read and unpack a case's files, two at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return _median(lambda: list(pool.map(_unpack, files)), repeats)


def packing_seconds(mask: Path, repeats: int = REPEATS) -> float:
    """Seconds to pack a mask that is there and to write it, beside itself."""
    data, beside = _gzip().decompress(mask.read_bytes()), mask.with_name(f".floor.{mask.name}")
    try:
        return _median(lambda: beside.write_bytes(_gzip().compress(data, 1)), repeats)
    finally:
        beside.unlink(missing_ok=True)


def window_count(shape: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """Windows of a pass over a volume, which is padded to one window where it is smaller."""
    padded = [max(size, side) for size, side in zip(shape, window, strict=True)]
    steps = [max(1, int(side * (1 - overlap))) for side in window]
    return len(dense_patch_slices(padded, window, steps))


def network_seconds(
    network: Network, channels: int, shape: Sequence[int], window: Sequence[int], overlap: float
) -> float:
    """Seconds of a pass over a volume at the network's rate on random windows, without anything around it.

    Args:
        network: anything that takes a window, ``1 C H W D``.
        channels: of a window.
        shape: of the volume on the network's grid.
        window, overlap: of the pass.
    """
    count = window_count(shape, window, overlap)
    windows = itertools.cycle([torch.rand(1, channels, *window, generator=torch.Generator().manual_seed(0))])
    with torch.inference_mode():
        network(next(windows))  # compiled, memory at hand
        return count * _median(lambda: network(next(windows)), min(count, MOST))


def network_flops(network: nn.Module, channels: int, window: Sequence[int]) -> float:
    """Floating point operations of one window."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, *window))
    return float(counter.get_total_flops())


def matrix_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """The machine's GFLOP/s in a product of large matrices, with PyTorch's threads."""
    a, b = torch.rand(2, SIDE, SIDE).to(dtype)
    torch.mm(a, b)
    return 2 * SIDE**3 / _median(lambda: torch.mm(a, b), repeats) / 1e9


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
