# SPDX-License-Identifier: Apache-2.0
"""The jobs of the shipped weights, and patches of random size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import benchmarks.study_students as study_students
import benchmarks.study_taught as study_taught
from benchmarks.job_queue import run_jobs
from benchmarks.study_setting import FOLDS
from benchmarks.study_shipped import LARGEST, RandomSizes, StudyShipped
from scripts.cli.main import main
from tests.study_jobs import FOLDS_OF_PATIENTS, new_plan, seen_folds, settings

FOLD_OF = {patient: k for k, part in enumerate(FOLDS_OF_PATIENTS) for patient in part}


def pass_gate(plan: StudyShipped) -> None:
    plan.results.mkdir(parents=True, exist_ok=True)
    verdict = {"final": True, "passed": True, "steps": 4000, "teachers": ["t1", "t2"], "recipe": "default"}
    (plan.results / "gate.json").write_text(json.dumps(verdict))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyShipped:
    """The shipped weights of 38 patients whose files do not exist."""
    return new_plan(tmp_path, monkeypatch, StudyShipped)


def test_teachers_of_the_shipped_student_have_not_seen_the_patient_and_never_the_tested_fold(
    shipped: StudyShipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="gate of the study is not judged"):
        shipped.jobs()
    pass_gate(shipped)
    written: list[dict[str, list[Path]]] = []
    monkeypatch.setattr(study_taught, "write_predictions", lambda _, answers: written.append(answers))
    (shipped.results / "jobs").mkdir()
    for job in shipped.recipe_jobs():
        row = {"patient_id": "0", "dice": 0.5, "status": "ok"}
        job.record.write_text(json.dumps({"cases": [row]}))
    final, *validated = shipped.jobs()
    assert len(validated) == FOLDS
    for job in (final, *validated):
        written.clear()
        job.folder.mkdir(parents=True, exist_ok=True)
        for preparation in job.preparations:
            preparation()
        rows = json.loads((job.folder / "cases.json").read_text())
        assert all("label" in row for row in rows)
        (answers,) = written
        left_out = set() if job is final else {job.study_row.fold}
        assert {FOLD_OF[case] for case in answers} == set(range(FOLDS)) - left_out
        for case, paths in answers.items():
            # No pair of stage 1 leaves out both the tested fold and one of two folds further.
            in_sample = job is not final and (FOLD_OF[case] - job.study_row.fold) % FOLDS in (2, 3)
            pairs = 2 if job is final or in_sample else 1
            assert [path.stem.split("_")[0] for path in paths] == ["t1", "t2"] * pairs
            for path in paths:
                assert not seen_folds(path) & left_out
                assert (FOLD_OF[case] in seen_folds(path)) == in_sample
                assert path in job.needs
        for command in (*job.before, *job.typed()):
            assert json.loads(settings(command)["spacing"]) == [3, 3, 3]
            assert json.loads(settings(command)["patch"]) == LARGEST
            if command[0] != "evaluate":
                assert settings(command).get("fold") == ("null" if job is final else None)
        assert settings(job.typed()[0])["modality_dropout"] == "0.25"
    assert len({row["patient_id"] for row in json.loads((final.folder / "cases.json").read_text())}) == 38
    assert (final.evaluations, len(final.typed()), final.done) == ((), 1, False)
    (final.folder / "model.pt").touch()  # killed before the rest was written
    assert not final.done
    (final.folder / "manifest.json").write_text("{}")
    assert not final.done
    assert final.description is not None
    final.description.parent.mkdir(parents=True, exist_ok=True)
    final.description.write_text("{}")
    assert final.done
    for job in validated:
        assert len(job.rows) == 7 + 1
        assert job.rows[-1].arm == "cross_validated@one_pass"
        assert "whole_volume=true" in job.typed()[-1]


def test_patches_of_random_size_are_parts_of_the_batch_alike_for_all_tensors() -> None:
    torch.manual_seed(0)
    image = torch.arange(2 * 80 * 64 * 40, dtype=torch.float32).view(2, 1, 80, 64, 40)
    cached = {"t.logits": image.repeat(1, 2, 1, 1, 1)}
    presence = torch.ones(2, 3)
    sizes, starts = set(), set()
    for _ in range(60):
        batch = RandomSizes(lambda data: (data, data + 1, (), {"presence": presence, "cached": cached}))(image)
        cut, label, args, named = batch
        assert cut.shape[:2] == (2, 1)
        sizes.add(tuple(cut.shape[2:]))
        torch.testing.assert_close(label, cut + 1)
        torch.testing.assert_close(named["cached"]["t.logits"][:, 1:], cut)
        assert named["presence"] is presence
        assert args == ()
        first = int(cut[0, 0, 0, 0, 0])
        start = first // (64 * 40), first // 40 % 64, first % 40
        starts.add(start)
        box = tuple(slice(a, a + n) for a, n in zip(start, cut.shape[2:], strict=True))
        torch.testing.assert_close(cut, image[(slice(None), slice(None), *box)])
    assert sizes == {(x, y, 40) for x in (48, 64, 80) for y in (48, 64)}
    assert len(starts) > 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_shipped_student_is_trained_and_cross_validated_on_phantoms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_students, "RECIPES", {"default": {}})
    monkeypatch.setattr(study_students, "SEEDS", (0,))
    monkeypatch.setattr("benchmarks.study_teachers.TEACHER_SCALE", "demo")
    assert main(["phantom", "--cases", "10", "--output-dir", str(tmp_path / "data")]) == 0
    plan = StudyShipped("phantom", str(tmp_path / "data"), tmp_path / "runs", tmp_path / "results", shorten=1000)
    pass_gate(plan)
    assert run_jobs([*plan.recipe_jobs(), *plan.pair_teacher("t1", (0, 1))], 2) == []
    students = plan.jobs()[:2]
    for path in {path for job in students for path in job.needs if path.suffix == ".npz" and not path.is_file()}:
        shutil.copy(plan.answers_path("t1", (0, 1)), path)  # in the place of answers that would take long
    assert run_jobs(students, 2) == []
    final, validated = students
    assert (final.folder / "model.pt").is_file()
    assert not final.record.is_file()
    task = json.loads((final.folder / "model.task.json").read_text())
    assert len(task["training_cases"]) == 10
    assert task["validation_cases"] == []
    records = [json.loads(plan.record(row).read_text()) for row in validated.rows]
    assert [len(record["cases"]) for record in records] == [2] * 8
