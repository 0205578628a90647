# SPDX-License-Identifier: Apache-2.0
"""The files and tables of the study from synthetic jobs."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import benchmarks.study as study_command
import benchmarks.study_compression as study_compression
from benchmarks.study_compression import matching_costs
from benchmarks.study_costs import ENSEMBLE, ENSEMBLE_MEMBERS, measure_costs, read_costs, study_networks
from benchmarks.study_records import read_runs
from benchmarks.study_students import STUDENTS
from benchmarks.study_table import write_study

PARAMETERS = {"0.2M": 200_000, "0.9M": 900_000, ENSEMBLE: 30_000_000}


def write_job(folder: Path, experiment: str, arm: str, dice: list[float | None], **keys: Any) -> dict[str, Any]:
    """One job of fold ``fold`` with a patient per Dice; None is a missed tumour."""
    job = {
        **{"experiment": experiment, "arm": arm, "student": "0.9M", "fold": 0, "source_fold": None, "seed": 0},
        **{"steps": 1500, "commit": "abc", "device": "cpu", "processor": "a CPU", "seconds": 36.0, "commands": []},
        **{"manifest": {}, **keys},
    }
    job["parameters"] = PARAMETERS[job["student"]]
    job["cases"] = [
        {
            **{"case_id": f"f{job['fold']}p{i}", "patient_id": f"f{job['fold']}p{i}", "dice": value or 0.0},
            **dict.fromkeys(("hd95_mm", "assd_mm"), None if value is None else 4.0),
            **{"status": "missed" if value is None else "ok", "diagonal_mm": 100.0},
        }
        for i, value in enumerate(dice)
    ]
    name = "_".join(str(job[key]) for key in ("experiment", "arm", "student", "fold", "seed"))
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    (folder / "jobs" / f"{name}.json").write_text(json.dumps(job))
    return job


def write_arm(folder: Path, experiment: str, arm: str, gain: float, **keys: Any) -> None:
    """Five folds of two patients with two seeds; the seeds differ by 0.02, patients by 0.1, gains by up to 0.009."""
    for fold in range(5):
        for seed in range(2):
            dice: list[float | None] = [0.5 + gain * (1 + 0.02 * fold) + 0.1 * i + 0.02 * seed for i in range(2)]
            write_job(folder, experiment, arm, dice, fold=fold, seed=seed, **keys)


def write_cost_file(folder: Path) -> None:
    rows = [
        {"network": name, "parameters": PARAMETERS[name], "gflops": cost, "cpu_seconds_per_case": cost / 10}
        for name, cost in (("0.2M", 0.3), ("0.9M", 1.0), (ENSEMBLE, 20.0))
    ]
    (folder / "costs.json").write_text(json.dumps([{**row, "processor": "a quiet CPU"} for row in rows]))


def section(page: str, title: str) -> str:
    """The part of a page below a heading."""
    return page.split(f"## {title}")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study after ``write_study``."""
    tmp_path = tmp_path_factory.mktemp("study")
    for arm, gain in (("alone", 0.0), ("control", 0.02), ("kd", 0.1)):
        write_arm(tmp_path, "B1", arm, gain)
    write_arm(tmp_path, "B2", "kd", 0.1)
    for arm, gain in (("alone", 0.0), ("control", 0.0), ("kd_out_of_fold", 0.1)):
        write_arm(tmp_path, "C", arm, gain, student="0.2M", steps=2000)
    write_arm(tmp_path, "C", "teachers", 0.1, student=ENSEMBLE, steps=4000)
    write_cost_file(tmp_path)
    write_study(tmp_path)
    return tmp_path


