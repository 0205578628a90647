# SPDX-License-Identifier: Apache-2.0
"""A lack of memory is reported as such, not as a damaged file. Reclaimable file cache counts as available."""

from __future__ import annotations

import os
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.headers import Header
from scripts.image_io.reader import header_of, read_volume
from scripts.runtime import memory_check as memory
from scripts.runtime.grids import network_grid, own_grid
from scripts.runtime.resampling import restore_mask

SHAPE = (256, 512, 256)  # int16: 64 MiB
MIB = 2**20


@pytest.fixture(scope="module", params=["x.nii", "x.nii.gz", "x.mha", "slope.nii.gz"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("large") / request.param
    voxels = np.zeros(SHAPE, np.int16)
    if path.suffix == ".mha":
        sitk.WriteImage(sitk.GetImageFromArray(voxels.T), str(path), True)
        return path
    image = nib.Nifti1Image(voxels, np.eye(4))
    if path.name.startswith("slope"):
        image.header.set_slope_inter(2, 1)
    nib.save(image, path)
    return path


def _error_of_reading(path: Path, more_bytes: int) -> str:
    """The error of reading a file in a child process that may allocate so many more bytes; empty if it succeeds."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = ""
        try:
            header = header_of(path, Rules())
            used = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, used + more_bytes))
            read_volume(header, Rules())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(sink, text.encode())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


@pytest.mark.parametrize("share", [0.5, 1.2, 1.7])
def test_a_file_that_does_not_fit_is_not_called_damaged(share: float, large: Path) -> None:
    """The message does not depend on where it fails. 256 x 512 x 256 voxels of 2 bytes are 1/16 GiB."""
    message = f"OSError: {large} does not fit in memory: it needs a multiple of 0.06 GiB while it is read. "
    error = _error_of_reading(large, int(share * 64 * MIB))
    assert error in ("", message + "Use a machine with more memory, or refuse such files with --max-voxels.")
    assert error or share > 1


def test_with_enough_memory_it_is_read(large: Path) -> None:
    assert _error_of_reading(large, 2048 * MIB) == ""


def test_reclaimable_file_cache_counts_as_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As container runtimes count: of 5000 bytes 1000 are in use, of which 600 are inactive file cache."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "none")
    files: dict[str, Any] = {"max": 5000, "current": 1000, "stat": "anon 300\nactive_file 100\ninactive_file 600"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert memory.available_bytes() == 5000 - (1000 - 600)
    (tmp_path / "memory.stat").write_text("inactive_file 2000\n")
    assert memory.available_bytes() == 5000
    (tmp_path / "memory.stat").unlink()
    assert memory.available_bytes() == 4000


def _group(folder: Path, names: tuple[str, str], limit: object, used: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("own", "root", "names", "cache"),
    [
        ("0::/job/step\n", ".", ("memory.max", "memory.current"), "inactive_file"),
        (
            "5:cpu:/x\n4:memory:/job/step\n0::/\n",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_",
        ),
    ],
)
def test_the_limit_of_every_group_above_this_process_counts(
    own: str, root: str, names: tuple[str, str], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm and systemd nest them, in version 2 and 1: the group has no limit of its own, but one above it has."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "fs")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    folder = tmp_path / "fs" / root / "job" / "step"
    _group(folder, names, "max" if root == "." else 2**63 - 4096, 700)
    _group(folder.parent, names, 9000, 2000)
    (folder.parent / "memory.stat").write_text(f"{cache if root == '.' else 'total_inactive_file'} 500\ncache 7\n")
    assert memory.available_bytes() == 9000 - (2000 - 500)
    (tmp_path / "own").write_text("0::/\n")
    assert memory.available_bytes() > 2**20


def test_a_case_that_needs_more_than_the_share_of_its_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"ct": Header("a.nii", (64, 64, 64), np.eye(4), np.dtype(np.float32))}
    arguments: dict[str, Any] = {"reference": "ct", "spacing": [1, 1, 1], "classes": 2, "pass_gib": 0.5}
    needed = memory.estimate_bytes(headers, **arguments)
    monkeypatch.setattr(memory, "available_bytes", lambda: int(needed * 1.5))
    memory.require_memory(headers, **arguments)
    memory.share_memory(2)
    try:
        with pytest.raises(memory.SharedMemoryError):
            memory.require_memory(headers, **arguments)
        monkeypatch.setattr(memory, "available_bytes", lambda: int(needed * 0.9))
        with pytest.raises(ValueError, match=r"64 x 64 x 64 voxels\) needs about"):
            memory.require_memory(headers, **arguments)
        monkeypatch.setattr(memory, "available_bytes", lambda: needed * 2)
        memory.require_memory(headers, **arguments)
    finally:
        memory.share_memory(1)


@pytest.mark.parametrize("classes", [2, 40])
def test_restoring_a_mask_of_many_classes_stays_within_the_estimate(classes: int) -> None:
    """On a grid three times as coarse; the network's pass is not part of it."""
    own = Header("a.nii", (120, 120, 60), np.eye(4), np.dtype(np.float32))
    spacing = [3.0, 3.0, 1.0]
    affine, shape = network_grid(own.affine, own.shape, spacing)
    logits = np.random.default_rng(0).standard_normal((classes, *shape)).astype(np.float32)
    estimate = memory.estimate_bytes({"ct": own}, "ct", spacing, classes, pass_gib=0) - memory.OVERHEAD
    tracemalloc.start()  # of NumPy's arrays; SimpleITK's images are about a third of them
    try:
        restore_mask(logits, affine, own_grid({}, own.affine, own.shape), threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert logits.nbytes + peak < estimate


def test_a_scale_of_integers_is_applied_in_float64() -> None:
    headers = {kind: Header("a.nii", (100, 100, 100), np.eye(4), np.dtype(kind)) for kind in ("int16", "float32")}
    needed = {
        kind: memory.estimate_bytes({"ct": each}, "ct", [4, 4, 4], 2, pass_gib=0.1) for kind, each in headers.items()
    }
    assert needed["int16"] - needed["float32"] == 100**3 * ((2 + 16) - (2 * 4 + 4))
