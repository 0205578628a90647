# SPDX-License-Identifier: Apache-2.0
"""NRRD files: the same voxels and grid as SimpleITK reads, and one sentence for everything else."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.header_reader import read_header
from scripts.image_io.reader import header_of, read_itk, read_volume

VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)  # z y x
FIELDS = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "4 3 2",
    "space directions": "(2,0,0) (0,3,0) (0,0,4)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(5,6,7)",
}


def write(path: Path, data: bytes | None = None, magic: str = "NRRD0004", extra: str = "", **changes: Any) -> Path:
    """A file of these fields; ``None`` leaves a field out, and names may have underscores instead of spaces."""
    fields = {**FIELDS, **{name.replace("_", " "): value for name, value in changes.items()}}
    lines = [magic, "# comment", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    header = "\n".join([*lines, *([extra] if extra else [])]) + "\n\n"
    path.write_bytes(header.encode() + (VOXELS.tobytes() if data is None else data))
    return path


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_voxels_and_grid_are_those_of_simpleitk(kind: str, compress: bool, tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(60).reshape(3, 4, 5).astype(kind))
    image.SetSpacing((0.5, 1.25, 3))
    image.SetOrigin((-10, 20.5, 7))
    angle = np.radians(20)
    image.SetDirection((np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"), compress)
    read = read_itk(tmp_path / "a.nrrd", Rules())
    assert np.array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(image))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(read, get)() == pytest.approx(getattr(image, get)())
    assert header_of(tmp_path / "a.nrrd", Rules()).warnings == ()


@pytest.mark.parametrize(
    ("space", "diagonal", "origin"),
    [
        ("LPS", (-2, -3, 4), (-5, -6, 7)),
        ("right-anterior-superior", (2, 3, 4), (5, 6, 7)),
        ("LAS", (-2, 3, 4), (-5, 6, 7)),
    ],
)
def test_every_space_is_turned_into_ras(space: str, diagonal: Any, origin: Any, tmp_path: Path) -> None:
    affine = read_header(write(tmp_path / "a.nrrd", space=space)).affine
    assert np.array_equal(np.diag(affine)[:3], diagonal)
    assert np.array_equal(affine[:3, 3], origin)


def test_byte_order_and_gzip_are_followed(tmp_path: Path) -> None:
    big = write(tmp_path / "big.nrrd", VOXELS.astype(">i2").tobytes(), endian="big")
    packed = write(tmp_path / "packed.nrrd", gzip.compress(VOXELS.tobytes()), encoding="gzip", extra="Segment0_ID:=a:b")
    for path in (big, packed):
        voxels = read_volume(header_of(path, Rules()), Rules())
        assert np.array_equal(voxels, VOXELS.T)


@pytest.mark.parametrize(
    "changes", [{"space": None}, {"space_origin": None}, {"space": None, "space_directions": None, "spacings": "2 3 4"}]
)
def test_a_file_without_a_place_draws_a_warning(changes: dict[str, Any], tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "a.nrrd", **changes))
    assert "has no position in space (no space, directions or origin)" in header.warnings[0]
    assert np.array_equal(np.abs(np.diag(header.affine))[:3], [2, 3, 4])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"magic": "NRRD9999"}, "is not a NRRD file"),
    "detached": ({"data_file": "a.raw"}, "Its voxels lie in another file"),
    "skipped bytes": ({"byte_skip": "8"}, "has the NRRD field 'byte skip', which is not supported"),
    "text": ({"encoding": "ascii"}, "has the NRRD encoding 'ascii'"),
    "bzip2": ({"encoding": "bzip2"}, "Only raw and gzip are read"),
    "vectors": ({"kinds": "vector domain domain"}, "with an axis that is not in space"),
    "segments": ({"dimension": "4", "sizes": "2 4 3 1", "kinds": "list domain domain domain"}, "Export one label map"),
    "4D": ({"dimension": "4", "sizes": "4 3 1 2", "kinds": None}, "Give one 3D volume per file"),
    "blocks": ({"type": "block"}, "contains voxels of type 'block'"),
    "no sizes": ({"sizes": None}, "damaged NRRD header .no sizes"),
    "negative size": ({"sizes": "4 3 -2"}, "damaged NRRD header .sizes"),
    "dimension": ({"dimension": "2"}, "damaged NRRD header .dimension"),
    "endian": ({"endian": None}, "no endian"),
    "metres": ({"space_units": '"m" "m" "m"'}, "states sizes in m"),
    "time": ({"space": "left-posterior-superior-time"}, "Only RAS, LAS and LPS are read"),
    "no voxel sizes": ({"space_directions": None}, "has no voxel sizes"),
    "two vectors": ({"space_directions": "(1,0,0) (0,1,0)"}, "space directions"),
    "nan": ({"space_origin": "(nan,0,0)"}, "space origin"),
    "singular": ({"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}, "singular affine"),
    "repeated": ({"extra": "type: short"}, "damaged NRRD header .'type: short'"),
    "too large": ({"sizes": "40000 40000 40000"}, "more than the limit"),
    "too short": ({"sizes": "4 3 3"}, "is too small for the 36 voxels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_followed_is_refused_from_the_header(kind: str, tmp_path: Path) -> None:
    changes, words = REFUSED[kind]
    with pytest.raises(ValueError, match=words) as error:
        read_header(write(tmp_path / "a.nrrd", **changes))
    assert str(error.value).startswith(str(tmp_path / "a.nrrd"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (VOXELS.tobytes() + b"x", "contains more than the 24 voxels"),
        (gzip.compress(VOXELS.tobytes())[:-5], "is truncated or damaged"),
        (gzip.compress(VOXELS.tobytes()[:-2]), "contains fewer than the 24 voxels"),
        (gzip.compress(VOXELS.tobytes() + b"x" * 9), "contains more than the 24 voxels"),
        (gzip.compress(VOXELS.tobytes())[:-8] + b"12345678", "is truncated or damaged"),
        (b"\x1f\x8bgarbage" * 9, "is truncated or damaged"),
    ],
    ids=["raw too long", "gzip cut", "too few", "too many", "wrong checksum", "no gzip"],
)
def test_damaged_voxels_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    encoding = "gzip" if data.startswith(b"\x1f\x8b") else "raw"
    with pytest.raises(ValueError, match=words):
        read_volume(header_of(write(tmp_path / "a.nrrd", data, encoding=encoding), Rules()), Rules())


def test_text_and_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        read_header(tmp_path / "a.nrrd")
    (tmp_path / "a.nrrd").write_text("hello")
    with pytest.raises(ValueError, match="is a text file"):
        read_header(tmp_path / "a.nrrd")
