# SPDX-License-Identifier: Apache-2.0
"""Non-finite, constant and scaled values, wrong units, and labels of every kind."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from scripts.data.folds import make_splits
from scripts.image_io.checks import Rules

Array = NDArray[Any]


def _array(path: Path) -> Array:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


def _put(*values: float) -> Callable[[Array], Array]:
    """Set as many randomly chosen voxels to the values, as float32."""

    def change(voxels: Array) -> Array:
        changed = voxels.astype(np.float32)
        places = np.random.default_rng(1).choice(changed.size, len(values), replace=False)
        changed[np.unravel_index(places, changed.shape)] = values
        return changed

    return change


def test_nonfinite_voxels_are_replaced_and_reported_if_requested(
    case: Any, change_voxels: Any, segment: Any, check: Any, threshold: Any
) -> None:
    """The replacement of 100 HU is above the threshold of 50 HU, and nothing else changes."""
    change_voxels(case["ct"], _put(np.nan, np.inf, -np.inf))
    stored = _array(case["ct"])
    outcome = segment(case, *threshold("ct", 0.5), "--replace-nonfinite", 100)
    assert outcome.code == 0, outcome.err
    words = ("3 of 7680 voxels are NaN or infinite, replaced by 100", str(case["ct"]))
    assert outcome.warned(*words)
    wanted = np.where(np.isfinite(stored), stored, 100) > 50
    np.testing.assert_array_equal(_array(outcome.mask), wanted)
    found = check({"A": case}, "--replace-nonfinite", 100)
    assert found.code == 0
    assert found.warned(*words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_a_replacement_that_is_not_finite_in_float32_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="give a number that is finite in float32, such as 0"):
        Rules(replace_nonfinite=value)


def test_every_verb_refuses_a_replacement_that_is_not_finite(
    case: Any, change_voxels: Any, segment: Any, command: Any, write_list: Any, train: Any,
    cohort_of: Any, assert_refused: Any, tmp_path: Path,
) -> None:  # fmt: skip
    change_voxels(case["ct"], _put(np.nan))
    words, value = "give a number that is finite in float32, such as 0.", "-inf"
    assert_refused(segment(case, f"--replace-nonfinite={value}"), words)
    assert_refused(segment(case, "--set", f"+checks#replace_nonfinite={value}"), words)
    assert_refused(
        command("check", tmp_path / "found", *write_list({"A": case}), f"--replace-nonfinite={value}"), words
    )
    assert_refused(train(cohort_of(5), f"--replace-nonfinite={value}"), words)


def test_a_value_that_float32_cannot_represent_counts_as_infinite(
    case: Any, change_voxels: Any, findings_of: Any
) -> None:
    change_voxels(case["mr"], lambda voxels: np.where(np.arange(voxels.size).reshape(voxels.shape) == 99, 1e39, voxels))
    assert nib.Nifti1Image.from_filename(case["mr"]).get_data_dtype() == np.float64
    (error,) = (finding for finding in findings_of(case) if finding.level == "error")
    assert "1 of 7392 voxels are NaN or infinite" in error.what


def test_one_constant_image_gives_a_warning_with_its_name(
    case: Any, change_voxels: Any, segment: Any, check: Any
) -> None:
    change_voxels(case["pet"], lambda voxels: voxels * 0 + 3)
    for outcome in (segment(case), check({"A": case})):
        assert outcome.code == 0, outcome.err
        assert outcome.warned(str(case["pet"]), "(pet) is constant: every voxel is 3")


def test_a_case_of_constant_images_only_is_refused(
    cohort_of: Any, change_voxels: Any, segment: Any, check: Any, train: Any, assert_refused: Any
) -> None:
    cases = cohort_of(5)
    for key in ("ct", "pet", "mr"):
        change_voxels(cases["B"][key], lambda voxels: voxels * 0 - 5)
    names = [str(cases["B"][key]) for key in ("ct", "pet", "mr")]
    words = ["Every image of the case is constant", *names]
    assert_refused(segment(cases["B"]), *words)
    assert_refused(train(cases), *words)
    errors = [each for each in check(cases).findings if each["level"] == "error"]
    assert [each["case_id"] for each in errors] == ["B"]
    assert all(word in errors[0]["what"] for word in words)


def test_slope_and_intercept_are_applied_once_and_the_mask_has_none(
    case: Any, write_nifti: Any, segment: Any, threshold: Any
) -> None:
    """HU = 2 stored - 1001 is odd, so never the threshold of 0 HU; once unscaled, or twice scaled, others exceed it."""
    rng = np.random.default_rng(2)
    stored = rng.integers(0, 700, (24, 20, 16)).astype(np.int16)
    write_nifti(case["ct"], stored, nib.Nifti1Image.from_filename(case["ct"]).affine, slope=2.0, intercept=-1001.0)
    outcome = segment(case, *threshold("ct", 0.4))
    assert outcome.code == 0, outcome.err
    mask = nib.Nifti1Image.from_filename(outcome.mask)
    raw = mask.dataobj.get_unscaled()
    np.testing.assert_array_equal(raw, 2 * stored.astype(int) - 1001 > 0)
    assert set(np.unique(raw)) == {0, 1}
    slope, intercept = (float(mask.header[name]) for name in ("scl_slope", "scl_inter"))
    assert np.isnan(slope) or (slope, intercept) == (1.0, 0.0)


LABELS = [
    ("255", _put(255), "contains the value 255, which"),
    ("-1", _put(-1), "contains the value -1, which"),
    ("0.9999", _put(0.9999), "contains the value 0.9999, which"),
    ("NaN", _put(np.nan, np.nan), "contains the value nan, which"),
    ("2 to 5", _put(2, 3, 4, 5), "contains the values 2, 3, 4, 5, which"),
]
BAD_LABELS = pytest.mark.parametrize(("change", "words"), [c[1:] for c in LABELS], ids=[c[0] for c in LABELS])


@BAD_LABELS
@pytest.mark.parametrize("replacement", [None, 0], ids=["plain", "replacing"])
def test_an_invalid_label_is_refused_with_its_values_also_if_images_are_corrected(
    replacement: float | None, change: Any, words: str, case: Any, change_voxels: Any, findings_of: Any
) -> None:
    change_voxels(case["label"], change)
    errors = [each for each in findings_of(case, Rules(replace_nonfinite=replacement)) if each.level == "error"]
    assert [error.key for error in errors] == ["label"]
    assert str(case["label"]) in errors[0].what
    assert words in errors[0].what


_, INVALID, WORDS = LABELS[-1]


def test_check_names_the_values_of_every_invalid_label(
    cohort_of: Any, change_voxels: Any, check: Any, assert_refused: Any
) -> None:
    cases, words = cohort_of(3), WORDS
    change_voxels(cases["B"]["label"], INVALID)
    change_voxels(cases["C"]["label"], _put(7))
    outcome = check(cases)
    assert_refused(outcome, "2 errors found")
    first, second = (each for each in outcome.findings if each["level"] == "error")
    assert (first["case_id"], first["key"]) == ("B", "label")
    assert str(cases["B"]["label"]) in first["what"]
    assert words in first["what"]
    assert second["case_id"] == "C"


@pytest.mark.parametrize("part", ["training", "validation"])
def test_training_refuses_an_invalid_label_of_a_training_or_validation_case(
    part: str, cohort_of: Any, change_voxels: Any, train: Any, assert_refused: Any
) -> None:
    cases = cohort_of(5)
    fold_of_b = next(number for number, patients in enumerate(make_splits(cases)) if "B" in patients)
    change_voxels(cases["B"]["label"], INVALID)
    outcome = train(cases, "--fold", fold_of_b if part == "validation" else (fold_of_b + 1) % 5)
    assert_refused(outcome, str(cases["B"]["label"]), WORDS)


def test_float64_labels_of_the_data_sets_mapping_are_accepted(
    cohort_of: Any, change_voxels: Any, check: Any, train: Any, tmp_path: Path
) -> None:
    """PI-CAI's: 0, and the ISUP grades 2 to 5, which are all foreground."""
    cases = {}
    names = {"ct": "t2w", "pet": "adc", "mr": "hbv", "label": "label"}
    for grade, (name, files) in zip((2, 3, 4, 5, 2), cohort_of(5).items(), strict=True):
        change_voxels(files["label"], lambda voxels, grade=grade: (voxels * grade).astype(np.float64))
        assert nib.Nifti1Image.from_filename(files["label"]).get_data_dtype() == np.float64
        change_voxels(files["ct"], lambda voxels: voxels + 1100)
        change_voxels(files["pet"], lambda voxels: voxels * 300)
        cases[name] = {names[key]: path for key, path in files.items()}
    found = check(cases, "--data", "picai22")
    assert (found.code, [each for each in found.findings if each["level"] != "note"]) == (0, [])
    outcome = train(cases, "--data", "picai22")
    assert outcome.code == 0, outcome.err
    change_voxels(cases["A"]["label"], lambda voxels: voxels * 3)
    errors = [each for each in check(cases, "--data", "picai22").findings if each["level"] == "error"]
    assert ["contains the value 6, which" in each["what"] for each in errors] == [True]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_empty_labels_are_noted_trained_on_and_scored_by_status(
    cohort_of: Any, change_voxels: Any, check: Any, train: Any, command: Any, write_list: Any, weights: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    cases = cohort_of(5)
    for name in "ABCD":
        change_voxels(cases[name]["label"], lambda voxels: voxels * 0)
    found = check(cases)
    empty = [each["case_id"] for each in found.findings if "is empty: no voxel is foreground" in each["what"]]
    assert (found.code, empty) == (0, ["A", "B", "C", "D"])
    assert {each["level"] for each in found.findings if each["key"] == "label"} == {"note"}
    outcome = train(cases)
    assert outcome.code == 0, outcome.err
    assert np.isfinite(float(_rows(tmp_path / "run" / "curves.csv")[0]["loss"]))
    folder = tmp_path / "scores"
    scored = command(
        "evaluate", folder, *write_list(cases), "--output-dir", folder, "--weights", weights, "--engine", "torch"
    )
    assert scored.code == 0, scored.err
    rows = {row["case_id"]: row for row in _rows(folder / "cases.csv")}
    for name in "ABCDE":
        mask = _array(folder / "masks" / f"{name}.nii.gz")
        assert mask.any()
        assert rows[name]["status"] == ("false_positive" if name in "ABCD" else "ok"), rows[name]
    assert json.loads((folder / "summary.json").read_text())["aggregate"]["n"] == 5


def test_a_label_that_vanishes_at_the_networks_spacing_is_reported(
    cohort_of: Any, write_nifti: Any, make_affine: Any, check: Any, train: Any, tmp_path: Path
) -> None:
    """Two voxels of 1 mm between the centres of the network's grid of 4 x 4 x 5 mm."""
    cases = cohort_of(5)
    tiny = np.zeros((96, 80, 80), np.uint8)
    tiny[51, 41:43, 42] = 1  # 3 to 4 mm from the middle, where no voxel of the network has its centre
    write_nifti(cases["C"]["label"], tiny, make_affine(np.diag([-1.0, -1.0, 1.0]), (1, 1, 1), tiny.shape))
    words = f"{cases['C']['label']} has 2 voxel(s) of class 1, but none at the network's spacing of 4 x 4 x 5 mm"
    found = check(cases)
    assert found.code == 0
    grid, vanished = (each for each in found.findings if each["level"] == "warning")
    assert (vanished["case_id"], vanished["key"], vanished["what"].startswith(words)) == ("C", "label", True)
    assert (grid["case_id"], "lies on the grid of none of the case's images" in grid["what"]) == ("C", True)
    outcome = train(cases)
    assert outcome.code == 0, outcome.err
    assert outcome.warned(f"Case C: {words}")
    assert not outcome.warned("Case A: ")


def test_the_dice_of_a_validation_without_any_foreground_is_an_empty_cell(
    cohort_of: Any, change_voxels: Any, train: Any, tmp_path: Path
) -> None:
    cases = cohort_of(5)
    for files in cases.values():
        change_voxels(files["label"], lambda voxels: voxels * 0)
    outcome = train(cases)
    assert outcome.code == 0, outcome.err
    (row,) = _rows(tmp_path / "run" / "curves.csv")
    assert row["val_dice"] == ""


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _fourth(path: Path) -> None:
    image = nib.Nifti1Image.from_filename(path)
    nib.save(nib.Nifti1Image(np.stack([np.asarray(image.dataobj)] * 2, -1), image.affine), path)


def _away(path: Path) -> None:
    image = nib.Nifti1Image.from_filename(path)
    moved = image.affine.copy()
    moved[0, 3] += 200
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), path)


