# SPDX-License-Identifier: Apache-2.0
"""Images on other grids and in other shapes: the mask's position, compared with a scene in world coordinates.

The scene is a cone. With a threshold instead of a network, the mask is a ball on any grid of the modality.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[Any]
LPS = np.diag([-1.0, -1.0, 1.0])
OBLIQUE = Rotation.from_euler("z", 20, degrees=True).as_matrix() @ LPS
CENTRE, RADIUS = np.array([3.0, -2.0, 1.0]), 17.0  # mm; off the grids' centre, so that a mirrored mask is detected
SCALES = {"ct": (-200, 300), "pet": (0, 10), "mr": (0, 1200)}  # of the phantom's config, to [0, 1]
SLOPE, TOP = 0.02, 0.9  # of the scaled cone, per mm and at its tip
DIM, QFORM = 40, 252  # offsets in a NIfTI-1 header


def _distance(points: Array) -> Array:
    return np.linalg.norm(points - CENTRE, axis=-1)


@pytest.fixture
def place(write_nifti: Any, make_affine: Any, world: Any) -> Callable[..., Path]:
    """``place(path, key, axes, spacing, shape, centre)`` writes the cone in a modality's units on such a grid."""

    def write(path: Path, key: str, axes: Any, spacing: Any, shape: Any, centre: Any = (0, 0, 0)) -> Path:
        affine = make_affine(axes, spacing, shape, centre)
        low, high = SCALES[key]
        voxels = low + (high - low) * np.maximum(TOP - SLOPE * _distance(world(affine, shape)), 0)
        voxels[0, 0, 0] = -1000 if key == "ct" else 0
        written: Path = write_nifti(path, voxels.astype(np.float32), affine)
        return written

    return write


def _assert_ball(mask: Path, world: Any, tolerance: float) -> None:
    """Check all voxels that are farther than the tolerance from the ball's surface."""
    image = nib.Nifti1Image.from_filename(mask)
    distance = _distance(world(image.affine, image.shape)) - RADIUS
    found, clear = np.asarray(image.dataobj), np.abs(distance) > tolerance
    assert (clear & (distance < 0)).sum() > 100
    np.testing.assert_array_equal(found[clear], (distance < 0)[clear])


PLACES = [
    ("pet", LPS, (5, 5, 5.5), (20, 18, 16), (5, 0, 0), "centre 5.00 mm from the reference's, rotated by 0.0 degrees"),
    ("pet", LPS, (5, 5, 5.5), (20, 18, 16), (0, 3, -4), "centre 5.00 mm from the reference's, rotated by 0.0 degrees"),
    ("mr", LPS @ np.diag([-1, 1, 1]), (4, 4, 5), (24, 20, 16), (0, 0, 0), "centre 0.00 mm"),
    ("mr", OBLIQUE, (4, 4, 5), (24, 24, 16), (0, 0, 0), "rotated by 20.0 degrees"),
    ("mr", LPS[:, [2, 0, 1]], (5, 3, 3), (16, 28, 28), (0, 0, 0), "rotated by 0.0 degrees, voxels of 5 x 3 x 3 mm"),
    ("pet", LPS, (2.5, 2.5, 2.5), (33, 29, 31), (1, 1, 1), "centre 1.73 mm"),
]
NAMES = ["shifted by 5 mm", "shifted by 3-4-5 mm", "mirrored", "oblique", "other axes", "other spacing and shape"]


@pytest.mark.parametrize(("key", "axes", "spacing", "shape", "centre", "words"), PLACES, ids=NAMES)
def test_check_notes_where_a_modality_lies_relative_to_the_reference(
    key: str, axes: Array, spacing: Any, shape: Any, centre: Any, words: str, case: Any, place: Any, findings_of: Any
) -> None:
    place(case["ct"], "ct", LPS, (4, 4, 5), (24, 20, 16))
    place(case[key], key, axes, spacing, shape, centre)
    findings = findings_of(case)
    assert [each for each in findings if each.level == "error"] == []
    assert any(words in each.what for each in findings if (each.level, each.key) == ("note", key))


# All other grids: tests/data/test_geometry_properties.py
@pytest.mark.parametrize(("key", "axes", "spacing", "shape", "centre", "words"), [PLACES[1], PLACES[3]])
def test_the_mask_has_the_position_of_the_modality_and_the_log_notes_it(
    key: str, axes: Array, spacing: Any, shape: Any, centre: Any, words: str,
    case: Any, place: Any, segment: Any, threshold: Any, world: Any,
) -> None:  # fmt: skip
    place(case["ct"], "ct", LPS, (4, 4, 5), (24, 20, 16))
    place(case[key], key, axes, spacing, shape, centre)
    outcome = segment(case, *threshold(key, TOP - SLOPE * RADIUS))
    assert outcome.code == 0, outcome.err
    _assert_ball(outcome.mask, world, 0.7)
    assert outcome.noted(f"{key}: .*{words}")


