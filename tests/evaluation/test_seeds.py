# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.evaluation.compare import compare
from scripts.evaluation.seeds import group_seeds, mean_over_seeds
from scripts.evaluation.summary_table import markdown_differences, markdown_summary
from scripts.metrics import aggregate, aggregate_regions, paired_difference, write_rows
from scripts.report.curves import curve_names, read_curves
from scripts.report.tables import difference_table, network_name, summary_table


def row(case: str, dice: float | None, status: str = "ok", distance: float | None = 3.0, **more: Any) -> dict[str, Any]:
    return {
        "case_id": case, "patient_id": case, "dice": dice, "hd95_mm": distance, "assd_mm": distance,
        "status": status, "diagonal_mm": 100.0, "volume_ml": 1.0, "reference_volume_ml": 1.0, **more,
    }  # fmt: skip


def test_seeds_are_averaged_per_case_and_a_failure_counts_as_the_worst_value() -> None:
    runs = [[row("a", 0.8), row("b", 0.0, "missed", None)], [row("a", 0.6, distance=5.0), row("b", 0.4)]]
    merged = {each["case_id"]: each for each in mean_over_seeds(runs)}
    assert merged["a"]["dice"] == pytest.approx(0.7)
    assert merged["a"]["hd95_mm"] == pytest.approx(4.0)
    assert merged["b"]["dice"] == pytest.approx(0.2)
    assert merged["b"]["assd_mm"] == pytest.approx((100.0 + 3.0) / 2)


def test_seeds_are_averaged_per_region() -> None:
    values = {"WT": 0.6, "ET": 0.2}
    runs = [[row("a", dice + seed, region=region) for region, dice in values.items()] for seed in (0.0, 0.2)]
    merged = {each["region"]: each["dice"] for each in mean_over_seeds(runs)}
    assert merged == {"WT": pytest.approx(0.7), "ET": pytest.approx(0.3)}


def test_an_empty_mask_of_an_empty_reference_has_no_value() -> None:
    empty, false = row("a", None, "true_negative", None), row("a", 0.0, "false_positive", None)
    assert [(each["dice"], each["status"]) for each in mean_over_seeds([[empty], [empty]])] == [(None, "true_negative")]
    assert [(each["dice"], each["status"]) for each in mean_over_seeds([[empty], [false]])] == [(0.0, "false_positive")]


def test_evaluations_of_one_name_are_one_network() -> None:
    runs = [
        {"name": name, "rows": rows, "aggregate": aggregate(rows), "seconds_per_case": seconds}
        for name, rows, seconds in (
            ("alone", [row("a", 0.5), row("b", 0.7)], 1.0),
            ("teacher", [row("a", 0.9), row("b", 0.9)], 4.0),
            ("alone", [row("a", 0.7), row("b", 0.9)], 2.0),
        )
    ]
    alone, teacher = group_seeds(runs)
    assert (alone["name"], alone["seconds_per_case"]) == ("alone (2 seeds)", 1.5)
    assert alone["seed_dice"] == pytest.approx([0.6, 0.8])
    assert alone["aggregate"]["metrics"]["dice"]["defined"]["mean"] == pytest.approx(0.7)
    assert alone["aggregate"]["n_patients"] == 2
    assert teacher["name"] == "teacher"
    assert "seed_dice" not in teacher


