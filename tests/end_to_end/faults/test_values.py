# SPDX-License-Identifier: Apache-2.0
"""Values that are odd, scaled, or in the wrong units; labels of every kind."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]


def _array(path: Path) -> Array:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


def _put(*values: float) -> Callable[[Array], Array]:
    """The values in as many voxels of a seeded choice, as float32."""

    def change(voxels: Array) -> Array:
        changed = voxels.astype(np.float32)
        places = np.random.default_rng(1).choice(changed.size, len(values), replace=False)
        changed[np.unravel_index(places, changed.shape)] = values
        return changed

    return change


def test_nonfinite_voxels_are_replaced_where_that_is_asked_for_and_reported(
    case: Any, change_voxels: Any, segment: Any, check: Any, threshold: Any
) -> None:
    """Replaced by 100 HU they lie above the threshold of 50 HU, and nothing else changes."""
    change_voxels(case["ct"], _put(np.nan, np.inf, -np.inf))
    stored = _array(case["ct"])
    outcome = segment(case, *threshold("ct", 0.5), "--replace-nonfinite", 100)
    assert outcome.code == 0, outcome.err
    words = ("holds 3 voxels of 7680 that are NaN or infinite: replaced by 100", str(case["ct"]))
    assert outcome.warned(*words)
    wanted = np.where(np.isfinite(stored), stored, 100) > 50
    np.testing.assert_array_equal(_array(outcome.mask), wanted)
    found = check({"A": case}, "--replace-nonfinite", 100)
    assert found.code == 0
    assert found.warned(*words)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39"])
def test_a_replacement_that_is_not_finite_in_float32_is_refused_by_every_way_to_it(
    value: str, case: Any, change_voxels: Any, segment: Any, command: Any, write_list: Any, train: Any,
    cohort_of: Any, assert_refused: Any, tmp_path: Path,
) -> None:  # fmt: skip
    change_voxels(case["ct"], _put(np.nan))
    words = "give a number that is finite in float32, such as 0."
    assert_refused(segment(case, f"--replace-nonfinite={value}"), words)
    assert_refused(segment(case, "--set", f"checks#replace_nonfinite={value}"), words)
    assert_refused(
        command("check", tmp_path / "found", *write_list({"A": case}), f"--replace-nonfinite={value}"), words
    )
    assert_refused(train(cohort_of(5), f"--replace-nonfinite={value}"), words)


def test_what_becomes_infinite_in_float32_counts_as_infinite(case: Any, change_voxels: Any, segment: Any) -> None:
    change_voxels(case["mr"], lambda voxels: np.where(np.arange(voxels.size).reshape(voxels.shape) == 99, 1e39, voxels))
    assert nib.Nifti1Image.from_filename(case["mr"]).get_data_dtype() == np.float64
    outcome = segment(case)
    assert outcome.code == 1
    assert "holds 1 voxels of 7392 that are NaN or infinite" in outcome.errors[0]


def test_one_constant_image_is_a_warning_by_name(case: Any, change_voxels: Any, segment: Any, check: Any) -> None:
    change_voxels(case["pet"], lambda voxels: voxels * 0 + 3)
    for outcome in (segment(case), check({"A": case})):
        assert outcome.code == 0, outcome.err
        assert outcome.warned(str(case["pet"]), "(pet) is constant: every voxel is 3")


def test_a_case_of_constant_images_alone_is_refused(
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
    ("255", _put(255), "holds the values 255, which"),
    ("-1", _put(-1), "holds the values -1, which"),
    ("0.9999", _put(0.9999), "holds the values 0.9999, which"),
    ("NaN", _put(np.nan, np.nan), "holds the values nan, which"),
    ("2 to 5", _put(2, 3, 4, 5), "holds the values 2, 3, 4, 5, which"),
]
BAD_LABELS = pytest.mark.parametrize(("change", "words"), [c[1:] for c in LABELS], ids=[c[0] for c in LABELS])


@BAD_LABELS
@pytest.mark.parametrize("more", [[], ["--replace-nonfinite", "0"]], ids=["plain", "replacing"])
def test_check_names_the_values_that_a_label_must_not_hold(
    more: list[str], change: Any, words: str, cohort_of: Any, change_voxels: Any, check: Any, assert_refused: Any
) -> None:
    cases = cohort_of(3)
    change_voxels(cases["B"]["label"], change)
    change_voxels(cases["C"]["label"], _put(7))
    outcome = check(cases, *more)
    assert_refused(outcome, "2 errors were found")
    first, second = (each for each in outcome.findings if each["level"] == "error")
    assert (first["case_id"], first["key"]) == ("B", "label")
    assert str(cases["B"]["label"]) in first["what"]
    assert words in first["what"]
    assert second["case_id"] == "C"  # it went on


@BAD_LABELS
@pytest.mark.parametrize("fold", [0, 1, 2, 3, 4])
def test_training_refuses_such_a_label_wherever_its_case_is_dealt(
    fold: int, change: Any, words: str, cohort_of: Any, change_voxels: Any, train: Any, assert_refused: Any
) -> None:
    cases = cohort_of(5)
    change_voxels(cases["B"]["label"], change)
    outcome = train(cases, "--fold", fold)
    assert_refused(outcome, str(cases["B"]["label"]), words)


def test_labels_in_float64_of_the_data_sets_own_mapping_are_accepted(
    cohort_of: Any, change_voxels: Any, check: Any, train: Any, tmp_path: Path
) -> None:
    """PI-CAI's: 0, and the ISUP grades 2 to 5, which are all foreground."""
    cases = {}
    names = {"ct": "t2w", "pet": "adc", "mr": "hbv", "label": "label"}
    for grade, (name, files) in zip((2, 3, 4, 5, 2), cohort_of(5).items(), strict=True):
        change_voxels(files["label"], lambda voxels, grade=grade: (voxels * grade).astype(np.float64))
        assert nib.Nifti1Image.from_filename(files["label"]).get_data_dtype() == np.float64
        change_voxels(files["ct"], lambda voxels: voxels + 1100)
        cases[name] = {names[key]: path for key, path in files.items()}
    found = check(cases, "--data", "picai22")
    assert (found.code, [each for each in found.findings if each["level"] != "note"]) == (0, [])
    outcome = train(cases, "--data", "picai22")
    assert outcome.code == 0, outcome.err
    change_voxels(cases["A"]["label"], lambda voxels: voxels * 3)
    errors = [each for each in check(cases, "--data", "picai22").findings if each["level"] == "error"]
    assert ["holds the values 6, which" in each["what"] for each in errors] == [True]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_empty_labels_are_counted_trained_on_and_scored_by_status(
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
    ("damage", "words"), [(_cut, "is cut off or damaged"), (_fourth, "x 16 x 2 voxels"), (_away, "do not overlap")]
)
def test_a_labels_file_is_judged_as_an_images_is(
    damage: Any, words: str, cohort_of: Any, check: Any, train: Any, assert_refused: Any
) -> None:
    cases = cohort_of(5)
    damage(cases["C"]["label"])
    (error,) = (each for each in check(cases).findings if each["level"] == "error")
    assert (error["case_id"], error["key"]) == ("C", "label")
    assert error["what"].startswith(str(cases["C"]["label"]))
    assert words in error["what"]
    assert_refused(train(cases), str(cases["C"]["label"]), words)


