# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.data.bids import bids_name, bids_task, describe_mask, write_dataset_description

NEOPLASM = ["108369006", "SCT", "Neoplasm"]
BRATS = {
    "labels": [[0], [1], [2], [4]],
    "classes": ["background", "necrosis", "oedema", "enhancing"],
    "regions": {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]},
}


def _task(**settings: Any) -> Any:
    default = {"labels": [[0], [1]], "classes": None, "regions": None, "mask_values": "file", "codes": {}}
    return bids_task({**default, **settings})


TUMOUR = _task(classes=["background", "tumour"], codes={"tumour": NEOPLASM})


@pytest.mark.parametrize(
    ("case_id", "name"),
    [
        ("a-1", "sub-a1/anat/sub-a1_space-pet_label-tumour_mask.nii.gz"),
        ("sub-01", "sub-01/anat/sub-01_space-pet_label-tumour_mask.nii.gz"),
        ("sub-01_ses-b", "sub-01/ses-b/anat/sub-01_ses-b_space-pet_label-tumour_mask.nii.gz"),
        ("sub-01_x", "sub-01x/anat/sub-01x_space-pet_label-tumour_mask.nii.gz"),
    ],
)
def test_a_mask_is_named_after_its_case_its_grid_and_its_region(case_id: str, name: str):
    assert bids_name({"case_id": case_id, "image": "p", "pet": "p"}, ["ct", "pet"], TUMOUR) == Path(name)


def test_what_bids_has_no_name_for_is_refused():
    with pytest.raises(ValueError, match="The id of case \u60a3\u8005 contains no ASCII letter or digit"):
        bids_name({"case_id": "\u60a3\u8005", "image": "a"}, ["ct"], TUMOUR)
    with pytest.raises(ValueError, match="The name of the region \u816b\u760d contains no ASCII letter or digit"):
        bids_name({"case_id": "a", "image": "a"}, ["ct"], _task(classes=["background", "\u816b\u760d"]))


@pytest.mark.parametrize(
    ("settings", "ending", "kind"),
    [
        (
            {"classes": ["background", "gross tumour"], "codes": {"gross tumour": NEOPLASM}},
            "label-grosstumour_mask",
            "Lesion",
        ),
        (
            {"classes": ["background", "liver"], "codes": {"liver": ["10200004", "SCT", "Liver"]}},
            "label-liver_mask",
            "ROI",
        ),
        ({}, "label-foreground_mask", "ROI"),
        ({"labels": [[0], [255]]}, "dseg", ""),  # a mask of BIDS holds 0 and 1
        ({"labels": [[0], [255]], "mask_values": "index"}, "label-foreground_mask", "ROI"),
        (BRATS, "dseg", ""),
        ({**BRATS, "regions": {"WT": [1, 2, 4]}}, "dseg", ""),
    ],
)
def test_one_region_of_ones_is_a_mask_and_all_else_a_segmentation(settings: Any, ending: str, kind: str):
    task = _task(**settings)
    assert task.type == kind
    name = bids_name({"case_id": "a", "image": "c"}, ["ct"], task).name
    assert name == f"sub-a_space-ct_{ending}.nii.gz"


def test_a_value_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match=r"foreground is 1\.5\. Use --set mask_values=index"):
        _task(labels=[[0], [1.5]])


@pytest.mark.parametrize(("mode", "values"), [("file", ["1", "2", "4"]), ("index", ["1", "2", "3"])])
def test_a_segmentation_has_a_table_of_its_values(mode: str, values: list[str], tmp_path: Path):
    task = _task(**BRATS, mask_values=mode)
    case = {"case_id": "a", "image": "t1.nii.gz", "t1": "t1.nii.gz", "t2": "t2.nii.gz"}
    mask = tmp_path / bids_name(case, ["t1", "t2"], task)
    describe_mask(mask, case, ["t1", "t2"], task)
    assert not list(tmp_path.rglob("*.tsv"))  # the case failed
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"")
    describe_mask(mask, case, ["t1", "t2"], task)
    rows = [line.split("\t") for line in (mask.parent / "sub-a_space-t1_dseg.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "name", "color"]
    assert [row[:2] for row in rows[1:]] == [
        ["0", "background"],
        *map(list, zip(values, ["necrosis", "oedema", "enhancing"], strict=True)),
    ]
    assert len({row[2] for row in rows[1:]}) == 4
    sidecar = json.loads((mask.parent / "sub-a_space-t1_dseg.json").read_text())
    assert "Type" not in sidecar
    assert [Path(path).name for path in sidecar["Sources"]] == ["t1.nii.gz", "t2.nii.gz"]


def test_the_data_set_is_named_after_the_regions(tmp_path: Path):
    write_dataset_description(tmp_path, _task(**BRATS))
    description = json.loads((tmp_path / "dataset_description.json").read_text())
    assert description["Name"] == "Segmentation of WT, TC, ET, research only"
