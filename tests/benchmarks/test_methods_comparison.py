# SPDX-License-Identifier: Apache-2.0
"""The comparison's queue, its table and the fixed thresholds, with trainings that only pretend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from benchmarks.job_queue import Job, work_off
from benchmarks.methods_plan import ALONE, Plan, threshold_masks
from benchmarks.methods_table import entries, markdown, seed_mean, write_comparison
from scripts.cli.main import ACTIONS, main
from scripts.cli.options import build_parser
from scripts.metrics import write_rows

METHODS = ("cwd", "dual", "teachformer")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan("sts", "data", "compare", tmp_path, ("ct", "pet", "mr"), METHODS, seeds=(0, 1))


def row(case: str, dice: float | None, status: str = "ok", distance: float | None = 3.0) -> dict[str, Any]:
    return {
        "case_id": case, "patient_id": case, "dice": dice, "hd95_mm": distance, "assd_mm": distance,
        "volume_ml": 1.0, "reference_volume_ml": 1.0, "status": status, "diagonal_mm": 100.0,
    }  # fmt: skip


def finish(folder: Path, dice: Sequence[float], seconds: float = 10.0) -> None:
    """What a training and its evaluation leave, as far as the table reads it."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    terms = {"loss": {"terms": {"cwd": {"weight": 0.5}}}} if "cwd" in str(folder) else {"loss": "@segmentation_loss"}
    manifest = {"wall_seconds": seconds, "peak_mib": 500.0, "config": terms}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "curves.csv").write_text("epoch,loss,seconds_per_step\n1,1.0,0.2\n2,0.5,0.4\n3,0.4,0.3\n")
    write_rows([row(f"p{i}", value) for i, value in enumerate(dice)], folder / "eval" / "cases.csv")
    (folder / "eval" / "summary.json").write_text("{}")


def test_every_command_of_the_plan_is_one_that_the_program_takes(plan: Plan) -> None:
    parser = build_parser(ACTIONS)
    for job in plan.jobs():
        training, scoring = (parser.parse_args(command) for command in job.commands)
        assert training.output_dir == str(job.folder)
        assert scoring.weights == str(job.folder / "model.pt")
        assert training.fold == scoring.fold == 0
        assert training.epochs == (100 if job.row.startswith("teacher ") else 2 if "warmed" in job.row else 10)


def test_every_method_runs_with_every_seed_and_once_more_with_random_teachers(plan: Plan) -> None:
    jobs = plan.jobs()
    assert len({(job.row, job.seed) for job in jobs}) == len(jobs) == len({job.folder for job in jobs})
    for method in METHODS:
        for name in (method, f"{method}, random teachers"):
            assert [job.seed for job in jobs if job.row == name] == [0, 1]
    for job in jobs:
        if job.row == "dual":
            assert "dynunet=" in " ".join(job.commands[0])
            assert "hdenseformer=" in " ".join(job.commands[0])
            assert all("selective_fusion=true" in command for command in job.commands)
        if job.row.endswith("random teachers"):
            assert "dynunet=random" in job.commands[0]
    # What a run needs is what another run of the plan leaves, before it in the queue.
    made: set[Path] = set()
    for job in jobs:
        assert set(job.needs) <= made, job.row
        made.add(job.folder / "model.pt")


def pretend(arguments: Sequence[str]) -> int:
    """Stands for ``main``: leaves what a verb would, except in a folder called broken."""
    output = Path(arguments[arguments.index("out") + 1])
    if "broken" in str(output):
        raise ValueError("broken on purpose")
    print(" ".join(arguments))
    output.mkdir(parents=True, exist_ok=True)
    (output / ("summary.json" if arguments[0] == "evaluate" else "model.pt")).write_text("{}")
    if arguments[0] != "evaluate":
        (output / "manifest.json").write_text("{}")
    return 0


def job(folder: Path, *needs: Path) -> Job:
    return Job(
        folder.name, 0, folder, (("train", "out", str(folder)), ("evaluate", "out", str(folder / "eval"))), needs
    )


def test_the_queue_waits_for_what_a_run_needs_and_leaves_out_what_is_done(tmp_path: Path) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    jobs = [job(second, first / "model.pt"), job(first), job(third, second / "model.pt")]
    assert work_off(jobs, 2, pretend) == []
    assert all(each.done for each in jobs)
    times = {each.row: (each.folder / "log.txt").stat().st_mtime_ns for each in jobs}
    assert times["first"] < times["second"] < times["third"]
    (third / "eval" / "summary.json").unlink()
    assert work_off(jobs, 2, pretend) == []
    again = {each.row for each in jobs if (each.folder / "log.txt").stat().st_mtime_ns != times[each.row]}
    assert again == {"third"}
    assert (third / "log.txt").read_text().count("train") == 1  # it was trained; only its evaluation was missing
    assert (third / "log.txt").read_text().count("evaluate") == 2


def test_an_interrupted_training_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoint.pt").write_text("")
    assert work_off([job(tmp_path / "half")], 1, pretend) == []
    assert "--resume" in (tmp_path / "half" / "log.txt").read_text().splitlines()[0]


