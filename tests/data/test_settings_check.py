# SPDX-License-Identifier: Apache-2.0
"""Wrong settings end a run in one sentence before anything is read, by the verbs and by ``monai.bundle run``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.cli.config import CONFIGS
from scripts.cli.main import main
from scripts.data import check_settings

SHARED = {
    "spacing=[0,3,3]": "spacing is [0, 3, 3]. Give three numbers in mm",
    "spacing=[-3,3,3]": "spacing is [-3, 3, 3]. Give three numbers in mm",
    "spacing=[0.001,3,3]": "spacing is [0.001, 3, 3]. Give three numbers in mm, from 0.02 to 50",
    "intensity=5": "intensity is 5. Give a range per modality",
    'modalities=["case_id"]': 'modalities is ["case_id"]. Give a list of different names of letters, digits, _ and -',
    'modalities=["t1=1"]': 'modalities is ["t1=1"]. Give a list of different names',
    "spacing=[3,3]": "spacing is [3, 3]. Give three numbers in mm",
    "spacing=3": "spacing is 3. Give three numbers in mm",
    "spacing=null": "spacing is null. Give three numbers in mm",
    "spacing=[3,3,NaN]": "spacing is [3, 3, NaN]. Give three numbers in mm",
    "spacing=[3,3,Infinity]": "spacing is [3, 3, Infinity]. Give three numbers in mm",
    "patch=[64,64]": "patch is [64, 64]. Give three positive whole numbers, such as [64, 64, 64]: patches are volumes",
    "patch=[64,64,0]": "patch is [64, 64, 0]. Give three positive whole numbers",
    "patch=[64,64,1.5]": "patch is [64, 64, 1.5]. Give three positive whole numbers",
    "intensity#pet=[10,0]": 'intensity["pet"] is [10, 0]. Give [low, high]',
    "intensity#pet=[5,5]": 'intensity["pet"] is [5, 5]. Give [low, high]',
    "intensity#pet=zcore": 'intensity["pet"] is "zcore". Give [low, high]',
    'intensity={"ct": [-200, 300]}': "intensity has no entry for ['pet', 'mr']",
    "labels=[]": "labels is []. Give a list of the label's values for each class",
    "labels=[[0],[]]": "labels is [[0], []]. Give a list of the label's values for each class",
    "labels=[0,1]": "labels is [0, 1]. Give a list of the label's values for each class",
    "labels=[[0],[1,2],[2]]": "labels lists the value 2 in classes 1 and 2. Give each value to one class",
    'modalities=["ct","ct"]': 'modalities is ["ct", "ct"]. Give a list of different names',
    "allow_missing=no": 'allow_missing is "no". Give true or false',
    "stacked=1": "stacked is 1. Give true or false",
    "fold=-1": "fold is -1. Give the number of a fold, from 0",
    "fold=0.5": "fold is 0.5. Give the number of a fold, from 0",
}
TRAINING = {
    "student_features=8": "student_features is 8. Give the channels of each stage",
    'student_features=[8,"a"]': 'student_features is [8, "a"]. Give the channels of each stage',
    "flips=[[0]]": "flips is [[0]]. Give the axes that may be flipped",
    "student_norm=[]": "student_norm is []. Give a name, or a name and its options",
    "student_strides=2": "student_strides is 2. Give a whole number of at least 1, or three of them",
    "batch_size=0": "batch_size is 0. Give a whole number of at least 1",
    "batch_size=-2": "batch_size is -2. Give a whole number of at least 1",
    "batch_size=1.5": "batch_size is 1.5. Give a whole number of at least 1",
    "max_epochs=0": "max_epochs is 0. Give a whole number of at least 1",
    "val_interval=0": "val_interval is 0. Give a whole number of at least 1",
    "accumulation=0": "accumulation is 0. Give a whole number of at least 1",
    "num_workers=-1": "num_workers is -1. Give a whole number of at least 0",
    "learning_rate=-0.1": "learning_rate is -0.1. Give a number of at least 0",
    "learning_rate=fast": 'learning_rate is "fast". Give a number of at least 0',
    "modality_dropout=1": "modality_dropout is 1. Give a probability from 0 to below 1",
    "resume=yes": 'resume is "yes". Give true or false',
}
INFERENCE = {
    "overlap=1": "overlap is 1. Give a number from 0 to below 1",
    "overlap=-0.1": "overlap is -0.1. Give a number from 0 to below 1",
    "overlap=null": "overlap is null. Give a number from 0 to below 1",
    "memory_gib=0": "memory_gib is 0. Give a positive number",
}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one error message of a verb that fails."""
    assert main([str(each) for each in arguments]) == 1
    errors = capsys.readouterr().err
    (message,) = (line.removeprefix("error: ") for line in errors.splitlines() if line.startswith("error: "))
    assert "Traceback" not in errors
    return message


