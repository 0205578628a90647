# SPDX-License-Identifier: Apache-2.0
"""Trainings whose output, volumes, tracker, split or teacher cannot be used end in one sentence before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.cli.main import main

FILE = "a file"
REFUSED: dict[str, tuple[list[str], str]] = {
    "output is a file": (["--output-dir", FILE], "{file} is a file. Name a folder."),
    "output below a file": (
        ["--output-dir", f"{FILE}/run"], "{file}/run cannot be written (Not a directory): choose another output."
    ),
    "volumes in a file": (
        ["--volumes-dir", FILE], "The volumes cannot be kept in {file} (File exists). Choose another --volumes-dir."
    ),
    "weights below a file": (
        ["--set", f"final_weights={FILE}/model.pt"],
        "{file}/model.pt cannot be written (File exists): choose another folder for the final weights.",
    ),
    "unknown tracker": (
        ["--set", "experiment_tracking=wandb"], "experiment_tracking is 'wandb'. Choose mlflow, or nothing"
    ),
    "split is a folder": (["--set", "splits_file=/tmp"], "The split file /tmp is a folder. Name a JSON file."),
    "no such fold": (["--fold", "9"], "Fold 9 does not exist. Choose one of 0 to 4."),
    "pretrained is a folder": (["--pretrained", "/tmp"], "No weights at /tmp: train the network first or check the"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_training_that_cannot_work_is_refused_in_one_sentence_and_writes_no_weights(
    kind: str, tiny: list[str], cohort: Path, refused: Any, tmp_path: Path
) -> None:
    options, sentence = REFUSED[kind]
    file = tmp_path / "file"
    file.write_text("x")
    line = ["train", *tiny, "--set", "spacing=[12,12,12]", "--set", "val_interval=100", "--epochs", "1"]
    line += ["--dataset-dir", cohort, "--output-dir", tmp_path / "out"]
    error = refused(*line, *(each.replace(FILE, str(file)) for each in options))
    assert f"error: {sentence.format(file=file)}" in error
    assert not list(tmp_path.rglob("*.pt"))
    assert file.read_text() == "x"


def test_a_teacher_of_another_patch_is_refused_by_name(
    tiny: list[str], cohort: Path, refused: Any, tmp_path: Path
) -> None:
    sizes = '{"unetr":{"feature_size":4,"hidden_size":24,"mlp_dim":24,"num_heads":2}}'
    common = [*tiny, "--set", "spacing=[12,12,12]", "--set", "val_interval=100", "--set", f"architectures={sizes}"]
    common += ["--dataset-dir", str(cohort), "--epochs", "1"]
    weights = tmp_path / "teacher" / "model.pt"
    asked = ["--architecture", "unetr", "--modalities", "pet", "--output-dir", str(weights.parent)]
    assert main(["teacher", *common, "--set", "patch=[32,32,32]", *asked]) == 0
    student = ["distill", *common, "--method", "hinton", "--teacher", f"unetr:pet={weights}"]
    error = refused(*student, "--set", "patch=[32,32,16]", "--output-dir", tmp_path / "student")
    assert "model.task.json contradicts this run: its patch is [32, 32, 32], this run's is [32, 32, 16]." in error
    weights.with_name("model.task.json").unlink()
    error = refused(*student, "--set", "patch=[32,32,16]", "--output-dir", tmp_path / "student")
    assert "position_embeddings is [1, 8, 24] of float32, not [1, 4, 24] of float32" in error
