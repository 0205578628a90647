# SPDX-License-Identifier: Apache-2.0
"""The stages of gkd: which trainings `distill` starts, with what, and which finished ones it refuses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.cli import distill
from scripts.cli.bundle_run import build_item
from scripts.cli.main import main
from scripts.networks.teacher import Teacher
from scripts.training.training_record import write_task

STAGES = ["autoencoder", "student", "header_student", "header_dynunet"]
Trained = list[tuple[str, dict[str, Any], list[str]]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Folder, overrides and --set of each training, which only writes its record beside files that stand for weights.

    The content of such a file is that of the settings, as that of real weights.
    """
    runs: Trained = []

    def run(args: argparse.Namespace, configs: list[str], overrides: dict[str, Any]) -> None:
        folder = Path(args.output_dir)
        runs.append((folder.name, overrides, args.set))
        if "distill" in configs:
            return
        folder.mkdir(parents=True, exist_ok=True)
        record = build_item(args, configs, overrides, "record")
        settings = {key: value for key, value in record.items() if not key.startswith(("git", "bundle"))}
        (folder / "model.pt").write_text(str(settings))
        write_task(record, folder / "model.pt")
        (folder / "manifest.json").write_text("{}")

    for name in ("run_bundle", "run_training"):
        monkeypatch.setattr(distill, name, run)
    monkeypatch.setattr(distill, "_require_usable_teachers", lambda *_: None)  # its weights are none
    return runs


@pytest.fixture
def gkd(cohort: Path, tmp_path: Path) -> Callable[..., int]:
    """Run gkd with one teacher on the phantoms."""
    (tmp_path / "teacher.pt").write_text("one")
    command = ["distill", "--data", "phantom", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "out")]
    command += ["--method", "gkd", "--teacher", f"dynunet={tmp_path / 'teacher.pt'}"]

    def run(*more: str) -> int:
        options = [] if "--epochs" in more else ["--epochs", "4"]
        return main([*command, *options, *more])

    return run


def test_stages_that_this_run_would_train_in_the_same_way_are_used_again(
    gkd: Callable[..., int], trained: Trained
) -> None:
    assert gkd() == 0
    assert [name for name, *_ in trained] == [*STAGES, "out"]
    epochs = {name: (settings["max_epochs"], settings.get("earlier_epochs", 0)) for name, settings, _ in trained}
    assert (epochs["student"], epochs["out"]) == ((2, 0), (2, 2))  # the student sees no sample twice
    trained.clear()
    assert gkd("--verbose") == 0
    assert [name for name, *_ in trained] == ["out"]