@pytest.mark.benchmarks
def test_every_file_is_computed_from_the_jobs(study: Path) -> None:
    with (study / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("experiment", "arm", "student", "fold", "source_fold", "seed"),
        *("patient_id", "dice", "hd95_mm", "assd_mm", "status"),
    ]
    assert len(rows) == 8 * 10 * 2
    gains = {arm: [float(row["dice"]) for row in rows if row["experiment"] == "B1" and row["arm"] == arm]
             for arm in ("kd", "control")}  # fmt: skip
    h1, h2, h3 = json.loads((study / "hypotheses.json").read_text())
    assert list(h1) == ["id", "n", "mean", "ci95", "p", "p_holm", "verdict"]
    assert h1["n"] == 10
    assert h1["mean"] == pytest.approx(statistics.fmean(gains["kd"]) - statistics.fmean(gains["control"]))
    assert h1["verdict"] == h3["verdict"] == "helps"
    assert (h2["id"], h2["n"], h2["p"], h2["verdict"]) == ("H2", 0, None, "not yet tested")
    with (study / "costs.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["network", "parameters", "gflops", "cpu_seconds_per_case"]
    for name in ("dice_by_size.png", "hypotheses.png"):
        assert imread(study / name).std() > 0.05
    before = {path: path.read_bytes() for path in study.iterdir() if path.is_file()}
    assert write_study(study) + "\n" == (study / "table.md").read_text()
    assert before == {path: path.read_bytes() for path in study.iterdir() if path.is_file()}


@pytest.mark.benchmarks
def test_the_page_answers_each_experiment(study: Path) -> None:
    page = (study / "table.md").read_text()
    hypotheses = section(page, "Hypotheses")
    assert "| H1 | B1 | 0.9M | kd - control | 10 | +0.083 [" in hypotheses
    assert "not yet tested: an arm has no run" in hypotheses
    assert "No finished run." in section(page, "D: missing modalities")
    assert "| 0.9M | alone (of B1) | 1500 | 2 | 5 | 10 | 10 | 0.560 [" in section(page, "B2")
    assert "| 0.9M | kd - alone | 10 and 10 | 10 | +0.104 [" in section(page, "B2")
    compression = section(page, "Students against")
    assert (
        "| 0.2M | kd_out_of_fold | 10 | +0.000 [+0.000, +0.000] | 100.0% | 150.0 times | -98.5% | yes |" in compression
    )
    assert "| 0.2M | control | 10 | -0.104 [" in compression
    assert "| B1 | 30 | abc | cpu | a CPU | 0.3 |" in section(page, "Where the runs were made")


@pytest.mark.benchmarks
def test_a_training_with_several_results_counts_once_and_an_unfinished_arm_is_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(study_compression, "draw_dice_by_size", lambda entries, *_: bool(drawn.extend(entries)))
    write_arm(tmp_path, "C", "alone", 0.0, student="0.2M", steps=2000)
    write_job(tmp_path, "C", "kd_in_sample", [0.9, 0.9], student="0.2M", steps=2000)  # one fold, one seed
    for fold, source in ((0, 1), (1, 0)):  # both folds of a pair, by one training of an hour
        more = {"student": ENSEMBLE, "seconds": 3600.0, "commands": ["the training", f"score {fold}"]}
        write_job(tmp_path, "A", "t1", [0.5, 0.6], fold=fold, source_fold=source, **more)
    write_cost_file(tmp_path)
    page = write_study(tmp_path)
    assert "| A | 2 | abc | cpu | a CPU | 1.0 |" in page
    assert [(entry["student"], entry["arm"]) for entry in drawn] == [("0.2M", "alone")]


@pytest.mark.benchmarks
def test_students_are_compared_on_the_same_subset_of_modalities(tmp_path: Path) -> None:
    for arm, gain in (("alone_dropout@mr", 0.0), ("alone_mr", 0.02), ("kd_dropout@mr", 0.1), ("kd_dropout@ct", 0.2)):
        write_arm(tmp_path, "D", arm, gain)
    write_study(tmp_path)
    rows = [
        line.split(" | ")[1]
        for line in section((tmp_path / "table.md").read_text(), "D:").splitlines()
        if " - " in line
    ]
    assert rows == ["alone_mr - alone_dropout@mr", "kd_dropout@mr - alone_dropout@mr"]


def test_costs_of_another_network_are_left_out() -> None:
    costs = [{"network": "0.2M", "parameters": 250_000}, {"network": "0.9M", "parameters": 900_000}]
    arms = {("0.2M", "kd"): [{"parameters": 200_000}], ("0.9M", "kd"): [{"parameters": 900_000}]}
    matched, notes = matching_costs(arms, costs)
    assert matched == {"0.9M": costs[1]}
    assert notes == ["The costs of 0.2M are left out: costs.json has 250000 parameters, its runs have 200000."]


@pytest.mark.benchmarks
def test_failures_and_diverged_runs_stay_in(tmp_path: Path) -> None:
    write_job(tmp_path, "B1", "alone", [0.8, None])
    write_job(tmp_path, "B1", "alone", [None, None], seed=1)
    page = write_study(tmp_path)
    # Patient 0: Dice (0.8 + 0) / 2 and HD95 (4 + 100) / 2. Patient 1: 0 and 100.
    row = next(line for line in page.splitlines() if line.startswith("| 0.9M | alone |"))
    assert row.startswith("| 0.9M | alone | 1500 | 2 | 1 | 2 | 2 | 0.200 [")
    assert "| 76.0 [" in row
    assert row.endswith("| 3 of 4 | 1 |")
    assert not (tmp_path / "costs.csv").exists()
    assert "The costs are not yet measured." in page


@pytest.mark.benchmarks
@pytest.mark.parametrize("keys", [{"steps": 100}, {"shortened": True}])
def test_a_shortened_run_is_in_no_table_and_named(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_job(tmp_path, "B1", "alone", [0.8, 0.6])
    write_job(tmp_path, "B1", "alone", [0.6, 0.4], fold=1, steps=1507)  # rounded up to whole epochs
    write_job(tmp_path, "B1", "alone", [0.1, 0.1], seed=1, **keys)
    page = write_study(tmp_path)
    steps = keys.get("steps", 1500)
    sentence = f"Refused: B1, alone, 0.9M, fold 0, seed 1 is a shortened run of {steps} steps. It is in no table."
    assert page.count(sentence) == 1
    assert "| 0.9M | alone | 1500 to 1507 | 1 | 2 | 2 | 4 | 0.600 [" in page
    assert (tmp_path / "cases.csv").read_text().count("\n") == 5


def test_damaged_jobs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished job"):
        read_runs(tmp_path)
    job = write_job(tmp_path, "B1", "alone", [0.8])
    copy = tmp_path / "jobs" / "copy.json"
    copy.write_text(json.dumps(job))
    with pytest.raises(ValueError, match=r"same run as another file: B1, alone, 0\.9M, fold 0, seed 0"):
        read_runs(tmp_path)
    copy.write_text(json.dumps({**job, "seed": 1, "cases": [{**job["cases"][0], "dice": None}]}))
    with pytest.raises(ValueError, match=r"copy\.json is not a job of the study: case 'f0p0': status ok needs dice"):
        read_runs(tmp_path)
    copy.write_text(json.dumps({"experiment": "B1"}))
    with pytest.raises(ValueError, match="it lacks arm, student"):
        read_runs(tmp_path)


@pytest.mark.benchmarks
def test_the_networks_have_the_parameters_of_the_study() -> None:
    with torch.device("meta"):
        parameters = {
            name: sum(weights.numel() for weights in network.parameters()) for name, network in study_networks().items()
        }
    assert {name: f"{parameters[name] / 1e6:.1f}M" for name in STUDENTS} == {name: name for name in STUDENTS}
    teachers = [round(parameters[name] / 1e6, 1) for name in (*ENSEMBLE_MEMBERS, "UNETR ViT-base")]
    assert teachers == [4.5, 29.4, 98.9]


@pytest.mark.benchmarks
def test_costs_of_convolutions_by_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = torch.nn.Conv3d(3, 16, 3, padding=1), torch.nn.Conv3d(3, 2, 1)
    monkeypatch.setattr("benchmarks.study_costs.study_networks", lambda: {"wide": wide, "narrow": narrow})
    threads = torch.get_num_threads()
    costs = {row["network"]: row for row in measure_costs(tmp_path, repeats=1, members=("wide", "narrow"))}
    assert torch.get_num_threads() == threads
    assert [costs[name]["parameters"] for name in ("wide", "narrow", ENSEMBLE)] == [3 * 16 * 27 + 16, 8, 1320]
    assert costs["wide"]["gflops"] == pytest.approx(2 * 3 * 16 * 27 * 48**3 / 1e9, abs=0.005)
    seconds = {name: row["cpu_seconds_per_case"] for name, row in costs.items()}
    assert 0 < seconds["narrow"] < seconds["wide"] < seconds[ENSEMBLE]
    assert read_costs(tmp_path) == list(costs.values())
    (tmp_path / "costs.json").write_text('[{"network": "wide"}]')
    with pytest.raises(ValueError, match=r"costs\.json is damaged"):
        read_costs(tmp_path)


def test_an_unfinished_arm_is_compared_by_the_runs_that_both_arms_have(tmp_path: Path) -> None:
    """The second seed is easier by 0.2; only one arm has it."""
    for fold in range(5):
        for seed in range(2):
            write_job(tmp_path, "C", "alone", [0.5 + 0.2 * seed, 0.6 + 0.2 * seed], fold=fold, seed=seed)
        write_job(tmp_path, "C", "kd_in_sample", [0.6, 0.7], fold=fold)
    line = next(line for line in write_study(tmp_path).splitlines() if "kd_in_sample - alone" in line)
    assert [cell.strip() for cell in line.split("|")[3:5]] == ["5 and 5", "10"]
    assert "+0.100 [+0.100, +0.100]" in line


def test_the_page_gives_no_estimate_of_an_untested_hypothesis(tmp_path: Path) -> None:
    """Otherwise the study could be stopped when an estimate pleases."""
    for fold in range(5):
        place: dict[str, Any] = {"fold": fold, "source_fold": (fold + 1) % 5}
        write_job(tmp_path, "B1", "kd", [0.5, 0.6], **place)
        for seed in range(2):
            write_job(tmp_path, "B1", "control", [0.5 + 0.2 * seed, 0.6 + 0.2 * seed], seed=seed, **place)
    (line,) = (line for line in write_study(tmp_path).splitlines() if "| kd - control |" in line)
    assert line.startswith("| H1 | B1 | 0.9M | kd - control | 10 |  |  |  |  | not yet tested: kd is not complete")


def test_the_share_of_an_unfinished_student_is_that_of_the_same_patients(tmp_path: Path) -> None:
    """It has fold 0 only, where the teachers are better, and equals them there."""
    for fold in range(5):
        write_job(tmp_path, "C", "teachers", [0.9 if fold == 0 else 0.5], fold=fold, student="ensemble")
    write_job(tmp_path, "C", "alone", [0.9], fold=0)
    line = next(line for line in write_study(tmp_path).splitlines() if "100.0%" in line)
    assert line.split("|")[2].strip() == "alone"


def test_the_second_round_of_a_hypothesis_counts_once_it_is_complete(tmp_path: Path) -> None:
    for arm, gain in (("kd", 0.05), ("control", 0.0)):
        for fold in range(5):
            for seed in range(2):
                dice: list[float | None] = [0.5 + gain + 0.01 * fold, 0.6 + gain]
                write_job(tmp_path, "B1", arm, dice, fold=fold, source_fold=(fold + 1) % 5, seed=seed)
    before = write_study(tmp_path)
    for seed in range(2, 4):  # a run of the second round of one arm only, and a bad one
        job = write_job(tmp_path, "B1", "kd", [0.0, 0.0], fold=0, source_fold=2, seed=seed)
        assert job["source_fold"] == 2
    (line,) = (line for line in write_study(tmp_path).splitlines() if "| kd - control |" in line)
    assert line.startswith("| H1 | B1 | 0.9M | kd - control | 10 | +0.050 [")
    assert line in before


def test_a_trial_has_folders_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortened run must not be taken for a result."""
    made = []

    class Plan:
        gate = None

        def __init__(self, **keys: Any) -> None:
            made.append(keys)

        def jobs(self) -> list[Any]:
            return []

    monkeypatch.setattr(study_command, "StudyPlan", Plan)
    where = ["--dataset-dir", "DATA", "--results", str(tmp_path / "results"), "--output-dir", str(tmp_path / "runs")]
    for shorten in ("1", "10"):
        parser = argparse.ArgumentParser()
        study_command.add_options(parser)
        study_command.run(parser.parse_args([*where, "--shorten", shorten, "--dry-run"]))
    assert [each["results"] for each in made] == [tmp_path / "results", tmp_path / "results" / "trial"]
    assert [each["output"] for each in made] == [tmp_path / "runs", tmp_path / "runs" / "trial"]


def test_results_of_another_kind_of_device_are_refused(tmp_path: Path) -> None:
    plan = argparse.Namespace(results=tmp_path, gpu=True)
    study_command.require_one_device(plan)
    write_job(tmp_path, "B1", "alone", [0.5], device="NVIDIA H100")
    study_command.require_one_device(plan)
    write_job(tmp_path, "B1", "control", [0.5])
    with pytest.raises(ValueError, match=r"B1_control\S* was made on cpu\. On another kind of device"):
        study_command.require_one_device(plan)