@pytest.mark.parametrize(
    ("damage", "words"), [(_cut, "is truncated or damaged"), (_fourth, "x 16 x 2 voxels"), (_away, "do not overlap")]
)
def test_the_file_of_a_label_is_checked_like_that_of_an_image(
    damage: Any, words: str, case: Any, findings_of: Any
) -> None:
    damage(case["label"])
    (error,) = (finding for finding in findings_of(case) if finding.level == "error")
    assert error.key == "label"
    assert error.what.startswith(str(case["label"]))
    assert words in error.what


def test_training_refuses_a_damaged_label_file(cohort_of: Any, train: Any, assert_refused: Any) -> None:
    cases = cohort_of(5)
    _cut(cases["C"]["label"])
    assert_refused(train(cases), str(cases["C"]["label"]), "is truncated or damaged")


@pytest.mark.parametrize("shift", [(0, -0.385, 0), (1.9, 0, 0)])
def test_a_label_shifted_by_less_than_half_a_voxel_is_the_same_label(
    shift: tuple[float, ...], cohort_of: Any, write_nifti: Any, check: Any, train: Any, threshold: Any, tmp_path: Path
) -> None:
    """Weights that cut the CT at 0 HU, and are not trained, reach a Dice of 1 where the label is the CT above 0 HU."""
    cases = cohort_of(5)
    for files in cases.values():
        image = nib.Nifti1Image.from_filename(files["ct"])
        moved = image.affine.copy()
        moved[:3, 3] += shift
        write_nifti(files["label"], (np.asarray(image.dataobj) > 0).astype(np.uint8), moved)
    found = check(cases)
    assert found.code == 0
    notes = [re.search(r"label: centre ([\d.]+) mm from the reference's", each["what"]) for each in found.findings]
    distances = [float(match[1]) for match in notes if match]
    assert distances == pytest.approx([np.linalg.norm(shift)] * 5, abs=0.0051)  # two decimals
    frozen = ["--set", "learning_rate=0", "--set", "weight_decay=0"]
    path, definition = threshold("ct", 0.4001)[1], threshold("ct", 0.4001)[3]
    outcome = train(cases, "--pretrained", path, "--set", definition, *frozen)
    assert outcome.code == 0, outcome.err
    (row,) = _rows(tmp_path / "run" / "curves.csv")
    assert float(row["val_dice"]) == 1.0


