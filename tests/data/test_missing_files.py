# SPDX-License-Identifier: Apache-2.0
"""Absent or unused modalities do not change the other channels or the masks' grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, decollate_batch

from scripts.data import postprocessing, preprocessing, require_cases
from scripts.data.modalities import GatherModalitiesd

MODALITIES = ["ct", "pet", "mr"]
INTENSITY = {key: [0, 1] for key in MODALITIES}
SPACING = (3.0, 3.0, 3.0)
GRIDS = {
    "ct": (np.diag([-1.0, -1, 1]), (2.0, 2.0, 4.0), (18, 16, 10)),
    "pet": (np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]]), (4.0, 4.5, 5.0), (10, 9, 11)),
    "mr": (np.eye(3), (1.5, 3.0, 2.5), (20, 10, 12)),
}


@pytest.fixture
def case(tmp_path: Path, write_nifti: Any, make_affine: Any) -> dict[str, str]:
    """Each modality on its own grid with noise above 0.2; the reference is named by ``image`` alone."""
    rng, paths = np.random.default_rng(0), {}
    for key, (axes, spacing, shape) in GRIDS.items():
        voxels = rng.uniform(0.2, 1.0, shape).astype(np.float32)
        paths[key] = str(write_nifti(tmp_path / f"{key}.nii.gz", voxels, make_affine(axes, spacing, shape)))
    return {"case_id": "A", "image": paths.pop("ct"), **paths}


def infer(item: dict[str, str], **options: Any) -> dict[str, Any]:
    return preprocessing(MODALITIES, INTENSITY, SPACING, "infer", **options)(item)  # type: ignore[no-any-return]


@pytest.mark.parametrize("present", [["ct"], ["pet", "mr"], ["mr", "ct"], MODALITIES])
def test_unused_modalities_are_zeros_and_the_others_bit_identical(case: Any, present: list[str]) -> None:
    full, part = infer(case), infer(case, present=present)
    used = [key in present for key in MODALITIES]
    assert part["presence"].tolist() == used
    assert part["image"].shape == full["image"].shape
    assert torch.equal(part["image"].affine, full["image"].affine)
    for channel, is_used in enumerate(used):
        expected = full["image"][channel] if is_used else torch.zeros_like(full["image"][channel])
        assert torch.equal(part["image"][channel], expected)
        assert (full["image"][channel] > 0.1).any()


def test_a_reference_that_only_defines_the_grid_may_have_any_values(case: Any, tmp_path: Path) -> None:
    reference = nib.Nifti1Image.from_filename(case["image"])
    nib.save(nib.Nifti1Image(np.full(reference.shape, np.nan, np.float32), reference.affine), tmp_path / "nan.nii.gz")
    part = infer({**case, "image": str(tmp_path / "nan.nii.gz")}, present=["pet", "mr"])
    assert torch.equal(part["image"], infer(case, present=["pet", "mr"])["image"])


def test_files_of_unused_modalities_need_not_exist(case: Any) -> None:
    case["mr"] = "nowhere.nii.gz"
    assert infer(case, present=["ct", "pet"])["presence"].tolist() == [True, True, False]
    del case["mr"]
    require_cases([case], "data", MODALITIES, present=["ct", "pet"])
    assert infer(case, present=["ct", "pet"])["presence"].tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"\(A: mr\)"):
        require_cases([case], "data", MODALITIES, present=["ct", "mr"])


def test_in_training_an_unused_modality_stays_zero_through_augmentation(case: Any) -> None:
    options = {"present": ["pet", "mr"], "labels": [[0], [1]], "patch": (8, 8, 8), "mode": "train"}
    transform = preprocessing(MODALITIES, INTENSITY, SPACING, **options)
    label = nib.Nifti1Image.from_filename(case["pet"])
    path = Path(case["pet"]).with_name("label.nii.gz")
    nib.save(nib.Nifti1Image(np.ones(label.shape, np.uint8), label.affine), path)
    for seed in range(3):
        (sample,) = transform.set_random_state(seed)({**case, "label": str(path)})
        assert sample["presence"].tolist() == [False, True, True]
        assert [bool((channel != 0).any()) for channel in sample["image"]] == [False, True, True]


@pytest.mark.parametrize("present", [[], ["ct", "t2w"], ["PET"]])
def test_no_or_unknown_modalities_are_refused_in_one_sentence(case: Any, present: list[str]) -> None:
    for attempt in (
        lambda: infer(case, present=present),
        lambda: require_cases([case], "", MODALITIES, present=present),
    ):
        with pytest.raises(ValueError, match=r"^present is \[.*\]\. Name one or more of ct, pet, mr\.$"):
            attempt()


def test_an_unknown_reference_is_refused(case: Any) -> None:
    with pytest.raises(ValueError, match=r"reference 't2w' is not a modality\. Choose one of ct, pet, mr"):
        infer(case, reference="t2w")


@pytest.mark.parametrize("reference", ["pet", "mr"])
def test_any_modality_can_give_the_grid_and_the_channels_keep_their_order(case: Any, reference: str) -> None:
    alone = preprocessing([reference], INTENSITY, SPACING, "infer")({"case_id": "A", "image": case[reference]})
    item = {"case_id": "A", "image": case[reference], "ct": case["image"], "mr": case["mr"], "pet": case["pet"]}
    result = infer(item, reference=reference)
    assert torch.equal(result["image"].affine, alone["image"].affine)
    assert torch.equal(result["image"][MODALITIES.index(reference)], alone["image"][0])
    assert all((channel > 0.1).any() for channel in result["image"])
    assert not set(MODALITIES) & set(result)  # no volume is stored twice


def test_a_case_without_the_first_modality_is_written_on_the_next_ones_grid(case: Any, tmp_path: Path) -> None:
    item = {"case_id": "A", "image": case["pet"], "mr": case["mr"]}
    with pytest.raises(ValueError, match=r"\(A: ct\)"):
        require_cases([item], "data", MODALITIES, reference="pet")
    require_cases([item], "data", MODALITIES, allow_missing=True, reference="pet")
    before = preprocessing(MODALITIES, INTENSITY, SPACING, "infer", allow_missing=True, reference="pet")
    (batch,) = DataLoader(Dataset([item], before), batch_size=1)
    assert batch["presence"].tolist() == [[False, True, True]]
    assert (batch["image"][0, 0] == 0).all()
    batch["pred"] = torch.cat([-batch["image"][:, 1:2], batch["image"][:, 1:2]], dim=1) * 20
    postprocessing(str(tmp_path / "masks"))(decollate_batch(batch)[0])
    mask, pet = nib.load(tmp_path / "masks" / "A.nii.gz"), nib.load(case["pet"])
    assert mask.shape == pet.shape
    np.testing.assert_allclose(mask.affine, pet.affine, atol=1e-4)
    assert np.asarray(mask.dataobj).mean() > 0.9


def test_an_image_that_is_another_modality_is_not_the_reference(case: Any) -> None:
    item = {"case_id": "A", "image": case["image"], "ct": case["image"], "mr": case["mr"]}
    with pytest.raises(ValueError, match="has no pet, the reference modality"):
        GatherModalitiesd(MODALITIES, allow_missing=True, reference="pet")(item)
