# SPDX-License-Identifier: Apache-2.0
"""Transforms of one case: find its files, crop to its box and back, map its label, stack its modalities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor, decollate_batch, list_data_collate
from scipy.spatial.transform import Rotation

from scripts.data import datalist, postprocessing, preprocessing
from scripts.data.modalities import CropToBoxd, GatherModalitiesd, MapLabelsd, StackModalitiesd

MODALITIES = ["ct", "pet"]
SUFFIXED = {"ct": "{case}_ct.nii.gz", "pet": "{case}_pt.nii.gz"}
FOLDERS = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz"}
MONAI_LABEL = {"ct": "{case}", "pet": "pet/{case}"}


@pytest.fixture
def touch(tmp_path: Path) -> Callable[[str], str]:
    """Create an empty file in the temporary folder, and return its path."""

    def make(name: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        return str(tmp_path / name)

    return make


def test_explicit_keys_suffice_without_a_naming_rule(touch: Any) -> None:
    ct, pet = touch("a.nii.gz"), touch("b.nii.gz")
    item = {"image": ct, "pet": pet, "label": "l.nii.gz"}
    assert GatherModalitiesd(MODALITIES)(item) == {**item, "ct": ct, "case_id": "a"}
    assert item == {"image": ct, "pet": pet, "label": "l.nii.gz"}  # the data list is not changed


def test_one_file_as_two_modalities_is_refused(touch: Any, tmp_path: Path) -> None:
    ct = touch("a.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to(ct)
    for pet in (ct, str(tmp_path / "link.nii.gz")):
        with pytest.raises(ValueError, match=r"Case a: ct and pet are one file, .*Name the file of each"):
            GatherModalitiesd(MODALITIES)({"ct": ct, "pet": pet})
    study = str(tmp_path)  # a folder of DICOM files may hold the series of both
    assert GatherModalitiesd(MODALITIES)({"ct": study, "pet": study})["pet"] == study


@pytest.mark.parametrize("key", ["image", "ct"])
def test_the_reference_may_be_named_by_its_own_key_or_as_image(touch: Any, key: str) -> None:
    ct = touch("a.nii.gz")
    found = GatherModalitiesd(["ct"])({key: ct})
    assert found["image"] == found["ct"] == ct


@pytest.mark.parametrize(
    ("layout", "reference", "other"),
    [
        (SUFFIXED, "CHUM_001_ct.nii.gz", "CHUM_001_pt.nii.gz"),
        (FOLDERS, "STS_001/CT_image.nii.gz", "STS_001/PET_image.nii.gz"),
        (MONAI_LABEL, "studies/p7.nii.gz", "studies/pet/p7.nii.gz"),
        ({"ct": "{case}.nii.gz", "pet": "../pet/{case}.nii.gz"}, "ct/p7.nii.gz", "pet/p7.nii.gz"),
    ],
)
def test_a_naming_rule_completes_the_modalities(touch: Any, layout: Any, reference: str, other: str) -> None:
    ct, pet = touch(reference), touch(other)
    found = GatherModalitiesd(MODALITIES, [layout])({"image": ct})
    assert Path(found["pet"]).resolve() == Path(pet).resolve()
    assert found["ct"] == ct


def test_layouts_are_tried_in_turn_and_the_first_file_found_stays(touch: Any) -> None:
    ct = touch("p7_ct.nii.gz")
    pet = touch("pet/p7_ct.nii.gz")
    layouts = [FOLDERS, SUFFIXED, MONAI_LABEL]
    assert GatherModalitiesd(MODALITIES, layouts)({"image": ct})["pet"] == pet
    first = touch("p7_pt.nii.gz")
    assert GatherModalitiesd(MODALITIES, layouts)({"image": ct})["pet"] == first


def test_an_explicit_key_wins_over_the_naming_rule(touch: Any) -> None:
    ct, pet, other = touch("p7_ct.nii.gz"), touch("p7_pt.nii.gz"), touch("elsewhere/pet.nii.gz")
    found = GatherModalitiesd(MODALITIES, [SUFFIXED])({"image": ct, "pet": other})
    assert found["pet"] == other != pet


def test_a_rule_finds_no_file_of_another_case_or_modality(touch: Any) -> None:
    ct = touch("p7.nii.gz")
    touch("PET_image.nii.gz"), touch("_pt.nii.gz"), touch("p7_mr.nii.gz")
    layouts = [FOLDERS, {**SUFFIXED, "mr": "{case}_mr.nii.gz"}, {"ct": "{case}.nii.gz", "mr": "{case}_mr.nii.gz"}]
    found = GatherModalitiesd(MODALITIES, layouts, allow_missing=True)({"image": ct})
    assert set(found) == {"image", "ct", "case_id"}


def test_the_case_id_is_kept_or_made_from_the_file_name(touch: Any) -> None:
    ct = touch("p7.nii.gz")
    assert GatherModalitiesd(["ct"])({"image": ct})["case_id"] == "p7"
    assert GatherModalitiesd(["ct"])({"image": ct, "case_id": "mine"})["case_id"] == "mine"


def test_every_missing_file_of_the_case_is_named(touch: Any, tmp_path: Path) -> None:
    item = {"case_id": "p7", "image": str(tmp_path / "no_ct.nii.gz"), "pet": str(tmp_path / "no_pt.nii.gz")}
    with pytest.raises(FileNotFoundError, match=r"Case p7: .*no_ct\.nii\.gz, .*no_pt\.nii\.gz"):
        GatherModalitiesd(MODALITIES, allow_missing=True)(item)


def test_an_absent_modality_is_refused_with_case_and_modality_unless_allowed(touch: Any) -> None:
    ct = touch("p7_ct.nii.gz")
    with pytest.raises(ValueError, match=r"Case p7_ct: no pet, mr was given or found next to .*p7_ct\.nii\.gz"):
        GatherModalitiesd(["ct", "pet", "mr"], [SUFFIXED])({"image": ct})
    assert "pet" not in GatherModalitiesd(MODALITIES, [SUFFIXED], allow_missing=True)({"image": ct})


def test_a_case_without_its_reference_is_refused_with_its_keys(touch: Any) -> None:
    with pytest.raises(ValueError, match=r"has no ct, the reference modality.*It has label, pet\."):
        GatherModalitiesd(MODALITIES, allow_missing=True)({"pet": touch("p.nii.gz"), "label": "l"})


BOX_LPS = [-30.0, -18.0, 4.0, -8.0, 14.0, 31.0]


@pytest.fixture(params=[np.diag([-1.0, -1, 1]), Rotation.from_euler("z", 20, degrees=True).as_matrix(), np.eye(3)])
def volume(request: pytest.FixtureRequest, make_affine: Any) -> MetaTensor:
    """Voxels of 3 x 2 x 4 mm, values from 1 on, on an LPS, an oblique or a RAS grid."""
    shape = (24, 40, 18)
    affine = make_affine(request.param, (3, 2, 4), shape, (10, 5, 12))
    return MetaTensor(torch.arange(1.0, 1 + np.prod(shape)).reshape(1, *shape), affine=torch.tensor(affine))


def test_a_crop_contains_the_box_which_is_given_in_lps(volume: MetaTensor, world: Any) -> None:
    crop = CropToBoxd("ct")({"ct": volume, "bbox_mm": BOX_LPS})["ct"]
    low, high = np.reshape(BOX_LPS, (2, 3))
    lps = world(volume.affine, volume.shape[1:]) * [-1, -1, 1]
    inside = ((lps >= low) & (lps <= high)).all(-1)
    kept = np.isin(volume[0].numpy(), crop[0].numpy())
    assert kept[inside].all()
    assert inside.sum() > 500
    # A cuboid of voxels around the box: no plane of it lies more than two voxels beyond the box's corners.
    corners = np.stack(np.meshgrid(*np.stack([low, high], 1) * [[-1], [-1], [1]], indexing="ij"), -1).reshape(-1, 3)
    affine = np.asarray(crop.affine)
    index = (corners - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert (index.min(0) < 2).all()
    assert (index.max(0) > np.array(crop.shape[1:]) - 3).all()
    # Its values keep their place in the world.
    np.testing.assert_allclose(world(affine, crop.shape[1:])[0, 0, 0] * [-1, -1, 1], lps[kept][0], atol=1e-4)


def test_a_crop_records_its_position_in_the_whole_image(volume: MetaTensor) -> None:
    before = volume.affine.clone()
    crop = CropToBoxd("ct")({"ct": volume, "bbox_mm": BOX_LPS})["ct"]
    start = [int(n) for n in crop.meta["crop_start"]]
    there = tuple(slice(s, s + n) for s, n in zip(start, crop.shape[1:], strict=True))
    assert torch.equal(volume[0][there].as_tensor(), crop[0].as_tensor())
    assert crop.shape != volume.shape
    assert torch.equal(volume.affine, before)


def test_an_item_without_a_box_is_unchanged(volume: MetaTensor) -> None:
    assert CropToBoxd("ct")({"ct": volume})["ct"] is volume


def test_a_box_outside_the_image_is_refused_with_the_case(volume: MetaTensor) -> None:
    item = {"ct": volume, "bbox_mm": [500, 500, 500, 600, 600, 600], "case_id": "p7", "image": "a.nii"}
    with pytest.raises(ValueError, match=r"Case p7: its bounding box lies outside a\.nii"):
        CropToBoxd("ct")(item)


def test_a_mask_of_a_cropped_hecktor_case_returns_to_the_whole_ct(require_data: Any, tmp_path: Path) -> None:
    item = datalist("hecktor21", require_data("hecktor21"))[0]
    before = preprocessing(MODALITIES, {"ct": [-200, 300], "pet": [0, 15]}, (4, 4, 4), "infer")
    case = Dataset([item], before)[0]
    reference = nib.Nifti1Image.from_filename(item["ct"])
    assert (np.array(case["image"].shape[1:]) * 4 < np.array(reference.shape) * reference.header.get_zooms() - 8).any()
    batch = list_data_collate([case])
    batch["pred"] = torch.stack([torch.zeros_like(batch["image"][:, 0]), torch.ones_like(batch["image"][:, 0])], 1) * 9
    postprocessing(str(tmp_path))(decollate_batch(batch)[0])
    mask = nib.Nifti1Image.from_filename(tmp_path / f"{item['case_id']}.nii.gz")
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
    where = np.argwhere(np.asarray(mask.dataobj)) @ mask.affine[:3, :3].T + mask.affine[:3, 3]
    low, high = np.reshape(item["bbox_mm"], (2, 3))
    margin = 4 * np.array(reference.header.get_zooms())
    assert (where * [-1, -1, 1] > low - margin).all()
    assert (where * [-1, -1, 1] < high + margin).all()


def label_of(values: Any, source: str = "folder/label.nii.gz") -> MetaTensor:
    return MetaTensor(torch.tensor(values).reshape(1, 1, 1, -1), meta={"filename_or_obj": source})


def test_label_values_are_mapped_to_classes() -> None:
    mapped = MapLabelsd("label", [[0], [2, 3], [4, 5, 1.5]])({"label": label_of([0.0, 2, 3, 4, 5, 1.5])})["label"]
    assert mapped.flatten().tolist() == [0, 1, 1, 2, 2, 2]
    swapped = MapLabelsd("label", [[1], [0]])({"label": label_of([0, 1, 1])})["label"]
    assert swapped.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float32, torch.float64])
def test_ignored_voxels_get_an_index_of_their_own_in_every_voxel_type(dtype: torch.dtype) -> None:
    label = label_of([0, 1, 9, 1, 9]).to(dtype)
    mapped = MapLabelsd("label", [[0], [1]], ignore=9)({"label": label})["label"]
    assert mapped.flatten().tolist() == [0, 1, 254, 1, 254]
    assert mapped.meta["filename_or_obj"] == "folder/label.nii.gz"
    with pytest.raises(ValueError, match=r"contains the value 9, which.*`labels` \(or `ignore`\)"):
        MapLabelsd("label", [[0], [1]])({"label": label})


@pytest.mark.parametrize(("value", "shown"), [(255, "255"), (-1, "-1"), (0.9999, "0.9999"), (float("nan"), "nan")])
def test_any_other_label_value_is_refused_with_file_and_value(value: float, shown: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^folder/label\.nii\.gz contains the value {shown}, which.*Correct the file"
    ):
        MapLabelsd("label", [[0], [1]])({"label": label_of([0.0, 1, value, value])})


def test_a_case_without_its_label_is_refused_where_one_is_needed() -> None:
    with pytest.raises(ValueError, match="Case p7 has no label"):
        MapLabelsd("label", [[0], [1]])({"case_id": "p7"})


def test_modalities_are_stacked_in_order_and_absent_ones_are_zeros() -> None:
    ct, mr = MetaTensor(torch.full((1, 2, 3, 4), 5.0)), MetaTensor(torch.full((1, 2, 3, 4), 7.0))
    order = ["ct", "pet", "mr"]
    filled = StackModalitiesd(order, stack=False)({"mr": mr, "ct": ct, "case_id": "p7"})
    filled["pet"] += 1  # as an augmentation may do
    done = StackModalitiesd(order, stack=True)(filled)
    assert done["image"].shape == (3, 2, 3, 4)
    assert [channel.unique().tolist() for channel in done["image"]] == [[5.0], [0.0], [7.0]]
    assert done["presence"].tolist() == [True, False, True]
    assert set(done) == {"image", "presence", "case_id"}
    assert done["image"].meta["case_id"] == "p7"  # names the mask that inference saves