@pytest.mark.parametrize("axes", [OBLIQUE, LPS @ np.diag([1, -1, 1])], ids=["oblique", "mirrored"])
def test_the_mask_is_on_the_references_own_grid_with_any_axes(
    axes: Array, case: Any, place: Any, segment: Any, threshold: Any, world: Any
) -> None:
    place(case["ct"], "ct", axes, (4, 4, 5), (24, 22, 16), (1, 2, 3))
    place(case["pet"], "pet", LPS, (5, 5, 5.5), (20, 18, 16))
    outcome = segment(case, *threshold("pet", TOP - SLOPE * RADIUS))
    assert outcome.code == 0, outcome.err
    mask, reference = (nib.Nifti1Image.from_filename(path) for path in (outcome.mask, case["ct"]))
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
    _assert_ball(outcome.mask, world, 0.7)


def test_files_that_share_no_space_are_refused(
    case: Any, place: Any, segment: Any, check: Any, cohort_of: Any, train: Any, assert_refused: Any
) -> None:
    """The CT ends 40 mm from its centre along z, a PET of 88 mm whose centre is 85 mm away begins at 41 mm."""
    place(case["pet"], "pet", LPS, (5, 5, 5.5), (20, 18, 16), (0, 0, 83))
    assert segment(case).code == 0  # they share 1 mm
    (case["pet"].parents[1] / "output" / "mask.nii.gz").unlink()
    (case["pet"].parents[1] / "output" / "mask.manifest.json").unlink()
    place(case["pet"], "pet", LPS, (5, 5, 5.5), (20, 18, 16), (0, 0, 85))
    words = f"{case['pet']} and {case['ct']} do not overlap in space. Check that these files belong together."
    assert_refused(segment(case), words)
    cases = cohort_of(5)
    cases["B"] = case
    assert [each["what"] for each in check(cases).findings if each["level"] == "error"] == [words]
    assert_refused(train(cases), words)


def _tilted(path: Path) -> None:
    """A qform that is rotated by 90 degrees against the sform, which stays."""
    image = nib.Nifti1Image.from_filename(path)
    turned = image.affine.copy()
    turned[:3, :3] = Rotation.from_euler("z", 90, degrees=True).as_matrix() @ turned[:3, :3]
    image.set_qform(turned, code=1)
    image.set_sform(image.affine, code=1)
    nib.save(image, path)


def test_the_sform_is_used_with_a_warning_if_the_qform_differs(
    case: Any, place: Any, segment: Any, check: Any, threshold: Any, world: Any
) -> None:
    place(case["ct"], "ct", LPS, (4, 4, 5), (24, 20, 16))
    wanted = nib.Nifti1Image.from_filename(case["ct"]).affine
    _tilted(case["ct"])
    outcome = segment(case, *threshold("ct", TOP - SLOPE * RADIUS))
    assert outcome.code == 0, outcome.err
    assert outcome.warned(str(case["ct"]), "an sform and a qform up to", "the sform is used")
    mask = nib.Nifti1Image.from_filename(outcome.mask)
    np.testing.assert_allclose(mask.get_sform(), wanted, atol=1e-4)
    np.testing.assert_allclose(mask.get_qform(), wanted, atol=1e-4)
    _assert_ball(outcome.mask, world, 0.7)
    assert check({"A": case}).warned(str(case["ct"]), "the sform is used")


def _unit_axes(path: Path) -> None:
    """An sform whose axes have length 1, beside the right pixdim; no qform."""
    image = nib.Nifti1Image.from_filename(path)
    header, affine = image.header.copy(), image.affine.copy()
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    affine[:3, :3] /= sizes
    changed = nib.Nifti1Image(np.asarray(image.dataobj), None, header)
    changed.header.set_qform(None, code=0)
    changed.header.set_sform(affine, code=1)
    changed.header["pixdim"][1:4] = sizes
    nib.save(changed, path)


