# SPDX-License-Identifier: Apache-2.0
"""Aggregates: arithmetic, failures, the bootstrap over patients, files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.metrics import COLUMNS, STATUSES, aggregate, aggregate_regions, paired_difference, read_rows, write_rows


def row(case: str, dice=0.8, hd95=4.0, assd=1.0, status="ok", patient: str | None = None, diagonal=100.0) -> dict:
    if status != "ok":
        dice = 0.0 if status in ("missed", "false_positive") else None
        hd95 = assd = None
    result = {"case_id": case, "dice": dice, "hd95_mm": hd95, "assd_mm": assd, "status": status}
    return result | {"diagonal_mm": diagonal} | ({} if patient is None else {"patient_id": patient})


@pytest.fixture
def mixed() -> list[dict]:
    return [
        row("a", 0.9, 2.0, 1.0),
        row("b", 0.7, 4.0, 2.0),
        row("c", status="missed", diagonal=100.0),
        row("d", status="false_positive", diagonal=200.0),
        row("e", status="true_negative"),
        row("f", status="error", diagonal=300.0),
    ]


def test_all_five_statuses_are_always_counted(mixed) -> None:
    assert aggregate(mixed)["counts"] == {"ok": 2, "missed": 1, "false_positive": 1, "true_negative": 1, "error": 1}
    assert aggregate([])["counts"] == dict.fromkeys(STATUSES, 0)


def test_defined_dice_counts_missed_and_false_positive_as_zero_and_leaves_out_the_rest(mixed) -> None:
    summary = aggregate(mixed)["metrics"]["dice"]["defined"]
    assert (summary["n"], summary["n_patients"]) == (4, 4)
    assert summary["mean"] == pytest.approx(1.6 / 4)
    assert summary["median"] == pytest.approx(0.35)
    assert summary["std"] == pytest.approx(math.sqrt((0.25 + 0.09 + 0.16 + 0.16) / 3))


def test_worst_filled_dice_counts_the_missing_prediction_as_zero(mixed) -> None:
    summary = aggregate(mixed)["metrics"]["dice"]["worst_filled"]
    assert summary["n"] == 5
    assert summary["mean"] == pytest.approx(1.6 / 5)


@pytest.mark.parametrize(("metric", "total"), [("hd95_mm", 6.0), ("assd_mm", 3.0)])
def test_failures_count_at_their_own_image_diagonal_in_worst_filled_distances_only(mixed, metric, total) -> None:
    metrics = aggregate(mixed)["metrics"][metric]
    assert (metrics["defined"]["n"], metrics["defined"]["mean"]) == (2, pytest.approx(total / 2))
    assert metrics["worst_filled"]["n"] == 5
    assert metrics["worst_filled"]["mean"] == pytest.approx((total + 100 + 200 + 300) / 5)


def test_missing_a_tumour_never_improves_the_worst_filled_distance() -> None:
    """Averaging defined values only: [2, 2, missed] gives 2, better than [2, 2, 5] with the third tumour found."""
    found = aggregate([row("a", hd95=2.0), row("b", hd95=2.0), row("c", hd95=5.0)])["metrics"]["hd95_mm"]
    missed = aggregate([row("a", hd95=2.0), row("b", hd95=2.0), row("c", status="missed")])["metrics"]["hd95_mm"]
    assert missed["defined"]["mean"] < found["defined"]["mean"]
    assert (missed["defined"]["n"], found["defined"]["n"]) == (2, 3)
    assert missed["worst_filled"]["mean"] == pytest.approx(104 / 3)
    assert missed["worst_filled"]["mean"] > found["worst_filled"]["mean"] == pytest.approx(3.0)
    assert missed["worst_filled"]["n"] == 3


@pytest.mark.parametrize("rows", [[], [row("a")], [row("a", status="true_negative")], [row("a", status="error")]])
def test_undefined_statistics_are_null_and_never_nan(rows) -> None:
    result = aggregate(rows)
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    for metric in result["metrics"].values():
        for summary in metric.values():
            assert summary["std"] is None
            assert summary["ci95"] is None
            assert (summary["mean"] is None) == (summary["n"] == 0)


def test_one_patient_with_many_cases_has_a_spread_but_no_interval() -> None:
    summary = aggregate([row("a", 0.5, patient="p"), row("b", 0.7, patient="p")])["metrics"]["dice"]["defined"]
    assert (summary["n"], summary["n_patients"], summary["ci95"]) == (2, 1, None)
    assert summary["std"] == pytest.approx(math.sqrt(0.02))


def test_definitions_and_bootstrap_settings_are_part_of_the_result() -> None:
    result = aggregate([row("a"), row("b")], seed=7, resamples=50, level=0.9)
    assert "95th percentiles" in result["definitions"]["hd95_mm"]
    assert "pooled over the boundary voxels of both masks" in result["definitions"]["assd_mm"]
    expected = {"unit": "patient", "method": "percentile", "seed": 7, "resamples": 50, "level": 0.9}
    assert result["bootstrap"] == expected


def test_bootstrap_is_determined_by_its_seed_and_not_by_the_order_of_rows() -> None:
    rows = [row(f"c{i}", i / 10, hd95=1.7 * i) for i in range(10)]
    assert aggregate(rows, seed=1) == aggregate(rows[::-1], seed=1)
    first, second = (aggregate(rows, seed=s)["metrics"]["hd95_mm"]["defined"]["ci95"] for s in (1, 2))
    assert first != second


def test_bootstrap_is_the_same_in_every_process(tmp_path) -> None:
    """Python orders sets of strings differently in each process; the patients' order must not follow."""
    code = "from scripts.metrics import aggregate, read_rows; print(aggregate(read_rows('cases.csv')))"
    write_rows([row(f"c{i}", i / 10) for i in range(10)], tmp_path / "cases.csv")
    environments = [{**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": s} for s in "12"]
    command = [sys.executable, "-c", code]
    outputs = {subprocess.check_output(command, cwd=tmp_path, env=environment) for environment in environments}
    assert len(outputs) == 1


def test_interval_of_two_patients_is_known_exactly() -> None:
    """Two patients with 0 and 1: the mean of a resample is 0, 1/2, 1 with odds 1:2:1, so 95% reaches from 0 to 1 and
    40% stays at 1/2."""
    rows = [row("a", 0.0), row("b", 1.0)]
    assert aggregate(rows)["metrics"]["dice"]["defined"]["ci95"] == [0.0, 1.0]
    assert aggregate(rows, level=0.4)["metrics"]["dice"]["defined"]["ci95"] == [0.5, 0.5]


def test_interval_brackets_the_mean_and_shrinks_with_more_patients() -> None:
    widths = []
    for n in (10, 160):
        summary = aggregate([row(f"c{i}", (i % 10) / 10) for i in range(n)])["metrics"]["dice"]["defined"]
        low, high = summary["ci95"]
        assert low < summary["mean"] < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)


def test_cluster_bootstrap_keeps_the_cases_of_a_patient_together() -> None:
    """Two patients with 50 identical cases each: two independent observations, so the interval is [0, 1]. Resampling
    the 100 cases as if independent would give about [0.4, 0.6]."""
    values = [(f"{p}{i}", float(p == "q")) for p in "pq" for i in range(50)]
    clustered = aggregate([row(case, dice, patient=case[0]) for case, dice in values])["metrics"]["dice"]["defined"]
    independent = aggregate([row(case, dice) for case, dice in values])["metrics"]["dice"]["defined"]
    assert clustered["ci95"] == [0.0, 1.0]
    assert independent["ci95"] == pytest.approx([0.4, 0.6], abs=0.03)
    assert (clustered["n"], clustered["n_patients"], independent["n_patients"]) == (100, 2, 100)
    assert clustered["mean"] == independent["mean"] == 0.5


def test_patients_with_more_cases_weigh_more_in_each_resample() -> None:
    """p has three cases of 1, q one of 0: the means of (p, p), (p, q), (q, q) are 1, 3/4 and 0, and the middle one is
    drawn half of the time."""
    rows = [row(f"p{i}", 1.0, patient="p") for i in range(3)] + [row("q", 0.0)]
    summary = aggregate(rows, level=0.4)["metrics"]["dice"]["defined"]
    assert (summary["mean"], summary["ci95"]) == (0.75, [0.75, 0.75])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("x") | {"status": "good"}, "unknown status 'good'"),
        (row("x", dice=math.nan), "dice is nan"),
        (row("x", hd95=math.inf), "hd95_mm is inf"),
        (row("x", assd=None), "status ok needs"),
        (row("x", status="missed") | {"hd95_mm": 0.0}, "has no distances"),
        (row("x", status="false_positive") | {"dice": 1.0}, "means dice 0"),
        (row("x", status="true_negative") | {"dice": 1.0}, "has no dice"),
        (row("x", status="error", diagonal=None), "needs a positive diagonal_mm"),
        (row("x", status="missed", diagonal=0.0), "needs a positive diagonal_mm"),
    ],
)
def test_values_that_contradict_the_status_are_refused_by_case(bad, message) -> None:
    with pytest.raises(ValueError, match=f"case 'x'.*{message}"):
        aggregate([row("a"), bad])


