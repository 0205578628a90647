# SPDX-License-Identifier: Apache-2.0
"""Huge volumes are refused by their headers with an estimate, which exceeds the memory that a case really needs."""

from __future__ import annotations

import gzip
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest

import scripts.image_io.reader
from scripts.cli.main import main
from scripts.image_io.header_reader import read_header
from scripts.runtime import memory_check as memory

GIB = 2**30
ROOM = 2 * GIB
LENGTH = 2000


@pytest.fixture(params=["sparse", "compressed"])
def huge(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """2000^3 zeros: a sparse file with all bytes, or a small file whose header claims that size."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((LENGTH, LENGTH, LENGTH))
    header.set_sform(np.eye(4), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / ("ct.nii" if request.param == "sparse" else "ct.nii.gz")
    if request.param == "sparse":
        path.write_bytes(header.binaryblock + bytes(4))
        with open(path, "r+b") as file:
            file.truncate(352 + LENGTH**3)
    else:
        noise = np.random.default_rng(0).bytes(LENGTH**3 // 900)  # gzip could have packed that many voxels into this
        path.write_bytes(gzip.compress(header.binaryblock + noise, 1))
    return path


def test_more_voxels_than_the_maximum_are_refused_regardless_of_memory(
    huge: Path, refused: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    mask = tmp_path / "out" / "mask.nii.gz"
    error = refused(*segment_arguments({"ct": huge}, mask, "--allow-missing"))
    assert f"{huge} states 2000 x 2000 x 2000 voxels, more than the limit of {2**30}" in error
    assert "--max-voxels" in error
    assert [path for path in mask.parent.iterdir() if path.name[0] != "."] == []


def test_a_case_above_the_memory_limit_of_the_process_is_refused_before_it_is_read(
    huge: Path, child: Any, sentence: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    mask = tmp_path / "out" / "mask.nii.gz"

    def work() -> int:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        more = ("--allow-missing", "--max-voxels", 10**11, "--set", "spacing=[4,4,4]")
        return main(segment_arguments({"ct": huge}, mask, *more))

    code, printed = child(work).end()
    error = sentence(printed)
    assert code == 1
    assert f"{huge} (2000 x 2000 x 2000 voxels) needs about " in error
    needed, there = (float(each) for each in re.findall(r"([\d.]+) GiB", error))
    # At least the file's bytes, the tensor and the mask, one byte each, and the network's grid of 500^3 in float32.
    assert needed > (3 * LENGTH**3 + 4 * 500**3) / GIB
    assert 0 < there <= ROOM / GIB + 0.05
    assert "crop the images" in error
    assert [path for path in mask.parent.iterdir() if path.name[0] != "."] == []


def test_nothing_is_read_before_the_estimate_is_accepted(
    noise_case: Any, refused: Any, segment_arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a volume was read")

    files, mask = noise_case(tmp_path, 16), tmp_path / "out" / "mask.nii.gz"
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB // 5)  # of about 0.22
    with monkeypatch.context() as patch:
        patch.setattr(scripts.image_io.reader, "read_volume", never)
        assert "needs about 0.2 GiB of memory, but only 0.2 GiB are available" in refused(
            *segment_arguments(files, mask)
        )
    assert main(segment_arguments(files, mask, "--set", "memory_gib=0.05")) == 0


@pytest.mark.parametrize("pass_gib", [0.05, 1.25])
def test_a_case_is_refused_once_the_estimate_exceeds_the_available_memory(
    pass_gib: float, noise_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {key: read_header(path) for key, path in noise_case(tmp_path, 16).items()}
    # Three files of 16^3 float32 (bytes, tensor, scaled), the grid of 8^3 for 3 modalities and 2 classes, all 16 planes
    # of 2 classes, the mask, the pass (its limit, or 200 bytes of each voxel of a small window), and an eighth of a GiB
    # whatever the size.
    network = min(pass_gib * GIB, 200 * 2**19)
    estimate = int(3 * 16**3 * 12 + 8**3 * 4 * 13 + 16**3 * 8 + 16**3 * 2 + network + GIB / 8)
    assert memory.estimate_bytes(headers, "ct", (2, 2, 2), 2, pass_gib) == estimate
    monkeypatch.setattr(memory, "available_bytes", lambda: estimate)
    memory.require_memory(headers, "ct", (2, 2, 2), 2, pass_gib)
    monkeypatch.setattr(memory, "available_bytes", lambda: estimate - 1)
    with pytest.raises(ValueError, match=rf"{headers['ct'].path} \(16 x 16 x 16 voxels\) needs about"):
        memory.require_memory(headers, "ct", (2, 2, 2), 2, pass_gib)


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_limits_of_the_process_bound_the_available_memory(limit: int, child: Any) -> None:
    def work() -> int:
        info = psutil.Process().memory_info()
        used = info.vms if limit == resource.RLIMIT_AS else info.data
        resource.setrlimit(limit, (used + GIB // 2, -1))
        return 0 if 0.3 * GIB < memory.available_bytes() <= 0.51 * GIB else 1

    assert child(work).end()[0] == 0


def test_the_limit_of_a_control_group_bounds_the_available_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.available_bytes()
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available_bytes() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == pytest.approx(free, rel=0.2)


@pytest.mark.parametrize("whole", [False, True], ids=["windows", "one pass"])
@pytest.mark.parametrize(
    ("size", "voxel", "spacing", "most"),
    [(48, 3, 1, 9), (96, 1, 2, 9), (192, 1, 3, 4)],
    ids=["network finer", "network coarser", "large"],
)
def test_the_peak_of_a_real_run_is_below_the_estimate_but_close_to_it(
    whole: bool, size: int, voxel: int, spacing: int, most: float, child: Any, write_nifti: Callable[..., Path],
    segment_arguments: Any, tmp_path: Path,
) -> None:  # fmt: skip
    voxels = np.random.default_rng(0).integers(0, 9, (size,) * 3).astype(np.float32)
    affine = np.diag([voxel, voxel, voxel, 1.0])
    files = {key: write_nifti(tmp_path / f"{key}.nii", voxels, affine) for key in ("ct", "pet", "mr")}
    mask = tmp_path / "out" / "mask.nii.gz"
    more = [f"whole_volume={str(whole).lower()}", "memory_gib=0.25", "patch=[64,64,64]", f"spacing={[spacing] * 3}"]
    arguments = segment_arguments(files, mask, *(each for pair in more for each in ("--set", pair)))

    def work() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = main(arguments)
        print(f"grew by {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024} bytes")
        return code

    code, printed = child(work).end()
    assert code == 0, printed
    (grown,) = (int(each) for each in re.findall(r"grew by (\d+) bytes", printed))
    (estimate,) = (float(each) * GIB for each in re.findall(r"memory: about ([\d.]+) GiB needed", printed))
    assert grown > 4 * size**3  # of the voxels of a file: it was measured
    assert grown < estimate <= most * grown
