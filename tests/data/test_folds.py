# SPDX-License-Identifier: Apache-2.0
"""Splits of patients into folds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from scripts.cli.main import main
from scripts.data.folds import chosen_cases, fold_split, make_splits, smallest_training

# 23 patients; every fourth has two studies, as in PI-CAI
CASES: list[dict[str, Any]] = [
    {"case_id": f"P{patient:02d}_{study}", "patient_id": f"P{patient:02d}"}
    for patient in range(23)
    for study in range(1 + (patient % 4 == 0))
]
PATIENTS = sorted({case["patient_id"] for case in CASES})


def ids(cases: list[dict[str, Any]], key: str = "patient_id") -> set[str]:
    return {case[key] for case in cases}


def test_folds_are_disjoint_balanced_and_complete() -> None:
    folds = make_splits([case["patient_id"] for case in CASES], folds=5)
    assert sorted(patient for fold in folds for patient in fold) == PATIENTS
    assert {len(fold) for fold in folds} == {4, 5}


def test_folds_depend_on_the_seed_and_not_on_the_order_of_the_patients() -> None:
    assert make_splits(PATIENTS, seed=3) == make_splits(PATIENTS[::-1] * 2, seed=3)
    assert make_splits(PATIENTS, seed=3) != make_splits(PATIENTS, seed=4)


def test_the_studies_of_a_patient_stay_together() -> None:
    for fold in range(5):
        training, validation = fold_split(CASES, fold=fold)
        assert ids(training).isdisjoint(ids(validation))
        assert ids(training, "case_id") | ids(validation, "case_id") == ids(CASES, "case_id")
        assert len(training) + len(validation) == len(CASES)


def test_every_patient_is_validated_once() -> None:
    validated = [patient for fold in range(5) for patient in ids(fold_split(CASES, fold=fold)[1])]
    assert sorted(validated) == PATIENTS


def test_without_a_fold_all_cases_train() -> None:
    assert fold_split(CASES, fold=None) == (CASES, [])


def test_no_cases_give_no_split_and_no_file(tmp_path: Path) -> None:
    assert fold_split([], file=tmp_path / "splits.json") == ([], [])
    assert not list(tmp_path.iterdir())


def test_the_file_is_written_once_and_then_used(tmp_path: Path) -> None:
    file = tmp_path / "new" / "splits.json"
    first = fold_split(CASES, fold=1, seed=7, file=file)
    written = file.read_text()
    assert json.loads(written) == {"seed": 7, "folds": make_splits(PATIENTS, seed=7)}
    assert fold_split(CASES, fold=1, seed=8, folds=3, file=str(file)) == first
    assert file.read_text() == written
    assert [path.name for path in file.parent.iterdir()] == ["splits.json"]


def test_a_path_that_was_mistyped_does_not_give_other_folds_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "typo.json"
    with pytest.raises(FileNotFoundError, match=r"There is no split file at .*typo\.json\. Check splits_file"):
        fold_split(CASES, file=file, training=False)
    assert not list(tmp_path.iterdir())
    fold_split(CASES, file=tmp_path / "default.json")
    assert not caplog.records
    fold_split(CASES, file=file, named=True)
    assert f"There is no split file at {file}: new folds are written there" in caplog.text


def test_a_fold_of_all_patients_leaves_none_to_train_but_all_to_be_answered_for(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"seed": 0, "folds": [PATIENTS]}))
    split = fold_split(CASES, file=file)
    assert [len(part) for part in split] == [0, len(CASES)]
    assert chosen_cases(split, "all") == chosen_cases(split, "validation") == split[1]
    with pytest.raises(ValueError, match=r"no training cases\. The validation fold holds all patients"):
        chosen_cases(split, "training")
    names = [f"PHANTOM_{number:03d}" for number in range(1, 7)]
    file.write_text(json.dumps({"seed": 0, "folds": [names]}))
    command = ["train", "--data", "phantom", "--dataset-dir", str(cohort), "--device", "cpu", "--set"]
    assert main([*command, f"splits_file={file}", "--output-dir", str(tmp_path / "out")]) == 1
    assert "The validation fold holds all patients. Choose another fold" in capsys.readouterr().err


def test_a_file_written_by_hand_is_used(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"name": "mine", "seed": 0, "folds": [PATIENTS[:2], PATIENTS[2:]]}))
    assert ids(fold_split(CASES, fold=0, file=file)[1]) == set(PATIENTS[:2])


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([[*PATIENTS[:3], "X1", "X2"], PATIENTS[3:]], "without a case on disk: X1, X2. Restore"),
        ([PATIENTS[:3], PATIENTS[5:]], "does not list these patients on disk: P03, P04. Add each"),
        ([PATIENTS[:4], PATIENTS[3:]], r"more than once: P03 \(folds 0, 1\)"),
        ([[*PATIENTS[:4], "P03"], PATIENTS[4:]], r"more than once: P03 \(folds 0, 0\)"),
        ("P00", "has no list 'folds'"),
        ([], "has no list 'folds'"),
    ],
)
def test_a_file_that_does_not_match_the_patients_is_refused_by_name(folds: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"seed": 0, "folds": folds}))
    with pytest.raises(ValueError, match=f"splits.json .*{message}"):
        fold_split(CASES, file=file)


def test_a_file_that_is_not_json_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    file.write_text('{"seed": 0, "folds": [["P0')
    with pytest.raises(ValueError, match=r"splits\.json cannot be read"):
        fold_split(CASES, file=file)


def test_fewer_patients_than_folds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"23 patient\(s\) cannot fill 24 folds"):
        fold_split(CASES, folds=24)


def test_few_patients_are_told_how_to_name_folds(tmp_path: Path) -> None:
    cases = [{"case_id": patient, "patient_id": patient, "label": "l"} for patient in ("A", "B", "C")]
    with pytest.raises(ValueError, match="3 patient") as caught:
        fold_split(cases)
    example = str(caught.value).partition("such as ")[2].partition(", and name it: --set splits_file=FILE.")[0]
    (tmp_path / "folds.json").write_text(example)
    training, validation = fold_split(cases, fold=1, file=tmp_path / "folds.json")
    assert (ids(training), ids(validation)) == ({"A", "C"}, {"B"})
    with pytest.raises(ValueError, match=r"1 patient\(s\) cannot fill 5 folds. Add cases of other patients"):
        fold_split(cases[:1])


def test_a_single_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 folds, got 1"):
        make_splits(PATIENTS, folds=1)


@pytest.mark.parametrize("fold", [-1, 5])
def test_a_fold_that_does_not_exist_is_refused_and_nothing_is_written(fold: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Choose one of 0 to 4"):
        fold_split(CASES, fold=fold, file=tmp_path / "splits.json")
    assert not list(tmp_path.iterdir())


def own(case: str, patient: str = "", **more: Any) -> dict[str, Any]:
    return {"case_id": case, "patient_id": patient or case, "label": f"{case}.nii.gz", **more}


OWN_FOLDS = [own("a", fold=1), own("b", fold=0), own("c", fold=1), own("d"), own("t", partition="test")]


@pytest.mark.parametrize(("fold", "training", "validation"), [(0, "acd", "b"), (1, "bd", "ac")])
def test_the_folds_of_the_data_set_are_used_and_written(
    fold: int, training: str, validation: str, tmp_path: Path
) -> None:
    file = tmp_path / "splits.json"
    for _ in range(2):  # made, then read from the file
        parts = fold_split(OWN_FOLDS, fold, file=file)
        assert [[case["case_id"] for case in part] for part in parts] == [list(training), list(validation)]
    assert json.loads(file.read_text())["folds"] == [["b"], ["a", "c"]]


def test_a_split_file_comes_before_the_folds_of_the_data_set(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"folds": [["a", "b"], ["c", "d"]]}))
    assert [case["case_id"] for case in fold_split(OWN_FOLDS, 1, file=file)[1]] == ["c", "d"]


def test_a_case_without_a_fold_follows_its_patient() -> None:
    training, validation = fold_split([own("a1", "a", fold=0), own("a2", "a"), own("b", fold=1)], 0)
    assert [case["case_id"] for case in training] == ["b"]
    assert [case["case_id"] for case in validation] == ["a1", "a2"]


def test_a_patient_in_two_folds_of_the_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"puts patient a into the folds 0 and 1\. Put all cases"):
        fold_split([own("a1", "a", fold=0), own("a2", "a", fold=1)], 0)


def test_a_fold_without_a_patient_is_refused(tmp_path: Path) -> None:
    cases = [own("a", fold=0), own("b", fold=2)]
    with pytest.raises(ValueError, match=r"Fold 1 has no patient\. Choose another"):
        fold_split(cases, 1, file=tmp_path / "splits.json")
    with pytest.raises(ValueError, match=r"Fold 3 does not exist\. Choose one of 0 to 2"):
        fold_split(cases, 3)


@pytest.mark.parametrize("fold", [0, None])
def test_test_cases_neither_train_nor_validate_and_their_number_is_logged(
    fold: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    test = [own("t1", partition="test"), own("t2", partition="test")]
    with caplog.at_level(logging.INFO, "scripts"):
        training, validation = fold_split([*CASES, *test], fold)
    assert (training, validation) == fold_split(CASES, fold)
    assert "2 of 31 cases are test cases: they neither train nor validate" in caplog.text
    assert fold_split(test, fold) == ([], [])


def test_the_chosen_cases_are_training_validation_or_all() -> None:
    split = ([{"case_id": "a"}, {"case_id": "b"}], [{"case_id": "c"}])
    assert chosen_cases(split, "training") == split[0]
    assert chosen_cases(split, "validation") == split[1]
    assert chosen_cases(split, "all") == [*split[0], *split[1]]
    assert chosen_cases(([], []), "training") == []
    with pytest.raises(ValueError, match=r"The split has no validation cases\. Choose another fold, or other cases"):
        chosen_cases((split[0], []), "validation")
    with pytest.raises(ValueError, match=r"Unknown cases 'some': choose one of training, validation, all"):
        chosen_cases(split, "some")


def test_the_smallest_training_set_is_that_of_the_fold_with_most_cases(tmp_path: Path) -> None:
    cases = [own(f"v{number}", fold=0) for number in range(16)] + [own(f"t{number}") for number in range(4)]
    assert smallest_training(cases) == 4
    assert smallest_training(CASES) == min(len(fold_split(CASES, fold)[0]) for fold in range(5))
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"seed": 0, "folds": [PATIENTS[:20], PATIENTS[20:]]}))
    assert smallest_training(CASES, file) == len(fold_split(CASES, 0, file=file)[0])
    assert smallest_training([own("a"), own("b"), own("c")]) == 2  # too few for five folds: one validates
