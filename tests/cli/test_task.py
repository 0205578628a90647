# SPDX-License-Identifier: Apache-2.0
"""A task in a file: what the command line takes from it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.cli.bundle_run import resolved_config
from scripts.cli.main import main, parse_arguments
from scripts.cli.options import context_configs
from scripts.cli.trained_task import task_of

TASK: dict[str, Any] = {
    "cohort": "files",
    "layout": {"t1": "{case}_t1.nii.gz", "label": "{case}_seg.nii.gz"},
    "modalities": ["t1"],
    "intensity": {"t1": "zscore"},
    "labels": [[0], [1], [2]],
    "classes": ["background", "oedema", "core"],
    "regions": {"whole": [1, 2]},
    "spacing": [1, 1, 1],
    "patch": [32, 32, 32],
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(**changes: Any) -> None:
    task = {**TASK, **changes}
    Path("task.json").write_text(json.dumps({key: value for key, value in task.items() if value is not ...}))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--dry-run"]) == 1
    return capsys.readouterr().err


def config(*arguments: str) -> dict[str, Any]:
    args = parse_arguments(list(arguments))
    return resolved_config(args, ["train", *context_configs(args)], {})


def test_a_task_wins_over_the_scale_and_set_over_both() -> None:
    write()
    merged = config("train", "--data", "task.json", "--scale", "full", "--set", "patch=[48,48,48]")
    assert merged["spacing"] == [1, 1, 1]  # full has 2 mm
    assert merged["patch"] == [48, 48, 48]
    assert merged["student_features"] == [32, 64, 128, 256]  # of full
    assert merged["regions"] == {"whole": [1, 2]}
    assert merged["cohort"] == "files"


def test_the_split_file_of_a_task_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From whichever folder the command is typed."""
    write(splits_file="folds/mine.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config("train", "--data", "../task.json")["splits_file"] == str(tmp_path / "folds" / "mine.json")
    assert config("train", "--data", "../task.json", "--set", "splits_file=own.json")["splits_file"] == "own.json"


def test_other_labels_come_without_the_classes_and_regions_of_the_task() -> None:
    write()
    merged = config("train", "--data", "task.json", "--set", "labels=[[0],[1,2]]")
    assert (merged["classes"], merged["regions"]) == (None, None)
    named = config("train", "--data", "sts", "--set", "labels=[[0],[1],[2]]", "--set", 'classes=["b","c","d"]')
    assert named["classes"] == ["b", "c", "d"]
    assert config("train", "--data", "sts", "--set", "labels=[[0],[1]]")["classes"] == ["background", "tumour"]


def test_a_record_with_other_labels_brings_its_own_classes() -> None:
    for more, classes in (({}, None), ({"classes": ["background", "tumour"]}, ["background", "tumour"])):
        record = {"modalities": ["ct"], "labels": [[0], [2]], "cohort": "own", **more}
        Path("model.task.json").write_text(json.dumps(record))
        task = task_of(parse_arguments(["evaluate", "--weights", "model.pt"]))
        assert (task["labels"], task["classes"]) == ([[0], [2]], classes)  # sts has the same names for other labels


def test_text_of_a_task_is_never_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    code = "$open('RAN', 'w').write('x')"
    write(classes=["background", code, "@spacing"])
    assert main(["train", "--data", "task.json", "--dry-run"]) == 0
    assert "$open('RAN'" not in capsys.readouterr().out
    assert not Path("RAN").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalites": ["t1"]}, "has the unknown key modalites. Did you mean modalities?"),
        ({"cohort": ..., "layout": ...}, 'has no cohort. Add one, such as "cohort": "files" with a layout.'),
        ({"spacing": ..., "patch": ...}, "has no spacing, patch. Add it, or let `python -m scripts plan"),
        ({"labels": ...}, "has no labels. Add it, or let"),
    ],
)
def test_incomplete_and_unknown_settings_are_refused(
    changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(**changes)
    assert f"task.json {message}" in refused(capsys, "train", "--data", "task.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": {"core": ["1", "SCT", "x"]}}, "codes has an entry for core, which is no region of this task"),
        ({"codes": {"whole": ["1", "SCT"]}}, 'codes["whole"] has'),
        ({"codes": []}, "codes is []. Give the code of each region"),
        ({"dicom": {"t2": {"Modality": "MR"}}}, "dicom has a rule for t2, which is no modality of this task"),
        ({"dicom": {"t1": "MR"}}, 'dicom["t1"] is'),
    ],
)
def test_codes_and_rules_for_dicom_are_judged_before_a_training(
    changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(**changes)
    assert main(["train", "--data", "task.json", "--dataset-dir", "nowhere", "--output-dir", "out"]) == 1
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_files_that_are_no_task_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (("[1]", "is not the description of a task"), ("{", "task.json is not JSON")):
        Path("task.json").write_text(content)
        assert message in refused(capsys, "train", "--data", "task.json")
    for name in ("none.json", "nothing"):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--data", name])
    assert "nothing is none of hecktor21, phantom, picai22, sts, and no FILE.json" in capsys.readouterr().err


def test_segment_has_an_option_for_each_modality_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    write(modalities=["t1", "t2"], intensity={"t1": "zscore", "t2": "zscore"})
    args = parse_arguments(["segment", "--data", "task.json", "--t1", "a", "--image", "t2=b", "--output", "m.nii.gz"])
    assert dict(args.image) == {"t1": "a", "t2": "b"}
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["segment", "--data", "task.json", "--ct", "a", "--output", "m.nii.gz"])
    assert "unrecognized arguments: --ct a" in capsys.readouterr().err
    common = ("segment", "--data", "task.json", "--weights", "none.pt", "--output", "m.nii.gz")
    assert "Two images are named as t1: b and a" in refused(capsys, *common, "--t1", "a", "--image", "t1=b")
    assert "ct is no modality of this task. Images are --t1, --t2, the modalities" in refused(
        capsys, *common, "--image", "ct=a"
    )


