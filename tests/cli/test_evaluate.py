# SPDX-License-Identifier: Apache-2.0
"""``evaluate`` of masks made elsewhere, and the ``report`` of several evaluations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.cli.main import main


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluate(cohort: Path, masks: str, output: str, *more: str) -> None:
    """Score the reference masks of the phantoms as if another program had made them."""
    Path(masks).mkdir(parents=True, exist_ok=True)
    for label in cohort.glob("*/CT_mask.nii.gz"):
        shutil.copy(label, Path(masks) / f"{label.parent.name}.nii.gz")
    line = ["evaluate", "--data", "phantom", "--dataset-dir", str(cohort), "--predictions", masks]
    assert main([*line, "--output-dir", output, *more]) == 0


def names(table: str) -> list[str]:
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][2:]


def test_masks_of_another_program_have_the_name_of_their_folder(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(cohort, "other_program/", "EV")
    assert names(capsys.readouterr().out) == ["other_program"]
    evaluate(cohort, "other_program", "EV", "--name", "reader 1")
    assert names(capsys.readouterr().out) == ["reader 1"]


def test_a_report_without_the_data_set_says_that_it_shows_no_images(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(cohort, "masks", "EV")
    hint = "It shows no images of the cases"
    for more, said in (([], True), (["--dataset-dir", str(cohort)], False)):
        capsys.readouterr()
        assert main(["report", "--evaluations", "EV", "--output-dir", "OUT", *more]) == 0
        assert (hint in capsys.readouterr().out) == said


def test_evaluations_of_one_name_are_told_apart(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(cohort, "a/masks", "EV")
    evaluate(cohort, "b/masks", "EVb")
    evaluate(cohort, "c", "EVc")
    capsys.readouterr()
    line = ["report", "--evaluations", "EV", "EVb", "EVc", "--output-dir", "OUT"]
    assert main([*line, "--dataset-dir", str(cohort)]) == 0
    assert names(capsys.readouterr().out) == ["masks (EV)", "masks (EVb)", "c"]
    assert main([*line, "--dataset-dir", str(cohort), "--baseline", "masks"]) == 1
    error = capsys.readouterr().err
    assert "No evaluation is named masks. Choose one of masks (EV), masks (EVb), c as --baseline." in error


def test_masks_without_a_data_set_are_refused_by_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    Path("M").mkdir()
    assert main(["evaluate", "--data", "phantom", "--predictions", "M", "--output-dir", "E"]) == 1
    assert "No cases to score. Name the folder of the data set with --dataset-dir" in capsys.readouterr().err


def test_modalities_need_an_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", "phantom", "--modalities", "ct", "--dry-run"]) == 1
    assert "needs its --architecture. To leave modalities out, use --present." in capsys.readouterr().err