def test_a_failed_run_is_told_with_its_reason_and_stops_only_those_that_need_it(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken", tmp_path / "other"
    jobs = [job(broken), job(tmp_path / "dependent", broken / "model.pt"), job(other)]
    assert [each.row for each in work_off(jobs, 2, pretend)] == ["broken", "dependent"]
    assert jobs[2].done
    assert "broken on purpose" in (broken / "log.txt").read_text()


def test_seeds_are_averaged_per_case_and_a_failure_counts_with_its_worst_value() -> None:
    runs = [[row("a", 0.8), row("b", 0.0, "missed", None)], [row("a", 0.6, distance=5.0), row("b", 0.4)]]
    merged = {each["case_id"]: each for each in seed_mean(runs)}
    assert merged["a"]["dice"] == pytest.approx(0.7)
    assert merged["a"]["hd95_mm"] == pytest.approx(4.0)
    assert merged["b"]["dice"] == pytest.approx(0.2)
    assert merged["b"]["assd_mm"] == pytest.approx((100.0 + 3.0) / 2)


def test_the_table_pairs_every_row_with_the_lone_student(plan: Plan) -> None:
    finish(plan.output / "student_alone" / "seed0", [0.5, 0.7])
    finish(plan.output / "student_alone" / "seed1", [0.9, 0.9])
    finish(plan.output / "teacher_dynunet" / "seed0", [0.9, 0.9])
    finish(plan.output / "cwd" / "seed0", [0.8, 0.7], seconds=20.0)
    finish(plan.output / "cwd" / "stages" / "ignored", [0.0, 0.0])
    finish(plan.output / "cwd" / "seed0" / "stages" / "student", [0.0, 0.0], seconds=7.0)
    found = {each["row"]: each for each in entries(plan, plan.jobs())}
    assert set(found) == {ALONE, "cwd", "teacher dynunet"}
    assert found[ALONE]["dice_per_seed"] == [0.6, 0.9]
    assert found["teacher dynunet"]["difference"]["dice"]["mean"] == pytest.approx(0.9 - 0.75)  # all seeds
    assert found["cwd"]["difference"]["dice"]["mean"] == pytest.approx(0.75 - 0.6)  # its own seed
    assert found["cwd"]["seconds"] == pytest.approx(27.0)  # its stages included
    assert found["cwd"]["step_s"] == pytest.approx(0.3)
    assert found["cwd"]["term_weights"] == [{"cwd": 0.5}]
    assert "difference" not in found[ALONE]
    text = markdown(list(found.values()))
    assert "| cwd | 1 | 0.750 [" in text
    assert "+0.150 [" in text


def test_the_files_of_a_comparison_are_written(tmp_path: Path) -> None:
    for number in range(1, 6):
        (tmp_path / "data" / f"STS_00{number}").mkdir(parents=True)
        for name in ("CT_image", "PET_image", "MR_T1_image", "CT_mask"):
            (tmp_path / "data" / f"STS_00{number}" / f"{name}.nii.gz").touch()
    plan = Plan("sts", str(tmp_path / "data"), "compare", tmp_path / "out", ("ct", "pet", "mr"), METHODS, (0,))
    finish(plan.output / "student_alone" / "seed0", [0.5, 0.7])
    finish(plan.output / "cwd" / "seed0", [0.8, 0.7])
    text = write_comparison(plan, plan.jobs(), str(plan.output / "costs.json"))
    assert (plan.output / "table.md").read_text() == text + "\n"
    assert (plan.output / "figure.png").stat().st_size > 5_000
    assert "cwd,p0,0.8000,3.0000,3.0000" in (plan.output / "cases.csv").read_text().splitlines()
    manifest = json.loads((plan.output / "manifest.json").read_text())
    assert (len(manifest["data"]["training"]), len(manifest["data"]["validation"])) == (4, 1)
    costs = {each["side"]: each for each in json.loads((plan.output / "costs.json").read_text())}
    assert costs["cwd"] == {
        "side": "cwd", "what": "training step", "median_s": 0.3, "ratio": 1.0, "peak_mib": 500.0
    }  # fmt: skip


def test_thresholds_keep_the_pets_grid_and_are_what_their_names_say(tmp_path: Path, make_affine: Any) -> None:
    affine = make_affine(np.eye(3), (4, 4, 3), (4, 4, 4))
    values = np.linspace(0, 10, 64, dtype=np.float32).reshape(4, 4, 4)
    for number in range(1, 6):
        folder = tmp_path / "data" / f"STS_00{number}"
        folder.mkdir(parents=True)
        for name in ("CT_image", "PET_image", "MR_T1_image", "CT_mask"):
            nib.save(nib.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    plan = Plan("sts", str(tmp_path / "data"), "compare", tmp_path / "out", ("ct", "pet", "mr"), METHODS)
    masks = dict(threshold_masks(plan))
    for row, limit in (("PET above SUV 2.5", 2.5), ("PET above 41% of its maximum", 4.1)):
        (path,) = masks[row].glob("*.nii.gz")
        mask = nib.load(path)
        np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), values >= limit)


def test_a_dry_run_prints_the_commands_of_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "methods", "--dataset-dir", "DATA", "--dry-run", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python -m scripts ") for line in lines)
    assert sum("--method cwd" in line for line in lines) == 2
    assert main(["benchmark", "methods"]) == 1
    assert "--dataset-dir" in capsys.readouterr().err
