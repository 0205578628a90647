# SPDX-License-Identifier: Apache-2.0
"""Structure sets filled back to the mask by Matplotlib, and by plastimatch where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from scripts.image_io.dicom_rtstruct import write_rtstruct
from tests.dicom_slices import SHAPE, SPACING, nested, series, write_mask

REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
OBLIQUE = np.reshape(
    sitk.VersorTransform((0.3, -0.5, 0.6), 0.7).GetMatrix(), (3, 3)
).T  # three perpendicular directions


def filled(structure: Any, slices: list[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The voxels of a structure (column, row, slice), even-odd, each contour on the image that it names."""
    found = np.zeros(shape[::-1], dtype=bool)
    centres = np.argwhere(np.ones(found.shape[1:]))
    numbers = {each.SOPInstanceUID: number for number, each in enumerate(slices)}
    for contour in structure.ContourSequence:
        number = numbers[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
        image = slices[number]
        assert (contour.ContourGeometricType, len(contour.ContourData)) == (
            "CLOSED_PLANAR",
            3 * contour.NumberOfContourPoints,
        )
        points = np.reshape(np.array(contour.ContourData, float), (-1, 3)) - np.array(image.ImagePositionPatient, float)
        directions = np.reshape(np.array(image.ImageOrientationPatient, float), (2, 3))
        assert np.abs(points @ np.cross(*directions)).max() < 1e-4  # mm: in the plane of the image
        corners = (points @ directions.T / np.array(image.PixelSpacing, float)[::-1])[:, ::-1]
        np.testing.assert_allclose(np.abs(corners % 1 - 0.5), 0, atol=1e-3)  # on the edges of pixels
        found[number] ^= Outline([*corners, corners[0]], closed=True).contains_points(centres).reshape(found.shape[1:])
    return found.transpose(2, 1, 0)


def ragged(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Several components with holes, single voxels, noise, a slice that is full and one that is empty."""
    rng = np.random.default_rng(11)
    smooth = gaussian_filter(rng.normal(size=shape), (1.5, 1.5, 0.5))
    mask = np.asarray(smooth > np.quantile(smooth, 0.6))
    mask[:, :, 0] = rng.random(shape[:2]) < 0.5
    mask[:, :, 1] = False
    mask[3, 4, 1] = mask[-1, -1, 1] = mask[0, 0, 1] = True
    mask[:, :, 2] = True
    mask[3:6, 2:5, 2] = False
    mask[4, 3, 2] = True
    mask[:, :, 3] = False
    return mask


@pytest.mark.parametrize("axes", [None, OBLIQUE], ids=["axial", "oblique"])
def test_each_region_is_filled_back_voxel_by_voxel(axes: Any, tmp_path: Path):
    """Pixels of 0.8 x 1.2 mm."""
    slices = series(axes)
    mask = write_mask(nested(), tmp_path, axes)
    path = tmp_path / "rtstruct.dcm"
    assert write_rtstruct(mask, slices, {**REGIONS, "cyst": [3]}, "1.0", path) == ["WT", "TC", "ET"]
    written = pydicom.dcmread(path)
    names = {each.ROINumber: each.ROIName for each in written.StructureSetROISequence}
    assert names == {1: "WT", 2: "TC", 3: "ET"}
    assert len({tuple(each.ROIDisplayColor) for each in written.ROIContourSequence}) == 3
    for structure in written.ROIContourSequence:
        expected = np.isin(nested(), REGIONS[names[structure.ReferencedROINumber]])
        np.testing.assert_array_equal(filled(structure, slices, SHAPE), expected)
    assert not filled(written.ROIContourSequence[2], slices, SHAPE)[:, :, :2].any()


@pytest.mark.parametrize("axes", [None, OBLIQUE], ids=["axial", "oblique"])
def test_holes_single_voxels_and_noise_are_filled_back(axes: Any, tmp_path: Path):
    slices, mask = series(axes), ragged(SHAPE)
    write_rtstruct(write_mask(mask, tmp_path, axes), slices, {"x": [1]}, "1.0", tmp_path / "rtstruct.dcm")
    structure = pydicom.dcmread(tmp_path / "rtstruct.dcm").ROIContourSequence[0]
    np.testing.assert_array_equal(filled(structure, slices, SHAPE), mask)


def test_the_structure_set_refers_to_its_images_and_patient(tmp_path: Path):
    slices = series()
    for image in slices:
        image.SpecificCharacterSet, image.PatientName, image.PatientID = "ISO_IR 100", "Müller^Eva", "P 1"
    regions = {"腫瘍": [1, 4], "ödem": [2]}
    write_rtstruct(write_mask(nested(), tmp_path), slices, regions, "1.0", tmp_path / "rtstruct.dcm")
    written = pydicom.dcmread(tmp_path / "rtstruct.dcm")
    assert [each.ROIName for each in written.StructureSetROISequence] == ["腫瘍", "ödem"]
    assert (str(written.PatientName), written.PatientID) == ("Müller^Eva", "P 1")
    assert written.StudyInstanceUID == slices[0].StudyInstanceUID
    assert written.SeriesInstanceUID != slices[0].SeriesInstanceUID
    frame = written.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == written.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    listed = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert listed.SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert [each.ReferencedSOPInstanceUID for each in listed.ContourImageSequence] == [
        each.SOPInstanceUID for each in slices
    ]


def test_an_empty_mask_gives_no_file(tmp_path: Path):
    (tmp_path / "rtstruct.dcm").write_bytes(b"earlier")
    mask = write_mask(np.zeros(SHAPE), tmp_path)
    assert write_rtstruct(mask, series(), REGIONS, "1.0", tmp_path / "rtstruct.dcm") == []
    assert not (tmp_path / "rtstruct.dcm").exists()


@pytest.mark.parametrize("options", [[], ["--xor-contours"]], ids=["or", "xor"])
def test_plastimatch_fills_the_mask_back(options: list[str], tmp_path: Path):
    """On a CT of 60 x 50 x 8 voxels of 0.8 x 1.2 x 4 mm, in both of the ways that it fills several contours."""
    if not shutil.which("plastimatch"):
        pytest.skip("plastimatch is not installed: apt-get install plastimatch")
    shape = (60, 50, 8)
    slices, mask = series(shape=shape, kind="CT"), ragged(shape)
    (tmp_path / "ct").mkdir()
    for number, image in enumerate(slices):
        image.save_as(tmp_path / "ct" / f"{number}.dcm", enforce_file_format=True)
    write_rtstruct(write_mask(mask, tmp_path), slices, {"x": [1]}, "1.0", tmp_path / "rtstruct.dcm")
    command = ["plastimatch", "convert", "--input", "rtstruct.dcm", "--referenced-ct", "ct", "--prefix-format", "mha"]
    done = subprocess.run(
        [*command, "--output-prefix", "out", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    back = sitk.ReadImage(str(tmp_path / "out" / "x.mha"))
    np.testing.assert_allclose(back.GetSpacing(), SPACING)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back).T > 0, mask)


def test_dciodvfy_finds_no_error(tmp_path: Path):
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    write_rtstruct(write_mask(nested(), tmp_path), series(), REGIONS, "1.0", tmp_path / "rtstruct.dcm")
    done = subprocess.run(["dciodvfy", tmp_path / "rtstruct.dcm"], capture_output=True, text=True, check=False)
    assert "RTStructureSet" in done.stdout + done.stderr
    assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == []
