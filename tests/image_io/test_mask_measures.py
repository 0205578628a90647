# SPDX-License-Identifier: Apache-2.0
"""Measures of files: a mask and a PET on grids of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.mask_measures import measure_files, volume_of


def save(voxels: Any, affine: Any, path: Path) -> Path:
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def turned(spacing: tuple[float, ...], origin: tuple[float, ...]) -> Any:
    """An oblique affine, RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(sitk.VersorTransform((0.2, -0.4, 0.5), 0.6).GetMatrix(), (3, 3)) * spacing
    affine[:3, 3] = origin
    return affine


def test_the_affine_of_an_image_is_that_of_its_file(tmp_path: Path):
    affine = turned((1.5, 2.0, 2.5), (10, -20, 30))
    voxels = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
    volume = volume_of(sitk.ReadImage(str(save(voxels, affine, tmp_path / "a.nii.gz"))))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(volume.voxels, voxels)


def test_a_mask_and_a_pet_on_other_grids_are_measured_in_the_patient(tmp_path: Path):
    """The lesion is a box of the mask; the PET is 7 within 12 mm of its centre, and 1 elsewhere."""
    mask_affine, pet_affine = turned((1.0, 1.0, 2.0), (5, 6, 7)), turned((2.0, 2.0, 2.0), (1, 2, 3))
    voxels = np.zeros((60, 50, 30), dtype=np.uint8)
    voxels[24:36, 20:28, 12:16] = 3
    centre = (mask_affine @ [29.5, 23.5, 13.5, 1])[:3]
    shape = (36, 32, 36)
    points = np.moveaxis(np.indices(shape), 0, -1) @ pet_affine[:3, :3].T + pet_affine[:3, 3]
    pet = np.where(((points - centre) ** 2).sum(-1) < 12**2, 7, 1).astype(np.float32)
    files = save(voxels, mask_affine, tmp_path / "m.nii.gz"), save(pet, pet_affine, tmp_path / "pet.nii.gz")
    region, lesion = measure_files(files[0], {"tumour": [3]}, files[1])
    assert lesion.volume_ml == pytest.approx(12 * 8 * 4 * 2 / 1000)
    np.testing.assert_allclose(lesion.centroid, centre, atol=1e-4)
    assert (lesion.uptake.suvmax, lesion.uptake.suvmean, lesion.uptake.suvpeak) == pytest.approx((7, 7, 7))
    assert lesion.uptake.mtv_ml == pytest.approx(lesion.volume_ml, rel=0.1)
    assert lesion.uptake.tlg_g == pytest.approx(7 * lesion.uptake.mtv_ml)
    assert region.values() == pytest.approx(lesion.values())


def test_the_pet_may_be_one_of_the_images_of_a_4d_file(tmp_path: Path):
    mask, stack = np.ones((4, 4, 4), dtype=np.uint8), np.zeros((4, 4, 4, 3), dtype=np.float32)
    stack[..., 1] = 5
    files = save(mask, np.eye(4), tmp_path / "m.nii.gz"), save(stack, np.eye(4), tmp_path / "stack.nii.gz")
    assert measure_files(files[0], {"tumour": [1]}, files[1], channel=1)[1].uptake.suvmean == 5


def test_without_a_pet_uptake_is_undefined(tmp_path: Path):
    mask = save(np.ones((4, 4, 4), dtype=np.uint8), np.eye(4), tmp_path / "m.nii.gz")
    assert [each.uptake for each in measure_files(mask, {"tumour": [1], "cyst": [2]})] == [None, None, None]


def test_nonfinite_voxels_of_a_pet_are_replaced_as_for_the_network(tmp_path: Path):
    mask, pet = np.ones((4, 4, 4), dtype=np.uint8), np.full((4, 4, 4), 5, dtype=np.float32)
    pet[0, 0, 0], pet[1, 1, 1] = np.nan, 9
    files = save(mask, np.eye(4), tmp_path / "m.nii.gz"), save(pet, np.eye(4), tmp_path / "pet.nii.gz")
    region, _ = measure_files(files[0], {"tumour": [1]}, files[1], Rules(replace_nonfinite=0.0))
    assert (region.uptake.suvmax, region.uptake.suvmean) == pytest.approx((9, (62 * 5 + 9) / 64))


def test_a_pet_in_another_unit_is_told_and_nan_is_refused(tmp_path: Path):
    mask, pet = np.ones((4, 4, 4), dtype=np.uint8), np.full((4, 4, 4), 9000.0, dtype=np.float32)
    pet[0] = 0
    files = save(mask, np.eye(4), tmp_path / "m.nii.gz"), save(pet, np.eye(4), tmp_path / "pet.nii.gz")
    warnings: list[str] = []
    measure_files(files[0], {"tumour": [1]}, files[1], warnings=warnings)
    assert [text.endswith("above any plausible SUV: is it in Bq/ml?") for text in warnings] == [True]
    pet[1] = np.nan
    save(pet, np.eye(4), files[1])
    with pytest.raises(ValueError, match="16 of 64 voxels are NaN or infinite"):
        measure_files(files[0], {"tumour": [1]}, files[1])