def test_a_case_listed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="case 'a' is listed twice"):
        aggregate([row("a"), row("b"), row("a")])


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_impossible_bootstrap_settings_are_refused(options) -> None:
    with pytest.raises(ValueError, match="resamples must be positive and level between 0 and 1"):
        aggregate([row("a")], **options)


def test_paired_difference_is_the_mean_of_a_minus_b_over_common_cases() -> None:
    a = [row("1", 0.9), row("2", 0.8), row("only_a", 0.1)]
    b = [row("2", 0.5), row("1", 0.7), row("only_b", 0.2)]
    result = paired_difference(a, b, "dice")
    assert (result["n"], result["n_patients"], result["n_unpaired"]) == (2, 2, 2)
    assert result["mean"] == pytest.approx(0.25)
    assert result["ci95"] == pytest.approx([0.2, 0.3])
    assert paired_difference(b, a, "dice")["mean"] == pytest.approx(-0.25)


def test_paired_difference_of_equal_rows_is_zero_with_zero_width(mixed) -> None:
    result = paired_difference(mixed, mixed, "hd95_mm")
    assert (result["n"], result["n_undefined"], result["mean"], result["ci95"]) == (5, 1, 0.0, [0.0, 0.0])


def test_paired_difference_counts_a_missed_tumour_unless_worst_filled_is_off() -> None:
    a = [row("1", hd95=2.0), row("2", hd95=2.0), row("3", status="missed")]
    b = [row("1", hd95=3.0), row("2", hd95=3.0), row("3", hd95=5.0)]
    assert paired_difference(a, b, "hd95_mm")["mean"] == pytest.approx((-1 - 1 + 95) / 3)
    without_failures = paired_difference(a, b, "hd95_mm", worst_filled=False)
    assert (without_failures["mean"], without_failures["n"], without_failures["n_undefined"]) == (-1.0, 2, 1)


