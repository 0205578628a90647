# SPDX-License-Identifier: Apache-2.0
"""The reader of MONAI's data lists."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from monai.data import load_decathlon_datalist

from scripts.data import fold_split
from scripts.data.case_list import ContradictionError, datalist, require_cases

PAIR = ["a_0000.nii.gz", "a_0001.nii.gz"]


def write(root: Path, name: str = "dataset.json", **content: Any) -> Path:
    (root / name).write_text(json.dumps(content))
    return root


def cases(root: Path, *modalities: str, **options: Any) -> list[dict[str, Any]]:
    return datalist("decathlon", root, modalities=modalities or ["ct"], **options)


def entry(case: str, **more: Any) -> dict[str, Any]:
    return {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz", **more}


def test_the_paths_are_those_that_monai_reads(tmp_path: Path) -> None:
    write(tmp_path, training=[entry("b"), entry("a")], test=["./imagesTs/t.nii.gz"], numTraining=2, numTest=1)
    listed = cases(tmp_path)
    expected = [
        *load_decathlon_datalist(tmp_path / "dataset.json"),
        *load_decathlon_datalist(tmp_path / "dataset.json", data_list_key="test"),
    ]
    assert {item["image"] for item in listed} == {str(Path(each["image"])) for each in expected}
    assert listed[0] == {
        "case_id": "a",
        "patient_id": "a",
        "image": str(tmp_path / "imagesTr/a.nii.gz"),
        "ct": str(tmp_path / "imagesTr/a.nii.gz"),
        "label": str(tmp_path / "labelsTr/a.nii.gz"),
    }
    assert listed[2]["partition"] == "test"


def test_a_list_of_images_is_in_the_order_of_the_modalities(tmp_path: Path) -> None:
    (item,) = cases(write(tmp_path, training=[{"image": PAIR}]), "ct", "pet")
    assert (item["case_id"], item["ct"], item["pet"]) == ("a", str(tmp_path / PAIR[0]), str(tmp_path / PAIR[1]))
    assert item["image"] == item["ct"]


@pytest.mark.parametrize(
    ("images", "name"),
    [
        (["x/B_001_t1.nii.gz", "x/B_001_t1ce.nii.gz"], "B_001"),
        (["CHUM-001__CT.nii", "CHUM-001__PT.nii"], "CHUM-001"),
        (["s/p7/ct.nii.gz", "s/p7/pet.nii.gz"], "p7"),
        (["case_12_0000.nrrd", "case_12_0001.nrrd"], "case_12"),
    ],
)
def test_the_id_is_the_part_that_the_names_have_in_common(images: list[str], name: str, tmp_path: Path) -> None:
    assert cases(write(tmp_path, training=[{"image": images}]), "a", "b")[0]["case_id"] == name


def test_ids_of_the_list_win(tmp_path: Path) -> None:
    (item,) = cases(write(tmp_path, training=[entry("a", case_id="scan 1", patient_id=7)]))
    assert (item["case_id"], item["patient_id"]) == ("scan 1", "7")


def test_the_id_0_is_an_id(tmp_path: Path) -> None:
    listed = cases(write(tmp_path, training=[entry(f"p{i}s{k}", patient_id=i) for i in range(3) for k in range(2)]))
    assert [item["patient_id"] for item in listed] == ["0", "0", "1", "1", "2", "2"]
    (item,) = cases(write(tmp_path, training=[entry("a", case_id=0)]))
    assert (item["case_id"], item["patient_id"]) == ("0", "0")


def test_channels_in_another_order_than_the_modalities_are_refused(tmp_path: Path) -> None:
    write(tmp_path, training=[entry("a")], modality={"0": "FLAIR", "1": "T1w"})
    assert len(cases(tmp_path, "flair", "t1w")) == 1
    assert len(cases(tmp_path, "first", "second")) == 1  # names of the task's own
    for wrong in (("t1w", "flair"), ("other", "flair")):
        with pytest.raises(ValueError, match=r"channels of .*dataset\.json are flair, t1w, the modalities of the task"):
            cases(tmp_path, *wrong)


def test_folds_validation_and_testing_divide_the_cases(tmp_path: Path) -> None:
    write(tmp_path, training=[entry("a", fold=1), entry("b", fold=0), entry("c")], testing=[entry("t", fold=0)])
    listed = cases(tmp_path)
    assert {item["case_id"]: item.get("fold") for item in listed} == {"a": 1, "b": 0, "c": None, "t": None}
    write(tmp_path, training=[entry("a"), entry("b")], validation=[entry("v")], test=["t.nii.gz"])
    training, validation = fold_split(cases(tmp_path))
    assert [item["case_id"] for item in training] == ["a", "b"]
    assert [item["case_id"] for item in validation] == ["v"]


def test_the_only_json_file_or_the_named_one_is_read(tmp_path: Path) -> None:
    write(tmp_path, "folds.json", training=[entry("a")])
    assert len(cases(tmp_path)) == 1
    write(tmp_path, "other.json", training=[entry("a"), entry("b")])
    with pytest.raises(ValueError, match=r"several \.json files \(folds\.json, other\.json\)\. Name one"):
        cases(tmp_path)
    assert len(cases(tmp_path, layout={"list": "other.json"})) == 2
    write(tmp_path, training=[entry("a"), entry("b"), entry("c")])  # dataset.json comes first
    assert len(cases(tmp_path)) == 3


def test_one_image_of_several_modalities_needs_stacked(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").touch()
    items = cases(write(tmp_path, training=[{"image": "a.nii.gz"}]), "ct", "pet")
    assert sorted(items[0]) == ["case_id", "image", "patient_id"]
    with pytest.raises(ValueError, match=r"absent \(a: pet\).*If the image is a 4D file.*--set stacked=true"):
        require_cases(items, tmp_path, ["ct", "pet"])
    require_cases(items, tmp_path, ["ct", "pet"], stacked=True)


def test_test_cases_need_no_label(tmp_path: Path) -> None:
    for name in ("a", "a_mask", "t"):
        (tmp_path / f"{name}.nii.gz").touch()
    training = [{"image": "a.nii.gz", "label": "a_mask.nii.gz"}]
    require_cases(cases(write(tmp_path, training=training, test=["t.nii.gz"])), tmp_path, ["ct"], labelled=True)
    with pytest.raises(ValueError, match=r"Labels are absent \(t\)"):
        require_cases(cases(write(tmp_path, training=[*training, "t.nii.gz"])), tmp_path, ["ct"], labelled=True)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    training = [entry("a"), {"label": "x.nii.gz"}, {"image": PAIR}, entry("b", fold="1"), {"image": "../x.nii.gz"}]
    write(tmp_path, training=training, validation={"image": "v"}, unlabeled=[{"image": "u.nii.gz"}], numTraining=9)
    with pytest.raises(ContradictionError) as caught:
        cases(tmp_path)
    path = tmp_path / "dataset.json"
    expected = [
        f"{path}: validation is no list",
        f"{path} lists cases under unlabeled, which is not read. Move them",
        f"{path} says numTraining 9, but lists 5 cases",
        f"{path} has both folds and a list validation",
        f"{path}, training 1 names no image",
        f"{path}, training 2 has 2 images, but the task has 1 modalities (ct)",
        f"{path}, training 3: fold is '1'. Give a whole number",
        f"{path}, training 4: ../x.nii.gz leads out of",
    ]
    problems = caught.value.problems
    assert all(problem.startswith(words) for problem, words in zip(problems, expected, strict=True)), problems
    assert [case["case_id"] for case in caught.value.cases] == ["a"]


def test_keys_that_are_not_read_are_logged_and_outside_paths_are_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, training=[{"image": "../x.nii.gz", "scanner": "A"}])
    with caplog.at_level(logging.WARNING, "scripts"):
        (item,) = cases(tmp_path, allow_outside=True)
    assert item["image"].endswith("x.nii.gz")
    assert "not read: scanner" in caplog.text


def test_no_list_is_named_with_the_expected_content(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No cases found in .*Expected: dataset\.json"):
        cases(tmp_path)
    with pytest.raises(FileNotFoundError, match="No cases of the data set 'decathlon'"):
        cases(write(tmp_path, training=[]))


def test_nnunet_and_a_data_list_of_the_same_files_are_the_same_cases_and_the_same_split(tmp_path: Path) -> None:
    names = [f"case_{number:02d}" for number in range(10)]
    images = {name: [f"imagesTr/{name}_000{channel}.nii.gz" for channel in (0, 1)] for name in names}
    test = [f"imagesTs/test_1_000{channel}.nii.gz" for channel in (0, 1)]
    listed = [path for pair in images.values() for path in pair]
    for path in (*listed, *test, *(f"labelsTr/{name}.nii.gz" for name in names)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    folds = {name: number % 5 for number, name in enumerate(names)}
    splits = [
        {
            "train": [name for name in names if folds[name] != fold],
            "val": [name for name in names if folds[name] == fold],
        }
        for fold in range(5)
    ]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    training = [
        {"image": images[name], "label": f"labelsTr/{name}.nii.gz", "fold": fold} for name, fold in folds.items()
    ]
    write(
        tmp_path,
        channel_names={"0": "CT", "1": "PET"},
        labels={"background": 0, "tumour": 1},
        numTraining=10,
        training=training,
        testing=[{"image": test}],
    )
    modalities = ["ct", "pet"]
    of_nnunet = datalist("nnunet", tmp_path, modalities=modalities)
    of_monai = datalist("decathlon", tmp_path, modalities=modalities)
    assert of_nnunet == of_monai
    assert len(of_nnunet) == 11
    for fold in range(5):
        training_cases, validation = fold_split(of_nnunet, fold)
        assert (training_cases, validation) == fold_split(of_monai, fold)
        assert [case["case_id"] for case in validation] == splits[fold]["val"]
        assert [case["case_id"] for case in training_cases] == splits[fold]["train"]


@pytest.mark.parametrize("case_id", ["../x", "/x", "a/b", "a\\b", ".hidden"])
def test_an_id_that_would_lead_out_of_a_folder_is_refused(case_id: str, tmp_path: Path) -> None:
    with pytest.raises(ContradictionError, match="cannot be a file name"):
        cases(write(tmp_path, training=[entry("a", case_id=case_id)]))


def test_one_image_in_two_cases_is_refused_with_both(tmp_path: Path) -> None:
    """As two raters of one image would be listed: one of them would validate what the other trains."""
    (tmp_path / "a.nii.gz").touch()
    two = [{"image": "a.nii.gz", "label": f"a_r{rater}.nii.gz", "case_id": f"a_r{rater}"} for rater in (1, 2)]
    for modalities in (["ct"], ["ct", "pet"]):  # an own file, or one 4D file of all modalities
        with pytest.raises(ContradictionError, match=r"a\.nii\.gz is an image of two cases, a_r1 and a_r2\."):
            cases(write(tmp_path, training=two), *modalities)


def test_one_file_as_image_and_label_or_as_the_label_of_two_cases_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "mask"):
        (tmp_path / f"{name}.nii.gz").touch()
    with pytest.raises(ContradictionError, match=r"Case a has \S+a\.nii\.gz as image and as label\."):
        cases(write(tmp_path, training=[{"image": "a.nii.gz", "label": "a.nii.gz"}]))
    shared = [{"image": f"{name}.nii.gz", "label": "mask.nii.gz"} for name in ("a", "b")]
    with pytest.raises(ContradictionError, match=r"mask\.nii\.gz is a label of two cases, a and b\."):
        cases(write(tmp_path, training=shared))
