# SPDX-License-Identifier: Apache-2.0
"""Nested regions by a sigmoid head, with voxels to ignore, from training to masks: by the command line, on phantoms."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from scripts.cli.main import main
from scripts.networks.teacher import Teacher
from scripts.report.curves import read_curves

TASK = [
    "--data", "phantom", "--threads", "1", "--device", "cpu", "--set", "labels=[[0],[1],[4]]",
    "--set", 'classes=["background","rim","core"]', "--set", 'regions={"whole":[1,4],"core":[4]}',
    "--set", "ignore=9", "--set", "patch=[32,32,16]", "--set", "spacing=[12,12,12]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", 'architectures={"dynunet":{"filters":[2,4,4,4]}}',
]  # fmt: skip
SIGMOID = ["--set", "head=sigmoid"]


@pytest.fixture(scope="module")
def nested(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms; the inner part of each tumour has the value 4, and the last planes are not labelled: 9."""
    folder = tmp_path_factory.mktemp("nested") / "cohort"
    shutil.copytree(cohort, folder)
    for path in folder.rglob("CT_mask.nii.gz"):
        image = nib.load(path)  # type: ignore[attr-defined]
        label = np.asarray(image.dataobj).astype(np.uint8)
        label[binary_erosion(label > 0, iterations=2)] = 4
        label[..., -4:] = 9
        assert set(np.unique(label).tolist()) == {0, 1, 4, 9}
        nib.save(nib.Nifti1Image(label, image.affine), path)  # type: ignore[attr-defined]
    return folder


@pytest.fixture
def run(nested: Path) -> Callable[..., int]:
    def call(verb: str, output: Path, *arguments: str) -> int:
        epochs = ["--epochs", "1", "--set", "val_interval=1"] if verb in ("train", "teacher", "distill") else []
        return main([verb, *TASK, "--dataset-dir", str(nested), "--output-dir", str(output), *epochs, *arguments])

    return call


@pytest.fixture(scope="module")
def softmax_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with one output per class, and its record."""
    return teacher_weights(tmp_path_factory.mktemp("softmax"), 3, {"head": "softmax"})


def teacher_weights(folder: Path, outputs: int, record: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    options = {"dynunet": {"filters": [2, 4, 4, 4]}}
    teacher = Teacher(["pet"], ["ct", "pet", "mr"], outputs, [32, 32, 16], "dynunet", options=options)
    torch.save({"model": teacher.state_dict()}, folder / "model.pt")
    (folder / "model.task.json").write_text(json.dumps(record))
    return folder / "model.pt"


def test_a_sigmoid_student_and_its_sigmoid_teacher(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["--architecture", "dynunet", "--modalities", "pet"]
    assert run("teacher", tmp_path / "teacher", *SIGMOID, *teacher) == 0
    weights = tmp_path / "teacher" / "model.pt"
    record = json.loads((tmp_path / "teacher" / "model.task.json").read_text())
    assert (record["head"], record["network"]["out_channels"]) == ("sigmoid", 2)
    assert run("distill", tmp_path / "out", *SIGMOID, "--method", "hinton", "--teacher", f"dynunet:pet={weights}") == 0
    record = json.loads((tmp_path / "out" / "model.task.json").read_text())
    assert record["sigmoid_regions"] == [[1, 2], [2]]
    assert record["segmentation_loss"]["regions"] == [[1, 2], [2]]
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert row["loss/hinton"] > 0
    assert {"val_dice/whole", "val_dice/core"} <= set(row)
    weights = tmp_path / "out" / "model.pt"
    assert run("evaluate", tmp_path / "evaluated", "--weights", str(weights)) == 0  # the head is that of the weights
    masks = [nib.load(path) for path in (tmp_path / "evaluated" / "masks").glob("*.nii.gz")]  # type: ignore[attr-defined]
    assert set(np.concatenate([np.unique(mask.dataobj) for mask in masks]).tolist()) <= {0, 1, 4}
    with (tmp_path / "evaluated" / "cases.csv").open() as file:
        assert {line["region"] for line in csv.DictReader(file)} == {"whole", "core"}
    capsys.readouterr()
    assert run("evaluate", tmp_path / "other", "--weights", str(weights), "--set", "head=softmax") != 0
    assert "its head is sigmoid, this run's is softmax" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["hinton", "dist", "cwd", "emkd", "gkd"])
def test_a_softmax_teacher_teaches_a_sigmoid_student(
    run: Any, softmax_teacher: Path, tmp_path: Path, method: str
) -> None:
    teacher = ["--teacher", f"dynunet:pet={softmax_teacher}"]
    epochs = ["--epochs", "2"] if method == "gkd" else []
    assert run("distill", tmp_path, *SIGMOID, "--method", method, *teacher, *epochs) == 0
    record = json.loads((tmp_path / "model.task.json").read_text())
    assert record["network"]["out_channels"] == 2


def test_a_cache_holds_the_logits_of_regions_and_belongs_to_them(
    run: Any, softmax_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, cache = ["--teacher", f"dynunet:pet={softmax_teacher}"], tmp_path / "cache"
    assert run("cache-teachers", cache, *SIGMOID, *teacher, "--tta", "flips", "--set", "flips=[0]") == 0
    manifest = json.loads((cache / "dynunet_pet" / "manifest.json").read_text())
    assert (manifest["channels"], manifest["regions"], manifest["tta_axes"]) == (2, [[1, 2], [2]], [0])
    cached = ["--method", "hinton", *teacher, "--cache-dir", str(cache)]
    assert run("distill", tmp_path / "out", *SIGMOID, *cached) == 0
    capsys.readouterr()
    assert run("distill", tmp_path / "other", *cached) != 0
    assert "its regions is [[1, 2], [2]], this run's is None" in capsys.readouterr().err


def test_a_sigmoid_teacher_cannot_teach_a_softmax(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = teacher_weights(tmp_path, 2, {"head": "sigmoid"})
    monkeypatch.setattr("scripts.image_io.reader.read_volume", lambda *_: pytest.fail("a case was read"))
    assert run("distill", tmp_path / "out", "--teacher", f"dynunet:pet={weights}", "--method", "hinton") != 0
    assert (
        "The teacher dynunet_pet has a sigmoid head, whose regions do not tell the classes" in capsys.readouterr().err
    )


@pytest.mark.parametrize("changed", [SIGMOID, []])
def test_a_loss_of_the_users_own_is_refused_where_it_cannot_read_the_label(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str]
) -> None:
    (tmp_path / "loss.json").write_text('{"_target_": "DiceFocalLoss", "to_onehot_y": true, "softmax": true}')
    assert run("train", tmp_path / "out", "--segmentation-loss", str(tmp_path / "loss.json"), *changed) != 0
    reason = "a sigmoid head" if changed is SIGMOID else "voxels to ignore"
    assert f"gets class indices, but the task has {reason}. Remove the option" in capsys.readouterr().err