def write_evaluation(folder: Path, name: str, values: list[float]) -> str:
    rows = [row(case, dice) for case, dice in zip("ab", values, strict=True)]
    folder.mkdir()
    summary = {
        "name": name, "aggregate": aggregate(rows), "parameters": None, "gflops": None, "seconds_per_case": 1.0,
        "predictions": "masks",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    write_rows(rows, folder / "cases.csv")
    return str(folder)


def test_a_report_averages_seeds_on_request_and_compares_with_a_baseline(tmp_path: Path) -> None:
    alone, distilled = {"0": [0.5, 0.7], "1": [0.7, 0.9]}, {"0": [0.8, 0.8], "1": [0.8, 1.0]}
    folders = [write_evaluation(tmp_path / f"alone{seed}", "alone", values) for seed, values in alone.items()]
    folders += [write_evaluation(tmp_path / f"kd{seed}", "distilled", values) for seed, values in distilled.items()]
    table = compare(folders, str(tmp_path / "out"), baseline="alone", average_seeds=True)
    summary, differences = table.split("\n\n")
    assert len(summary.splitlines()) == 2 + 2
    assert "| alone (2 seeds) | 0.700 [" in summary
    assert summary.splitlines()[0].endswith("| s per case | Dice per seed |")
    assert summary.splitlines()[2].endswith("| 0.600, 0.800 |")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "0.600, 0.800" in page
    assert page.count("not how seeds vary") == 2
    assert "| network | Dice - that of alone (2 seeds) | cases |" in differences
    # Case a: 0.8 - 0.6, case b: 0.9 - 0.8.
    assert "| distilled (2 seeds) | +0.150 [" in differences
    assert len(compare(folders, str(tmp_path / "out")).splitlines()) == 2 + 4
    with pytest.raises(ValueError, match=r"kd1 is named twice\. Keep one"):
        compare([*folders, folders[-1]], str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"No evaluation is named nothing\. Choose one of alone"):
        compare(folders, str(tmp_path / "out"), baseline="nothing")


def test_a_table_without_epochs_holds_no_curves(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("case_id,dice\nC01,0.5\n")
    with pytest.raises(ValueError, match=r"cases\.csv holds no learning curves\. Name the curves\.csv of a training"):
        read_curves(tmp_path / "cases.csv")


def test_the_unseen_cases_are_averaged_over_the_seeds_too() -> None:
    """A case that trained one of the seeds is not unseen."""
    runs = []
    for seed, dice in enumerate((0.9, 0.5, 0.1)):
        rows = [row("a", 1.0, trained_on="yes"), row("b", dice, trained_on="no"), row("c", dice, trained_on="no")]
        rows[2]["trained_on"] = "yes" if seed == 1 else "no"
        missing = ["c"] if seed == 2 else []
        runs.append({"name": "s", "rows": rows, "aggregate": aggregate(rows), "missing": missing, "unreadable": []})
    (mean,) = group_seeds(runs)
    assert [each["trained_on"] for each in mean["rows"]] == ["yes", "no", "yes"]
    assert mean["trained_on"]["cases"] == ["a", "c"]
    unseen = mean["trained_on"]["unseen_aggregate"]
    assert (unseen["n_patients"], unseen["metrics"]["dice"]["defined"]["mean"]) == (1, pytest.approx(0.5))
    assert mean["missing"] == ["c"]


@pytest.mark.parametrize(("second", "named"), [(["b", "c"], "a foreground, c foreground"), (["a", "b", "b"], "b")])
def test_seeds_of_other_cases_are_not_averaged(second: list[str], named: str) -> None:
    runs = [[row(case, 0.5) for case in cases] for cases in (["a", "b"], second)]
    with pytest.raises(
        ValueError, match=f"repeated in one of the 2 evaluations, by case and region: {named}.*another --name"
    ):
        mean_over_seeds(runs)


def test_the_pictures_of_a_mean_are_those_of_the_first_seed_and_say_so() -> None:
    runs = [
        {"name": "s (ct only)", "present": ["ct"], "rows": rows, "aggregate": aggregate(rows), "predictions": folder}
        for folder, rows in (("one", [row("a", 0.9)]), ("two", [row("a", 0.1)]))
    ]
    (mean,) = group_seeds(runs)
    assert mean["name"] == "s (2 seeds) (ct only)"
    assert network_name(mean) == "s (2 seeds)"
    drawn = mean["drawn"]
    assert (drawn["name"], drawn["predictions"], drawn["rows"][0]["dice"]) == (
        "s (the first of 2 seeds) (ct only)",
        "one",
        0.9,
    )


def test_a_failure_of_one_seed_is_no_defined_distance() -> None:
    """So that networks of one seed and of several can be compared."""
    runs = []
    for status, dice, distance in (("ok", 0.8, 4.0), ("error", None, None)):
        rows = [row("a", 0.6, distance=2.0, trained_on="yes"), row("b", dice, status, distance, trained_on="no")]
        runs.append({"name": "s", "rows": rows, "aggregate": aggregate(rows)})
    (mean,) = group_seeds(runs)
    distances = mean["aggregate"]["metrics"]["hd95_mm"]
    assert (distances["defined"]["mean"], distances["worst_filled"]["mean"]) == (3.0, (2 + (4 + 100) / 2) / 2)
    assert (mean["rows"][1]["status"], mean["rows"][1]["findings"]) == ("error", "not scored in 1 of 2 seeds")
    unseen = mean["trained_on"]["unseen_aggregate"]
    assert (unseen["counts"]["error"], unseen["counted"], unseen["n"]) == (1, 2, 1)


def test_curves_of_folders_of_one_name_are_told_apart() -> None:
    paths = ["alone/s0/curves.csv", "kd/s0/curves.csv", "kd/s1/curves.csv"]
    assert curve_names(paths) == dict(zip(["alone/s0", "kd/s0", "s1"], paths, strict=True))


def test_two_files_of_curves_in_one_folder_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["run/curves.csv", "run/old.csv"]
    assert curve_names(paths) == dict(zip(paths, paths, strict=True))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert curve_names(["curves.csv"]) == {"here": "curves.csv"}


def test_differences_count_cases_and_use_the_bootstrap_of_the_evaluation() -> None:
    dice = {"alone": [0.5, 0.7, 0.4, 0.9], "kd": [0.9, 0.1, 0.6, 0.7]}
    runs = []
    for name, values in dice.items():
        rows = [row("ab"[i // 2], value, region=("WT", "ET")[i % 2]) for i, value in enumerate(values)]
        total = aggregate(rows, seed=5, resamples=300, level=0.5)
        runs.append({"name": name, "rows": rows, "aggregate": total, "regions": aggregate_regions(rows)})
    line = markdown_differences(runs, runs[0]).splitlines()[-1]
    expected = paired_difference(runs[1]["rows"], runs[0]["rows"], "dice", seed=5, resamples=300, level=0.5)
    low, high = expected["ci95"]
    assert line == f"| kd | {expected['mean']:+.3f} [{low:+.3f}, {high:+.3f}] | 2 |"
    assert "2 cases, 2 patients, 2 regions" in str(difference_table(runs, runs[0]).rows[0][0])


def test_the_failures_of_all_seeds_are_counted() -> None:
    runs = []
    for seed in range(3):
        rows = [row("a", 0.0, "missed", None) if seed else row("a", 0.8), row("b", 0.9)]
        runs.append({"name": "s", "rows": rows, "aggregate": aggregate(rows), "parameters": None, "gflops": None})
    (mean,) = group_seeds(runs)
    assert (mean["aggregate"]["counts"]["missed"], mean["aggregate"]["counted"]) == (2, 6)
    assert mean["regions"]["foreground"]["counts"]["missed"] == 2
    line = markdown_summary([mean]).splitlines()[2]
    dice, failures = (line.split("|")[i].strip() for i in (2, 5))
    assert dice.endswith(f"{(0.8 / 3 + 0.9) / 2:.3f} with failures")
    assert failures == "2 of 6"
    table = summary_table([mean])
    assert any("2 of 6" in str(cell) for cell in table.rows[0])
