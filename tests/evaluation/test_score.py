# SPDX-License-Identifier: Apache-2.0
"""Scores of masks on disk: exact numbers, every failure counted and every problem reported."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.uid import generate_uid
from torch import nn

from scripts.cli.main import main
from scripts.evaluation.compare import compare
from scripts.evaluation.records import evaluated_task
from scripts.evaluation.score import score
from scripts.metrics.lesion_measures import read_measures
from tests.dicom_phantom import write_series
from tests.report_cases import case_html

pytestmark = pytest.mark.usefixtures("fake_git")
SHAPE, SPACING = (24, 20, 16), (1.5, 2.0, 2.5)
CUBE_ML = 8**3 * 1.5 * 2.0 * 2.5 / 1000  # 3.84
DIAGONAL = float(np.sqrt((24 * 1.5) ** 2 + (20 * 2) ** 2 + (16 * 2.5) ** 2))
AFFINE = np.diag([-1.5, -2.0, 2.5, 1.0])  # LPS


def cube(shift: int = 0) -> Any:
    mask = np.zeros(SHAPE, np.uint8)
    mask[8 + shift : 16 + shift, 6:14, 4:12] = 1
    return mask


@pytest.fixture
def cohort(tmp_path: Path, write_nifti: Any) -> list[dict[str, Any]]:
    """Six cases and, in the folder ``masks``, predictions of every kind."""
    empty, masks = np.zeros(SHAPE, np.uint8), tmp_path / "masks"
    half = np.diag([0.75, 1.0, 1.25, 1.0])  # voxels of half the size, two axes flipped, same position
    half[:3, 3] = AFFINE[:3, :3] @ [24 - 0.75, 20 - 0.75, -0.25]
    fine = cube()[::-1, ::-1].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    masks_by_case = {
        "A_same": (cube(), (cube(), AFFINE)),
        "B_shifted": (cube(), (cube(2), AFFINE)),
        "C_other_grid": (cube(), (fine, half)),
        "D_missing": (cube(), None),
        "E_empty": (empty, (empty, AFFINE)),
        "F_unlabelled": (None, (cube(), AFFINE)),
    }
    cases = []
    for name, (label, prediction) in masks_by_case.items():
        image = write_nifti(tmp_path / name / "ct.nii.gz", (100 * cube()).astype(np.int16), AFFINE)
        case = {"case_id": name, "patient_id": f"patient {name[0]}", "image": str(image), "ct": str(image)}
        if label is not None:
            case["label"] = str(write_nifti(tmp_path / name / "label.nii.gz", label, AFFINE))
        if prediction is not None:
            write_nifti(masks / f"{name}.nii.gz", *prediction)
        cases.append(case)
    write_nifti(masks / "stranger.nii.gz", cube(), AFFINE)
    return cases


def run(cases: Any, tmp_path: Path, **options: Any) -> dict[str, Any]:
    settings = {"labels": [[0], [1]], "intensity": {"ct": [0, 100]}, "workers": 1, "name": "network <X>"}
    settings |= {"predictions": str(tmp_path / "masks"), "output_dir": str(tmp_path / "out"), **options}
    return score(cases=cases, **settings)


def read(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def test_the_measures_are_those_of_the_predictions_on_their_own_grids(
    cohort: Any, tmp_path: Path, write_nifti: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The PET is 4 in the left half of the image and 8 in the right; that of B cannot be read."""
    pet = np.full(SHAPE, 4, np.float32)
    pet[12:] = 8
    for case in cohort:
        case["fdg"] = str(write_nifti(tmp_path / case["case_id"] / "pet.nii.gz", pet, AFFINE))
    Path(cohort[1]["fdg"]).write_bytes(b"")
    run(cohort, tmp_path, intensity={"ct": [0, 100], "fdg": [0, 10]}, dicom={"fdg": {"Modality": "PT"}})
    rows = read_measures(tmp_path / "out" / "measures.csv")
    by_case = {row["case_id"]: row for row in rows if row["lesion"] == "all"}
    assert list(by_case) == ["A_same", "B_shifted", "C_other_grid", "E_empty"]
    for name in ("A_same", "C_other_grid"):
        assert by_case[name]["volume_ml"] == pytest.approx(CUBE_ML)
        assert [by_case[name][key] for key in ("suvmax", "suvmean", "suvpeak")] == pytest.approx([8, 6, 8], rel=0.1)
        assert by_case[name]["mtv_ml"] == pytest.approx(CUBE_ML)
        assert by_case[name]["tlg_g"] == pytest.approx(6 * CUBE_ML)
    assert by_case["B_shifted"]["suvmax"] is None
    assert "B_shifted: no uptake is measured" in caplog.text
    assert (by_case["E_empty"]["volume_ml"], by_case["E_empty"]["mtv_ml"]) == (0, 0)


