# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods: its commands, its table and the fixed PET thresholds, without any training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from benchmarks.methods_plan import ALONE, MethodsPlan, write_threshold_masks
from benchmarks.methods_table import format_table, table_entries, write_comparison
from scripts.cli.main import main
from scripts.metrics import write_rows

METHODS = ("cwd", "dual", "teachformer")


@pytest.fixture
def plan(tmp_path: Path) -> MethodsPlan:
    return MethodsPlan("sts", "data", "compare", tmp_path, ("ct", "pet", "mr"), METHODS, seeds=(0, 1))


def metrics_row(case: str, dice: float | None, status: str = "ok", distance: float | None = 3.0) -> dict[str, Any]:
    return {
        "case_id": case, "patient_id": case, "dice": dice, "hd95_mm": distance, "assd_mm": distance,
        "volume_ml": 1.0, "reference_volume_ml": 1.0, "status": status, "diagonal_mm": 100.0,
    }  # fmt: skip


def write_result(folder: Path, dice: Sequence[float], seconds: float = 10.0) -> None:
    """Write the files of a training and its evaluation that the table reads."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    terms = {"loss": {"terms": {"cwd": {"weight": 0.5}}}} if "cwd" in str(folder) else {"loss": "@segmentation_loss"}
    manifest = {"wall_seconds": seconds, "peak_mib": 500.0, "config": terms}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "curves.csv").write_text("epoch,loss,seconds_per_step\n1,1.0,0.2\n2,0.5,0.4\n3,0.4,0.3\n")
    write_rows([metrics_row(f"p{i}", value) for i, value in enumerate(dice)], folder / "eval" / "cases.csv")
    (folder / "eval" / "summary.json").write_text("{}")


def option(command: Sequence[str], name: str) -> str:
    """The value that follows an option."""
    return command[command.index(name) + 1]


@pytest.mark.benchmarks
def test_the_command_line_accepts_every_command_of_the_plan(plan: MethodsPlan) -> None:
    for job in plan.jobs():
        training, evaluation = job.commands
        assert main([*training, "--dry-run"]) == main([*evaluation, "--dry-run"]) == 0
        assert option(training, "--output-dir") == str(job.folder)
        assert option(evaluation, "--weights") == str(job.folder / "model.pt")
        assert option(training, "--fold") == option(evaluation, "--fold") == "0"
        epochs = 100 if job.row.startswith("teacher ") else 10
        assert option(training, "--epochs") == str(epochs)


def test_every_method_runs_with_every_seed_and_again_with_random_teachers(plan: MethodsPlan) -> None:
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


def test_the_needs_of_a_job_are_outputs_of_earlier_jobs(plan: MethodsPlan) -> None:
    written: set[Path] = set()
    for job in plan.jobs():
        assert set(job.needs) <= written, job.row
        written.add(job.folder / "model.pt")


@pytest.mark.benchmarks
def test_the_table_compares_every_row_with_the_student_alone(plan: MethodsPlan) -> None:
    write_result(plan.output / "student_alone" / "seed0", [0.5, 0.7])
    write_result(plan.output / "student_alone" / "seed1", [0.9, 0.9])
    write_result(plan.output / "teacher_dynunet" / "seed0", [0.9, 0.9])
    write_result(plan.output / "cwd" / "seed0", [0.8, 0.7], seconds=20.0)
    write_result(plan.output / "cwd" / "stages" / "ignored", [0.0, 0.0])
    write_result(plan.output / "cwd" / "seed0" / "stages" / "student", [0.0, 0.0], seconds=7.0)
    entries = {entry["row"]: entry for entry in table_entries(plan, plan.jobs())}
    assert set(entries) == {ALONE, "cwd", "teacher dynunet"}
    assert entries[ALONE]["dice_per_seed"] == [0.6, 0.9]
    assert entries["teacher dynunet"]["difference"]["dice"]["mean"] == pytest.approx(0.9 - 0.75)  # all seeds
    assert entries["cwd"]["difference"]["dice"]["mean"] == pytest.approx(0.75 - 0.6)  # its own seed
    assert entries["cwd"]["seconds"] == pytest.approx(27.0)  # with its stages
    assert entries["cwd"]["step_s"] == pytest.approx(0.3)
    assert entries["cwd"]["term_weights"] == [{"cwd": 0.5}]
    assert "difference" not in entries[ALONE]
    table = format_table(list(entries.values()))
    assert "| cwd | 1 | 0.750 [" in table
    assert "+0.150 [" in table


@pytest.mark.benchmarks
def test_all_files_of_a_comparison_are_written(tmp_path: Path) -> None:
    for number in range(1, 6):
        (tmp_path / "data" / f"STS_00{number}").mkdir(parents=True)
        for name in ("CT_image", "PET_image", "MR_T1_image", "CT_mask"):
            (tmp_path / "data" / f"STS_00{number}" / f"{name}.nii.gz").touch()
    plan = MethodsPlan("sts", str(tmp_path / "data"), "compare", tmp_path / "out", ("ct", "pet", "mr"), METHODS, (0,))
    write_result(plan.output / "student_alone" / "seed0", [0.5, 0.7])
    write_result(plan.output / "cwd" / "seed0", [0.8, 0.7])
    table = write_comparison(plan, plan.jobs(), str(plan.output / "costs.json"))
    assert (plan.output / "table.md").read_text() == table + "\n"
    assert (plan.output / "figure.png").stat().st_size > 5_000
    assert "cwd,p0,0.8000,3.0000,3.0000" in (plan.output / "cases.csv").read_text().splitlines()
    manifest = json.loads((plan.output / "manifest.json").read_text())
    assert (len(manifest["data"]["training"]), len(manifest["data"]["validation"])) == (4, 1)
    costs = {row["side"]: row for row in json.loads((plan.output / "costs.json").read_text())}
    assert costs["cwd"] == {
        "side": "cwd", "what": "training step", "median_s": 0.3, "ratio": 1.0, "peak_mib": 500.0
    }  # fmt: skip


@pytest.mark.benchmarks
def test_threshold_masks_have_the_grid_of_the_pet_and_the_thresholds_of_their_names(
    tmp_path: Path, make_affine: Any
) -> None:
    affine = make_affine(np.eye(3), (4, 4, 3), (4, 4, 4))
    values = np.linspace(0, 10, 64, dtype=np.float32).reshape(4, 4, 4)
    for number in range(1, 6):
        folder = tmp_path / "data" / f"STS_00{number}"
        folder.mkdir(parents=True)
        for name in ("CT_image", "PET_image", "MR_T1_image", "CT_mask"):
            nib.save(nib.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    plan = MethodsPlan("sts", str(tmp_path / "data"), "compare", tmp_path / "out", ("ct", "pet", "mr"), METHODS)
    masks = dict(write_threshold_masks(plan))
    for row, threshold in (("PET above SUV 2.5", 2.5), ("PET above 41% of its maximum", 4.1)):
        (path,) = masks[row].glob("*.nii.gz")
        mask = nib.load(path)
        np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), values >= threshold)
