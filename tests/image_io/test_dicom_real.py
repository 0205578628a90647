# SPDX-License-Identifier: Apache-2.0
"""Real series: read like SimpleITK, at the position of their NIfTI files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.dicom_series import read_series_header
from scripts.image_io.reader import header_of, read_volume


@pytest.mark.parametrize(("modality", "shape"), [("CT", (198, 202, 59)), ("PET", (41, 43, 59)), ("MR_T1", None)])
def test_real_series_have_the_grid_that_simpleitk_reads(
    modality: str, shape: tuple[int, ...] | None, require_data: Callable[[str], Path]
) -> None:
    folder = require_data("sts_dicom") / "STS_001" / modality / "image"
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    image = reader.Execute()
    header = header_of(folder, Rules())
    corner = [size - 1 for size in image.GetSize()]
    for index in ([0, 0, 0], corner):  # LPS to RAS
        place = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose((header.affine @ [*index, 1])[:3], place, atol=1e-3)
    np.testing.assert_array_equal(read_volume(header, Rules()), sitk.GetArrayFromImage(image).T)
    assert shape in (None, header.shape)


def test_real_series_have_the_position_of_their_nifti_files(require_data: Callable[[str], Path]) -> None:
    """The NIfTI CT and MR are averaged over 2 x 2 voxels in plane; PET is as published."""
    for modality, factor in (("CT", 2), ("MR_T1", 2), ("PET", 1)):
        header = read_series_header(require_data("sts_dicom") / "STS_001" / modality / "image")
        nifti = nib.load(require_data("sts") / "STS_001" / f"{modality}_image.nii.gz")
        assert nifti.shape == (header.shape[0] // factor, header.shape[1] // factor, header.shape[2])
        sizes = np.linalg.norm(header.affine[:3, :3], axis=0) * [factor, factor, 1]
        np.testing.assert_allclose(nifti.header.get_zooms(), sizes, rtol=1e-4)
        centre = nifti.affine @ [*((np.array(nifti.shape) - 1) / 2), 1]
        whole = (np.array(nifti.shape) * [factor, factor, 1] - 1) / 2
        np.testing.assert_allclose(centre, header.affine @ [*whole, 1], atol=0.05)