def test_pairing_removes_the_spread_between_patients() -> None:
    a = [row(str(i), i / 20) for i in range(20)]
    b = [row(str(i), i / 20 - 0.01 - 0.001 * (i % 2)) for i in range(20)]
    low, high = paired_difference(a, b, "dice")["ci95"]
    assert 0.0099 < low < 0.0105 < high < 0.0111


def test_paired_difference_resamples_patients_and_needs_two() -> None:
    a = [row("1", 0.9, patient="p"), row("2", 0.8, patient="p")]
    b = [row("1", 0.7, patient="p"), row("2", 0.7, patient="p")]
    assert paired_difference(a, b, "dice")["ci95"] is None
    with pytest.raises(ValueError, match="case '1' belongs to patient 'p' and to patient '1'"):
        paired_difference(a, [row("1")], "dice")
    with pytest.raises(ValueError, match="unknown metric 'iou'"):
        paired_difference(a, b, "iou")


def test_csv_round_trip_keeps_every_number_and_every_undefined_cell(tmp_path, mixed) -> None:
    texts = {"region": "foreground", "findings": 'a, "b"; ü', "trained_on": "no"}
    rows = [{"patient_id": r["case_id"], "volume_ml": 1 / 3, "reference_volume_ml": None, **texts} | r for r in mixed]
    rows.append(
        row('odd, "id"\nü', 0.1 + 0.2, patient="007")
        | {"volume_ml": 1e-12, "reference_volume_ml": 0.0, "region": "whole; tumour", "findings": "", "trained_on": ""}
    )
    write_rows(rows, tmp_path / "new" / "cases.csv")
    assert read_rows(tmp_path / "new" / "cases.csv") == rows
    lines = (tmp_path / "new" / "cases.csv").read_text(encoding="utf-8").splitlines()
    columns = "case_id,patient_id,region,status,dice,hd95_mm,assd_mm,volume_ml,reference_volume_ml,diagonal_mm"
    assert lines[0] == f"{columns},findings,trained_on"
    assert lines[5] == 'e,e,foreground,true_negative,,,,0.3333333333333333,,100.0,"a, ""b""; ü",no'


FIRST = "case_id,patient_id,dice,hd95_mm,assd_mm,volume_ml,reference_volume_ml,status,diagonal_mm"


@pytest.mark.parametrize(("columns", "cells"), [(FIRST, ""), (f"{FIRST},findings,trained_on", ",a note,no")])
def test_a_table_without_regions_is_read(tmp_path, columns, cells) -> None:
    (tmp_path / "old.csv").write_text(f"{columns}\nx,p,0.5,2.0,1.0,3.0,4.0,ok,100.0{cells}\n", encoding="utf-8")
    numbers = {"dice": 0.5, "hd95_mm": 2.0, "assd_mm": 1.0, "volume_ml": 3.0, "reference_volume_ml": 4.0}
    texts = {"findings": "a note", "trained_on": "no"} if cells else {"findings": "", "trained_on": ""}
    names = {"case_id": "x", "patient_id": "p", "region": "foreground", "status": "ok", "diagonal_mm": 100.0}
    assert read_rows(tmp_path / "old.csv") == [{**names, **numbers, **texts}]


