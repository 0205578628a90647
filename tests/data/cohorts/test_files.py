# SPDX-License-Identifier: Apache-2.0
"""The reader of any folder of files, by patterns."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.data.case_list import ContradictionError, IncompleteError, datalist

BRATS = {key: f"{{case}}/{{case}}_{key}.nii.gz" for key in ("t1", "t1ce", "label")}
Tree = Callable[..., Path]


def test_an_item_has_every_file_and_cases_are_sorted(tree: Tree) -> None:
    root = tree(*(f"{case}/{case}_{key}.nii.gz" for case in ("B_2", "B_1", "B_10") for key in BRATS))
    first, second, third = datalist("files", root, modalities=["t1ce", "t1"], layout=BRATS)
    assert first == {
        "case_id": "B_1",
        "patient_id": "B_1",
        "image": str(root / "B_1/B_1_t1ce.nii.gz"),
        "t1ce": str(root / "B_1/B_1_t1ce.nii.gz"),
        "t1": str(root / "B_1/B_1_t1.nii.gz"),
        "label": str(root / "B_1/B_1_label.nii.gz"),
    }
    assert [second["case_id"], third["case_id"]] == ["B_10", "B_2"]


def test_other_modalities_and_the_label_may_be_absent(tree: Tree) -> None:
    root = tree("a/a_t1.nii.gz", "a/b_t1.nii.gz", "a/._a_t1ce.nii.gz", "notes.txt")
    (item,) = datalist("files", root, modalities=["t1", "t1ce"], layout=BRATS)
    assert sorted(item) == ["case_id", "image", "patient_id", "t1"]  # a/b_t1.nii.gz has two ids
    (item,) = datalist("files", root, modalities=["t1"], layout={"t1": BRATS["t1"]})
    assert item["case_id"] == "a"


def test_a_file_that_fits_two_patterns_belongs_to_the_more_specific_one(tree: Tree) -> None:
    root = tree("a.nii.gz", "a_pet.nii.gz", "a_seg.nii.gz", "b_c.nii.gz")
    layout = {"ct": "{case}.nii.gz", "pet": "{case}_pet.nii.gz", "label": "{case}_seg.nii.gz"}
    first, second = datalist("files", root, modalities=["ct", "pet"], layout=layout)
    assert (first["case_id"], first["label"]) == ("a", str(root / "a_seg.nii.gz"))
    assert sorted(second) == ["case_id", "ct", "image", "patient_id"]
    assert second["case_id"] == "b_c"


def test_the_patient_is_part_of_the_pattern(tree: Tree) -> None:
    root = tree("p1/p1_s1_t2w.mha", "p1/p1_s2_t2w.mha", "p1/p1_s2_adc.mha", "labels/s1.nii.gz")
    layout = {"t2w": "{patient}/{patient}_{case}_t2w.mha", "adc": "{patient}/{patient}_{case}_adc.mha"}
    first, second = datalist(
        "files", root, modalities=["t2w", "adc"], layout={**layout, "label": "labels/{case}.nii.gz"}
    )
    assert [(each["case_id"], each["patient_id"]) for each in (first, second)] == [("s1", "p1"), ("s2", "p1")]
    assert first["label"] == str(root / "labels/s1.nii.gz")
    assert "adc" not in first
    with pytest.raises(ValueError, match=r"pattern of adc has \{patient\}, but that of t2w, the reference, has not"):
        datalist("files", root, modalities=["t2w", "adc"], layout={**layout, "t2w": "{case}.mha"})


def test_files_of_two_patients_are_no_case(tree: Tree) -> None:
    root = tree("P1/s1_ct.nii.gz", "P2/s1_seg.nii.gz", "P2/s2_ct.nii.gz")
    layout = {"ct": "{patient}/{case}_ct.nii.gz", "label": "{patient}/{case}_seg.nii.gz"}
    with pytest.raises(ContradictionError, match=r"The case s1 has files of 2 patients \(P1, P2\)"):
        datalist("files", root, modalities=["ct"], layout=layout)


def test_a_pattern_may_name_a_dicom_folder_and_one_file_may_be_two_modalities(tree: Tree) -> None:
    root = tree("a/CT/1.dcm", "a/both.nii.gz")
    (item,) = datalist("files", root, modalities=["ct"], layout={"ct": "{case}/CT"})
    assert item["image"] == item["ct"] == str(root / "a/CT")
    layout = dict.fromkeys(("ct", "pet"), "{case}/both.nii.gz")
    (item,) = datalist("files", root, modalities=["ct", "pet"], layout=layout)
    assert item["ct"] == item["pet"] == str(root / "a/both.nii.gz")


def test_ids_are_composed_and_paths_are_as_on_disk(tree: Tree) -> None:
    name = unicodedata.normalize("NFD", "Müller")
    root = tree(f"{name}/{name}_t1.nii.gz")
    (item,) = datalist("files", root, modalities=["t1"], layout={"t1": BRATS["t1"]})
    assert item["case_id"] == unicodedata.normalize("NFC", name)
    assert Path(item["image"]).is_file()


def test_cases_without_their_reference_are_named_and_the_others_are_kept(tree: Tree) -> None:
    root = tree("a/a_t1.nii.gz", "b/b_t1ce.nii.gz", "c/c_label.nii.gz")
    with pytest.raises(IncompleteError, match=r"b/b_t1\.nii\.gz.*c/c_t1\.nii\.gz") as caught:
        datalist("files", root, modalities=["t1", "t1ce"], layout=BRATS)
    assert [case["case_id"] for case in caught.value.cases] == ["a"]
    assert f"{root / 'c/c_t1.nii.gz'} is missing. Add it, or remove the case." in caught.value.problems


def test_two_files_of_a_case_are_refused_with_both_names(tree: Tree) -> None:
    root = tree("p1/scan_ct.nii.gz", "p2/scan_ct.nii.gz", "p3/other_ct.nii.gz")
    with pytest.raises(
        ContradictionError, match=r"scan has two files for ct, .*p1/scan_ct.*p2/scan_ct.*Remove one"
    ) as e:
        datalist("files", root, modalities=["ct"], layout={"ct": "{patient}/{case}_ct.nii.gz"})
    assert [case["case_id"] for case in e.value.cases] == ["other", "scan"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"ct": "images/ct.nii.gz"}, r'pattern of ct, "images/ct.nii.gz", has no \{case\}'),
        ({"ct": "/data/{case}.nii.gz"}, "is absolute. Give it relative"),
        ({"ct": "C:/data/{case}.nii.gz"}, "is absolute. Give it relative"),
        ({"ct": "../{case}.nii.gz"}, "leads out of the data set's folder"),
        ({"ct": "{case}/*.nii.gz"}, r"has '\*'. Use only \{case\} and \{patient\}"),
        ({"ct": "{case}/{study}.nii.gz"}, r"has 'study'. Use only"),
        ({"ct": "{case}.nii.gz", "pt": "{case}_pt.nii.gz"}, "has the key pt, which the cohort 'files' does not know"),
        ({"label": "{case}.nii.gz"}, "layout has no pattern for ct. Add one"),
        ({}, "layout has no pattern for ct. Add one"),
        ({"ct": None}, r'layout\["ct"\] is None. Give text'),
    ],
)
def test_a_wrong_layout_is_one_sentence(layout: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        datalist("files", tmp_path, modalities=["ct"], layout=layout)


def test_no_folder_and_no_case_are_named_with_the_patterns(tmp_path: Path) -> None:
    for root, message in ((tmp_path / "none", "does not exist"), (tmp_path, "No cases")):
        with pytest.raises(FileNotFoundError, match=rf"{message}.*Expected: \{{case\}}_ct.nii.gz"):
            datalist("files", root, modalities=["ct"], layout={"ct": "{case}_ct.nii.gz"})


def test_one_image_of_two_cases_is_refused(tree: Tree) -> None:
    root = tree("p1/a_t1.nii.gz")
    (root / "p2").mkdir()
    (root / "p2" / "b_t1.nii.gz").symlink_to(root / "p1" / "a_t1.nii.gz")
    with pytest.raises(ValueError, match=r"a_t1\.nii\.gz is an image of two cases, a and b\. Remove one of them"):
        datalist("files", root, modalities=["t1"], layout={"t1": "{patient}/{case}_t1.nii.gz"})


def test_a_folder_that_cannot_be_read_is_named(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cases must not be left out without a word. The superuser may read every folder, so it is simulated."""
    root = tree("a/a_t1.nii.gz", "b/b_t1.nii.gz")
    scandir = os.scandir

    def scan(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(PermissionError, match=r"/b cannot be read \(Permission denied\)\. Correct its permissions"):
        datalist("files", root, modalities=["t1"], layout={"t1": "{case}/{case}_t1.nii.gz"})
