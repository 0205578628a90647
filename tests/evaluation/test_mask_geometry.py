# SPDX-License-Identifier: Apache-2.0
"""`evaluate` compares the header of every mask with that of its reference, and tells what it finds."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest

from scripts.cli.main import main

pytestmark = pytest.mark.usefixtures("fake_git")
SHAPE, SPACING = (20, 16, 12), (2.0, 2.0, 3.0)
REFERENCE = np.diag([-2.0, -2.0, 3.0, 1.0])  # LPS
REFERENCE[:3, 3] = [30.0, 10.0, -700.0]
REVERSED = np.array([[-1, 0, 0, 19], [0, -1, 0, 15], [0, 0, 1, 0], [0, 0, 0, 1]])  # of the first two axes


def cube() -> Any:
    """A cube of 6 x 6 x 6 voxels = 216 x 12 mm3 = 2.592 ml."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:12, 4:10, 3:9] = 1
    return mask


class Result(NamedTuple):
    """What a run of `evaluate` left of case P2; P1 is perfect."""

    code: int
    row: dict[str, str]
    summary: dict[str, Any]
    page: str
    log: str


@pytest.fixture
def evaluate(
    tmp_path: Path, write_nifti: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Evaluate two cases through the command line, the second one with this mask (and reference)."""
    monkeypatch.setattr("scripts.evaluation.score.case_overlays", lambda *arguments: [])

    def run(mask: nib.Nifti1Image, reference: nib.Nifti1Image | None = None) -> Result:
        lines = ["case_id,patient_id,ct,label"]
        for case_id in ("P1", "P2"):
            write_nifti(tmp_path / case_id / "ct.nii.gz", cube(), REFERENCE)
            write_nifti(tmp_path / case_id / "label.nii.gz", cube(), REFERENCE)
            write_nifti(tmp_path / "masks" / f"{case_id}.nii.gz", cube(), REFERENCE)
            lines.append(f"{case_id},{case_id},{case_id}/ct.nii.gz,{case_id}/label.nii.gz")
        (tmp_path / "cases.csv").write_text("\n".join(lines))
        nib.save(mask, tmp_path / "masks" / "P2.nii.gz")
        if reference is not None:
            nib.save(reference, tmp_path / "P2" / "label.nii.gz")
        arguments = ["evaluate", "--data", "phantom", "--data-list", tmp_path / "cases.csv", "--predictions"]
        arguments += [tmp_path / "masks", "--output-dir", tmp_path / "out", "--set", "+score#workers=1"]
        with caplog.at_level(logging.INFO, "scripts"):
            code = main([str(argument) for argument in [*arguments, "--set", 'modalities=["ct"]']])
        with open(tmp_path / "out" / "cases.csv", newline="") as file:
            rows = {row["case_id"]: row for row in csv.DictReader(file)}
        assert (rows["P1"]["status"], float(rows["P1"]["dice"]), rows["P1"]["findings"]) == ("ok", 1.0, "")
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        with open(tmp_path / "out" / "measures.csv", newline="") as file:
            measured = {row["case_id"] for row in csv.DictReader(file)}
        assert measured == {case for case, row in rows.items() if row["status"] != "error"}
        return Result(code, rows["P2"], summary, (tmp_path / "out" / "report.html").read_text(), caplog.text)

    return run


def image(voxels: Any, affine: Any, sform: Any = None, qform: Any = None) -> nib.Nifti1Image:
    """An image with these forms; by default both are the affine, and ``False`` leaves a form out."""
    written = nib.Nifti1Image(voxels, affine)
    for set_form, form in ((written.set_sform, sform), (written.set_qform, qform)):
        if form is False:
            set_form(affine, code=0)
        else:
            set_form(affine if form is None else form, code=1)
    return written


def without_place(voxels: Any) -> nib.Nifti1Image:
    """Voxel sizes only, neither sform nor qform."""
    written = nib.Nifti1Image(voxels, None)
    written.header.set_zooms(SPACING)
    written.header["sform_code"] = written.header["qform_code"] = 0
    return written


def moved(voxels: float, axis: int = 1) -> Any:
    affine = REFERENCE.copy()
    affine[:3, 3] += voxels * affine[:3, axis]
    return affine


def rotated(degrees: float) -> Any:
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ REFERENCE


REFUSED = {
    "identity affine": (image(cube(), np.eye(4)), "do not overlap in space"),
    "half a voxel and more": (image(cube(), moved(0.6)), "its voxels lie up to 1.2 mm (0.6 voxels) away"),
    "three voxels": (image(cube(), moved(3, 2)), "its voxels lie up to 9.0 mm (3.0 voxels) away"),
    "rotated": (image(cube(), rotated(5)), "has the shape of"),
    "voxel sizes": (image(cube(), REFERENCE @ np.diag([1.2, 1.2, 1, 1])), "has the shape of"),
    "another place": (image(cube(), moved(200)), "do not overlap in space"),
    "wrong flip": (image(cube(), REFERENCE @ np.diag([-1, 1, 1, 1])), "has the shape of"),
    "wrong axes": (image(cube(), REFERENCE[:, [1, 0, 2, 3]]), "has the shape of"),
    "wrong sform": (image(cube(), REFERENCE, sform=moved(-9)), "have the shape of|has the shape of"),
    "axes of arrays": (image(cube().transpose(2, 1, 0), REFERENCE), "the axes are in another order, but the affine is"),
    "no place": (without_place(cube()), "do not overlap in space"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_that_cannot_lie_on_its_reference_counts_as_unreadable(kind: str, evaluate: Any, tmp_path: Path) -> None:
    mask, words = REFUSED[kind]
    result = evaluate(mask)
    assert result.code == 0  # P1 was scored
    assert result.row["status"] == "error"
    assert [result.row[key] for key in ("dice", "hd95_mm", "assd_mm", "volume_ml")] == [""] * 4
    metrics = result.summary["aggregate"]["metrics"]["dice"]
    assert (metrics["defined"]["mean"], metrics["worst_filled"]["mean"]) == (1.0, 0.5)
    assert result.row["findings"].startswith(result.summary["unreadable"][0].rstrip("."))
    for text in (result.summary["unreadable"][0], result.summary["findings"]["P2"][0]):
        assert text.startswith(str(tmp_path / "masks" / "P2.nii.gz"))
        assert any(word in text for word in words.split("|"))
        assert text in result.log
    assert "Findings</button>" in result.page
    assert "P2.nii.gz" in result.page.partition("Every case")[2].partition("<h2>")[0]


def test_the_findings_of_a_refused_mask_contain_the_warning_about_its_header(evaluate: Any) -> None:
    shifted = evaluate(image(cube(), REFERENCE, sform=moved(-9)))
    assert "up to 18.0 mm (9.0 voxels) away" in shifted.row["findings"]
    no_place = evaluate(without_place(cube()))
    for result, words in (
        (shifted, "has an sform and a qform up to 18.0 mm apart: the sform is used"),
        (no_place, "has no position in space"),
    ):
        assert words in result.row["findings"]
        assert words in result.log


@pytest.mark.parametrize("which", ["mask", "reference"])
def test_a_guessed_place_that_mirrors_the_mask_is_refused(which: str, evaluate: Any) -> None:
    """Without sform and qform nibabel centres the grid with axes to the left, anterior and superior."""
    centred = np.diag([-2.0, -2.0, 3.0, 1.0])
    centred[:3, 3] = [19, 15, -16.5]
    images = without_place(cube()), image(cube(), centred)
    result = evaluate(*(images if which == "mask" else images[::-1]))
    assert result.row["status"] == "error"
    advice = "Save both with the affine of the image" if which == "mask" else "Correct the header of the reference"
    assert f"its voxels lie up to 30.0 mm (15.0 voxels) away. {advice}" in result.row["findings"]


def half_size() -> nib.Nifti1Image:
    """Every second layer of the cube's grid along z: the cube's layers 3 to 8 become 4, 6 and 8."""
    affine = REFERENCE @ np.diag([1, 1, 2, 1.0])
    affine[:3, 3] = REFERENCE[:3, 3] + 0.5 * REFERENCE[:3, 2]
    return image(np.ascontiguousarray(cube()[:, :, 1::2]), affine)


SCORED = {
    "less than half a voxel": (image(cube(), moved(0.4)), 1.0, "centre 0.80 mm from the reference's"),
    "rounding": (image(cube(), moved(1e-5)), 1.0, ""),
    "axes reversed": (image(cube()[::-1, ::-1], REFERENCE @ REVERSED), 1.0, "another order or direction (RAS) than"),
    "axes exchanged": (image(cube().transpose(1, 0, 2), REFERENCE[:, [1, 0, 2, 3]]), 1.0, "centre 0.00 mm from the"),
    "thick slices": (half_size(), None, "voxels of 2 x 2 x 6 mm (reference: 2 x 2 x 3 mm)"),
    "wrong qform": (
        image(cube(), REFERENCE, qform=moved(3)), 1.0, "has an sform and a qform up to 6.0 mm apart: the sform is used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCORED)
def test_a_mask_on_another_grid_is_resampled_with_a_note(kind: str, evaluate: Any) -> None:
    mask, dice, words = SCORED[kind]
    result = evaluate(mask)
    assert (result.code, result.row["status"]) == (0, "ok")
    if dice is None:  # 3 mm layers 3 to 8 are covered by the thick layers 1 (2, 3) to 4 (8, 9) that hold 3, 5, 7
        covered = np.repeat(cube()[:, :, 1::2], 2, 2)
        dice = 2 * (covered & cube()).sum() / (covered.sum() + cube().sum())
    assert float(result.row["dice"]) == pytest.approx(dice)
    assert words in result.row["findings"]
    assert bool(words) <= bool(result.summary["findings"].get("P2"))
    if "sform" in words or "order" in words:
        assert words in result.log


def test_a_mask_of_a_part_of_the_reference_is_scored_with_a_warning(evaluate: Any) -> None:
    """The mask ends in the middle of the cube: 3 of 6 layers, so Dice = 2 * 3 / (3 + 6)."""
    result = evaluate(image(cube()[:, :, :6], REFERENCE))
    assert (result.code, result.row["status"]) == (0, "ok")
    assert float(result.row["dice"]) == pytest.approx(2 / 3)
    words = "label.nii.gz: all voxels outside count as background"
    assert "covers 50% of the extent of" in result.row["findings"]
    assert words in result.row["findings"]
    assert words in result.log
    assert words in result.page


def test_a_cropped_mask_around_the_tumour_is_scored_with_a_warning(evaluate: Any) -> None:
    """As 3D Slicer saves a segmentation: only the box around it."""
    affine = REFERENCE.copy()
    affine[:3, 3] = REFERENCE[:3, :3] @ [5, 3, 2] + REFERENCE[:3, 3]
    result = evaluate(image(np.ascontiguousarray(cube()[5:13, 3:11, 2:10]), affine))
    assert float(result.row["dice"]) == 1.0
    assert "covers 13% of the extent of" in result.row["findings"]  # 8 x 8 x 8 of 20 x 16 x 12


def test_a_reference_without_a_place_is_named_whatever_the_mask(evaluate: Any) -> None:
    for mask, status in ((image(cube(), REFERENCE), "error"), (without_place(cube()), "ok")):
        result = evaluate(mask, without_place(cube()))
        assert result.row["status"] == status
        words = "label.nii.gz has no position in space (neither sform nor qform)"
        assert words in result.row["findings"]
        assert words in result.log
    assert float(result.row["dice"]) == 1.0


def test_evaluate_ends_with_1_where_no_mask_could_be_scored(
    evaluate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(image(cube(), np.eye(4)))
    text = (tmp_path / "cases.csv").read_text().splitlines()
    (tmp_path / "cases.csv").write_text("\n".join([text[0], text[2]]))
    arguments = ["evaluate", "--data", "phantom", "--data-list", tmp_path / "cases.csv", "--predictions"]
    arguments += [tmp_path / "masks", "--output-dir", tmp_path / "again", "--set", 'modalities=["ct"]']
    assert main([str(argument) for argument in arguments]) == 1
    assert "error: None of the 1 masks could be scored. " in capsys.readouterr().err
    assert (tmp_path / "again" / "cases.csv").is_file()
