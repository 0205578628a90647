# SPDX-License-Identifier: Apache-2.0
"""Headers that contradict themselves: voxel sizes, forms, units, scales, orientations."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules, check_headers
from scripts.image_io.header_reader import read_header
from scripts.image_io.headers import Header
from scripts.image_io.reader import read_itk

SHAPE = (6, 5, 4)
AFFINE = np.array([[-3.0, 0, 0, 20], [0, -3, 0, 10], [0, 0, 3, -5], [0, 0, 0, 1]])
UNIT = AFFINE @ np.diag([1 / 3, 1 / 3, 1 / 3, 1])
PIXDIM, SLOPE, UNITS, FORMS = 76, 112, 123, 252  # offsets in a NIfTI-1 header


@pytest.fixture
def nifti(tmp_path: Path) -> Callable[..., Path]:
    """``nifti(affine, pixdim, qform=None)``: a file with an sform, other voxel sizes and, if given, a qform."""

    def write(affine: Any, pixdim: Any, qform: Any = None) -> Path:
        path = tmp_path / "image.nii.gz"
        image = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(SHAPE), None)
        image.header.set_sform(affine, code=1)
        image.header.set_qform(qform, code=0 if qform is None else 1)
        image.header["pixdim"][1:4] = pixdim
        nib.save(image, path)
        return path

    return write


def patch(path: Path, offset: int, form: str, *values: float) -> Path:
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{form}", data, offset, *values)
    path.write_bytes(gzip.compress(bytes(data)))
    return path


@pytest.mark.parametrize("qform", [None, AFFINE], ids=["sform only", "with a qform of pixdim"])
def test_contradictory_voxel_sizes_are_refused_with_both(qform: Any, nifti: Any) -> None:
    path = nifti(UNIT, (3, 3, 3), qform)
    with pytest.raises(ValueError, match="voxels of 1 x 1 x 1 mm by its sform, but of 3 x 3 x 3 mm by its pixdim"):
        read_header(path)


@pytest.mark.parametrize(("voxel_size", "wanted"), [("affine", UNIT), ("pixdim", AFFINE)])
def test_an_option_says_which_voxel_sizes_are_believed(voxel_size: str, wanted: Any, nifti: Any) -> None:
    """pixdim scales the axes about the first voxel, whose place is that of the sform."""
    path = nifti(UNIT, (3, 3, 3))
    header = read_header(path, voxel_size=voxel_size)
    np.testing.assert_allclose(header.affine, wanted, atol=1e-5)
    (warning,) = header.warnings
    assert f"--voxel-size {voxel_size}" in warning
    image = read_itk(path, Rules(voxel_size=voxel_size))
    assert image.GetSpacing() == pytest.approx(np.linalg.norm(wanted[:3, :3], axis=0))
    assert image.GetOrigin() == pytest.approx((-20, -10, -5))


@pytest.mark.parametrize(("factor", "refused"), [(1.009, False), (0.991, False), (1.011, True), (0.989, True)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_voxel_sizes_that_differ_by_less_than_a_hundredth_are_accepted(
    factor: float, refused: bool, axis: int, nifti: Any
) -> None:
    sizes = [3.0, 3.0, 3.0]
    sizes[axis] *= factor
    for qform in (None, AFFINE):
        path = nifti(AFFINE, sizes, qform)
        if refused:
            with pytest.raises(ValueError, match="--voxel-size pixdim"):
                read_header(path)
        else:
            assert read_header(path).warnings == ()


def test_axes_in_any_order_have_their_own_sizes(nifti: Any) -> None:
    turned = np.array([[0.0, 0, 5, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]])
    assert read_header(nifti(turned, (2, 3, 5))).warnings == ()


def test_a_qform_of_another_place_or_direction_is_reported(nifti: Any) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 7
    mirrored = AFFINE @ np.diag([-1.0, 1, 1, 1])
    for qform, distance in ((moved, "7.0 mm"), (mirrored, "30.0 mm")):
        (warning,) = read_header(nifti(AFFINE, (3, 3, 3), qform)).warnings
        assert f"up to {distance} apart: the sform is used" in warning


@pytest.mark.parametrize(("voxel_size", "wanted"), [("affine", UNIT), ("pixdim", AFFINE)])
def test_forms_that_contradict_each_other_in_size_and_place_are_reported_twice(
    voxel_size: str, wanted: Any, nifti: Any
) -> None:
    moved = AFFINE.copy()
    moved[2, 3] += 4
    header = read_header(nifti(UNIT, (3, 3, 3), moved), voxel_size=voxel_size)
    np.testing.assert_allclose(header.affine, wanted, atol=1e-5)
    assert len(header.warnings) == 2
    assert "4.0 mm apart" in header.warnings[1]


def test_a_qform_without_handedness_is_right_handed_with_a_warning(nifti: Any) -> None:
    path = patch(patch(nifti(AFFINE, (3, 3, 3), AFFINE), PIXDIM, "f", 0), FORMS, "hh", 1, 0)
    header = read_header(path)
    np.testing.assert_allclose(header.affine, AFFINE, atol=1e-5)
    assert "pixdim[0] is 0" in header.warnings[0]
    with pytest.raises(ValueError, match="qfac"):
        read_header(patch(path, PIXDIM, "f", 0.5))


def test_an_undefined_unit_is_reported(nifti: Any) -> None:
    (warning,) = read_header(patch(nifti(AFFINE, (3, 3, 3)), UNITS, "B", 5)).warnings
    assert "xyzt_units 5" in warning
    for code in (0, 2, 10):
        assert read_header(patch(nifti(AFFINE, (3, 3, 3)), UNITS, "B", code)).warnings == ()


@pytest.mark.parametrize(
    ("slope", "intercept", "warned"),
    [(0, 0, False), (1, 0, False), (2, -5, False), (np.nan, np.nan, True), (np.inf, 0, True), (0, -1024, True)],
)
def test_a_scale_that_is_not_applied_is_reported(slope: float, intercept: float, warned: bool, nifti: Any) -> None:
    header = read_header(patch(nifti(AFFINE, (3, 3, 3)), SLOPE, "ff", slope, intercept))
    assert ["its values are read as stored" in text for text in header.warnings] == [True] * warned


def test_a_slope_with_an_intercept_that_is_not_finite_is_refused(nifti: Any) -> None:
    with pytest.raises(ValueError, match="damaged NIfTI header"):
        read_header(patch(nifti(AFFINE, (3, 3, 3)), SLOPE, "ff", 1, np.nan))


def test_voxel_sizes_of_another_unit_are_reported() -> None:
    for size, warned in ((0.003, True), (3000.0, True), (0.1, False), (10.0, False)):
        header = Header("image.nii", SHAPE, np.diag([size, size, size, 1.0]), np.dtype("int16"))
        findings = check_headers({"ct": header}, "ct")
        assert ["are these sizes in mm?" in finding.what for finding in findings] == [True] * warned


@pytest.fixture
def metaimage(tmp_path: Path) -> Callable[..., Path]:
    """``metaimage(NAME=value)``: a file of 2 x 3 x 4 mm with identity axes whose header has these fields."""
    image = sitk.GetImageFromArray(np.arange(120, dtype=np.int16).reshape(4, 5, 6))
    image.SetSpacing((2, 3, 4))
    sitk.WriteImage(image, str(tmp_path / "original.mha"))
    head, voxels = (tmp_path / "original.mha").read_bytes().split(b"ElementDataFile = LOCAL\n", 1)
    original = dict(line.split(" = ", 1) for line in head.decode().splitlines())

    def write(**fields: str) -> Path:
        lines = [f"{name} = {value}" for name, value in {**original, **fields, "ElementDataFile": "LOCAL"}.items()]
        (tmp_path / "image.mha").write_bytes("\n".join(lines).encode() + b"\n" + voxels)
        return tmp_path / "image.mha"

    return write


@pytest.mark.parametrize(
    ("fields", "words", "by_affine", "by_other"),
    [
        ({"ElementSize": "2 3 5"}, "2 x 3 x 4 mm by its ElementSpacing and TransformMatrix, but of 2 x 3 x 5 mm by its "
         "ElementSize", (2, 3, 4), (2, 3, 5)),
        ({"TransformMatrix": "2 0 0 0 1 0 0 0 1"}, "4 x 3 x 4 mm by its ElementSpacing and TransformMatrix, but of "
         "2 x 3 x 4 mm by its ElementSpacing", (4, 3, 4), (2, 3, 4)),
    ],
)  # fmt: skip
def test_contradictory_sizes_of_a_metaimage_are_refused_unless_an_option_chooses(
    fields: Any, words: str, by_affine: Any, by_other: Any, metaimage: Any
) -> None:
    path = metaimage(**fields)
    with pytest.raises(ValueError, match=words):
        read_header(path)
    for voxel_size, wanted in (("affine", by_affine), ("pixdim", by_other)):
        header = read_header(path, voxel_size=voxel_size)
        assert np.linalg.norm(header.affine[:3, :3], axis=0) == pytest.approx(wanted)
        assert len(header.warnings) == 1


def test_a_metaimage_with_equal_sizes_is_accepted(metaimage: Any) -> None:
    assert read_header(metaimage(ElementSize="2 3 4.03")).warnings == ()


@pytest.mark.parametrize(
    ("matrix", "letters", "warned"),
    [
        ("1 0 0 0 1 0 0 0 1", "RAI", False),  # ITK: where the axes begin
        ("1 0 0 0 1 0 0 0 1", "LPS", False),  # others: where they end
        ("1 0 0 0 1 0 0 0 1", "RAS", True),
        ("1 0 0 0 1 0 0 0 1", "AIR", True),
        ("-1 0 0 0 -1 0 0 0 1", "LPI", False),
        ("-1 0 0 0 -1 0 0 0 1", "RAI", True),
        ("0 1 0 0 0 1 1 0 0", "AIR", False),
        ("1 0 0 0 1 0 0 0 1", "???", False),
    ],
)
def test_an_orientation_that_contradicts_the_matrix_is_reported(
    matrix: str, letters: str, warned: bool, metaimage: Any
) -> None:
    warnings = read_header(metaimage(TransformMatrix=matrix, AnatomicalOrientation=letters)).warnings
    assert ["the TransformMatrix is used" in text for text in warnings] == [True] * warned


def test_fields_of_a_metaimage_that_itk_ignores_are_refused_or_reported(metaimage: Any) -> None:
    (warning,) = read_header(metaimage(CenterOfRotation="1 2 3")).warnings
    assert "CenterOfRotation of 1 2 3" in warning
    with pytest.raises(ValueError, match="slope of 2 and an intercept of -5"):
        read_header(metaimage(ElementToIntensityFunctionSlope="2", ElementToIntensityFunctionOffset="-5"))
    with pytest.raises(ValueError, match="lengths in um"):
        read_header(metaimage(DistanceUnits="um"))
    assert read_header(metaimage(DistanceUnits="mm", ElementToIntensityFunctionSlope="1")).warnings == ()


@pytest.mark.parametrize("second", ["Position", "Origin"])
def test_two_origins_are_refused(second: str, metaimage: Any) -> None:
    with pytest.raises(ValueError, match=f"both Offset and {second}"):
        read_header(metaimage(**{second: "1 1 1"}))


def test_an_unknown_choice_of_voxel_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--voxel-size is 'qform'\. Choose affine or pixdim\."):
        Rules(voxel_size="qform")


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.mha", "ct.nrrd"])
def test_a_pipe_is_refused_instead_of_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is a pipe, socket or device, not a file"):
        read_header(tmp_path / name)