def test_a_label_on_another_grid_is_resampled_by_its_affine(
    cohort_of: Any, write_nifti: Any, make_affine: Any, world: Any, train: Any, threshold: Any, tmp_path: Path
) -> None:
    """A ball as CT and, on a finer and turned grid, as label: nearest voxels differ from the ball at its rim only."""
    cases = cohort_of(5)
    turned = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    fine = make_affine(turned, (2, 2, 2), (44, 52, 44), (1, 2, 3))
    for files in cases.values():
        coarse = nib.Nifti1Image.from_filename(files["ct"]).affine
        ball = np.linalg.norm(world(coarse, (24, 20, 16)) - [6, 4, -3], axis=-1) < 20
        write_nifti(files["ct"], np.where(ball, 100, -1000).astype(np.int16), coarse)
        points = world(fine, (44, 52, 44))
        write_nifti(files["label"], (np.linalg.norm(points - [6, 4, -3], axis=-1) < 20).astype(np.float64), fine)
    arguments = threshold("ct", 0.4001)
    outcome = train(cases, "--pretrained", arguments[1], "--set", arguments[3], "--set", "learning_rate=0")
    assert outcome.code == 0, outcome.err
    (row,) = _rows(tmp_path / "run" / "curves.csv")
    nearest = np.rint((world(coarse, (24, 20, 16)) - fine[:3, 3]) @ np.linalg.inv(fine[:3, :3]).T) @ fine[:3, :3].T
    label = np.linalg.norm(nearest + fine[:3, 3] - [6, 4, -3], axis=-1) < 20
    dice = 2 * (ball & label).sum() / (ball.sum() + label.sum())
    assert dice > 0.9
    assert float(row["val_dice"]) == pytest.approx(dice, abs=0.02)


