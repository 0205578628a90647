# SPDX-License-Identifier: Apache-2.0
"""The reader of data sets in nnU-Net's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.data.case_list import ContradictionError, IncompleteError, datalist

Tree = Callable[..., Path]
CONTENT = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "GTVp": 1},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
IMAGES = [f"imagesTr/{case}_000{channel}.nii.gz" for case in "abc" for channel in (0, 1)]
LABELS = [f"labelsTr/{case}.nii.gz" for case in "abc"]


@pytest.fixture
def dataset(tree: Tree) -> Tree:
    """``dataset(*more, **content)`` makes three cases of two channels, and dataset.json."""

    def make(*more: str, files: list[str] | None = None, **content: Any) -> Path:
        root = tree(*([*IMAGES, *LABELS] if files is None else files), *more)
        (root / "dataset.json").write_text(json.dumps({**CONTENT, **content}))
        return root

    return make


def cases(root: Path, *modalities: str, **options: Any) -> list[dict[str, Any]]:
    return datalist("nnunet", root, modalities=modalities or ["ct", "pet"], **options)


def splits(root: Path, *folds: tuple[str, str]) -> None:
    content = [{"train": list(training), "val": list(validation)} for training, validation in folds]
    (root / "splits_final.json").write_text(json.dumps(content))


def test_an_item_has_a_file_per_channel_and_test_cases_are_marked(dataset: Tree) -> None:
    test = ["imagesTs/t_0000.nii.gz", "imagesTs/t_0001.nii.gz", "imagesTs/u_0000.nii.gz", "labelsTs/t.nii.gz"]
    root = dataset(*test, "imagesTr/._a_0000.nii.gz", "imagesTr/a.json")
    listed = cases(root)
    assert [item["case_id"] for item in listed] == list("abctu")
    assert listed[0] == {
        "case_id": "a",
        "patient_id": "a",
        "image": str(root / "imagesTr/a_0000.nii.gz"),
        "ct": str(root / "imagesTr/a_0000.nii.gz"),
        "pet": str(root / "imagesTr/a_0001.nii.gz"),
        "label": str(root / "labelsTr/a.nii.gz"),
    }
    assert listed[3]["partition"] == listed[4]["partition"] == "test"
    assert listed[3]["label"] == str(root / "labelsTs/t.nii.gz")
    assert not {"label", "pet"} & set(listed[4])


@pytest.mark.parametrize(
    ("modalities", "channel"),
    [(["pet", "CT"], 1), (["x", "y"], 0), (["ct", "tracer"], 0)],  # by name; by position; by both
)
def test_modalities_are_channels_by_name_or_by_position(modalities: list[str], channel: int, dataset: Tree) -> None:
    item = cases(dataset(), *modalities)[0]
    assert item["image"] == item[modalities[0]]
    assert item[modalities[0]].endswith(f"a_000{channel}.nii.gz")
    assert item[modalities[1]].endswith(f"a_000{1 - channel}.nii.gz")


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        (["ct"], r"The task has 1 modalities \(ct\), but .*dataset\.json has 2 channels \(ct, pet\)"),
        (["ct", "pet", "mr"], "The task has 3 modalities"),
        (["pet", "anatomy"], r"The modality pet is number 0 of the task, but channel 1 of .*\(ct, pet\)"),
    ],
)
def test_modalities_that_contradict_the_channels_are_refused(
    modalities: list[str], message: str, dataset: Tree
) -> None:
    with pytest.raises(ValueError, match=message):
        cases(dataset(), *modalities)


def test_version_1_and_another_ending(dataset: Tree) -> None:
    root = dataset(files=["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"])
    (root / "dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ"}}')
    assert [item["case_id"] for item in cases(root, "ct")] == ["a"]
    root = dataset("imagesTr/z_0000.nrrd", files=[], file_ending=".nrrd", channel_names={"0": "CT"}, numTraining=1)
    assert [item["image"][-11:] for item in cases(root, "ct")] == ["z_0000.nrrd"]


def test_files_that_dataset_json_lists_are_used(dataset: Tree) -> None:
    entry = {"images": ["x/1.nii.gz", "x/2.nii.gz"], "label": "y/3.nii.gz"}
    root = dataset("x/1.nii.gz", "x/2.nii.gz", "y/3.nii.gz", files=[], numTraining=1, dataset={"k": entry})
    (item,) = cases(root)
    assert (item["case_id"], item["pet"], item["label"]) == ("k", str(root / "x/2.nii.gz"), str(root / "y/3.nii.gz"))
    dataset(files=[], dataset={"k": {**entry, "label": "y/4.nii.gz"}})
    with pytest.raises(ContradictionError, match=r"y/4\.nii\.gz is missing\. Add it, or remove the case"):
        cases(root)
    dataset(files=[], dataset={"k": {**entry, "label": "../../out.nii.gz"}})
    with pytest.raises(ValueError, match=r"k: \.\./\.\./out\.nii\.gz leads out of"):
        cases(root)
    dataset(files=[], dataset={"k": ["x/1.nii.gz"]})
    with pytest.raises(ValueError, match=r'k: expected \{"images": \["FILE"'):
        cases(root)


def test_the_splits_are_folds(dataset: Tree) -> None:
    root = dataset()
    splits(root, ("ab", "c"), ("c", "ab"))
    assert {item["case_id"]: item["fold"] for item in cases(root)} == {"a": 1, "b": 1, "c": 0}


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([("ab", "c")], "the case a is in the val of no fold"),
        ([("ab", "c"), ("a", "b"), ("bc", "a")], "fold 1 does not have the case c"),
        ([("ab", "c"), ("ac", "b"), ("c", "ab")], "the case b of fold 2 occurs twice"),
        ([("abc", "c"), ("c", "ab")], "the case c of fold 0 occurs twice"),
        ([("abx", "c"), ("c", "ab")], "fold 0 has the case x, which has no image"),
        ([], "is no list of folds"),
    ],
)
def test_splits_that_are_no_partition_are_one_sentence(
    folds: list[tuple[str, str]], message: str, dataset: Tree
) -> None:
    root = dataset()
    splits(root, *folds)
    with pytest.raises(ContradictionError, match=rf"splits_final\.json.*{message}") as caught:
        cases(root)
    assert len(caught.value.problems) == 1
    assert len(caught.value.cases) == 3


def test_all_contradictions_are_named_at_once(dataset: Tree) -> None:
    root = dataset("labelsTr/d.nii.gz", "imagesTr/e.nii.gz", "imagesTr/a_0002.nii.gz", numTraining=9)
    with pytest.raises(ContradictionError) as caught:
        cases(root)
    problems = [
        f"The name of {root / 'imagesTr/e.nii.gz'} has no channel. Rename it as CASE_0000.nii.gz.",
        f"{root / 'imagesTr/a_0002.nii.gz'} is channel 2, but dataset.json names 2. Correct one of them.",
        f"{root / 'labelsTr/d.nii.gz'} has no image. Add it, or remove the label.",
        f"{root / 'dataset.json'} says numTraining 9, but there are 3 cases. Correct one of them.",
    ]
    assert sorted(caught.value.problems) == sorted(problems)
    assert all(problem in str(caught.value) for problem in problems)
    assert [case["case_id"] for case in caught.value.cases] == list("abc")


def test_a_case_without_its_reference_is_named(dataset: Tree) -> None:
    root = dataset(files=[*IMAGES[1:], *LABELS])
    with pytest.raises(IncompleteError, match=r"imagesTr/a_0000\.nii\.gz") as caught:
        cases(root)
    assert [case["case_id"] for case in caught.value.cases] == ["b", "c"]


def test_an_empty_data_set_a_layout_and_no_dataset_json_are_one_sentence(dataset: Tree, tmp_path: Path) -> None:
    root = dataset(files=["x"], file_ending=".nii", numTraining=0)
    with pytest.raises(FileNotFoundError, match=r"No cases.*imagesTr/<case>_0000\.nii and"):
        cases(root)
    with pytest.raises(ValueError, match=r"has the key ct, which the cohort 'nnunet' does not know\. It needs none"):
        cases(root, layout={"ct": "0000"})
    with pytest.raises(FileNotFoundError, match=r"There is no dataset\.json"):
        cases(tmp_path)


def test_names_are_the_same_in_either_form_of_unicode(dataset: Tree) -> None:
    composed, decomposed = "M\u00fcller", "Mu\u0308ller"
    files = [f"imagesTr/{decomposed}_0000.nii.gz", f"imagesTr/{composed}_0001.nii.gz", f"labelsTr/{composed}.nii.gz"]
    root = dataset(files=[*files, "imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz"], numTraining=2)
    splits(root, (["b"], [decomposed]), ([composed], ["b"]))
    (item,) = [item for item in cases(root) if item["case_id"] == composed]
    assert (item["fold"], Path(item["label"]).name) == (0, f"{composed}.nii.gz")
