# SPDX-License-Identifier: Apache-2.0
"""The transforms that read the images of a case and write its mask: what they give is what MONAI's own give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from scripts.data.case_io import LoadModalitiesd, SaveMaskd

TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
AFFINE = np.block([[TURN @ np.diag([-2.0, -3.0, 4.0]), np.array([[10.0], [20.0], [-30.0]])], [np.eye(4)[3:]]])


def values(dtype: Any, shape: tuple[int, ...] = (5, 6, 7)) -> Any:
    return np.random.default_rng(0).integers(0, 120, shape).astype(dtype)


def test_volumes_and_metadata_are_those_of_monais_reader(tmp_path: Path, write_nifti: Any) -> None:
    paths = {"a": write_nifti(tmp_path / "a.nii.gz", values("i2"), AFFINE, slope=2.0, intercept=-100.0)}
    paths |= {"b": write_nifti(tmp_path / "b.nii", values("f4"), AFFINE @ np.diag([0.5, 0.5, 0.5, 1]))}
    wanted = LoadImaged(["a", "b"], ensure_channel_first=True)(dict(paths))
    found = LoadModalitiesd(["a", "b"])(dict(paths))
    for key in paths:
        np.testing.assert_allclose(found[key].float().numpy(), wanted[key].numpy())
        np.testing.assert_allclose(found[key].affine, wanted[key].affine)
        np.testing.assert_allclose(found[key].meta["original_affine"], wanted[key].meta["original_affine"])
        assert list(found[key].meta["spatial_shape"]) == list(wanted[key].meta["spatial_shape"])


def test_a_4d_file_of_one_volume_is_a_volume(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(values("f4", (5, 6, 7, 1)), AFFINE), tmp_path / "x.nii.gz")
    found = LoadModalitiesd(["a"])({"a": str(tmp_path / "x.nii.gz")})["a"]
    assert found.shape == (1, 5, 6, 7)


def test_a_mask_is_named_after_its_case_or_else_its_image(tmp_path: Path) -> None:
    mask = MetaTensor(torch.ones(1, 2, 3, 4), affine=torch.as_tensor(AFFINE), meta={"case_id": "P1"})
    SaveMaskd("pred", str(tmp_path))({"pred": mask})
    unnamed = MetaTensor(torch.ones(1, 2, 3, 4), affine=torch.eye(4), meta={"filename_or_obj": "a/ct7.nii.gz"})
    SaveMaskd("pred", str(tmp_path))({"pred": unnamed})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["P1.nii.gz", "ct7.nii.gz"]