UNITS = [
    ("PET in Bq/ml", "pet", lambda v: v * 5000, "above any plausible SUV: is it in Bq/ml?"),
    ("a CT as PET", "pet", lambda v: v * 0 + np.linspace(-1000, 300, v.size).reshape(v.shape), "not a CT?"),
    ("a PET as CT", "ct", lambda v: (v > 0) * np.linspace(0, 8, v.size).reshape(v.shape), "none of air (about -1000"),
    ("an MR as CT", "ct", lambda v: (v > 0) * np.linspace(1, 900, v.size).reshape(v.shape), "is it a CT in HU?"),
    ("a damaged MR", "mr", lambda v: _put(3e38)(v), "beyond what any scanner stores: is a voxel damaged?"),
    ("a damaged CT", "ct", lambda v: _put(-3e38)(v), "beyond what any scanner stores: is a voxel damaged?"),
    ("a damaged PET", "pet", lambda v: _put(2e9)(v), "beyond what any scanner stores: is a voxel damaged?"),
    ("a CT as MR", "mr", lambda v: v * 0 + np.linspace(-1000, 300, v.size).reshape(v.shape), "is it a CT?"),
]


@pytest.mark.parametrize(("key", "change", "words"), [c[1:] for c in UNITS], ids=[c[0] for c in UNITS])
def test_values_of_other_units_give_a_warning_with_the_file_and_the_range(
    key: str, change: Any, words: str, case: Any, change_voxels: Any, findings_of: Any
) -> None:
    assert not [each for each in findings_of(case) if " has values from " in each.what]
    change_voxels(case[key], lambda voxels: change(voxels.astype(np.float64)).astype(np.float32))
    values = _array(case[key])
    (warning,) = (each for each in findings_of(case) if each.level == "warning")
    for part in (str(case[key]), words, f"from {values.min():.4g} to {values.max():.4g}"):
        assert part in warning.what