def test_contradictory_voxel_sizes_are_refused_by_every_verb_unless_an_option_chooses(
    case: Any, place: Any, segment: Any, check: Any, cohort_of: Any, train: Any, threshold: Any, world: Any,
    assert_refused: Any,
) -> None:  # fmt: skip
    place(case["pet"], "pet", LPS, (5, 5, 5.5), (20, 18, 16), (5, 0, 0))
    _unit_axes(case["pet"])
    words = (str(case["pet"]), "1 x 1 x 1 mm by its sform", "5 x 5 x 5.5 mm by its pixdim", "--voxel-size")
    assert_refused(segment(case), *words)
    cases = {**cohort_of(5), "B": case}
    found = check(cases)
    (error,) = (each["what"] for each in found.findings if each["level"] == "error")
    assert all(word in error for word in words)
    assert_refused(train(cases), *words)
    outcome = segment(case, *threshold("pet", TOP - SLOPE * RADIUS), "--voxel-size", "pixdim")
    assert outcome.code == 0, outcome.err
    assert outcome.warned(str(case["pet"]), "the pixdim is used (--voxel-size pixdim)")
    _assert_ball(outcome.mask, world, 0.7)
    for choice in ("pixdim", "affine"):
        found = check(cases, "--voxel-size", choice)
        assert found.code == 0, found.err
        assert found.warned(str(case["pet"]), f"--voxel-size {choice}")


def test_neither_sform_nor_qform_is_accepted_with_a_warning(
    case: Any, patch_nifti: Any, segment: Any, check: Any
) -> None:
    for key in ("ct", "pet", "mr"):
        patch_nifti(case[key], QFORM, "hh", 0, 0)
    outcome = segment(case)
    assert outcome.code == 0, outcome.err
    found = check({"A": case})
    for key in ("ct", "pet", "mr"):
        for each in (outcome, found):
            assert each.warned(str(case[key]), "no position in space", "only its voxel sizes are used")
    mask, reference = (nib.Nifti1Image.from_filename(path) for path in (outcome.mask, case["ct"]))
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)


@pytest.fixture
def common(case: Any, write_nifti: Any) -> tuple[Any, Callable[[int, str], Path]]:
    """The case with every modality on the CT's grid, and ``stack(n)``: n volumes along a last axis."""
    affine = nib.Nifti1Image.from_filename(case["ct"]).affine
    rng = np.random.default_rng(5)
    ranges = {"ct": (-1000, 300), "pet": (0, 9), "mr": (0, 900)}
    volumes = {key: rng.uniform(*ends, (24, 20, 16)).astype(np.float32) for key, ends in ranges.items()}
    for key, voxels in volumes.items():
        write_nifti(case[key], voxels, affine)

    def stack(number: int, name: str) -> Path:
        chosen = [*volumes.values(), volumes["mr"]][:number]
        written: Path = write_nifti(case["ct"].with_name(name), np.stack(chosen, -1), affine)
        return written

    return case, stack


def test_a_4d_file_of_all_modalities_gives_the_same_mask_as_three_files(common: Any, segment: Any) -> None:
    case, stack = common
    single = segment(case, name="single")
    stacked = segment({}, "--stacked", stack(3, "all.nii.gz"), name="stacked")
    assert (single.code, stacked.code) == (0, 0), stacked.err
    first, second = (nib.Nifti1Image.from_filename(each.mask) for each in (single, stacked))
    assert 0 < np.asarray(first.dataobj).mean() < 1
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    np.testing.assert_array_equal(first.affine, second.affine)


def test_measures_and_report_are_the_same_however_a_4d_file_is_named(common: Any, segment: Any) -> None:
    path = common[1](3, "all.nii.gz")
    named = segment({}, "--stacked", path, "--report", name="option")
    by_set = segment({"ct": path}, "--set", "stacked=true", "--report", name="set")
    assert (named.code, by_set.code) == (0, 0), by_set.err
    tables = [Path(str(each.mask).replace(".nii.gz", ".measures.csv")).read_text() for each in (named, by_set)]
    assert tables[0].replace("option,", "set,") == tables[1]
    assert all(row["suvmax"] for row in csv.DictReader(tables[1].splitlines()))
    page = Path(str(by_set.mask).replace(".nii.gz", ".report.html")).read_text()
    assert "Segmented without" not in page


@pytest.mark.parametrize(("number", "sizes"), [(2, "24 x 20 x 16 x 2"), (4, "24 x 20 x 16 x 4"), (1, "24 x 20 x 16")])
def test_a_4d_file_of_another_number_of_volumes_is_refused(
    number: int, sizes: str, common: Any, segment: Any, assert_refused: Any
) -> None:
    path = common[1](number, "all.nii.gz")
    words = f"error: {path} contains {sizes} voxels. Give one 4D file whose last axis is ct, pet, mr."
    outcome = segment({}, "--stacked", path)
    assert_refused(outcome, words)
    assert outcome.errors == [words]  # once, not once per modality