def test_the_task_travels_with_the_weights() -> None:
    Path("model.task.json").write_text(json.dumps(TASK))
    args = parse_arguments(["segment", "--weights", "model.pt", "--t1", "a", "--output", "m.nii.gz"])
    assert args.image == [("t1", "a")]
    task = task_of(args)
    assert {key: task[key] for key in TASK} == TASK
    args = parse_arguments(["evaluate", "--weights", "model.pt", "--set", "spacing=[2,2,2]"])
    assert task_of(args)["spacing"] == [2, 2, 2]


def test_an_image_of_another_task_is_refused_with_the_origin_of_the_modalities(
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = ["--t1", "a", "--output", "m.nii.gz"]
    assert main(["segment", "--weights", "RUNS/modell.pt", *image]) == 1
    assert capsys.readouterr().err == "error: No weights at RUNS/modell.pt. Check --weights.\n"
    Path("copied.pt").touch()
    for weights, words in (
        (["--weights", "copied.pt"], "copied.pt has no copied.task.json beside it. Copy it too, or add --data."),
        ([], "Images are --ct, --pet, --mr, the modalities of the shipped weights. Name yours with --weights."),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["segment", *weights, *image])
        assert words in capsys.readouterr().err
        assert words in refused(capsys, "segment", *weights, "--image", "t1=a", "--output", "m.nii.gz")


@pytest.mark.parametrize("verb", ["evaluate", "segment"])
def test_a_task_without_weights_asks_for_them(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    error = refused(capsys, verb, "--data", "task.json", *(["--t1", "a", "--output", "m.nii.gz"] * (verb == "segment")))
    assert "its modalities is ['ct', 'pet', 'mr'], this run's is ['t1']" in error
    assert error.endswith("These are the shipped weights. Name yours with --weights FILE.\n")
    assert "ignore_task" not in error


@pytest.mark.parametrize("key", ["intensity", "labels", "patch"])
def test_null_says_nothing(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(**{key: None})
    assert f"task.json has no {key}. Add it" in refused(capsys, "train", "--data", "task.json", "--dataset-dir", ".")
