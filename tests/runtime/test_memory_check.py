# SPDX-License-Identifier: Apache-2.0
"""A lack of memory is reported as such, not as a damaged file. Reclaimable file cache counts as available."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.reader import header_of, read_volume
from scripts.runtime import memory_check as memory

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
    files: dict[str, Any] = {"max": 5000, "current": 1000, "stat": "anon 300\nactive_file 100\ninactive_file 600"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert memory.available_bytes() == 5000 - (1000 - 600)
    (tmp_path / "memory.stat").write_text("inactive_file 2000\n")
    assert memory.available_bytes() == 5000
    (tmp_path / "memory.stat").unlink()
    assert memory.available_bytes() == 4000