@pytest.mark.parametrize("setting", [*SHARED, *TRAINING])
def test_train_refuses_a_wrong_setting_before_anything_is_read_or_written(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the data set does not exist, which would be the next error."""
    words = (SHARED | TRAINING)[setting]
    arguments = ("train", "--dataset-dir", tmp_path / "none", "--output-dir", tmp_path / "run", "--set", setting)
    assert refusal(capsys, *arguments).startswith(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", [key for key in SHARED | INFERENCE if not key.startswith("modalities")])
def test_segment_refuses_a_wrong_setting_before_anything_is_read_or_written(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (SHARED | INFERENCE)[setting]
    images = [word for key in ("ct", "pet", "mr") for word in (f"--{key}", tmp_path / f"{key}.nii.gz")]
    message = refusal(capsys, "segment", *images, "--output", tmp_path / "out" / "mask.nii.gz", "--set", setting)
    assert message.startswith(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["evaluate", "distill", "cache-teachers", "export", "teacher", "check"])
def test_every_verb_refuses_wrong_settings(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting in ("spacing=[0,3,3]", "labels=[[0,1],[1]]"):
        message = refusal(capsys, verb, "--dataset-dir", tmp_path / "none", "--set", setting)
        assert message.startswith(SHARED.get(setting, "labels lists the value 1 in classes 0 and 1. Give each value"))


def test_cache_teachers_checks_its_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "cache-teachers", "--dataset-dir", tmp_path / "none", "--set", "overlap=1.5")
    assert message.startswith("overlap is 1.5. Give a number from 0 to below 1")


def test_a_fold_that_does_not_exist_is_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", "phantom", "--dataset-dir", cohort, "--output-dir", tmp_path / "run", "--fold", 5)
    assert refusal(capsys, "train", *arguments) == "Fold 5 does not exist. Choose one of 0 to 4."


@pytest.mark.parametrize("config", ["train", "inference"])
def test_monai_bundle_run_refuses_a_wrong_setting(config: str, tmp_path: Path) -> None:
    from monai.bundle import run

    with pytest.raises(RuntimeError) as refused:
        run(
            config_file=str(CONFIGS / f"{config}.json"),
            meta_file=str(CONFIGS / "metadata.json"),
            logging_file=False,  # type: ignore[arg-type]
            output_dir=str(tmp_path / "run"),
            dataset_dir=str(tmp_path / "none"),
            spacing=[0, 3, 3],
        )
    assert re.match(r"spacing is \[0, 3, 3\]\. Give three numbers", str(refused.value.__cause__))
    assert not (tmp_path / "run").exists()


def test_statistics_of_too_few_values_are_refused() -> None:
    for norm in ("batch", ["batch", {"affine": True}], "BATCH"):
        with pytest.raises(ValueError, match="batch normalisation, and batch_size is 1"):
            check_settings(student_norm=norm, batch_size=1)
        check_settings(student_norm=norm, batch_size=2)
    check_settings(student_norm=["group", {"num_groups": 8}], batch_size=1)
    with pytest.raises(ValueError, match="is a single voxel on the"):
        check_settings(student_norm="instance", patch=[16, 16, 16], student_features=[4, 8, 8, 8])
    check_settings(student_norm="instance", patch=[16, 16, 32], student_features=[4, 8, 8, 8])
    strides = [[2, 2, 1], 2, 2, 2]
    check_settings(student_norm="instance", patch=[16, 16, 16], student_features=[4, 8, 8, 8], student_strides=strides)


@pytest.mark.parametrize("strides", [[2, 2], [2, 2, [2, 2]], [2, 2, 0], 2, [2, 2, 1.5], [2, 2, [1, 2, 0]]])
def test_strides_that_do_not_fit_the_stages_are_refused(strides: Any) -> None:
    with pytest.raises(
        ValueError, match=r"student_strides is .*three of them, for each of the 3 stages, such as \[\[2"
    ):
        check_settings(student_features=[4, 8, 8], student_strides=strides)
    check_settings(student_features=[4, 8, 8], student_strides=[1, [2, 2, 1], 2])


@pytest.mark.parametrize("name", ["sts", "hecktor21", "picai22", "phantom"])
def test_the_settings_of_the_data_sets_are_accepted(name: str) -> None:
    config = json.loads((CONFIGS / "data" / f"{name}.json").read_text())
    check_settings(**{key: config[key] for key in ("modalities", "intensity", "labels", "spacing", "patch")})
