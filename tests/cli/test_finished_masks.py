# SPDX-License-Identifier: Apache-2.0
"""Which masks of an earlier run are taken for done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from scripts.cli.finished_masks import beside, has_images, has_suv_values, is_of_mask, start_record

OLD, NEW = 1_000_000_000, 1_000_000_100  # seconds


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """A mask of a folder of slices with a box, and of a PET with a weight."""
    path = tmp_path / "a.nii.gz"
    path.touch()
    for name in ("ct/1.dcm", "ct/2.dcm", "pet.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (OLD, OLD))
    os.utime(tmp_path / "ct", (OLD, OLD))
    os.utime(path, (OLD + 1, OLD + 1))
    case = {"ct": str(tmp_path / "ct"), "pet": str(tmp_path / "pet.nii.gz"), "bbox_mm": [0, 0, 0, 1, 1, 1]}
    manifest = {"data": [case], "config": {"checks": {"suv": {"patient_weight": 70}}}}
    beside(path, ".manifest.json").write_text(json.dumps(manifest))
    return path


def is_same(mask: Path, **other: Any) -> bool:
    folder = mask.parent
    images = {"ct": str(folder / "ct"), "pet": str(folder / "pet.nii.gz"), **other}
    box = images.pop("box", [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    return has_images(mask, images, ("ct", "pet", "mr"), box)


def test_a_mask_is_of_the_images_and_the_box_that_its_manifest_names(mask: Path) -> None:
    assert is_same(mask)
    assert not is_same(mask, pet=str(mask.parent / "other.nii.gz"))
    assert not is_same(mask, mr=str(mask.parent / "mr.nii.gz"))
    assert not is_same(mask, box=[0, 0, 0, 1, 1, 2])
    assert not is_same(mask, box=None)
    beside(mask, ".manifest.json").write_text("{")
    assert not is_same(mask)


@pytest.mark.parametrize("changed", ["ct/2.dcm", "pet.nii.gz"])
def test_a_newer_image_or_slice_makes_a_mask_an_old_one(mask: Path, changed: str) -> None:
    os.utime(mask.parent / changed, (NEW, NEW))
    assert not is_same(mask)


def test_a_slice_that_was_added_or_removed_makes_a_mask_an_old_one(mask: Path) -> None:
    (mask.parent / "ct" / "1.dcm").unlink()
    assert not is_same(mask)


def test_values_for_suv_are_compared_as_numbers(mask: Path) -> None:
    assert has_suv_values(mask, {"patient_weight": 70.0})
    assert not has_suv_values(mask, {"patient_weight": 71})
    assert not has_suv_values(mask, {})


def test_measures_of_an_earlier_mask_are_not_those_of_this_one(mask: Path) -> None:
    measures = beside(mask, ".measures.csv")
    assert not is_of_mask(measures, mask)
    measures.touch()
    assert is_of_mask(measures, mask)
    os.utime(mask, (NEW * 2, NEW * 2))
    assert not is_of_mask(measures, mask)


def settings(**changed: Any) -> dict[str, Any]:
    checks = {"max_voxels": None, "replace_nonfinite": None, "voxel_size": None, "suv": None}
    checks |= {key: changed.pop(key) for key in [*changed] if key in checks}
    return {"overlap": 0.25, "allow_missing": False, "engine_precision": "auto", "checks": checks, **changed}


@pytest.mark.parametrize(
    "advised", [{"allow_missing": True}, {"max_voxels": 5}, {"replace_nonfinite": 0.0}, {"voxel_size": "affine"}]
)
def test_what_accepts_more_cases_may_be_added_but_not_taken_away(mask: Path, advised: dict[str, Any]) -> None:
    """The errors of failed cases advise these options."""
    record = mask.parent / "segment.json"
    record.write_text(json.dumps({"weights_sha256": "1", "settings": settings()}))
    start_record(record, [mask], "1", settings(**advised))
    assert json.loads(record.read_text())["settings"] == settings(**advised)
    with pytest.raises(ValueError, match="masks of other settings: its "):
        start_record(record, [mask], "1", settings())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"overlap": 0.5}, "its overlap is 0.25, this run's is 0.5"),
        ({"engine_precision": "int8"}, "its engine_precision is auto, this run's is int8"),
    ],
)
def test_settings_that_change_a_mask_are_refused(mask: Path, changed: dict[str, Any], named: str) -> None:
    record = mask.parent / "segment.json"
    record.write_text(json.dumps({"weights_sha256": "1", "settings": settings()}))
    with pytest.raises(ValueError, match=named):
        start_record(record, [mask], "1", settings(**changed))


def test_another_value_for_nan_is_another_setting(mask: Path) -> None:
    record = mask.parent / "segment.json"
    record.write_text(json.dumps({"weights_sha256": "1", "settings": settings(replace_nonfinite=0.0)}))
    with pytest.raises(ValueError, match=r"replace_nonfinite is 0\.0, this run's is 2\.0"):
        start_record(record, [mask], "1", settings(replace_nonfinite=2.0))
