# SPDX-License-Identifier: Apache-2.0
"""Estimate from a case's headers how much memory it needs, and check that it is available."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from scripts.image_io.checks import LABEL
from scripts.image_io.headers import Header
from scripts.runtime import BYTES_PER_VOXEL, GIB
from scripts.runtime.grids import network_grid
from scripts.runtime.resampling import SLAB

logger = logging.getLogger(__name__)

OVERHEAD = 2**27  # bytes added by the first case, of any size: kernels, reader buffers (measured: 80 to 110 MiB)
MIN_GRID_VOXELS = 2**19  # smaller volumes are padded to a window
CGROUP, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY, STATM = Path("/proc/meminfo"), Path("/proc/self/statm")


def estimate_bytes(
    headers: Mapping[str, Header], reference: str, spacing: Sequence[float], classes: int, pass_gib: float
) -> int:
    """Peak memory that segmenting a case adds to the process, in bytes. It is the sum of:

    - per voxel of a file: its stored size twice (unpacked bytes and tensor), and 4 bytes for the tensor; of integers at
      least 16 bytes beside the stored ones, because a slope and an intercept are applied in float64;
    - per voxel of the network's grid: 4 bytes each for two copies of the modalities, three of the classes (logits,
      probabilities, images), and the weights of windows;
    - per voxel of the reference's own grid: 2 bytes for the mask;
    - per voxel of the ``SLAB`` planes that are interpolated at once: 4 bytes for each class;
    - one pass of the network: ``BYTES_PER_VOXEL`` for each voxel that it processes at once;
    - ``OVERHEAD``.

    Args:
        headers: by modality.
        reference: the modality that defines the network's grid.
        spacing: of that grid, in mm.
        classes: of the network.
        pass_gib: limit of one pass of the network.
    """
    files = sum(header.voxels * _bytes_per_voxel(header) for header in headers.values())
    own = headers[reference]
    grid = math.prod(network_grid(own.affine, own.shape[:3], spacing)[1])
    slab = math.prod(own.shape[:2]) * min(SLAB, own.shape[2])
    network = min(pass_gib * GIB, BYTES_PER_VOXEL * max(grid, MIN_GRID_VOXELS))
    copies = grid * 4 * (2 * len(headers) + 3 * classes + 1) + slab * 4 * classes
    return int(files + copies + own.voxels * 2 + network + OVERHEAD)


def _bytes_per_voxel(header: Header) -> int:
    """What reading a file takes at most."""
    size = header.kind.itemsize
    return max(2 * size + 4, size + 16 if header.kind.kind in "iu" else 0)


class SharedMemoryError(ValueError):
    """A case does not fit into this process's share of the memory. It would fit if the process had all of it."""


_processes = 1  # of this program that segment cases on this machine


def share_memory(processes: int) -> None:
    """Tell this process how many processes, itself included, segment cases and share the memory."""
    global _processes
    _processes = processes


def available_bytes() -> int:
    """Memory that this process can still get from the machine, its control groups and its own limits."""
    in_groups = [left for group in _control_groups() if (left := _left_in_group(*group)) is not None]
    return min([_free_bytes(), *in_groups, *_limits()])


class _Names(NamedTuple):
    """The files of a control group: the limit, what is used, and the line of ``memory.stat`` that counts the cache."""

    limit: str
    used: str
    cache: str


V2 = _Names("memory.max", "memory.current", "inactive_file")
V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _control_groups() -> list[tuple[Path, _Names]]:
    """The control groups of this process that may limit its memory, version 1 or 2, with all above them."""
    groups = [(CGROUP, V2), (CGROUP / "memory", V1)]
    with suppress(OSError):
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root, names = (CGROUP / "memory", V1) if kinds else (CGROUP, V2)
            parts = Path(path).parts[1:]
            groups += [(root.joinpath(*parts[: n + 1]), names) for n in range(len(parts))]
    return groups


def _left_in_group(folder: Path, names: _Names) -> int | None:
    """What a control group's limit leaves; None without a limit."""
    try:
        limit, used = (int((folder / name).read_text(encoding="utf-8")) for name in (names.limit, names.used))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None
    return limit - max(0, used - _reclaimable_bytes(folder, names.cache))


def _free_bytes() -> int:
    """Memory that the machine can still give."""
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMORY.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    import psutil  # on systems without /proc

    return int(psutil.virtual_memory().available)


def _limits() -> list[int]:
    """What the process's own limits leave of its address space and of its data; Linux has both."""
    with suppress(OSError, ImportError):
        import resource

        size, _, _, _, _, data, _ = (int(pages) for pages in STATM.read_text(encoding="utf-8").split())
        used = ((resource.RLIMIT_AS, size), (resource.RLIMIT_DATA, data))
        limits = ((resource.getrlimit(kind)[0], pages * resource.getpagesize()) for kind, pages in used)
        return [limit - taken for limit, taken in limits if limit != resource.RLIM_INFINITY]
    return []


def _reclaimable_bytes(folder: Path, key: str) -> int:
    """A control group's inactive file cache, which the kernel frees when memory is needed."""
    with suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key} "))
    return 0


def require_memory(
    headers: Mapping[str, Header], reference: str, spacing: Sequence[float], classes: int, pass_gib: float
) -> None:
    """Log the estimate, and refuse a case that would not fit; see ``estimate_bytes`` for the arguments.

    Raises:
        SharedMemoryError: this process's share is not enough, see ``share_memory``, but all of the memory is.
        ValueError: not enough memory is available.
    """
    images = {key: header for key, header in headers.items() if key != LABEL}
    if reference not in images:
        return
    needed, available = estimate_bytes(images, reference, spacing, classes, pass_gib), available_bytes()
    logger.info("memory: about %.2f GiB needed, %.2f GiB available", needed / GIB, available / GIB)
    if available / _processes < needed <= available:
        raise SharedMemoryError(f"{images[reference].path} needs more than its share of the memory")
    if needed > available:
        size = " x ".join(map(str, images[reference].shape[:3]))
        raise ValueError(
            f"{images[reference].path} ({size} voxels) needs about {needed / GIB:.1f} GiB of memory, but only "
            f"{available / GIB:.1f} GiB are available. Close other programs, raise the limit, use a coarser spacing, "
            "or crop the images."
        )
