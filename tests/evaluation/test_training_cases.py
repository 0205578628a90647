# SPDX-License-Identifier: Apache-2.0
"""`evaluate` marks the cases that the network was trained on, and shows the others on their own."""

from __future__ import annotations

import csv
import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from scripts.cli.main import main
from scripts.evaluation.compare import compare

pytestmark = pytest.mark.usefixtures("fake_git")
IDS = ("P1", "P2", "P3", "Müller_1")
SHIFTS = (0, 0, 2, 4)  # in voxels of a cube of 8: Dice 1, 1, 0.75, 0.5


class Result(NamedTuple):
    """What a run of `evaluate` left."""

    code: int
    trained_on: dict[str, str]
    summary: dict[str, Any]
    table: str
    page: str
    log: str


@pytest.fixture
def evaluate(
    tmp_path: Path,
    write_nifti: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Result]:
    """Evaluate masks through the command line, with the record beside the weights."""
    monkeypatch.setattr("scripts.evaluation.score.case_overlays", lambda *arguments: [])
    lines = ["case_id,patient_id,ct,label"]
    for i, (case_id, shift) in enumerate(zip(IDS, SHIFTS, strict=True)):
        for name, move in (("ct", 0), ("label", 0), ("mask", shift)):
            voxels = np.zeros((20, 12, 12), np.uint8)
            voxels[2 + move : 10 + move, 2:10, 2:10] = 1
            path = tmp_path / ("masks" if name == "mask" else str(i)) / (case_id if name == "mask" else name)
            write_nifti(path.with_name(f"{path.name}.nii.gz"), voxels)
        lines.append(f"{case_id},patient {case_id},{i}/ct.nii.gz,{i}/label.nii.gz")
    (tmp_path / "cases.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "model.pt").write_bytes(b"weights")

    def run(record: Any = None, weights: bool = True) -> Result:
        if record is not None:
            (tmp_path / "model.task.json").write_text(json.dumps(record), encoding="utf-8")
        arguments = ["evaluate", "--data", "phantom", "--data-list", tmp_path / "cases.csv", "--predictions"]
        arguments += [tmp_path / "masks", "--output-dir", tmp_path / "out", "--set", "+score#workers=1"]
        arguments += ["--weights", tmp_path / "model.pt"] if weights else []
        with caplog.at_level(logging.INFO, "scripts"):
            code = main([str(argument) for argument in [*arguments, "--set", 'modalities=["ct"]']])
        if code:
            return Result(code, {}, {}, "", "", capsys.readouterr().err)
        with open(tmp_path / "out" / "cases.csv", newline="", encoding="utf-8") as file:
            marks = {row["case_id"]: row["trained_on"] for row in csv.DictReader(file)}
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        page = (tmp_path / "out" / "report.html").read_text()
        return Result(code, marks, summary, capsys.readouterr().out, page, caplog.text)

    return run


def record(*cases: tuple[str, str], **others: Any) -> dict[str, Any]:
    return {"training_cases": [{"case_id": case, "patient_id": patient} for case, patient in cases], **others}


def test_training_cases_are_marked_and_the_others_are_averaged_alone(evaluate: Any, tmp_path: Path) -> None:
    """P1 by its id, P2 by its patient's; the unseen cases have Dice 0.75 and 0.5, all have 0.8125."""
    result = evaluate(record(("P1", "patient P1"), ("P2_first_study", "patient P2"), ("Q", "patient Q")))
    assert result.code == 0
    assert result.trained_on == {"P1": "yes", "P2": "yes", "P3": "no", "Müller_1": "no"}
    sentence = "student was trained on 2 of these 4 cases (P1, P2), or learned from a network that was. Results on them"
    assert sentence in result.log
    assert f"<p>{sentence}" in result.page
    assert result.summary["trained_on"]["cases"] == ["P1", "P2"]
    unseen = result.summary["trained_on"]["unseen_aggregate"]
    assert (unseen["n"], unseen["metrics"]["dice"]["defined"]["mean"]) == (2, 0.625)
    assert result.summary["aggregate"]["metrics"]["dice"]["defined"]["mean"] == 0.8125
    rows = [line.split("|")[1:3] for line in result.table.splitlines() if line.startswith("| student")]
    assert [name.strip() for name, _ in rows] == ["student (trained on 2 of 4 cases)", "student, 2 unseen cases"]
    assert [dice.split()[0] for _, dice in rows] == ["0.812", "0.625"]
    assert "trained on 2 of them" in result.page
    assert "student, unseen cases" in result.page
    assert "Trained on</button>" in result.page
    text = compare([str(tmp_path / "out")], str(tmp_path / "both"))
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [name.strip() for name, _ in rows]
    assert sentence in (tmp_path / "both" / "report.html").read_text()


def test_ids_are_compared_in_composed_form(evaluate: Any) -> None:
    name = unicodedata.normalize("NFD", "Müller_1")
    assert evaluate(record((name, name))).trained_on["Müller_1"] == "yes"


def test_cases_that_no_training_used_are_marked_without_a_word(evaluate: Any) -> None:
    result = evaluate(record(("Q", "patient Q")))
    assert set(result.trained_on.values()) == {"no"}
    assert result.summary["trained_on"] == {"cases": [], "unseen_aggregate": None}
    assert "trained on" not in result.log + result.table
    assert "unseen" not in result.page


def test_a_network_that_was_trained_on_every_case_has_no_second_row(evaluate: Any) -> None:
    result = evaluate(record(*((case_id, case_id) for case_id in IDS)))
    assert set(result.trained_on.values()) == {"yes"}
    assert result.summary["trained_on"]["unseen_aggregate"] is None
    assert "student (trained on 4 of 4 cases)" in result.table
    assert "unseen" not in result.table


def test_without_a_record_it_is_unknown_and_the_log_says_why(evaluate: Any) -> None:
    result = evaluate()
    assert set(result.trained_on.values()) == {"unknown"}
    assert result.summary["trained_on"] == {"cases": None, "unseen_aggregate": None}
    assert "model.task.json does not exist, so it is unknown which cases the network was trained on" in result.log


def test_the_record_of_other_weights_is_not_believed(evaluate: Any) -> None:
    result = evaluate(record(("P1", "P1"), weights_sha256="0" * 64))
    assert set(result.trained_on.values()) == {"unknown"}
    assert "model.task.json describes other weights than" in result.log


def test_masks_of_an_unknown_network_are_not_compared_with_the_shipped_weights(evaluate: Any) -> None:
    result = evaluate(record(("P1", "P1")), weights=False)
    assert set(result.trained_on.values()) == {"unknown"}
    assert "task.json" not in result.log


@pytest.mark.parametrize("content", [[], {}, {"training_cases": 1}, {"training_cases": [1]}, "text"])
def test_a_damaged_record_is_refused_by_name(content: Any, evaluate: Any) -> None:
    result = evaluate(content)
    assert result.code == 1
    assert "model.task.json " in result.log
    assert "Restore it, or remove it." in result.log
