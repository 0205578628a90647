# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from scripts.data.bids import bids_name, bids_task, describe_mask, image_sources, write_dataset_files

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
    ("ids", "folder"),
    [
        ({"case_id": "a-1"}, "sub-a1"),
        ({"case_id": "sub-01", "patient_id": "sub-01"}, "sub-01"),
        ({"case_id": "sub-01_ses-b"}, "sub-01/ses-b"),
        ({"case_id": "sub-01_ses-b", "patient_id": "sub-01"}, "sub-01/ses-b"),
        ({"case_id": "P1_pre-op", "patient_id": "P1"}, "sub-P1/ses-preop"),
        ({"case_id": "scan7", "patient_id": "P1"}, "sub-P1/ses-scan7"),
        ({"case_id": "sub-01_x"}, "sub-01x"),
    ],
)
def test_a_mask_is_named_after_its_patient_its_session_its_grid_and_its_region(ids: dict[str, str], folder: str):
    name = f"{folder}/anat/{folder.replace('/', '_')}_space-pet_label-tumour_desc-auto_mask.nii.gz"
    assert bids_name({**ids, "image": "p", "pet": "p"}, ["ct", "pet"], TUMOUR) == Path(name)


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
            "label-grosstumour_desc-auto_mask",
            "Lesion",
        ),
        (
            {"classes": ["background", "liver"], "codes": {"liver": ["10200004", "SCT", "Liver"]}},
            "label-liver_desc-auto_mask",
            "ROI",
        ),
        ({}, "label-foreground_desc-auto_mask", "ROI"),
        ({"labels": [[0], [255]]}, "desc-auto_dseg", ""),  # a mask of BIDS holds 0 and 1
        ({"labels": [[0], [255]], "mask_values": "index"}, "label-foreground_desc-auto_mask", "ROI"),
        (BRATS, "desc-auto_dseg", ""),
        ({**BRATS, "regions": {"WT": [1, 2, 4]}}, "desc-auto_dseg", ""),
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
    sources = image_sources([case], ["t1", "t2"])
    mask = tmp_path / bids_name(case, ["t1", "t2"], task)
    describe_mask(mask, case, ["t1", "t2"], task, sources)
    assert not list(tmp_path.rglob("*.tsv"))  # the case failed
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"")
    describe_mask(mask, case, ["t1", "t2"], task, sources)
    rows = [line.split("\t") for line in (mask.parent / "sub-a_space-t1_desc-auto_dseg.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "name", "color"]
    assert [row[:2] for row in rows[1:]] == [
        ["0", "background"],
        *map(list, zip(values, ["necrosis", "oedema", "enhancing"], strict=True)),
    ]
    assert len({row[2] for row in rows[1:]}) == 4
    sidecar = json.loads((mask.parent / "sub-a_space-t1_desc-auto_dseg.json").read_text())
    assert "Type" not in sidecar
    assert sidecar["Sources"] == ["bids:source:t1.nii.gz", "bids:source:t2.nii.gz"]


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _cases(root: Path) -> list[dict[str, str]]:
    """One case of a BIDS data set, with a PET that lies in another folder."""
    ct, pet = root / "raw/sub-1/anat/sub-1_ct.nii.gz", root / "PET scans/1.nii.gz"
    _touch(ct, pet)
    return [{"case_id": "sub-1", "image": str(ct), "ct": str(ct), "pet": str(pet)}]


def test_images_are_named_by_uris_that_the_links_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cases, output = _cases(Path()), Path("raw/derivatives/masks")
    Path("raw/dataset_description.json").write_text(json.dumps({"Name": "raw", "Authors": ["Ada", "Grace"]}))
    sources = image_sources(cases, ["ct", "pet"])
    write_dataset_files(output, TUMOUR, sources)
    mask = output / bids_name(cases[0], ["ct", "pet"], TUMOUR)
    _touch(mask)
    describe_mask(mask, cases[0], ["ct", "pet"], TUMOUR, sources)
    description = json.loads((output / "dataset_description.json").read_text())
    sidecar = json.loads(mask.with_name(mask.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["SpatialReference"] == sidecar["Sources"][0]
    for uri, image in zip(sidecar["Sources"], (cases[0]["ct"], cases[0]["pet"]), strict=True):
        scheme, name, path = uri.split(":")
        assert scheme == "bids"
        assert (output / unquote(description["DatasetLinks"][name]) / unquote(path)).samefile(image)
    assert sorted(description["DatasetLinks"].values()) == ["../..", "../../../PET%20scans"]
    assert str(tmp_path) not in "".join(path.read_text() for path in output.rglob("*.*") if path.is_file())
    assert description["Authors"][:2] == ["The authors of the images", "Ada"]
    assert "Ada" not in (output / "README.md").read_text()


def test_files_of_a_data_set_under_version_control_are_named_as_they_lie_in_it(tmp_path: Path):
    """git-annex replaces each file by a link to its content."""
    content, image = tmp_path / "annex/SHA256-1", tmp_path / "raw/sub-1/anat/sub-1_ct.nii.gz"
    _touch(content, image.with_name("README"))
    image.symlink_to(content)
    _touch(tmp_path / "raw/dataset_description.json")
    case = {"case_id": "sub-1", "image": str(image), "ct": str(image)}
    assert image_sources([case], ["ct"]) == {"source": tmp_path / "raw"}


def test_the_data_set_is_named_after_the_regions_and_keeps_what_somebody_wrote(tmp_path: Path):
    path = tmp_path / "dataset_description.json"
    write_dataset_files(tmp_path, _task(**BRATS), {"source": tmp_path / "a"})
    description = json.loads(path.read_text())
    assert description["Name"] == "Segmentation of WT, TC, ET, research only"
    assert "1 is necrosis, 2 is oedema, 4 is enhancing" in (tmp_path / "README.md").read_text()
    path.write_text(json.dumps({**description, "Authors": ["Ada"], "License": "CC0"}))
    (tmp_path / "README.md").write_text("Ours.")
    write_dataset_files(tmp_path, _task(**BRATS), {"source": tmp_path / "b"})
    assert json.loads(path.read_text()) == {
        **description,
        "Authors": ["Ada"],
        "License": "CC0",
        "DatasetLinks": {"source": "b"},
    }
    assert (tmp_path / "README.md").read_text() == "Ours."


@pytest.mark.parametrize("content", ['{"Name": "raw"}', '{"Name": "x", "GeneratedBy": [{"Name": "fMRIPrep"}]}', "{"])
def test_a_data_set_of_somebody_else_is_not_written_into(content: str, tmp_path: Path):
    path = tmp_path / "dataset_description.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"Choose another --output-dir|is not JSON"):
        write_dataset_files(tmp_path, TUMOUR, {})
    assert path.read_text() == content
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
