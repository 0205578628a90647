# SPDX-License-Identifier: Apache-2.0
"""The trainings before domain-generalisable distillation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.distillation.staged_training import gkd_stages, is_finished
from scripts.utils.task_file import task_path

TEACHERS = {
    "one": {"architecture": "hdenseformer", "modalities": ["ct", "pet"], "weights": "one.pt"},
    "two": {"architecture": "dynunet", "modalities": ["pet"], "weights": "two.pt"},
}


def test_each_stage_builds_on_weights_that_an_earlier_one_writes() -> None:
    folder, written = Path("stages"), {"one.pt", "two.pt", ""}
    stages = gkd_stages(folder, TEACHERS, epochs=20)
    assert [stage.name for stage in stages] == ["autoencoder", "student", "header_student", "header_one", "header_two"]
    for stage in stages:
        assert {stage.overrides.get(key, "") for key in ("weights", "autoencoder")} <= written, stage.name
        written.add(str(folder / stage.name / "model.pt"))


def test_the_header_of_a_dynunet_is_built_for_the_patch_that_the_teacher_was_trained_on(tmp_path: Path) -> None:
    weights = tmp_path / "two.pt"
    weights.touch()
    task_path(weights).write_text(json.dumps({"patch": [48, 48, 48]}))
    stages = gkd_stages(Path("s"), {"two": {**TEACHERS["two"], "weights": str(weights)}, "one": TEACHERS["one"]}, 20)
    patches = {stage.name: stage.overrides.get("network_def#patch") for stage in stages}
    assert patches["header_two"] == [48, 48, 48]
    assert patches["header_one"] is None


@pytest.mark.parametrize(("epochs", "half"), [(20, 10), (3, 1), (2, 1)])
def test_the_students_epochs_are_split_between_alone_and_distilled(epochs: int, half: int) -> None:
    stages = {stage.name: stage.overrides["max_epochs"] for stage in gkd_stages(Path("s"), TEACHERS, epochs)}
    assert stages["student"] == stages["header_one"] == stages["header_student"] == half
    assert stages["autoencoder"] == epochs


def test_a_single_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 epochs, one alone and one distilled, got 1"):
        gkd_stages(Path("s"), TEACHERS, 1)


def test_a_teacher_that_cannot_be_used_is_refused_before_any_stage() -> None:
    with pytest.raises(ValueError, match=r"No teacher can be named 'v1\.2"):
        gkd_stages(Path("s"), {"v1.2": TEACHERS["one"]}, 20)
    with pytest.raises(ValueError, match="The teacher one has random weights, others in each stage of gkd"):
        gkd_stages(Path("s"), {"one": {**TEACHERS["one"], "weights": None}}, 20)
    with pytest.raises(ValueError, match="has the unknown key 'weigths'"):
        gkd_stages(Path("s"), {"one": {**TEACHERS["one"], "weigths": "two.pt"}}, 20)


def test_a_training_is_finished_when_its_manifest_exists(tmp_path: Path) -> None:
    assert not is_finished(tmp_path)
    (tmp_path / "model.pt").write_text("")
    assert not is_finished(tmp_path)
    (tmp_path / "manifest.json").write_text("")
    assert is_finished(tmp_path)