def test_a_cohort_of_4d_files_is_checked_and_trained_on_if_the_config_is_stacked(
    common: Any, cohort_of: Any, check: Any, train: Any, assert_refused: Any
) -> None:
    """Each modality is checked: a NaN in one file and a wrong number of volumes in another are found."""
    cases = {}
    for name in "ABCDE":
        path = common[1](3, f"{name}.nii.gz")
        cases[name] = {"image": path, "label": cohort_of(5)[name]["label"]}
    stacked = ("--set", "stacked=true")
    whole = check(cases, *stacked)
    assert (whole.code, [each for each in whole.findings if each["level"] == "error"]) == (0, [])
    outcome = train(cases, *stacked)
    assert outcome.code == 0, outcome.err
    common[1](4, "B.nii.gz")
    image = nib.Nifti1Image.from_filename(cases["C"]["image"])
    voxels = np.array(image.dataobj)
    voxels[3, 4, 5, 1] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), cases["C"]["image"])
    found = check(cases, *stacked)
    assert_refused(found)
    errors = {(each["case_id"], each["key"]): each["what"] for each in found.findings if each["level"] == "error"}
    assert set(errors) == {("B", "ct"), ("B", "pet"), ("B", "mr"), ("C", "pet")}
    assert "contains 24 x 20 x 16 x 4 voxels" in errors["B", "ct"]
    assert errors["C", "pet"].startswith(f"{cases['C']['image']}: 1 of 7680 voxels are NaN")


def test_a_last_axis_of_length_1_is_dropped(common: Any, change_voxels: Any, segment: Any, check: Any) -> None:
    case = common[0]
    before = np.asarray(nib.Nifti1Image.from_filename(segment(case, name="before").mask).dataobj)
    for key in ("ct", "pet"):
        change_voxels(case[key], lambda voxels: voxels[..., None])
        assert nib.Nifti1Image.from_filename(case[key]).shape == (24, 20, 16, 1)
    after = segment(case, name="after")
    assert after.code == 0, after.err
    assert 0 < before.mean() < 1
    np.testing.assert_array_equal(np.asarray(nib.Nifti1Image.from_filename(after.mask).dataobj), before)
    assert check({"A": case}).code == 0


@pytest.mark.parametrize("flat", [False, True], ids=["a slice", "2D"])
def test_single_slices_work_if_all_modalities_are_single_slices(
    flat: bool, case: Any, change_voxels: Any, segment: Any, check: Any, threshold: Any
) -> None:
    for key in ("ct", "pet", "mr", "label"):
        half = {"pet": 8, "mr": 7}.get(key, 8)
        change_voxels(case[key], lambda v, half=half: v[..., half] if flat else v[..., half : half + 1])
    slices = np.asarray(nib.Nifti1Image.from_filename(case["ct"]).dataobj).squeeze()
    outcome = segment(case, *threshold("ct", 0.4001))  # just above 0 HU
    assert outcome.code == 0, outcome.err
    assert outcome.warned(str(case["ct"]), "single slices")
    mask = np.asarray(nib.Nifti1Image.from_filename(outcome.mask).dataobj).squeeze()
    assert 50 < mask.sum() < 400
    np.testing.assert_array_equal(mask, slices > 0)
    assert check({"A": case}).code == 0


def test_with_a_patch_larger_than_the_volume_the_mask_is_the_same(case: Any, segment: Any, threshold: Any) -> None:
    voxels = np.asarray(nib.Nifti1Image.from_filename(case["ct"]).dataobj)
    for patch in ("[64,32,32]", "[16,64,16]"):
        outcome = segment(case, *threshold("ct", 0.4001), "--set", f"patch={patch}", name=f"patch{patch[1:3]}")
        assert outcome.code == 0, outcome.err
        found = np.asarray(nib.Nifti1Image.from_filename(outcome.mask).dataobj)
        np.testing.assert_array_equal(found, voxels > 0)


def test_training_with_a_patch_larger_than_the_volumes_works(cohort_of: Any, train: Any, tmp_path: Path) -> None:
    outcome = train(cohort_of(5), "--set", "patch=[32,32,32]")
    assert outcome.code == 0, outcome.err
    (row,) = csv.DictReader((tmp_path / "run" / "curves.csv").open(newline=""))
    assert np.isfinite(float(row["loss"]))
    assert np.isfinite(float(row["val_dice"]))
