# SPDX-License-Identifier: Apache-2.0
"""The benchmark of missing modalities: its commands, and its table from results that are computed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.job_queue import Job, run_jobs
from benchmarks.missing_modalities import (
    DISTILLED_DROPOUT,
    DROPOUT,
    PLAIN,
    ROWS,
    MissingPlan,
    format_table,
    loss_shares,
    subsets,
    table_entries,
    write_missing,
)
from scripts.cli.main import main
from scripts.metrics import write_rows

pytestmark = pytest.mark.benchmarks
COMMON = ("--data", "sts", "--dataset-dir", "data", "--scale", "compare", "--threads", "1", "--fold", "0")


@pytest.fixture
def plan(tmp_path: Path) -> MissingPlan:
    return MissingPlan(COMMON, tmp_path, ("ct", "pet", "mr"), seeds=(0, 1), epochs=20)


@pytest.fixture
def small_plan(tmp_path: Path) -> MissingPlan:
    """A plan of two modalities and two seeds."""
    return MissingPlan(COMMON, tmp_path, ("ct", "pet"), seeds=(0, 1))


def write_result(plan: MissingPlan, row: str, seed: int, present: str, dice: Sequence[float]) -> None:
    """Write the result of an evaluation that the table reads: one patient per Dice, distances of 2 mm."""
    folder = plan.folder(row, seed) / f"eval_{present}"
    folder.mkdir(parents=True)
    rows = [
        {
            "case_id": f"p{i}", "patient_id": f"p{i}", "dice": value, "hd95_mm": 2.0, "assd_mm": 2.0,
            "volume_ml": 1.0, "reference_volume_ml": 1.0, "status": "ok", "diagonal_mm": 100.0,
        }
        for i, value in enumerate(dice)
    ]  # fmt: skip
    write_rows(rows, folder / "cases.csv")


def test_subsets_are_non_empty_and_start_with_the_largest() -> None:
    assert subsets(("ct", "pet", "mr")) == [
        ("ct", "pet", "mr"), ("ct", "pet"), ("ct", "mr"), ("pet", "mr"), ("ct",), ("pet",), ("mr",),
    ]  # fmt: skip
    assert subsets(("ct",)) == [("ct",)]


def option(command: Sequence[str], name: str) -> str | None:
    """The value that follows an option; None if the command does not have it."""
    return command[command.index(name) + 1] if name in command else None


def test_the_command_line_accepts_every_command_of_the_plan(plan: MissingPlan) -> None:
    students = [job for job in plan.jobs() if job.row in ROWS]
    assert [(job.row, job.seed) for job in students] == [(row, seed) for seed in (0, 1) for row in ROWS]
    for job in plan.jobs():
        training, *evaluations = job.commands
        assert all(main([*command, "--dry-run"]) == 0 for command in job.commands)
        assert option(training, "--output-dir") == str(job.folder)
        assert (option(training, "--fold"), option(training, "--seed")) == ("0", str(job.seed))
        if job.row in ROWS:
            assert option(training, "--epochs") == "20"
            assert option(training, "--modality-dropout") == ("0.25" if job.row.endswith("dropout") else None)
            assert (training[0] == "distill") == job.row.startswith("distilled")
        present = [command[command.index("--present") + 1 : command.index("--output-dir")] for command in evaluations]
        assert present == (subsets(plan.modalities) if job.row in ROWS else [])
        assert {option(command, "--weights") for command in evaluations} <= {str(job.folder / "model.pt")}
        assert [option(command, "--output-dir") for command in evaluations] == [
            str(job.folder / name) for name in job.evaluations
        ]


def test_the_needs_of_a_job_are_outputs_of_earlier_jobs(plan: MissingPlan) -> None:
    jobs = plan.jobs()
    assert len({job.folder for job in jobs}) == len(jobs)
    written: set[Path] = set()
    for job in jobs:
        assert set(job.needs) <= written, job.row
        weights = [Path(word.split("=")[-1]) for word in job.commands[0] if word.endswith("model.pt")]
        assert set(weights) <= written, job.row  # also weights that are not among its needs
        written |= {job.folder / name for name in job.outputs}


def fake_command(arguments: Sequence[str]) -> int:
    """Write the files of a verb instead of running it."""
    output = Path(arguments[arguments.index("--output-dir") + 1])
    verb = arguments[0]
    names = {"evaluate": ["summary.json"], "cache-teachers": ["dynunet/manifest.json"]}
    for name in names.get(verb, ["model.pt", "manifest.json"]):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    print(verb, output)
    return 0


def test_finished_commands_are_skipped_and_an_unfinished_job_runs_only_the_missing_ones(plan: MissingPlan) -> None:
    jobs = plan.jobs()
    assert run_jobs(jobs, 2, fake_command) == []
    assert all(job.done for job in jobs)
    logs = {job.folder: (job.folder / "log.txt").read_text() for job in jobs}
    unfinished = next(job for job in jobs if (job.row, job.seed) == (DISTILLED_DROPOUT, 1))
    for name in ("eval_ct_mr", "eval_mr"):
        (unfinished.folder / name / "summary.json").unlink()
    assert run_jobs(plan.jobs(), 2, fake_command) == []
    for job in jobs:
        added = (job.folder / "log.txt").read_text().removeprefix(logs[job.folder])
        expected = [f"evaluate {job.folder / name}" for name in ("eval_ct_mr", "eval_mr")]
        assert added.splitlines() == (expected if job is unfinished else []), job.row


def test_a_failed_teacher_stops_only_its_cache_and_its_students(plan: MissingPlan) -> None:
    def failing_command(arguments: Sequence[str]) -> int:
        return 1 if arguments[0] == "teacher" else fake_command(arguments)

    failed: list[Job] = run_jobs(plan.jobs(), 2, failing_command)
    assert {job.row for job in failed} == {"teacher", "cache", ROWS[2], DISTILLED_DROPOUT}


def test_losses_differences_and_shares_equal_those_computed_by_hand(small_plan: MissingPlan) -> None:
    for seed, dice in ((0, (0.8, 0.6)), (1, (1.0, 0.8))):  # means per patient 0.9, 0.7
        write_result(small_plan, PLAIN, seed, "ct_pet", dice)
    for seed, dice in ((0, (0.4, 0.2)), (1, (0.6, 0.4))):  # 0.5, 0.3: loses 0.4 and 0.4
        write_result(small_plan, PLAIN, seed, "ct", dice)
        write_result(small_plan, PLAIN, seed, "pet", [x + 0.2 for x in dice])  # 0.7, 0.5: loses 0.2 and 0.2
    for seed in (0, 1):
        write_result(small_plan, DROPOUT, seed, "ct_pet", (0.8, 0.8))
        write_result(
            small_plan, DROPOUT, seed, "ct", (0.8, 0.6)
        )  # loses 0 and 0.2; 0.3 and 0.3 better than the plain student
        write_result(small_plan, DROPOUT, seed, "pet", (0.6, 0.6))  # loses 0.2 and 0.2; 0.1 worse and 0.1 better
    entries = table_entries(small_plan)
    by_key = {(each["row"], *each["present"]): each for each in entries}
    assert list(by_key) == [
        (row, *subset) for row in (PLAIN, DROPOUT) for subset in (("ct", "pet"), ("ct",), ("pet",))
    ]  # fmt: skip
    expected: dict[Any, tuple[float, float, float | None]] = {
        (PLAIN, "ct", "pet"): (0.8, 0.0, None),
        (PLAIN, "ct"): (0.4, -0.4, None),
        (PLAIN, "pet"): (0.6, -0.2, None),
        (DROPOUT, "ct", "pet"): (0.8, 0.0, 0.0),
        (DROPOUT, "ct"): (0.7, -0.1, 0.3),
        (DROPOUT, "pet"): (0.6, -0.2, 0.0),
    }
    for key, (dice, loss, against) in expected.items():
        entry = by_key[key]
        assert entry["metrics"]["dice"]["worst_filled"]["mean"] == pytest.approx(dice), key
        assert entry["loss"]["mean"] == pytest.approx(loss), key
        assert ("against_plain" in entry) == (against is not None), key
        if against is not None:
            assert entry["against_plain"]["mean"] == pytest.approx(against), key
    # With one of two modalities missing, the plain student loses 0.3 on average, the other one (0.1 + 0.2) / 2.
    assert loss_shares(entries, small_plan.modalities) == pytest.approx({PLAIN: 1.0, DROPOUT: 0.5})


def test_there_are_no_shares_without_a_result_of_the_plain_student(small_plan: MissingPlan) -> None:
    assert loss_shares([], small_plan.modalities) == {}
    write_result(small_plan, DROPOUT, 0, "ct_pet", (0.8, 0.8))
    write_result(small_plan, DROPOUT, 0, "ct", (0.8, 0.6))
    assert loss_shares(table_entries(small_plan), small_plan.modalities) == {}


def test_an_unfinished_plan_compares_only_seeds_that_both_students_have(small_plan: MissingPlan) -> None:
    write_result(small_plan, PLAIN, 0, "ct_pet", (0.8, 0.8))
    write_result(small_plan, PLAIN, 1, "ct_pet", (0.2, 0.2))
    write_result(small_plan, PLAIN, 0, "ct", (0.6, 0.6))  # seed 1 has not been scored on it
    write_result(small_plan, DROPOUT, 1, "ct_pet", (0.3, 0.3))
    write_result(small_plan, DROPOUT, 1, "ct", (0.1, 0.1))
    by_key = {(each["row"], *each["present"]): each for each in table_entries(small_plan)}
    assert by_key[PLAIN, "ct"]["loss"]["mean"] == pytest.approx(-0.2)
    assert by_key[DROPOUT, "ct", "pet"]["against_plain"]["mean"] == pytest.approx(0.1)
    assert "against_plain" not in by_key[DROPOUT, "ct"]  # the plain student has no seed 1
    write_result(small_plan, DISTILLED_DROPOUT, 0, "pet", (0.5, 0.5))  # not scored with all modalities
    by_key = {(each["row"], *each["present"]): each for each in table_entries(small_plan)}
    assert by_key[DISTILLED_DROPOUT, "pet"]["loss"] is None
    assert "| pet | distilled (dist), dropout | 0.500 [0.500, 0.500] |  |  | 2.0 [" in format_table(by_key.values(), {})


def test_the_table_sorts_rows_by_size_and_lists_the_shares() -> None:
    def summary(mean: float) -> dict[str, Any]:
        return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}

    def entry(row: str, present: list[str], dice: float, loss: float, **more: Any) -> dict[str, Any]:
        metrics = {"dice": dice, "hd95_mm": 12.0, "assd_mm": 3.0}
        filled = {name: {"worst_filled": summary(value)} for name, value in metrics.items()}
        return {"row": row, "present": present, "metrics": filled, "loss": summary(loss), **more}

    entries = [entry(PLAIN, ["ct"], 0.4, -0.4), entry(DROPOUT, ["ct", "pet"], 0.75, 0.0, against_plain=summary(-0.05))]
    entries[0]["metrics"]["assd_mm"]["worst_filled"]["ci95"] = None  # one patient has no interval
    assert format_table(entries, {PLAIN: 1.0, DROPOUT: 0.504}).splitlines() == [
        "| present | student | Dice | loss of Dice | Dice - plain | HD95 mm | ASSD mm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| ct, pet | alone, dropout | 0.750 [0.650, 0.850] | +0.000 [-0.100, +0.100] | -0.050 [-0.150, +0.050] "
        "| 12.0 [11.9, 12.1] | 3.0 [2.9, 3.1] |",
        "| ct | alone | 0.400 [0.300, 0.500] | -0.400 [-0.500, -0.300] |  | 12.0 [11.9, 12.1] | 3.0 |",
        "",
        "Loss of Dice with one modality missing, as a share of the plain student's loss:",
        "- alone: 1.00",
        "- alone, dropout: 0.50",
    ]


def test_all_files_of_the_benchmark_are_written(small_plan: MissingPlan) -> None:
    write_result(small_plan, PLAIN, 0, "ct_pet", (0.8, 0.6))
    text = write_missing(small_plan)
    assert (small_plan.output / "table.md").read_text() == text + "\n"
    written = json.loads((small_plan.output / "table.json").read_text())
    assert [(each["row"], each["present"]) for each in written["rows"]] == [(PLAIN, ["ct", "pet"])]
    assert written["dropout"] == 0.25
    commands = json.loads((small_plan.output / "commands.json").read_text())
    assert [each["row"] for each in commands] == [job.row for job in small_plan.jobs()]
