# SPDX-License-Identifier: Apache-2.0
"""What ``--teacher`` means."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.cli.main import main
from scripts.cli.teacher_options import teacher_specs, teachers_overrides

ALL = ["ct", "pet"]


def specs(*texts: str) -> dict[str, dict[str, Any]]:
    return teacher_specs(argparse.Namespace(teacher=list(texts)), ALL)


@pytest.mark.parametrize(
    ("text", "name", "spec"),
    [
        ("unetr=w.pt", "unetr", {"architecture": "unetr", "weights": "w.pt", "modalities": ALL}),
        ("unetr=random", "unetr", {"architecture": "unetr", "weights": None, "modalities": ALL}),
        ("unetr:pet=w.pt", "unetr_pet", {"architecture": "unetr", "weights": "w.pt", "modalities": ["pet"]}),
        (
            "unetr:pet+ct=w.pt",
            "unetr_pet_ct",
            {"architecture": "unetr", "weights": "w.pt", "modalities": ["pet", "ct"]},
        ),
        ("big=unetr=w.pt", "big", {"architecture": "unetr", "weights": "w.pt", "modalities": ALL}),
        ("big=unetr:ct=w.pt", "big", {"architecture": "unetr", "weights": "w.pt", "modalities": ["ct"]}),
        ("big:unetr=w.pt", "big", {"architecture": "unetr", "weights": "w.pt", "modalities": ALL}),
        ("big:unetr:ct=w.pt", "big", {"architecture": "unetr", "weights": "w.pt", "modalities": ["ct"]}),
        ("runs/big.json:ct=w.pt", "big_ct", {"architecture": "runs/big.json", "weights": "w.pt", "modalities": ["ct"]}),
        ("one=big.json=w.pt", "one", {"architecture": "big.json", "weights": "w.pt", "modalities": ALL}),
        ("unetr=a.pt,b.pt", "unetr", {"architecture": "unetr", "weights": ["a.pt", "b.pt"], "modalities": ALL}),
        (
            "unetr=runs/lr=0.1/w.pt",
            "unetr",
            {"architecture": "unetr", "weights": "runs/lr=0.1/w.pt", "modalities": ALL},
        ),
    ],
)
def test_a_teacher_in_one_word(text: str, name: str, spec: dict[str, Any]) -> None:
    assert specs(text) == {name: spec}


def test_a_modality_may_have_a_hyphen() -> None:
    args = argparse.Namespace(teacher=["big=dynunet:t1-ce+t1=W.pt", "nn=nnunet:t1-ce=F"])
    assert teacher_specs(args, ["t1", "t1-ce"]) == {
        "big": {"architecture": "dynunet", "weights": "W.pt", "modalities": ["t1-ce", "t1"]},
        "nn": {"nnunet": "F", "modalities": ["t1-ce"]},
    }


def test_two_teachers_of_one_architecture_both_count() -> None:
    found = specs("one=unetr=a.pt", "two=unetr=b.pt", "unetr:ct=c.pt")
    assert {name: spec["weights"] for name, spec in found.items()} == {"one": "a.pt", "two": "b.pt", "unetr_ct": "c.pt"}
    with pytest.raises(ValueError, match=r"Two teachers are named unetr\. Give each a name"):
        specs("unetr=a.pt", "unetr=b.pt")


def test_a_specification_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    spec = {"network": {"_target_": "x.Y"}, "weights": "w.pt", "layers": {"deep": "a", "fine": "b"}}
    path.write_text(json.dumps(spec))
    overrides = teachers_overrides(
        argparse.Namespace(teacher=[f"mine={path}"], teachers_dir=None, unlabelled=False, set=[]), ALL
    )
    assert overrides == {"teacher_specs": {"mine": {"modalities": ALL, **spec}}}


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["unetr"], "--teacher unetr has no weights"),
        (["=w.pt"], "has no weights"),
        (["unetr="], "has no weights"),
        (["mine=nowhere.json"], "There is no specification of a teacher at nowhere.json"),
        (["unetr:ct+foo=w.pt"], "foo is no modality (ct, pet, mr) and no architecture (dynunet, "),
        (["a=unetr=random", "a=dynunet=random"], "Two teachers are named a"),
    ],
)
def test_a_teacher_that_is_no_teacher_is_refused_in_one_sentence(
    texts: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", *(word for text in texts for word in ("--teacher", text)), "--dry-run"]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["distill", "cache-teachers"])
def test_a_folder_of_the_default_teachers_beside_others_is_refused(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--teachers-dir", "T", "--teacher", "unetr=random", "--dry-run"]) == 1
    assert "--teachers-dir holds the weights of the default teachers, and unetr replace" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["distill", "cache-teachers"])
def test_a_task_without_the_modalities_of_the_default_teachers_asks_for_teachers(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [verb, "--data", "hecktor21", "--dry-run"]
    assert main(command) == 1
    assert capsys.readouterr().err == (
        "error: This task has no mr for the three default teachers, only ct, pet. Name yours: --teacher "
        "ARCHITECTURE=WEIGHTS.\n"
    )
    for more in (["--teacher", "dynunet=random"], ["--set", "teacher_specs={}"], ["--set", "+teachers#ct=null"]):
        assert main([*command, *more]) == 0


@pytest.mark.parametrize(
    ("verb", "sentence"),
    [
        ("distill", "error: No weights at RUNS/teacher_ct/model.pt: train the network first or check the path."),
        ("cache-teachers", "error: There is no file RUNS/teacher_ct/model.pt. Make it first, or check the path."),
    ],
)
def test_missing_weights_of_a_teacher_are_named_in_a_sentence(
    verb: str, sentence: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dataset-dir", str(cohort), "--teachers-dir", "RUNS", "--output-dir", str(tmp_path), "--device", "cpu"]
    assert main([verb, "--data", "phantom", *where]) == 1
    assert sentence in capsys.readouterr().err


def test_a_patch_that_an_included_teacher_does_not_take_is_refused_before_the_training(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--data", "phantom", "--dataset-dir", str(cohort), "--set", "patch=[32,48,32]", "--device", "cpu"]
    teacher = ["--teacher", "big=swinunetr=random", "--method", "hinton"]
    assert main(["distill", *task, *teacher, "--output-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: The teacher big cannot be used: SwinUNETR cannot segment an image of 3 channels")
    assert "must be divisible by 2**5. Choose another patch for the task (--set patch=[X,Y,Z]), or another" in error
