# SPDX-License-Identifier: Apache-2.0
"""Scores of several regions: overlapping ones, ignored voxels, masks of file values and of class indices."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.cli.main import main
from scripts.evaluation.compare import compare
from scripts.evaluation.overlays import worst_first
from scripts.evaluation.records import read_summary
from scripts.evaluation.score import score
from scripts.metrics import aggregate, read_rows
from tests.report_cases import case_html

pytestmark = pytest.mark.usefixtures("fake_git")
LABELS = [[0], [1], [2], [4]]  # necrosis, oedema and the enhancing tumour
REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
VOXEL_ML = 2.0 / 1000
Mask = Any


def tumour() -> Mask:
    """A cube of 8 x 8 x 8 voxels of oedema, in it 4 x 4 x 4 of necrosis, in it 2 x 2 x 2 of enhancing tumour."""
    mask = np.zeros((16, 14, 12), np.uint8)
    mask[4:12, 3:11, 2:10] = 2
    mask[6:10, 5:9, 4:8] = 1
    mask[7:9, 6:8, 5:7] = 4
    return mask


@pytest.fixture
def scored(tmp_path: Path, write_nifti: Any) -> Any:
    """``scored(label and prediction by case, **options)``: write the masks, score them; returns the rows by key."""

    def run(masks: dict[str, tuple[Mask, Mask]], **options: Any) -> dict[tuple[str, str], dict[str, Any]]:
        cases = []
        for name, (label, prediction) in masks.items():
            write_nifti(tmp_path / "masks" / f"{name}.nii.gz", prediction, AFFINE)
            path = str(write_nifti(tmp_path / name / "label.nii.gz", label, AFFINE))
            cases.append({"case_id": name, "image": path, "t1": path, "label": path})
        settings = {"labels": LABELS, "intensity": {"t1": "zscore"}, "workers": 1, "name": "student"}
        settings |= {"regions": REGIONS, "output_dir": str(tmp_path / "out"), "predictions": str(tmp_path / "masks")}
        score(cases=cases, **{**settings, **options})
        return {(row["case_id"], row["region"]): row for row in read_rows(tmp_path / "out" / "cases.csv")}

    return run


def test_masks_equal_to_the_label_have_dice_1_in_every_region(scored: Any) -> None:
    rows = scored({"a": (tumour(), tumour())})
    assert list(rows) == [("a", "WT"), ("a", "TC"), ("a", "ET")]
    for row, voxels in zip(rows.values(), (8**3, 4**3, 2**3), strict=True):
        assert [row[key] for key in ("status", "dice", "hd95_mm", "assd_mm")] == ["ok", 1, 0, 0]
        assert row["volume_ml"] == row["reference_volume_ml"] == pytest.approx(voxels * VOXEL_ML)


def test_every_region_is_scored_by_its_own_voxels(scored: Any) -> None:
    prediction = tumour()
    prediction[prediction == 4] = 1  # the enhancing part is missed, the core is right
    prediction[4] = 0  # of eight layers of the whole tumour one is missing
    empty = np.zeros_like(prediction)
    rows = scored({"a": (tumour(), prediction), "b": (empty, empty)})
    assert rows["a", "WT"]["dice"] == pytest.approx(2 * 7 / (7 + 8))
    assert rows["a", "TC"]["dice"] == 1
    assert [rows["a", "ET"][key] for key in ("status", "dice", "hd95_mm", "volume_ml")] == ["missed", 0, None, 0]
    assert {rows["b", name]["status"] for name in REGIONS} == {"true_negative"}


def test_aggregates_are_over_all_rows_and_over_each_region(scored: Any, tmp_path: Path, capsys: Any) -> None:
    prediction = np.where(tumour() == 4, 1, tumour())
    rows = scored({"a": (tumour(), tumour()), "b": (tumour(), prediction)})
    summary = read_summary(tmp_path / "out" / "summary.json")
    assert list(summary["regions"]) == list(REGIONS)
    assert [each["metrics"]["dice"]["defined"]["mean"] for each in summary["regions"].values()] == [1, 1, 0.5]
    assert summary["aggregate"]["metrics"]["dice"]["defined"]["mean"] == pytest.approx(5 / 6)
    assert summary["aggregate"] == aggregate(list(rows.values()))
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in capsys.readouterr().out.splitlines()]
    assert [(name, dice[:5]) for name, dice in lines[2:6]] == [
        ("student", "0.833"), ("student: WT", "1.000"), ("student: TC", "1.000"), ("student: ET", "0.500"),
    ]  # fmt: skip
    table = compare([str(tmp_path / "out")], str(tmp_path / "both"))
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        *("| student", "| student: WT", "| student: TC", "| student: ET")
    ]


def test_one_region_has_the_same_aggregate_as_the_whole_and_no_line_of_its_own(
    scored: Any, tmp_path: Path, capsys: Any
) -> None:
    scored({"a": (tumour(), tumour())}, regions={"tumour": [1, 2, 4]})
    summary = read_summary(tmp_path / "out" / "summary.json")
    assert summary["regions"] == {"tumour": summary["aggregate"]}
    assert "student: tumour" not in capsys.readouterr().out
    assert "<h2>Every case: tumour</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_by_default_every_foreground_class_is_a_region(scored: Any) -> None:
    assert list(scored({"a": (tumour(), tumour())}, regions=None)) == [("a", f"class {index}") for index in (1, 2, 3)]


def test_ignored_voxels_count_in_neither_mask(scored: Any) -> None:
    label, prediction = tumour(), tumour()
    label[4:6] = label[9:12] = 9  # five of the eight layers
    prediction[4:6] = 4  # wrong, but not counted
    prediction[9:12] = 9  # as in a copy of the label
    rows = scored({"a": (label, prediction)}, ignore=9)
    assert [rows["a", name]["dice"] for name in REGIONS] == [1, 1, 1]
    for name, voxels in zip(REGIONS, (3 * 8 * 8, 3 * 4 * 4, 2 * 2 * 2), strict=True):  # in the layers 6 to 8
        assert rows["a", name]["reference_volume_ml"] == pytest.approx(voxels * VOXEL_ML)
        assert rows["a", name]["volume_ml"] == rows["a", name]["reference_volume_ml"]


def test_the_ignored_value_is_unknown_where_nothing_is_ignored(scored: Any) -> None:
    label = np.where(tumour() == 1, 9, tumour())
    with pytest.raises(ValueError, match=r"label\.nii\.gz contains the value 9, which the task's labels"):
        scored({"a": (label, tumour())})


def indices(mask: Mask) -> Mask:
    return np.searchsorted([0, 1, 2, 4], mask).astype(np.uint8)


def test_masks_of_class_indices_are_scored_by_index(scored: Any) -> None:
    rows = scored({"a": (tumour(), indices(tumour()))}, mask_values="index")
    assert [row["dice"] for row in rows.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("mask_values", "value", "words"),
    [
        ("file", 3, r'These are class indices: set "mask_values": "index"'),
        ("index", 4, r'These are values of the label files: set "mask_values": "file"'),
        ("file", 7, r"Correct the file, or `labels` \(or `ignore`\) of the task"),
    ],
)
def test_unknown_values_are_an_error_of_every_region_and_name_the_other_setting(
    scored: Any, mask_values: str, value: int, words: str
) -> None:
    wrong = np.where(tumour() == 4, value, tumour() if mask_values == "file" else indices(tumour()))
    right = indices(tumour()) if mask_values == "index" else tumour()
    rows = scored({"a": (tumour(), wrong.astype(np.uint8)), "b": (tumour(), right)}, mask_values=mask_values)
    for name in REGIONS:
        row = rows["a", name]
        assert (row["status"], row["dice"], row["volume_ml"]) == ("error", None, None)
        assert row["reference_volume_ml"] == rows["b", name]["reference_volume_ml"]
        unknown = rf"a\.nii\.gz contains the value {value}, which the task's labels .* do not name\. .*{words}$"
        assert re.search(unknown, row["findings"])
        assert rows["b", name]["status"] == "ok"


def test_a_case_counts_once_whatever_the_number_of_its_regions(scored: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^None of the 2 masks could be scored\. "):
        scored(dict.fromkeys("ab", (tumour(), 9 * tumour())))
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<th scope="row">student<small>2 cases, 2 patients, 3 regions</small>' in page
    assert '<th scope="row">student: ET<small>2 cases, 2 patients</small>' in page


def test_the_report_has_a_table_per_region_and_outlines_with_a_switch_each(scored: Any, tmp_path: Path) -> None:
    scored({"a": (tumour(), np.where(tumour() == 4, 1, tumour()))})
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r"<h2>(Every case.*?)</h2>", page) == [f"Every case: {name}" for name in REGIONS]
    html = case_html(tmp_path / "out" / "report.html")
    assert "<span>Mean Dice 0.667</span>" in html
    assert re.findall(r'data-region="(\d)">.*?</svg>(.*?)</label>', html) == [*zip("012", REGIONS, strict=True)]
    volumes = [f"{name} {mask} {n * VOXEL_ML:.2f} ml" for name, sizes in (("WT", (512, 512)), ("TC", (64, 64)),
               ("ET", (8, 0))) for mask, n in zip(("reference", "prediction"), sizes, strict=True)]  # fmt: skip
    assert f"Volume: {', '.join(volumes)}" in html
    assert f"Differences: wrong region {8 * VOXEL_ML:.2f} ml" in html


def test_cases_are_chosen_by_their_mean_dice_over_regions() -> None:
    dice = {"a": (0.9, 0.1), "b": (0.6, 0.6), "c": (None, 0.2), "d": (None, None)}
    rows = [
        {"case_id": case, "dice": value, "status": "true_negative" if value is None else "ok"}
        for case, values in dice.items()
        for value in values
    ]
    assert worst_first(rows) == ["c", "a", "b", "d"]


def test_the_regions_of_a_config_reach_the_table(tmp_path: Path, write_nifti: Any) -> None:
    for name in ("ct", "label", "masks/a"):
        write_nifti(tmp_path / f"{name}.nii.gz", tumour(), AFFINE)
    (tmp_path / "list.csv").write_text("case_id,ct,label\na,ct.nii.gz,label.nii.gz\n")
    values = ["labels=[[0],[1],[2],[4]]", "classes=null", 'regions={"WT":[1,2,4],"ET":[4]}']
    settings = [part for value in values for part in ("--set", value)]
    arguments = ["evaluate", "--data", "phantom", "--data-list", tmp_path / "list.csv"]
    arguments += ["--predictions", tmp_path / "masks", "--output-dir", tmp_path / "out", *settings]
    assert main([str(each) for each in arguments]) == 0
    with open(tmp_path / "out" / "cases.csv", newline="") as file:
        assert [(row["region"], row["dice"]) for row in csv.DictReader(file)] == [("WT", "1.0"), ("ET", "1.0")]
    arguments = ["report", "--evaluations", tmp_path / "out", "--output-dir", tmp_path / "both"]
    arguments += ["--data-list", tmp_path / "list.csv"]
    assert main([str(each) for each in arguments]) == 0  # the manifest holds labels and regions
    assert "<span>Mean Dice 1.000</span>" in case_html(tmp_path / "both" / "report.html")
