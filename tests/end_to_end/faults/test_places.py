# SPDX-License-Identifier: Apache-2.0
"""Images that lie elsewhere, in other shapes: the mask's place against a scene that is a function of world coordinates.

The scene is a cone: with a threshold in the network's place the mask is a ball, wherever the modality's own voxels lie.
"""

from __future__ import annotations

import csv
import re
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
CENTRE, RADIUS = np.array([3.0, -2.0, 1.0]), 17.0  # mm; the ball is off the grids' centre, so that a mirror shows
SCALES = {"ct": (-200, 300), "pet": (0, 10), "mr": (0, 1200)}  # of the phantom's config, to [0, 1]
SLOPE, TOP = 0.02, 0.9  # of the scaled cone, per mm and at its tip
DIM, QFORM = 40, 252  # offsets in a NIfTI-1 header


def _distance(points: Array) -> Array:
    return np.linalg.norm(points - CENTRE, axis=-1)


@pytest.fixture
def place(write_nifti: Any, make_affine: Any, world: Any) -> Callable[..., Path]:
    """``place(path, key, axes, spacing, shape, centre)``: the cone as a modality sees it on such a grid."""

    def write(path: Path, key: str, axes: Any, spacing: Any, shape: Any, centre: Any = (0, 0, 0)) -> Path:
        affine = make_affine(axes, spacing, shape, centre)
        low, high = SCALES[key]
        voxels = low + (high - low) * np.maximum(TOP - SLOPE * _distance(world(affine, shape)), 0)
        voxels[0, 0, 0] = -1000 if key == "ct" else 0
        written: Path = write_nifti(path, voxels.astype(np.float32), affine)
        return written

    return write


def _assert_ball(mask: Path, world: Any, tolerance: float) -> None:
    """Every voxel that is farther than this from the ball's surface is on the right side."""
    image = nib.Nifti1Image.from_filename(mask)
    distance = _distance(world(image.affine, image.shape)) - RADIUS
    found, clear = np.asarray(image.dataobj), np.abs(distance) > tolerance
    assert (clear & (distance < 0)).sum() > 100
    np.testing.assert_array_equal(found[clear], (distance < 0)[clear])


PLACES = [
    ("pet", LPS, (5, 5, 5.5), (20, 18, 16), (5, 0, 0), "centre 5.00 mm from the reference's, turned by 0.0 degrees"),
    ("pet", LPS, (5, 5, 5.5), (20, 18, 16), (0, 3, -4), "centre 5.00 mm from the reference's, turned by 0.0 degrees"),
    ("mr", LPS @ np.diag([-1, 1, 1]), (4, 4, 5), (24, 20, 16), (0, 0, 0), "centre 0.00 mm"),
    ("mr", OBLIQUE, (4, 4, 5), (24, 24, 16), (0, 0, 0), "turned by 20.0 degrees"),
    ("mr", LPS[:, [2, 0, 1]], (5, 3, 3), (16, 28, 28), (0, 0, 0), "turned by 0.0 degrees, voxels of 5 x 3 x 3 mm"),
    ("pet", LPS, (2.5, 2.5, 2.5), (33, 29, 31), (1, 1, 1), "centre 1.73 mm"),
]
NAMES = ["shifted by 5 mm", "shifted by 3-4-5 mm", "mirrored", "oblique", "other axes", "other spacing and shape"]


@pytest.mark.parametrize(("key", "axes", "spacing", "shape", "centre", "words"), PLACES, ids=NAMES)
def test_a_mask_lies_where_the_modality_lies_and_the_log_tells_how_far(
    key: str, axes: Array, spacing: Any, shape: Any, centre: Any, words: str,
    case: Any, place: Any, segment: Any, check: Any, threshold: Any, world: Any,
) -> None:  # fmt: skip
    place(case["ct"], "ct", LPS, (4, 4, 5), (24, 20, 16))
    place(case[key], key, axes, spacing, shape, centre)
    outcome = segment(case, *threshold(key, TOP - SLOPE * RADIUS))
    assert outcome.code == 0, outcome.err
    _assert_ball(outcome.mask, world, 0.7)
    assert f"{key}: {words}" in outcome.err or re.search(f"{key}: .*{words}", outcome.err)
    found = check({"A": case})
    assert found.code == 0
    assert any(words in each["what"] for each in found.findings if (each["level"], each["key"]) == ("note", key))