def test_the_measures_use_the_values_of_a_case_for_suv(cohort: Any, tmp_path: Path) -> None:
    """The table says that the PET, stored as 1000 everywhere, is to be multiplied by 0.004."""
    (case, *_) = cohort
    write_series(tmp_path / "pet", "PT", np.full(SHAPE, 1000, np.int16), AFFINE, (generate_uid(), generate_uid()), {})
    case |= {"fdg": str(tmp_path / "pet"), "suv": {"suv_factor": 0.004}}
    run([case], tmp_path, intensity={"ct": [0, 100], "fdg": [0, 10]}, dicom={"fdg": {"Modality": "PT"}})
    (row,) = (row for row in read_measures(tmp_path / "out" / "measures.csv") if row["lesion"] == "all")
    assert [row["suvmax"], row["suvmean"]] == pytest.approx([4.0, 4.0])


def test_a_report_from_another_folder_finds_the_masks(
    cohort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run(cohort, tmp_path, predictions="masks", output_dir="out")
    monkeypatch.chdir(tmp_path / "elsewhere")
    compare(["../out"], "report", cohort, {"ct": [0, 100]}, labels=[[0], [1]])
    assert "<h2>Cases</h2>" in Path("report/report.html").read_text()
    (tmp_path / "masks").rename(tmp_path / "moved")
    compare(["../out"], "report", cohort, {"ct": [0, 100]}, labels=[[0], [1]])
    assert "../out: its masks are not at ../masks, so none is drawn" in caplog.text


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON; NaN and infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)  # type: ignore[no-any-return]


def test_every_case_has_a_row_with_exact_values(cohort: Any, tmp_path: Path) -> None:
    run(cohort, tmp_path)
    rows = read(tmp_path / "out" / "cases.csv")
    assert list(rows) == ["A_same", "B_shifted", "C_other_grid", "D_missing", "E_empty"]
    for name in ("A_same", "C_other_grid"):
        assert [float(rows[name][key]) for key in ("dice", "hd95_mm", "assd_mm")] == [1, 0, 0]
    assert float(rows["B_shifted"]["dice"]) == 0.75  # 6 of 8 layers overlap
    assert float(rows["B_shifted"]["hd95_mm"]) == 3.0  # by two voxels of 1.5 mm
    assert [rows[name]["status"] for name in rows] == ["ok", "ok", "ok", "error", "true_negative"]
    for name, row in rows.items():
        assert row["patient_id"] == f"patient {name[0]}"
        assert float(row["diagonal_mm"]) == pytest.approx(DIAGONAL)
        assert float(row["reference_volume_ml"]) == pytest.approx(0 if name == "E_empty" else CUBE_ML)
        if name != "D_missing":
            assert float(row["volume_ml"]) == pytest.approx(0 if name == "E_empty" else CUBE_ML)
    for name in ("D_missing", "E_empty"):
        assert [rows[name][key] for key in ("dice", "hd95_mm", "assd_mm")] == ["", "", ""]
    assert rows["D_missing"]["volume_ml"] == ""