def test_segment_and_check_warn_of_values_of_another_unit_and_convert_nothing(
    case: Any, change_voxels: Any, segment: Any, check: Any
) -> None:
    assert not segment(case, name="before").warned(" has values from ")
    change_voxels(case["pet"], lambda voxels: (voxels * 5000).astype(np.float32))
    values = _array(case["pet"])
    for outcome in (segment(case), check({"A": case})):
        assert outcome.code == 0, outcome.err
        assert outcome.warned(str(case["pet"]), "Bq/ml?", f"from {values.min():.4g} to {values.max():.4g}")


def _padded(voxels: Array) -> Array:
    """A body that fills half of the image, in a corner of padding."""
    padded = np.where(voxels < 500, 1000.0, voxels)
    padded[:, :, 8:] = -2000
    padded[:, :, 7] = 0
    return padded


RANGES = [
    ("an MR times 20", "mr", lambda v: v * 20, r"\d+% of them above the range 0 to 1200"),
    ("an MR in 0..1", "mr", lambda v: v / v.max(), "fill 0.08% of the range 0 to 1200"),
    ("an MR in 0..255", "mr", lambda v: v / v.max() * 255, "fill 21.25% of the range 0 to 1200"),
    ("a z-scored MR", "mr", lambda v: (v - v.mean()) / v.std(), r"fill 0.\d\d% of the range 0 to 1200"),
    ("a PET in 0..1", "pet", lambda v: v / v.max(), "fill 10.00% of the range 0 to 10"),
    ("a PET in kBq/ml", "pet", lambda v: v * 5.2, "in kBq/ml|above the range 0 to 10"),
    ("a z-scored PET", "pet", lambda v: (v - v.mean()) / v.std(), r"\d+% of them below the range 0 to 10|fill"),
    ("a CT plus 1024 with padding", "ct", lambda v: _padded(v + 1024), "above the range -200 to 300"),
]


