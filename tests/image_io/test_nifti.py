# SPDX-License-Identifier: Apache-2.0
"""NIfTI files compared with nibabel; damaged streams; atomic writing."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.image_io import nifti
from scripts.image_io.nifti import read_nifti, write_nifti

TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
AFFINE = np.block([[TURN @ np.diag([-2.0, -3.0, 4.0]), np.array([[10.0], [20.0], [-30.0]])], [np.eye(4)[3:]]])


def values(dtype: Any, shape: tuple[int, ...] = (5, 6, 7)) -> Any:
    return np.random.default_rng(0).integers(0, 120, shape).astype(dtype)


@pytest.fixture(params=["isal", "zlib"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)  # as if it were not installed
    else:
        pytest.importorskip("isal", reason="isal is not installed")
    return str(request.param)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8", "u2", ">i2", ">f4"])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_values_and_affine_are_those_of_nibabel(tmp_path: Path, dtype: str, name: str, module: str) -> None:
    nib.save(nib.Nifti1Image(values(dtype), AFFINE), tmp_path / name)
    found = read_nifti(tmp_path / name)
    loaded = nib.Nifti1Image.from_filename(tmp_path / name)
    np.testing.assert_array_equal(found, np.asanyarray(loaded.dataobj).astype("f8"))
    assert found.shape == (5, 6, 7)
    found[0, 0, 0] = 1  # the array may be written to


def test_the_voxels_stay_in_the_files_order(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(values("i2"), AFFINE), tmp_path / "x.nii.gz")
    found = read_nifti(tmp_path / "x.nii.gz")
    assert found.dtype == np.int16
    assert found.strides == (2, 10, 60)


def test_nifti_2_is_read(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(values("f4"), AFFINE), tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(read_nifti(tmp_path / "x.nii.gz"), values("f4"))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "checksum"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str, module: str) -> None:
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(values("f4", (20, 20, 20)), AFFINE), path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "bit":
        data[len(data) // 2] ^= 4
    elif damage == "checksum":
        data[-6] ^= 1
    else:
        data = bytearray(b"" if damage == "empty" else b"not an image")
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"ct\.nii\.gz is (truncated or damaged|an empty file|a text file)|contains more than"
    ):
        read_nifti(path)


def test_nibabel_reads_the_written_mask(tmp_path: Path, module: str) -> None:
    written = tmp_path / "new" / "m.nii.gz"
    write_nifti(values("u1"), AFFINE, written)
    loaded = nib.Nifti1Image.from_filename(tmp_path / "new" / "m.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(loaded.dataobj), values("u1"))
    np.testing.assert_allclose(loaded.get_sform(coded=True)[0], AFFINE)
    assert loaded.get_data_dtype() == np.uint8
    assert loaded.header.get_xyzt_units() == ("mm", "unknown")
    assert gzip.decompress(written.read_bytes()) == nifti.read_bytes(written)


def test_a_failing_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.nii.gz"
    write_nifti(values("u1"), AFFINE, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_nifti(values("u1") + 1, AFFINE, path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["m.nii.gz"]