def test_every_table_of_the_results_is_read() -> None:
    tables = [
        path
        for path in (Path(__file__).parents[2] / "docs" / "results").rglob("cases.csv")
        if path.read_text(encoding="utf-8").startswith("case_id,")
    ]
    assert len(tables) > 3
    for path in tables:
        assert aggregate(read_rows(path), resamples=1)["n"] == path.read_text(encoding="utf-8").count("\n") - 1


@pytest.fixture
def regions() -> list[dict]:
    """Three cases with two regions each; the second region of the last case is missed."""
    values = {"a": (0.9, 0.5), "b": (0.7, 0.3), "c": (0.8, None)}
    return [
        row(case, dice, status="missed" if dice is None else "ok") | {"region": region}
        for case, pair in values.items()
        for region, dice in zip(("whole", "core"), pair, strict=True)
    ]


def test_every_region_has_its_own_aggregate_in_the_order_of_the_rows(regions) -> None:
    result = aggregate_regions(regions, seed=3, resamples=50)
    assert list(result) == ["whole", "core"]
    assert result["whole"]["metrics"]["dice"]["defined"]["mean"] == pytest.approx((0.9 + 0.7 + 0.8) / 3)
    assert result["core"]["metrics"]["dice"]["defined"]["mean"] == pytest.approx((0.5 + 0.3 + 0) / 3)
    assert [each["n"] for each in result.values()] == [3, 3]
    assert result["core"]["counts"]["missed"] == 1
    assert result["core"]["bootstrap"] == {**result["core"]["bootstrap"], "seed": 3, "resamples": 50}
    assert aggregate_regions([row("a")]) == {"foreground": aggregate([row("a")])}


def test_an_aggregate_of_several_regions_is_over_all_rows_and_keeps_a_patient_together(regions) -> None:
    summary = aggregate(regions)["metrics"]["dice"]["defined"]
    assert (summary["n"], summary["n_patients"]) == (6, 3)
    assert summary["mean"] == pytest.approx((0.9 + 0.5 + 0.7 + 0.3 + 0.8 + 0) / 6)
    means = [0.7, 0.5, 0.4]  # of each patient: every resample's mean lies between them
    assert min(means) - 1e-9 <= summary["ci95"][0] < summary["ci95"][1] <= max(means) + 1e-9
    assert aggregate(regions) == aggregate(regions[::-1])


def test_differences_are_paired_by_case_and_region(regions) -> None:
    worse = [{**each, "dice": each["dice"] - 0.1} if each["region"] == "core" and each["dice"] else each
             for each in regions]  # fmt: skip
    result = paired_difference(regions, worse[::-1], "dice")
    assert (result["n"], result["n_patients"], result["n_unpaired"]) == (6, 3, 0)
    assert result["mean"] == pytest.approx(2 * 0.1 / 6)
    assert paired_difference(regions, worse[:-1], "dice")["n_unpaired"] == 1


def test_a_region_listed_twice_in_a_case_is_refused(regions) -> None:
    with pytest.raises(ValueError, match="case 'b', region 'core' is listed twice"):
        aggregate([*regions, regions[3]])


def test_a_table_from_csv_gives_the_same_aggregate(tmp_path, mixed) -> None:
    write_rows(mixed, tmp_path / "cases.csv")
    assert aggregate(read_rows(tmp_path / "cases.csv")) == aggregate(mixed)


@pytest.mark.parametrize(
    ("bad", "message"), [({"dice": math.nan}, "dice is nan"), ({"dise": 1}, "unknown columns.*dise")]
)
def test_a_bad_row_leaves_the_old_table_alone(tmp_path, bad, message) -> None:
    write_rows([row("a")], tmp_path / "cases.csv")
    before = (tmp_path / "cases.csv").read_bytes()
    with pytest.raises(ValueError, match=message):
        write_rows([row("b"), row("c") | bad], tmp_path / "cases.csv")
    assert (tmp_path / "cases.csv").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["cases.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("case,dice\na,1\n", "expected"), ("HEADER\na,a,0.5\n", "row 2 does not have 12 cells"), ("", "expected")],
)
def test_a_foreign_or_truncated_table_is_refused(tmp_path, text, message) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(text.replace("HEADER", ",".join(COLUMNS)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_a_difference_counts_each_case_once_also_where_some_regions_have_none() -> None:
    empty = {"dice": None, "hd95_mm": None, "assd_mm": None, "status": "true_negative", "diagonal_mm": 9.0}
    full = {"dice": 0.5, "hd95_mm": 1.0, "assd_mm": 1.0, "status": "ok", "diagonal_mm": 9.0}
    rows = [{"case_id": case, "region": region, **(empty if (case, region) in {("a", "ET"), ("b", "ET")} else full)}
            for case in "abc" for region in ("WT", "TC", "ET")]  # fmt: skip
    result = paired_difference(rows, rows, "dice")
    assert (result["n"], result["n_cases"]) == (7, 3)