@pytest.mark.parametrize(("key", "change", "words"), [each[1:] for each in RANGES], ids=[each[0] for each in RANGES])
def test_values_that_do_not_fit_the_networks_range_give_a_warning(
    key: str, change: Any, words: str, case: Any, change_voxels: Any, segment: Any, check: Any
) -> None:
    change_voxels(case[key], lambda voxels: change(voxels.astype(np.float64)).astype(np.float32))
    for outcome in (segment(case), check({"A": case})):
        assert outcome.code == 0, outcome.err
        messages = [record.getMessage() for record in outcome.log if record.levelno == logging.WARNING]
        messages += [finding["what"] for finding in outcome.findings if finding["level"] == "warning"]
        (message,) = (text for text in messages if text.startswith(str(case[key])))
        assert re.search(words, message), message


def test_training_warns_of_values_that_do_not_fit_and_a_zscore_has_no_range(
    cohort_of: Any, change_voxels: Any, train: Any, check: Any
) -> None:
    cases = cohort_of(5)
    change_voxels(cases["B"]["mr"], lambda voxels: (voxels / voxels.max()).astype(np.float32))
    outcome = train(cases)
    assert outcome.code == 0, outcome.err
    assert outcome.warned(str(cases["B"]["mr"]), "fill 0.08% of the range")
    found = check(cases, "--set", 'intensity={"ct": [-200, 300], "pet": [0, 10], "mr": "zscore"}')
    assert [each for each in found.findings if each["level"] == "warning"] == []


@pytest.mark.parametrize("keep", [0.5, 1.0], ids=["half", "all but the checksum"])
def test_evaluation_refuses_a_damaged_label(
    keep: float, cohort_of: Any, change_voxels: Any, command: Any, write_list: Any, assert_refused: Any, tmp_path: Path
) -> None:
    """SimpleITK reads the remaining bytes without an error, which would give a wrong Dice."""
    cases, masks, folder = cohort_of(2), tmp_path / "masks", tmp_path / "scores"
    masks.mkdir()
    noise = np.random.default_rng(4).integers(0, 2, (24, 20, 16)).astype(np.uint8)  # hardly compressible
    for name, files in cases.items():
        change_voxels(files["label"], lambda _: noise)
        shutil.copy(files["label"], masks / f"{name}.nii.gz")
    damaged = cases["B"]["label"]
    data = damaged.read_bytes()
    damaged.write_bytes(data[: int((len(data) - 8) * keep)])
    outcome = command("evaluate", folder, *write_list(cases), "--output-dir", folder, "--predictions", masks)
    assert_refused(outcome, str(damaged), "is truncated or damaged")
    assert "summary.json" not in outcome.files


def test_evaluation_refuses_an_invalid_label_by_name(
    cohort_of: Any, change_voxels: Any, command: Any, write_list: Any, tmp_path: Path,
    assert_refused: Any,
) -> None:  # fmt: skip
    cases, folder = cohort_of(2), tmp_path / "scores"
    (tmp_path / "masks").mkdir()
    for name, files in cases.items():
        shutil.copy(files["label"], tmp_path / "masks" / f"{name}.nii.gz")
    change_voxels(cases["B"]["label"], INVALID)
    arguments = [*write_list(cases), "--output-dir", folder, "--predictions", tmp_path / "masks"]
    outcome = command("evaluate", folder, *arguments)
    assert_refused(outcome, str(cases["B"]["label"]), "2, 3, 4, 5")
    assert "summary.json" not in outcome.files