def test_a_missing_mask_counts_as_the_worst_value_in_the_summary(cohort: Any, tmp_path: Path) -> None:
    returned = run(cohort, tmp_path)
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary == json.loads(json.dumps(returned))
    whole = summary["aggregate"]
    assert (whole["n"], whole["n_patients"]) == (5, 5)
    assert whole["counts"] == {"ok": 3, "missed": 0, "false_positive": 0, "true_negative": 1, "error": 1}
    assert whole["metrics"]["dice"]["defined"]["mean"] == pytest.approx((1 + 0.75 + 1) / 3)
    assert whole["metrics"]["dice"]["worst_filled"]["mean"] == pytest.approx((1 + 0.75 + 1 + 0) / 4)
    assert whole["metrics"]["hd95_mm"]["worst_filled"]["mean"] == pytest.approx((0 + 3 + 0 + DIAGONAL) / 4)


def test_missing_masks_extra_files_and_cases_without_reference_are_listed_and_logged(
    cohort: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        summary = run(cohort, tmp_path)
    assert summary["missing"] == ["D_missing"]
    assert summary["without_reference"] == ["F_unlabelled"]
    assert "stranger.nii.gz" in summary["extra_files"]
    assert not {f"{name}.nii.gz" for name in ("A_same", "B_shifted", "C_other_grid")} & set(summary["extra_files"])
    for name in ("D_missing", "F_unlabelled", "stranger.nii.gz"):
        assert name in caplog.text


def test_the_report_contains_numbers_cases_and_outlines(cohort: Any, tmp_path: Path, capsys: Any) -> None:
    run(cohort, tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "network &lt;X&gt;" in page
    assert "<X>" not in page
    assert "0.917" in page  # mean Dice where it is defined
    for name in ("A_same", "B_shifted", "C_other_grid", "D_missing", "E_empty"):
        assert name in page
    cases = re.findall(r"<b>(\w+)</b>(?: <span>Dice ([\d.]+)</span>)?(?: <em>(.*?)</em>)?<small>(.*?)</small>", page)
    same = [(name, "1.000", "", "no difference") for name in ("A_same", "C_other_grid")]
    moved_ml = CUBE_ML / 2  # a quarter of the cube's voxels only here, a quarter only there
    assert cases[:4] == [
        ("B_shifted", "0.750", "border", f"border {moved_ml:.2f} ml"),
        *same,
        ("E_empty", "", "", "no difference"),
    ]
    assert "network &lt;X&gt;, D_missing: no mask was found" in page
    assert "data:image/webp" in case_html(tmp_path / "out" / "report.html")
    assert "| network \\<X> | 0.917" in capsys.readouterr().out


def test_the_manifest_of_the_inference_is_kept_unless_it_is_of_other_masks_or_cases(
    cohort: Any, tmp_path: Path
) -> None:
    own = {"output_dir": str(tmp_path)}  # its folder ``masks`` has the predictions
    run(cohort, tmp_path, **own)
    path = tmp_path / "manifest.json"
    manifest = read_json(path)
    assert manifest["data"] == cohort
    of_inference = json.dumps({**manifest, "wall_seconds": 12.0, "seed": 41})
    path.write_text(of_inference)
    assert run(cohort, tmp_path, **own)["seconds_per_case"] == pytest.approx(12 / 6)
    assert read_json(path)["seed"] == 41
    assert run(cohort[:3], tmp_path, **own)["seconds_per_case"] is None
    assert read_json(path)["data"] == cohort[:3]
    path.write_text(of_inference)
    foreign = str(shutil.copytree(tmp_path / "masks", tmp_path / "elsewhere" / "masks"))
    assert run(cohort, tmp_path, **own, predictions=foreign)["seconds_per_case"] is None
    assert read_json(path).get("seed") != 41


def test_parameters_and_operations_of_a_network_are_counted(cohort: Any, tmp_path: Path) -> None:
    network = nn.Conv3d(2, 16, 3, padding=1)
    summary = run(cohort[:1], tmp_path, network=network, patch=(32, 32, 16), intensity={"ct": [0, 1], "pet": [0, 1]})
    assert summary["parameters"] == 2 * 16 * 27 + 16
    assert summary["gflops"] == round(2 * 2 * 16 * 27 * 32 * 32 * 16 / 1e9, 2)
    assert run(cohort[:1], tmp_path)["parameters"] is None


def test_a_cohort_without_any_reference_is_refused(cohort: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="None of the 1 cases has a reference mask"):
        run(cohort[-1:], tmp_path)
    with pytest.raises(ValueError, match=r"No cases to score\. Name the folder of the data set with --dataset-dir"):
        run([], tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_masks_that_does_not_exist_is_named(cohort: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Folder of masks not found: .*nowhere"):
        run(cohort, tmp_path, predictions=str(tmp_path / "nowhere"))


def test_unknown_values_of_a_reference_are_refused_with_the_path(cohort: Any, tmp_path: Path, write_nifti: Any) -> None:
    write_nifti(Path(cohort[0]["label"]), cube() * 7, AFFINE)
    with pytest.raises(ValueError, match=r"label\.nii\.gz contains the value 7, which"):
        run(cohort[:2], tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [7, 0.5, np.nan])
def test_unknown_values_of_a_mask_count_its_case_as_an_error(
    cohort: Any, tmp_path: Path, write_nifti: Any, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    write_nifti(tmp_path / "masks" / "A_same.nii.gz", (cube() * value).astype(np.float32), AFFINE)
    with caplog.at_level(logging.WARNING):
        summary = run(cohort[:2], tmp_path)
    rows = read(tmp_path / "out" / "cases.csv")
    assert [rows[name]["status"] for name in rows] == ["error", "ok"]
    assert [rows["A_same"][key] for key in ("dice", "hd95_mm", "assd_mm", "volume_ml")] == [""] * 4
    assert f"A_same.nii.gz contains the value {value:.7g}, which the task's labels" in rows["A_same"]["findings"]
    assert rows["A_same"]["findings"] in caplog.text
    assert summary["unreadable"] == [f"{rows['A_same']['findings']}."]
    assert summary["aggregate"]["metrics"]["dice"]["worst_filled"]["mean"] == 0.375  # of 0 and 0.75


def test_undefined_values_stay_empty_in_every_output(cohort: Any, tmp_path: Path, capsys: Any) -> None:
    """Empty references with empty masks have no Dice and no distances, alone and on average."""
    run(cohort[4:5], tmp_path)
    row = read(tmp_path / "out" / "cases.csv")["E_empty"]
    assert [row[key] for key in ("dice", "hd95_mm", "assd_mm")] == [""] * 3
    metrics = read_json(tmp_path / "out" / "summary.json")["aggregate"]["metrics"]
    for name in ("dice", "hd95_mm", "assd_mm"):
        for kind in ("defined", "worst_filled"):
            assert metrics[name][kind]["n"] == 0
            assert [metrics[name][kind][key] for key in ("mean", "median", "std", "ci95")] == [None] * 4
    assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[2:6]] == [
        "undefined (0)", "undefined (0)", "undefined (0)", "0",
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<td class="number">\N{EN DASH} (0)</td>') == 3
    assert page.count('<td class="number" data-value="">\N{EN DASH}</td>') == 3
    assert not re.search(r"\bnan\b", re.sub(r"data:\S+", "", page), re.IGNORECASE)


def test_a_comparison_has_a_row_per_evaluation_and_outlines_of_the_first(
    cohort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("scripts.evaluation.score.case_overlays", lambda *arguments: [])
        run(cohort, tmp_path, output_dir=str(tmp_path / "one"), name="first")
        run(cohort[:2], tmp_path, output_dir=str(tmp_path / "two"), name="second")
    curves = tmp_path / "student" / "curves.csv"
    curves.parent.mkdir()
    curves.write_text("epoch,loss,val_dice\n1,0.5,\n2,0.25,0.5\n")
    text = compare(
        [str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "both"), cohort, ["ct"], [str(curves)]
    )
    head, _, first, second = text.splitlines()
    assert [cell.strip() for cell in head.split("|")][1:5] == ["network", "Dice", "HD95 mm", "ASSD mm"]
    cells = [[cell.strip() for cell in line.split("|")] for line in (first, second)]
    assert [row[1] for row in cells] == ["first", "second"]
    assert cells[0][2].startswith("0.917 [")
    assert cells[0][2].endswith("(3); 0.688 with failures")  # (1 + 0.75 + 1 + 0) / 4
    assert cells[0][3].endswith(f"(3); {(3 + DIAGONAL) / 4:.1f} with failures")
    assert cells[1][2].endswith("(2)")
    assert cells[1][2].startswith("0.875 [")
    assert [row[5] for row in cells] == ["1", "0"]  # failures
    assert (tmp_path / "both" / "table.md").read_text() == text + "\n"
    assert read_json(tmp_path / "both" / "manifest.json")["data"] == cohort
    page = (tmp_path / "both" / "report.html").read_text()
    assert all(words in page for words in ("<h1>Comparison</h1>", "first", "second", "<b>B_shifted</b>", "student"))


@pytest.mark.parametrize("order", [("pet", "all", "again"), ("all", "again", "pet")])
def test_a_comparison_shows_outlines_of_the_first_run_with_most_modalities(
    order: tuple[str, ...], cohort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_nifti: Any
) -> None:
    """The masks of every run differ: the cube of 3.84 ml is moved by 0, 1 or 2 voxels."""
    shift, intensity = {"all": 0, "again": 1, "pet": 2}, {"ct": [0, 100], "pet": [0, 10]}
    case = {**cohort[0], "pet": cohort[0]["ct"]}
    with monkeypatch.context() as patch:
        patch.setattr("scripts.evaluation.score.case_overlays", lambda *arguments: [])
        for name in order:
            write_nifti(tmp_path / name / "masks" / "A_same.nii.gz", cube(shift[name]), AFFINE)
            folders = {"predictions": str(tmp_path / name / "masks"), "output_dir": str(tmp_path / name)}
            run([case], tmp_path, name=name, intensity=intensity, present=["pet"] if name == "pet" else None,
                network=nn.Conv3d(2, 1, 1), **folders)  # fmt: skip
    compare([str(tmp_path / name) for name in order], str(tmp_path / "both"), [case], intensity)
    html = case_html(tmp_path / "both" / "report.html")
    assert "<h3>A_same</h3>" in html
    assert "<span>Dice 1.000</span>" in html
    assert html.count("<span>Prediction: all, given CT, PET</span>") == 1
    assert "not given to the network" not in html


def test_the_caption_of_outlines_names_the_network_and_what_it_was_given(cohort: Any, tmp_path: Path) -> None:
    case, intensity = {**cohort[0], "pet": cohort[0]["ct"]}, {"ct": [0, 100], "pet": [0, 10]}
    run([case], tmp_path, intensity=intensity, present=["pet"])
    html = case_html(tmp_path / "out" / "report.html")
    assert html.count("<span>Prediction: network &lt;X&gt;, given PET</span>") == 1
    assert html.count("<b>CT</b> <small>0 to 100, not given to the network</small>") == 3
    assert html.count("<b>PET</b> <small>0 to 10</small>") == 3
    run([case], tmp_path, intensity=intensity)  # masks of an unknown network
    assert "<span>Prediction: network &lt;X&gt;</span>" in case_html(tmp_path / "out" / "report.html")


def test_a_comparison_draws_no_outlines_without_images_or_of_other_cases(cohort: Any, tmp_path: Path) -> None:
    run(cohort, tmp_path)
    for cases in ([], [{**cohort[0], "case_id": "of another cohort"}]):
        compare([str(tmp_path / "out")], str(tmp_path / "both"), cases, ["ct"])
        assert "<h2>Cases</h2>" not in (tmp_path / "both" / "report.html").read_text()
        assert not (tmp_path / "both" / "report_files").exists()


def test_a_folder_without_an_evaluation_is_refused(cohort: Any, tmp_path: Path) -> None:
    run(cohort, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"masks contains no summary\.json"):
        compare([str(tmp_path / "out"), str(tmp_path / "masks")], str(tmp_path / "both"))
    assert not (tmp_path / "both").exists()


def test_the_table_shows_the_failures_of_a_network_that_misses_everything(
    cohort: Any, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "masks" / "D_missing.nii.gz").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^None of the 1 masks could be scored\. .*D_missing\.nii\.gz is an empty file"
    ):
        run(cohort[3:4], tmp_path, name="a|b \\ c\nd")
    name, *cells = re.split(r" (?<!\\)\| ", capsys.readouterr().out.splitlines()[2].removeprefix("| "))
    assert name == r"a\|b \\ c d"
    worst = f"undefined (0); {DIAGONAL:.1f} with failures"
    assert cells[:4] == ["undefined (0); 0.000 with failures", worst, worst, "1"]


@pytest.mark.parametrize("file", ["summary.json", "manifest.json"])
def test_a_damaged_or_foreign_file_is_refused_and_replaced_by_the_next_evaluation(
    file: str, cohort: Any, tmp_path: Path
) -> None:
    case = cohort[:1]
    run(case, tmp_path)
    path = tmp_path / "out" / file
    keys = read_json(path).keys()
    for content in ("", "{", "[]", "[1]", "{}", '"text"', '{"data": [[], []]}', '{"aggregate": {}}', "\xff"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=f"^{path} is damaged or was not written by `evaluate`. Run"):
            compare([str(tmp_path / "out")], str(tmp_path / "both"))
        assert not (tmp_path / "both").exists()
        run(case, tmp_path)
        assert read_json(path).keys() == keys
    compare([str(tmp_path / "out")], str(tmp_path / "both"))


def test_a_summary_without_a_needed_value_is_refused(cohort: Any, tmp_path: Path) -> None:
    summary = run(cohort[:1], tmp_path)
    for key in ("name", "aggregate", "predictions", "parameters", "gflops", "seconds_per_case"):
        rest = {name: value for name, value in summary.items() if name != key}
        (tmp_path / "out" / "summary.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=r"summary\.json is damaged or was not written by `evaluate`"):
            compare([str(tmp_path / "out")], str(tmp_path / "both"))


def test_the_summary_names_the_modalities_that_were_used(cohort: Any, tmp_path: Path) -> None:
    intensity = {"ct": [0, 100], "pet": [0, 10]}
    assert run(cohort, tmp_path, intensity=intensity)["present"] == ["ct", "pet"]
    part = run(cohort, tmp_path, intensity=intensity, present=["pet"])
    assert (part["name"], part["present"]) == ("network <X> (pet only)", ["pet"])
    assert read_json(tmp_path / "out" / "summary.json")["present"] == ["pet"]
    with pytest.raises(ValueError, match=r"present is \['mr'\]\. Name one or more of ct, pet"):
        run(cohort, tmp_path, intensity=intensity, present=["mr"])


def test_the_outlines_of_a_reference_follow_labels(cohort: Any, tmp_path: Path) -> None:
    """A value that `labels` maps to background is neither scored nor drawn."""
    image = sitk.ReadImage(cohort[0]["label"])
    values = sitk.GetArrayFromImage(image)
    values[0, 0, :] = 9
    marked = sitk.GetImageFromArray(values)
    marked.CopyInformation(image)
    sitk.WriteImage(marked, cohort[0]["label"])
    summary = run(cohort[:1], tmp_path, labels=[[0, 9], [1]])
    assert summary["aggregate"]["metrics"]["dice"]["defined"]["mean"] == 1.0
    html = case_html(tmp_path / "out" / "report.html")
    assert html.count(f"Volume: reference {CUBE_ML:.2f} ml, prediction {CUBE_ML:.2f} ml") == 1


def test_an_unreadable_image_is_logged_and_the_outlines_are_still_drawn(
    cohort: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "A_same" / "pet.nii.gz"
    broken.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        run([{**cohort[0], "pet": str(broken)}], tmp_path, intensity={"ct": [0, 100], "pet": [0, 10]})
    assert f"pet is not shown in the report: {broken} is an empty file" in caplog.text
    html = case_html(tmp_path / "out" / "report.html")
    assert "<b>CT</b> <small>0 to 100</small>" in html
    assert "<b>PET</b>" not in html


def test_centres_of_the_data_list_make_subgroups_also_in_a_comparison(cohort: Any, tmp_path: Path) -> None:
    cases = [{**case, "centre": "North" if case["case_id"] < "C" else "S<ou>th"} for case in cohort]
    run(cases, tmp_path)
    compare([str(tmp_path / "out")], str(tmp_path / "both"))  # its manifest contains the data list
    for folder in ("out", "both"):
        page = (tmp_path / folder / "report.html").read_text()
        rows = re.findall(r'<th scope="row">(North|S&lt;ou&gt;th)<small>(\d) cases', page)
        assert rows == [("North", "2"), ("S&lt;ou&gt;th", "3")], folder
        assert "0.875 [0.750, 1.000] (2)" in page  # of North: 1 and 0.75
    assert "centre" not in read(tmp_path / "out" / "cases.csv")["A_same"]


def test_evaluations_with_different_modalities_are_compared(cohort: Any, tmp_path: Path) -> None:
    for present, name in ((None, "all"), (["pet"], "pet")):
        run(cohort, tmp_path, intensity={"ct": [0, 1], "pet": [0, 1]}, present=present, output_dir=str(tmp_path / name))
    compare([str(tmp_path / "pet"), str(tmp_path / "all")], str(tmp_path / "both"))
    page = (tmp_path / "both" / "report.html").read_text()
    assert re.findall(r"<td>(yes|no)</td>", page) == ["yes", "yes", "no", "yes"]
    assert "0.000 [0.000, 0.000] (4)" in page  # the same masks: no difference


def test_the_report_verb_reads_centres_and_images_from_a_data_list(cohort: Any, tmp_path: Path) -> None:
    run(cohort[:3], tmp_path)
    lines = ["case_id,patient_id,centre,ct,label"]
    for case, centre in zip(cohort[:3], ("North", "South", "South"), strict=True):
        files = [str(Path(case[key]).relative_to(tmp_path)) for key in ("ct", "label")]
        lines.append(",".join([case["case_id"], case["patient_id"], centre, *files]))
    (tmp_path / "list.csv").write_text("\n".join(lines))
    arguments = ["report", "--data", "phantom", "--data-list", tmp_path / "list.csv"]
    arguments += ["--evaluations", tmp_path / "out", "--output-dir", tmp_path / "both"]
    with pytest.MonkeyPatch.context() as patch:
        shown: list[Any] = []
        patch.setattr("scripts.evaluation.compare.case_overlays", lambda cases, *others: shown.extend(cases) or [])
        assert main([str(argument) for argument in arguments]) == 0
    assert [Path(case["ct"]) for case in shown] == [Path(case["ct"]) for case in cohort[:3]]
    page = (tmp_path / "both" / "report.html").read_text()
    assert re.findall(r'<th scope="row">(North|South)<small>(\d) case', page) == [("North", "1"), ("South", "2")]


def test_only_the_modalities_of_the_network_count(cohort: Any, tmp_path: Path) -> None:
    """A task may have a range for a modality that it does not use."""
    more = {"intensity": {"ct": [0, 1], "pet": [0, 1]}, "modalities": ["ct"], "patch": (16, 16, 16)}
    summary = run(cohort[:1], tmp_path, network=nn.Conv3d(1, 2, 1), **more)
    assert (summary["name"], summary["present"], summary["parameters"]) == ("network <X>", ["ct"], 4)


def test_a_setting_that_is_none_is_none_in_a_report(tmp_path: Path) -> None:
    """A config has no other way to say that a setting is None than an expression."""
    config = {"labels": [[0], [2]], "regions": "$None", "classes": "$None"}
    (tmp_path / "manifest.json").write_text(json.dumps({"config": config}))
    assert evaluated_task(str(tmp_path)) == {"labels": [[0], [2]], "regions": None, "classes": None}


def test_a_report_is_not_written_into_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is an evaluation, whose page would be replaced\. Choose another --output-dir"
    ):
        compare([str(tmp_path), str(tmp_path / "b")], f"{tmp_path}/.")