SHIFTS = [(0.385, 0, 0), (0, -0.385, 0), (1.9, 0, 0)]


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_label_off_by_less_than_half_a_voxel_is_the_same_label(
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
    told = [re.search(r"label: centre ([\d.]+) mm from the reference's", each["what"]) for each in found.findings]
    distances = [float(match[1]) for match in told if match]
    assert distances == pytest.approx([np.linalg.norm(shift)] * 5, abs=0.0051)  # two decimals
    frozen = ["--set", "learning_rate=0", "--set", "weight_decay=0"]
    path, definition = threshold("ct", 0.4001)[1], threshold("ct", 0.4001)[3]
    outcome = train(cases, "--pretrained", path, "--set", definition, *frozen)
    assert outcome.code == 0, outcome.err
    (row,) = _rows(tmp_path / "run" / "curves.csv")
    assert float(row["val_dice"]) == 1.0


def test_a_label_on_another_grid_is_resampled_to_its_place(
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
    ("PET in Bq/ml", "pet", lambda v: v * 5000, "more than an SUV reaches: is it in Bq/ml?"),
    ("a CT as PET", "pet", lambda v: v * 0 + np.linspace(-1000, 300, v.size).reshape(v.shape), "not a CT?"),
    ("a PET as CT", "ct", lambda v: (v > 0) * np.linspace(0, 8, v.size).reshape(v.shape), "none of air (about -1000"),
    ("an MR as CT", "ct", lambda v: (v > 0) * np.linspace(1, 900, v.size).reshape(v.shape), "is it a CT in HU?"),
    ("a damaged MR", "mr", lambda v: _put(3e38)(v), "beyond what any scanner stores: is a voxel damaged?"),
    ("a damaged CT", "ct", lambda v: _put(-3e38)(v), "beyond what any scanner stores: is a voxel damaged?"),
    ("a damaged PET", "pet", lambda v: _put(2e9)(v), "beyond what any scanner stores: is a voxel damaged?"),
    ("a CT as MR", "mr", lambda v: v * 0 + np.linspace(-1000, 300, v.size).reshape(v.shape), "is it a CT?"),
]


@pytest.mark.parametrize(("key", "change", "words"), [c[1:] for c in UNITS], ids=[c[0] for c in UNITS])
def test_values_of_other_units_are_a_warning_by_name_and_nothing_is_converted(
    key: str, change: Any, words: str, case: Any, change_voxels: Any, segment: Any, check: Any
) -> None:
    """The whole case is without such a warning; the voxels' least and largest value stand in it as they are stored."""
    quiet = segment(case, name="quiet")
    assert not quiet.warned(" has values from ")
    change_voxels(case[key], lambda voxels: change(voxels.astype(np.float64)).astype(np.float32))
    ends = _array(case[key])
    for outcome in (segment(case), check({"A": case})):
        assert outcome.code == 0, outcome.err
        assert outcome.warned(str(case[key]), words, f"from {ends.min():.4g} to {ends.max():.4g}")


@pytest.mark.parametrize("keep", [0.5, 0.9, 1.0], ids=["half", "most", "all but the checksum"])
@pytest.mark.parametrize("which", ["label", "mask"])
def test_a_damaged_label_or_mask_is_not_scored(
    which: str, keep: float, cohort_of: Any, change_voxels: Any, command: Any, write_list: Any, assert_refused: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """SimpleITK reads what is left of it without an error, so that a wrong Dice would be told."""
    cases, masks, folder = cohort_of(2), tmp_path / "masks", tmp_path / "scores"
    masks.mkdir()
    for name, files in cases.items():
        random = np.random.default_rng(4).integers(0, 2, (24, 20, 16)).astype(np.uint8)  # hardly shrinks
        change_voxels(files["label"], lambda _, random=random: random)
        shutil.copy(files["label"], masks / f"{name}.nii.gz")
    arguments = [*write_list(cases), "--output-dir", folder, "--predictions", masks]
    damaged = cases["B"]["label"] if which == "label" else masks / "B.nii.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: int((len(whole) - 8) * keep)])
    outcome = command("evaluate", folder, *arguments)
    if which == "label":
        assert_refused(outcome, str(damaged), "is cut off or damaged")
        assert "summary.json" not in outcome.files
    else:  # another's mistake, which counts as the worst value and is named
        assert outcome.code == 0
        assert outcome.warned("unreadable", str(damaged), "is cut off or damaged")
        assert [(row["status"], row["dice"]) for row in _rows(folder / "cases.csv")] == [("ok", "1.0"), ("error", "")]
    damaged.write_bytes(whole)
    assert command("evaluate", folder, *arguments).code == 0
    rows = _rows(folder / "cases.csv")
    assert [float(row["dice"]) for row in rows] == [1.0, 1.0]


@BAD_LABELS
def test_evaluation_refuses_such_a_label_by_name(
    change: Any, words: str, cohort_of: Any, change_voxels: Any, command: Any, write_list: Any, tmp_path: Path,
    assert_refused: Any,
) -> None:  # fmt: skip
    cases, folder = cohort_of(2), tmp_path / "scores"
    (tmp_path / "masks").mkdir()
    for name, files in cases.items():
        shutil.copy(files["label"], tmp_path / "masks" / f"{name}.nii.gz")
    change_voxels(cases["B"]["label"], change)
    arguments = [*write_list(cases), "--output-dir", folder, "--predictions", tmp_path / "masks"]
    outcome = command("evaluate", folder, *arguments)
    assert_refused(outcome, str(cases["B"]["label"]), words)
    assert "summary.json" not in outcome.files
