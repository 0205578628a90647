# SPDX-License-Identifier: Apache-2.0
"""How much memory a case will take, from its files' heads, and whether it is there."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from scripts.data.resampling import network_grid
from scripts.image_io.headers import Header

logger = logging.getLogger(__name__)

GIB = 2**30
OVERHEAD = 2**27  # what the first case adds whatever its size (measured: 80 to 110 MiB): kernels, buffers of readers
BYTES_PER_VOXEL = 200  # of the student's pass, see scripts.inference.sliding_window
LEAST_GRID = 2**19  # voxels: smaller volumes are padded to a window
CGROUP = Path("/sys/fs/cgroup")


def estimate_bytes(
    headers: Mapping[str, Header], reference: str, spacing: Sequence[float], classes: int, pass_gib: float
) -> int:
    """Peak of what segmenting a case adds to the process.

    Per voxel of a file its stored size twice (unpacked bytes and the tensor) and 4 bytes where it is scaled; per voxel
    of the network's grid 4 bytes each for two copies of the modalities, for two of the classes and for the weights of
    windows; per voxel of the reference's own grid one for the mask and 4 for what is interpolated at once; one pass of
    the network, ``BYTES_PER_VOXEL`` of what it sees at once; and ``OVERHEAD``.

    Args:
        headers: by modality.
        reference: gives the network's grid.
        spacing: of it, in mm.
        classes: of the network.
        pass_gib: limit of one pass of the network.
    """
    files = sum(header.voxels * (2 * header.kind.itemsize + 4) for header in headers.values())
    own = headers[reference]
    grid = math.prod(network_grid(own.affine, own.shape[:3], spacing)[1])
    network = min(pass_gib * GIB, BYTES_PER_VOXEL * max(grid, LEAST_GRID))
    return int(files + grid * 4 * (2 * len(headers) + 2 * classes + 1) + own.voxels * 5 + network + OVERHEAD)


def available_bytes() -> int:
    """What this process can still get: of the machine, its control group and its own limits."""
    free = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # no such group, or "max"
        most, used = (int((CGROUP / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        free.append(most - max(0, used - _cached_bytes()))
    process = psutil.Process().memory_info()
    if hasattr(psutil, "RLIMIT_AS"):
        for limit, taken in ((psutil.RLIMIT_AS, process.vms), (psutil.RLIMIT_DATA, process.data)):
            most = psutil.Process().rlimit(limit)[0]
            if most >= 0:
                free.append(most - taken)
    return min(free)


def _cached_bytes() -> int:
    """Of the control group's memory, files' pages that nobody uses: the kernel gives them back when asked for more."""
    with suppress(OSError, ValueError):
        lines = (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return 0


def require_memory(
    headers: Mapping[str, Header], reference: str, spacing: Sequence[float], classes: int, pass_gib: float
) -> None:
    """Say the estimate, and refuse a case that would not fit; see ``estimate_bytes``.

    Raises:
        ValueError: there is not that much memory.
    """
    images = {key: header for key, header in headers.items() if key != "label"}
    if reference not in images:
        return
    needed, there = estimate_bytes(images, reference, spacing, classes, pass_gib), available_bytes()
    logger.info("memory: about %.2f GiB needed, %.2f GiB available", needed / GIB, there / GIB)
    if needed > there:
        sizes = " x ".join(map(str, images[reference].shape[:3]))
        raise ValueError(
            f"{images[reference].path} ({sizes} voxels) needs about {needed / GIB:.1f} GiB of memory, but "
            f"{there / GIB:.1f} GiB are available: close other programs, raise the limit, use a coarser spacing, or "
            "crop the images."
        )