def test_the_stages_train_on_the_same_cases_as_the_distillation(
    gkd: Callable[..., int], trained: Trained, tmp_path: Path
) -> None:
    ids = [f"PHANTOM_00{i}" for i in range(1, 7)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "splits.json").write_text(json.dumps({"seed": 0, "folds": [ids[:2], ids[2:]]}))
    assert gkd() == 0
    for stage in STAGES:
        record = json.loads((tmp_path / "out" / "stages" / stage / "model.task.json").read_text())
        assert [case["case_id"] for case in record["validation_cases"]] == ids[:2]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (["--fold", "1"], "its fold is 0, this run's is 1; its training cases include"),
        (["--seed", "7"], "its seed is 0, this run's is 7"),
        (["--set", "spacing=[9,9,9]"], "its spacing is"),
        (["--epochs", "6"], "its epochs is 4, this run's is 6"),
    ],
    ids=["fold", "seed", "spacing", "epochs"],
)
def test_finished_stages_of_other_data_or_settings_are_refused(
    changes: list[str], found: str, gkd: Callable[..., int], trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gkd() == 0
    trained.clear()
    assert gkd(*changes) == 1
    assert trained == []
    error = " ".join(capsys.readouterr().err.split())
    assert "autoencoder/model.pt is from a different run: " in error
    assert found in error
    assert "Choose another --stages-dir, or train all stages again by --set overwrite=true." in error


def test_a_header_of_other_weights_of_its_teacher_is_refused(
    gkd: Callable[..., int], trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gkd() == 0
    trained.clear()
    (tmp_path / "teacher.pt").write_text("two")
    assert gkd() == 1
    assert trained == []
    error = capsys.readouterr().err
    assert "header_dynunet/model.pt is from a different run: its built_on_sha256#network is" in error


def test_a_header_of_another_student_is_refused(
    gkd: Callable[..., int], trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gkd() == 0
    (tmp_path / "out" / "stages" / "student" / "model.pt").write_text("another")
    assert gkd() == 1
    assert "header_student/model.pt is from a different run: its built_on_sha256#network is" in capsys.readouterr().err


def test_overwrite_trains_all_stages_again_and_resume_none(gkd: Callable[..., int], trained: Trained) -> None:
    assert gkd() == 0
    trained.clear()
    assert gkd("--set", "overwrite=true", "--fold", "1") == 0
    assert [name for name, *_ in trained] == [*STAGES, "out"]
    assert all("resume" not in overrides for _, overrides, _ in trained)
    trained.clear()
    assert gkd("--set", "overwrite=true", "--fold", "1", "--resume") == 0
    assert [name for name, *_ in trained] == ["out"]


def test_an_interrupted_stage_is_resumed_unless_it_is_overwritten(
    gkd: Callable[..., int], trained: Trained, tmp_path: Path
) -> None:
    assert gkd() == 0
    student = tmp_path / "out" / "stages" / "student"
    (student / "manifest.json").unlink()
    (student / "checkpoint.pt").touch()
    trained.clear()
    assert gkd() == 0
    assert [(name, overrides.get("resume")) for name, overrides, _ in trained] == [("student", True), ("out", None)]


def test_a_stage_without_a_record_is_used_with_a_warning(
    gkd: Callable[..., int], trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert gkd() == 0
    (tmp_path / "out" / "stages" / "autoencoder" / "model.task.json").unlink()
    trained.clear()
    assert gkd() == 0
    assert [name for name, *_ in trained] == ["out"]
    assert "autoencoder/model.pt has no record of its data and settings" in caplog.text


def test_a_student_without_an_encoder_is_refused_before_the_first_stage(
    gkd: Callable[..., int], trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"_target_": "monai.networks.nets.BasicUNet", "spatial_dims": 3, "in_channels": 3, "out_channels": 2}
    (tmp_path / "own.json").write_text(json.dumps(network))
    assert gkd("--network", str(tmp_path / "own.json")) == 1
    assert trained == []
    assert "BasicUNet has no separate encoder and decoder, which alignment headers need: leave out --network" in (
        " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--set", "max_epochs=40"], "gkd sets max_epochs in each of its stages, so --set max_epochs cannot. Use --ep"),
        (["--set", "+max_epochs=40"], "so --set +max_epochs cannot"),
        (["--set", "output_dir=elsewhere"], "Use --output-dir."),
        (["--set", "pretrained=a.pt"], "Remove it: the student starts from a stage of its own."),
        (["--pretrained", "a.pt"], "gkd starts the student from a stage of its own. Remove --pretrained."),
    ],
)
def test_options_that_the_stages_cannot_follow_are_refused(
    options: list[str], sentence: str, gkd: Callable[..., int], trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gkd(*options) == 1
    assert trained == []
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_settings_of_the_distillation_do_not_reach_its_stages(gkd: Callable[..., int], trained: Trained) -> None:
    distillation = ["loss#terms#graphs#weight=0.5", "+distiller#views=5", "ignore_task=true"]
    shared = ["learning_rate=0.01", '+architectures#dynunet={"filters": [2, 4]}']
    assert gkd(*(word for pair in (*distillation, *shared) for word in ("--set", pair))) == 0
    assert [pairs for *_, pairs in trained] == [shared] * len(STAGES) + [[*distillation, *shared]]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("unetr:ct={}", "UNETR has no separate encoder and decoder, which alignment headers need: choose hdenseformer"),
        ("dynunet=nowhere.pt", "No weights at nowhere.pt"),
    ],
)
def test_a_teacher_that_gkd_cannot_use_is_refused_before_the_first_stage(
    teacher: str, words: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"unetr": {"hidden_size": 12, "mlp_dim": 24, "num_heads": 2, "feature_size": 4}}
    made = Teacher(["ct"], ["ct", "pet", "mr"], 2, [16, 16, 16], "unetr", options=small)
    torch.save(made.state_dict(), tmp_path / "teacher.pt")
    command = ["distill", "--data", "phantom", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "out")]
    command += ["--set", "patch=[16,16,16]", "--set", f"architectures={json.dumps(small)}", "--device", "cpu"]
    command += ["--method", "gkd", "--teacher", teacher.format(tmp_path / "teacher.pt"), "--epochs", "2"]
    assert main(command) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()


def test_the_stages_of_the_student_have_what_another_method_adds_to_it(
    gkd: Callable[..., int], trained: Trained
) -> None:
    assert gkd("--method", "dual") == 0
    added = {name: settings.get("selective_fusion") for name, settings, _ in trained}
    assert added == {**dict.fromkeys(STAGES), "student": True, "header_student": True, "out": None}
