# SPDX-License-Identifier: Apache-2.0
"""The record of a training: in the checkpoint, beside the weights, and its comparison with commands and configs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from scripts.cli.main import main
from scripts.training.training_record import definition, read_task, task_path, training_record
from scripts.utils.checksums import sha256

TINY = [
    "--data", "phantom", "--threads", "1", "--device", "cpu", "--set", "patch=[16,16,16]",
    "--set", "spacing=[12,12,12]", "--set", "student_features=[4,8,8,8]", "--set", "val_interval=100",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--epochs", "1",
]  # fmt: skip
DYNUNET = ["--set", "patch=[32,32,32]", "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]},"uxnet":{}}']
STUDENT = {
    "_target_": "scripts.networks.Student",
    "in_channels": 3,
    "out_channels": 2,
    "features": [4, 8, 8, 8],
    "norm": ["group", {"num_groups": 4}],
    "selective_fusion": False,
    "modality_dropout": 0.0,
}


def test_a_training_keeps_its_record_in_the_checkpoint_and_beside_the_weights(cohort: Path, tmp_path: Path) -> None:
    assert main(["train", *TINY, "--fold", "1", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path)]) == 0
    task = json.loads((tmp_path / "model.task.json").read_text())
    expected = {
        "weights_sha256": sha256(tmp_path / "model.pt"),
        "cohort": "phantom",
        "modalities": ["ct", "pet", "mr"],
        "intensity": {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]},
        "labels": [[0], [1]],
        "spacing": [12, 12, 12],
        "patch": [16, 16, 16],
        "fold": 1,
        "seed": 0,
        "epochs": 1,
        "batch_size": 2,
        "learning_rate": 0.001,
        "network": STUDENT,
        "segmentation_loss": {
            "_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "include_background": False
        },
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }  # fmt: skip
    assert {key: task[key] for key in expected} == expected
    assert "loss" not in task
    assert "teachers_sha256" not in task
    splits = json.loads((tmp_path / "splits.json").read_text())["folds"]
    assert [case["patient_id"] for case in task["validation_cases"]] == splits[1]
    ids = [case["case_id"] for key in ("training_cases", "validation_cases") for case in task[key]]
    assert sorted(ids) == [f"PHANTOM_{i:03d}" for i in range(1, 7)]
    record = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["record"]
    assert record == {key: value for key, value in task.items() if key != "weights_sha256"}
    assert read_task(tmp_path / "model.pt") == task


def test_a_distillation_also_keeps_its_terms_and_teachers(cohort: Path, tmp_path: Path) -> None:
    common = [*TINY, *DYNUNET, "--dataset-dir", str(cohort)]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert (
        main(["teacher", *common, "--architecture", "dynunet", "--modalities", "pet", "--output-dir", str(teacher)])
        == 0
    )
    network = read_task(teacher / "model.pt")["network"]  # type: ignore[index]
    assert network["options"] == {"dynunet": {"filters": [2, 4, 4, 4, 4]}, "uxnet": {}}
    assert (network["architecture"], network["modalities"]) == ("dynunet", ["pet"])
    asked = ["--method", "hinton", "--teacher", f"dynunet:pet={teacher / 'model.pt'}"]
    assert main(["distill", *common, *asked, "--output-dir", str(student)]) == 0
    task: Any = read_task(student / "model.pt")
    assert task["teachers_sha256"] == {"dynunet_pet": sha256(teacher / "model.pt")}
    term = {"tap": "logits", "weight": 0.5, "loss": {"_target_": "scripts.losses.SoftPredictionLoss"}}
    assert task["loss"] == {
        "_target_": "scripts.distillation.loss.DistillationLoss", "weighting": "mean", "terms": {"hinton": term}
    }  # fmt: skip
    assert task["network"] == STUDENT


def test_a_definition_follows_references_and_builds_nothing() -> None:
    config = {
        "imports": ["$import math"],
        "sizes": [1, 2, 3],
        "last": "$@sizes[-1] + math.floor(0.5)",
        "built": {"_target_": "does.not.Exist"},
        "norm": {"name": "group", "sizes": "@sizes"},
        "net": {
            "_target_": "does.not.Exist", "a": "@last", "b": ["@sizes", "@norm"], "c": "$@built.size", "d": "@built",
            "e": "user@place",
        },
    }  # fmt: skip
    assert definition(ConfigParser(config), "net") == {
        "_target_": "does.not.Exist",
        "a": 3,
        "b": [[1, 2, 3], {"name": "group", "sizes": [1, 2, 3]}],
        "c": "$@built.size",
        "d": {"_target_": "does.not.Exist"},
        "e": "user@place",
    }


def test_without_a_config_the_record_holds_the_settings_and_the_cases() -> None:
    case = {"case_id": "A", "patient_id": "P", "image": "a.nii"}
    record = training_record([[case], []], {"spacing": (1.0, 2.0), "device": torch.device("cpu"), "pi": math.pi})
    versions = {"bundle_version", "git_commit"}
    assert {key: value for key, value in record.items() if key not in versions} == {
        "spacing": [1.0, 2.0],
        "device": "cpu",
        "pi": math.pi,
        "training_cases": [{"case_id": "A", "patient_id": "P"}],
        "validation_cases": [],
    }


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b""])
def test_a_damaged_task_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    assert read_task(tmp_path / "model.pt") is None
    assert task_path(tmp_path / "a.b.pt").name == "a.b.task.json"
    task_path(tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.task\.json .*Restore it, or remove it"):
        read_task(tmp_path / "model.pt")