@pytest.mark.parametrize("axes", [OBLIQUE, LPS @ np.diag([1, -1, 1])], ids=["oblique", "mirrored"])
def test_the_mask_is_on_the_references_own_grid_whatever_its_axes(
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
    words = f"{case['pet']} and {case['ct']} do not overlap in space: check which files belong together."
    assert_refused(segment(case), words)
    cases = cohort_of(5)
    cases["B"] = case
    assert [each["what"] for each in check(cases).findings if each["level"] == "error"] == [words]
    assert_refused(train(cases), words)


def _tilted(path: Path) -> None:
    """A qform that is turned by 90 degrees against the sform, which stays."""
    image = nib.Nifti1Image.from_filename(path)
    turned = image.affine.copy()
    turned[:3, :3] = Rotation.from_euler("z", 90, degrees=True).as_matrix() @ turned[:3, :3]
    image.set_qform(turned, code=1)
    image.set_sform(image.affine, code=1)
    nib.save(image, path)


def test_of_sform_and_qform_the_sform_is_used_and_that_is_said(
    case: Any, place: Any, segment: Any, check: Any, threshold: Any, world: Any
) -> None:
    place(case["ct"], "ct", LPS, (4, 4, 5), (24, 20, 16))
    wanted = nib.Nifti1Image.from_filename(case["ct"]).affine
    _tilted(case["ct"])
    outcome = segment(case, *threshold("ct", TOP - SLOPE * RADIUS))
    assert outcome.code == 0, outcome.err
    assert outcome.warned(str(case["ct"]), "an sform and a qform that are up to", "the sform is used")
    mask = nib.Nifti1Image.from_filename(outcome.mask)
    np.testing.assert_allclose(mask.get_sform(), wanted, atol=1e-4)
    np.testing.assert_allclose(mask.get_qform(), wanted, atol=1e-4)
    _assert_ball(outcome.mask, world, 0.7)
    assert check({"A": case}).warned(str(case["ct"]), "the sform is used")


def test_neither_sform_nor_qform_is_accepted_and_said(case: Any, patch_nifti: Any, segment: Any, check: Any) -> None:
    for key in ("ct", "pet", "mr"):
        patch_nifti(case[key], QFORM, "hh", 0, 0)
    outcome = segment(case)
    assert outcome.code == 0, outcome.err
    found = check({"A": case})
    for key in ("ct", "pet", "mr"):
        for each in (outcome, found):
            assert each.warned(str(case[key]), "no place in space", "its voxel sizes alone are used")
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


def test_a_4d_file_of_all_modalities_gives_the_very_mask_of_the_three_files(common: Any, segment: Any) -> None:
    case, stack = common
    single = segment(case, name="single")
    stacked = segment({}, "--stacked", stack(3, "all.nii.gz"), name="stacked")
    assert (single.code, stacked.code) == (0, 0), stacked.err
    first, second = (nib.Nifti1Image.from_filename(each.mask) for each in (single, stacked))
    assert 0 < np.asarray(first.dataobj).mean() < 1
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    np.testing.assert_array_equal(first.affine, second.affine)


@pytest.mark.parametrize(("number", "sizes"), [(2, "24 x 20 x 16 x 2"), (4, "24 x 20 x 16 x 4"), (1, "24 x 20 x 16")])
def test_a_4d_file_of_another_number_of_volumes_is_refused(
    number: int, sizes: str, common: Any, segment: Any, assert_refused: Any
) -> None:
    path = common[1](number, "all.nii.gz")
    words = f"error: {path} holds {sizes} voxels: give one 4D file whose last axis is ct, pet, mr."
    outcome = segment({}, "--stacked", path)
    assert_refused(outcome, words)
    assert outcome.errors == [words]  # once, not once per modality


def test_a_cohort_of_4d_files_is_checked_and_trained_on_where_the_config_says_so(
    common: Any, cohort_of: Any, check: Any, train: Any, assert_refused: Any
) -> None:
    """Checked as three modalities: the NaN of one and the wrong number of another are found, by file."""
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
    assert "holds 24 x 20 x 16 x 4 voxels" in errors["B", "ct"]
    assert errors["C", "pet"].startswith(f"{cases['C']['image']} holds 1 voxels of 7680 that are NaN")


def test_a_last_axis_of_one_is_a_volume(common: Any, change_voxels: Any, segment: Any, check: Any) -> None:
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
def test_single_slices_work_where_all_modalities_are_single_slices(
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


def test_a_patch_larger_than_the_volume_pads_and_changes_no_voxel(case: Any, segment: Any, threshold: Any) -> None:
    voxels = np.asarray(nib.Nifti1Image.from_filename(case["ct"]).dataobj)
    for patch in ("[64,32,32]", "[16,64,16]"):
        outcome = segment(case, *threshold("ct", 0.4001), "--set", f"patch={patch}", name=f"patch{patch[1:3]}")
        assert outcome.code == 0, outcome.err
        found = np.asarray(nib.Nifti1Image.from_filename(outcome.mask).dataobj)
        np.testing.assert_array_equal(found, voxels > 0)


def test_training_with_a_patch_larger_than_the_volumes_pads(cohort_of: Any, train: Any, tmp_path: Path) -> None:
    outcome = train(cohort_of(5), "--set", "patch=[32,32,32]")
    assert outcome.code == 0, outcome.err
    (row,) = csv.DictReader((tmp_path / "run" / "curves.csv").open(newline=""))
    assert np.isfinite(float(row["loss"]))
    assert np.isfinite(float(row["val_dice"]))
