# SPDX-License-Identifier: Apache-2.0
"""The benchmark of missing modalities: its plan, its queue with trainings that only pretend, its table by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.job_queue import Job, work_off
from benchmarks.missing_modalities import (
    DISTILLED,
    DROPPED,
    PLAIN,
    ROWS,
    MissingPlan,
    markdown,
    measured,
    shares,
    subsets,
    write_missing,
)
from scripts.cli.main import ACTIONS, main
from scripts.cli.options import build_parser
from scripts.metrics import write_rows

COMMON = ("--data", "sts", "--dataset-dir", "data", "--scale", "compare", "--threads", "1", "--fold", "0")


@pytest.fixture
def plan(tmp_path: Path) -> MissingPlan:
    return MissingPlan(COMMON, tmp_path, ("ct", "pet", "mr"), seeds=(0, 1), epochs=20)


@pytest.fixture
def pair(tmp_path: Path) -> MissingPlan:
    """A plan of two modalities and two seeds."""
    return MissingPlan(COMMON, tmp_path, ("ct", "pet"), seeds=(0, 1))


def score(plan: MissingPlan, row: str, seed: int, present: str, dice: Sequence[float]) -> None:
    """What an evaluation leaves, as far as the table reads it: patients of these Dice, distances of 2 mm."""
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


def test_subsets_are_all_but_the_empty_one_and_the_whole_comes_first() -> None:
    assert subsets(("ct", "pet", "mr")) == [
        ("ct", "pet", "mr"), ("ct", "pet"), ("ct", "mr"), ("pet", "mr"), ("ct",), ("pet",), ("mr",),
    ]  # fmt: skip
    assert subsets(("ct",)) == [("ct",)]


def test_every_command_of_the_plan_is_one_that_the_program_takes(plan: MissingPlan) -> None:
    parser = build_parser(ACTIONS)
    students = [job for job in plan.jobs() if job.row in ROWS]
    assert [(job.row, job.seed) for job in students] == [(row, seed) for seed in (0, 1) for row in ROWS]
    for job in plan.jobs():
        first, *scores = (parser.parse_args(command) for command in job.commands)
        assert (first.output_dir, first.fold, first.seed) == (str(job.folder), 0, job.seed)
        if job.row in ROWS:
            assert first.epochs == 20
            assert first.modality_dropout == (0.25 if job.row.endswith("dropout") else None)
            assert (first.verb == "distill") == job.row.startswith("distilled")
        assert [tuple(each.present) for each in scores] == (subsets(plan.modalities) if job.row in ROWS else [])
        assert {each.weights for each in scores} <= {str(job.folder / "model.pt")}
        assert [each.output_dir for each in scores] == [str(job.folder / name) for name in job.evaluations]


def test_what_a_job_needs_is_made_by_a_job_before_it(plan: MissingPlan) -> None:
    jobs = plan.jobs()
    assert len({job.folder for job in jobs}) == len(jobs)
    made: set[Path] = set()
    for job in jobs:
        assert set(job.needs) <= made, job.row
        named = [Path(word.split("=")[-1]) for word in job.commands[0] if word.endswith("model.pt")]
        assert set(named) <= made, job.row  # also those that are not waited for
        made |= {job.folder / name for name in job.makes}


def pretend(arguments: Sequence[str]) -> int:
    """Stands for ``main``: leaves what a verb would."""
    output = Path(arguments[arguments.index("--output-dir") + 1])
    verb = arguments[0]
    made = {"evaluate": ["summary.json"], "cache-teachers": ["dynunet/manifest.json"]}
    for name in made.get(verb, ["model.pt", "manifest.json"]):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    print(verb, output)
    return 0


def test_what_is_done_is_skipped_and_a_half_done_list_goes_on_with_what_is_missing(plan: MissingPlan) -> None:
    jobs = plan.jobs()
    assert work_off(jobs, 2, pretend) == []
    assert all(job.done for job in jobs)
    logs = {job.folder: (job.folder / "log.txt").read_text() for job in jobs}
    half = next(job for job in jobs if (job.row, job.seed) == (DISTILLED, 1))
    for name in ("eval_ct_mr", "eval_mr"):
        (half.folder / name / "summary.json").unlink()
    assert work_off(plan.jobs(), 2, pretend) == []
    for job in jobs:
        added = (job.folder / "log.txt").read_text().removeprefix(logs[job.folder])
        expected = [f"evaluate {half.folder / name}" for name in ("eval_ct_mr", "eval_mr")] if job is half else []
        assert added.splitlines() == expected, job.row


def test_a_teacher_that_fails_stops_only_what_learns_from_it(plan: MissingPlan) -> None:
    def fail(arguments: Sequence[str]) -> int:
        return 1 if arguments[0] == "teacher" else pretend(arguments)

    failed: list[Job] = work_off(plan.jobs(), 2, fail)
    assert {job.row for job in failed} == {"teacher", "cache", ROWS[2], DISTILLED}


def test_losses_differences_and_shares_are_those_by_hand(pair: MissingPlan) -> None:
    for seed, dice in ((0, (0.8, 0.6)), (1, (1.0, 0.8))):  # means per patient 0.9, 0.7
        score(pair, PLAIN, seed, "ct_pet", dice)
    for seed, dice in ((0, (0.4, 0.2)), (1, (0.6, 0.4))):  # 0.5, 0.3: loses 0.4 and 0.4
        score(pair, PLAIN, seed, "ct", dice)
        score(pair, PLAIN, seed, "pet", [x + 0.2 for x in dice])  # 0.7, 0.5: loses 0.2 and 0.2
    for seed in (0, 1):
        score(pair, DROPPED, seed, "ct_pet", (0.8, 0.8))
        score(pair, DROPPED, seed, "ct", (0.8, 0.6))  # loses 0 and 0.2; 0.3 and 0.3 better than the plain one
        score(pair, DROPPED, seed, "pet", (0.6, 0.6))  # loses 0.2 and 0.2; 0.1 worse and 0.1 better
    found = measured(pair)
    by_key = {(each["row"], *each["present"]): each for each in found}
    assert list(by_key) == [
        (row, *subset) for row in (PLAIN, DROPPED) for subset in (("ct", "pet"), ("ct",), ("pet",))
    ]  # fmt: skip
    expected: dict[Any, tuple[float, float, float | None]] = {
        (PLAIN, "ct", "pet"): (0.8, 0.0, None),
        (PLAIN, "ct"): (0.4, -0.4, None),
        (PLAIN, "pet"): (0.6, -0.2, None),
        (DROPPED, "ct", "pet"): (0.8, 0.0, 0.0),
        (DROPPED, "ct"): (0.7, -0.1, 0.3),
        (DROPPED, "pet"): (0.6, -0.2, 0.0),
    }
    for key, (dice, loss, against) in expected.items():
        entry = by_key[key]
        assert entry["metrics"]["dice"]["worst_filled"]["mean"] == pytest.approx(dice), key
        assert entry["loss"]["mean"] == pytest.approx(loss), key
        assert ("against_plain" in entry) == (against is not None), key
        if against is not None:
            assert entry["against_plain"]["mean"] == pytest.approx(against), key
    # With one of two missing the plain one loses 0.3 on average, the other (0.1 + 0.2) / 2.
    assert shares(found, pair.modalities) == pytest.approx({PLAIN: 1.0, DROPPED: 0.5})


def test_a_share_of_nothing_is_left_out(pair: MissingPlan) -> None:
    assert shares([], pair.modalities) == {}
    score(pair, DROPPED, 0, "ct_pet", (0.8, 0.8))
    score(pair, DROPPED, 0, "ct", (0.8, 0.6))
    assert shares(measured(pair), pair.modalities) == {}


def test_a_half_done_plan_compares_seeds_that_both_sides_have(pair: MissingPlan) -> None:
    score(pair, PLAIN, 0, "ct_pet", (0.8, 0.8))
    score(pair, PLAIN, 1, "ct_pet", (0.2, 0.2))
    score(pair, PLAIN, 0, "ct", (0.6, 0.6))  # seed 1 has yet to be scored on it
    score(pair, DROPPED, 1, "ct_pet", (0.3, 0.3))
    score(pair, DROPPED, 1, "ct", (0.1, 0.1))
    by_key = {(each["row"], *each["present"]): each for each in measured(pair)}
    assert by_key[PLAIN, "ct"]["loss"]["mean"] == pytest.approx(-0.2)
    assert by_key[DROPPED, "ct", "pet"]["against_plain"]["mean"] == pytest.approx(0.1)
    assert "against_plain" not in by_key[DROPPED, "ct"]  # the plain one's seed 1 is not there
    score(pair, DISTILLED, 0, "pet", (0.5, 0.5))  # nothing with every modality
    by_key = {(each["row"], *each["present"]): each for each in measured(pair)}
    assert by_key[DISTILLED, "pet"]["loss"] is None
    assert "| pet | distilled (dist), dropout | 0.500 [0.500, 0.500] |  |  | 2.0 [" in markdown(by_key.values(), {})


def test_the_table_is_the_rows_by_size_and_the_shares() -> None:
    def summary(mean: float) -> dict[str, Any]:
        return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}

    def entry(row: str, present: list[str], dice: float, loss: float, **more: Any) -> dict[str, Any]:
        metrics = {"dice": dice, "hd95_mm": 12.0, "assd_mm": 3.0}
        filled = {name: {"worst_filled": summary(value)} for name, value in metrics.items()}
        return {"row": row, "present": present, "metrics": filled, "loss": summary(loss), **more}

    found = [
        entry(PLAIN, ["ct"], 0.4, -0.4),
        entry(DROPPED, ["ct", "pet"], 0.75, 0.0, against_plain=summary(-0.05)),
    ]
    found[0]["metrics"]["assd_mm"]["worst_filled"]["ci95"] = None  # of one patient there is no interval
    assert markdown(found, {PLAIN: 1.0, DROPPED: 0.504}).splitlines() == [
        "| present | student | Dice | loss of Dice | Dice - plain | HD95 mm | ASSD mm |",
        "|---|---|---|---|---|---|---|",
        "| ct, pet | alone, dropout | 0.750 [0.650, 0.850] | +0.000 [-0.100, +0.100] | -0.050 [-0.150, +0.050] "
        "| 12.0 [11.9, 12.1] | 3.0 [2.9, 3.1] |",
        "| ct | alone | 0.400 [0.300, 0.500] | -0.400 [-0.500, -0.300] |  | 12.0 [11.9, 12.1] | 3.0 [nan, nan] |",
        "",
        "With one modality missing, a student loses this share of what the plain one loses:",
        "- alone: 1.00",
        "- alone, dropout: 0.50",
    ]


def test_the_files_of_the_benchmark_are_written(pair: MissingPlan) -> None:
    score(pair, PLAIN, 0, "ct_pet", (0.8, 0.6))
    text = write_missing(pair)
    assert (pair.output / "table.md").read_text() == text + "\n"
    written = json.loads((pair.output / "table.json").read_text())
    assert [(each["row"], each["present"]) for each in written["rows"]] == [(PLAIN, ["ct", "pet"])]
    assert written["dropout"] == 0.25
    commands = json.loads((pair.output / "commands.json").read_text())
    assert [each["row"] for each in commands] == [job.row for job in pair.jobs()]


def test_a_dry_run_prints_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "missing", "--dataset-dir", "DATA", "--dry-run", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python -m scripts ") for line in lines)
    assert sum("evaluate" in line for line in lines) == len(ROWS) * 7
