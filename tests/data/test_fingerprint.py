# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a data set: grids in the network's axes, values of the foreground, volumes of label values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.data.fingerprint import Source, fingerprint_case, fingerprint_cohort, ras_grid

Write = Callable[..., Path]


def affine(*spacing: float) -> Any:
    return np.diag([*spacing, 1.0])


@pytest.fixture
def case(tmp_path: Path, write_nifti: Write) -> dict[str, Any]:
    """CT of 20 x 20 x 10 voxels, PET with voxels twice as long, a label of 4 x 4 x 2 voxels of 1 and one of 5."""
    ct = np.full((20, 20, 10), -1024, dtype=np.int16)
    pet = np.zeros((10, 10, 5), dtype=np.float32)
    label = np.zeros((20, 20, 10), dtype=np.uint8)
    label[4:8, 4:8, 4:6], label[15, 15, 8] = 1, 5
    ct[label > 0], pet[2:4, 2:4, 2], pet[7, 7, 4] = 40, 7.5, 7.5
    pet_affine = affine(2, 2, 6)
    pet_affine[:3, 3] = 0.5, 0.5, 1.5  # the centre of the first eight voxels of the CT
    return {
        "case_id": "a",
        "ct": str(write_nifti(tmp_path / "ct.nii.gz", ct, affine(1, 1, 3))),
        "pet": str(write_nifti(tmp_path / "pet.nii.gz", pet, pet_affine)),
        "label": str(write_nifti(tmp_path / "label.nii.gz", label, affine(1, 1, 3))),
    }


def test_values_are_those_of_the_foreground_on_every_images_own_grid(case: dict[str, Any]) -> None:
    fingerprint = fingerprint_case(case, Source(["ct", "pet"], samples=500))
    assert fingerprint.problem == ""
    assert (fingerprint.shape, fingerprint.spacing) == ((20, 20, 10), (1, 1, 3))
    ct, pet = fingerprint.values["ct"], fingerprint.values["pet"]
    assert (ct.low, ct.high, len(ct.sample), set(ct.sample.tolist())) == (-1024, 40, 500, {40})
    assert (pet.low, pet.high, len(pet.sample), set(pet.sample.tolist())) == (0, 7.5, 500, {7.5})


def test_volumes_of_label_values_are_in_mm3(case: dict[str, Any]) -> None:
    volumes = fingerprint_case(case, Source(["ct", "pet"])).volumes
    assert volumes == pytest.approx({0: (4000 - 33) * 3, 1: 32 * 3, 5: 3})


def test_values_of_the_background_are_not_drawn(case: dict[str, Any], write_nifti: Write) -> None:
    ct = np.asanyarray(nib.load(case["ct"]).dataobj).copy()
    ct[15, 15, 8] = 900
    write_nifti(Path(case["ct"]), ct, affine(1, 1, 3))
    fingerprint = fingerprint_case(case, Source(["ct", "pet"], background=(0, 5), samples=500))
    assert set(fingerprint.values["ct"].sample.tolist()) == {40}


def test_without_a_label_all_values_but_0_are_drawn(case: dict[str, Any]) -> None:
    del case["label"]
    fingerprint = fingerprint_case(case, Source(["ct", "pet"], samples=500))
    assert fingerprint.volumes is None
    assert set(fingerprint.values["pet"].sample.tolist()) == {7.5}
    assert set(fingerprint.values["ct"].sample.tolist()) <= {-1024, 40}


def test_foreground_outside_an_images_field_of_view_is_not_drawn(case: dict[str, Any], write_nifti: Write) -> None:
    write_nifti(Path(case["pet"]), np.full((2, 2, 2), 3, dtype=np.float32), affine(6, 6, 11))
    sample = fingerprint_case(case, Source(["ct", "pet"], samples=500)).values["pet"].sample
    assert set(sample.tolist()) == {3}
    assert len(sample) < 500  # the single voxel at (15, 15, 24) mm lies outside


def test_values_that_are_not_finite_are_left_out(case: dict[str, Any], write_nifti: Write) -> None:
    pet = np.asanyarray(nib.load(case["pet"]).dataobj).copy()
    pet[2, 2, 2], pet[0, 0, 0] = np.nan, np.inf
    write_nifti(Path(case["pet"]), pet, nib.load(case["pet"]).affine)
    values = fingerprint_case(case, Source(["ct", "pet"], samples=500)).values["pet"]
    assert (values.low, values.high, set(values.sample.tolist())) == (0, 7.5, {7.5})


def test_an_absent_modality_has_no_values(case: dict[str, Any]) -> None:
    del case["pet"]
    fingerprint = fingerprint_case(case, Source(["ct", "pet"]))
    assert (fingerprint.problem, list(fingerprint.values)) == ("", ["ct"])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL", "ASL"])
def test_axes_are_right_anterior_superior(codes: str) -> None:
    ornt = nib.orientations.axcodes2ornt(codes)
    shape, spacing = np.array([30, 40, 50]), np.array([0.5, 2.0, 4.0])
    stored = nib.Nifti1Image(np.zeros(shape, dtype=np.uint8), affine(*spacing)).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), ornt)
    )
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    assert ras_grid(stored.affine, stored.shape) == ((30, 40, 50), (0.5, 2.0, 4.0))


def test_the_shape_is_that_of_the_cases_box(case: dict[str, Any]) -> None:
    case["bbox_mm"] = [-12, -15, 3, -3, -5, 18]  # LPS: x 3 to 12, y 5 to 15, z 3 to 18 in RAS
    assert fingerprint_case(case, Source(["ct", "pet"])).shape == (10, 11, 6)


def test_a_case_that_cannot_be_read_has_a_sentence(case: dict[str, Any], tmp_path: Path, write_nifti: Write) -> None:
    (tmp_path / "pet.nii.gz").write_bytes(b"")
    fingerprint = fingerprint_case(case, Source(["ct", "pet"]))
    assert "pet.nii.gz is an empty file" in fingerprint.problem
    assert fingerprint.values == {}
    far = affine(2, 2, 6)
    far[:3, 3] = 1000
    write_nifti(tmp_path / "pet.nii.gz", np.ones((4, 4, 4), dtype=np.float32), far)
    assert "do not overlap in space" in fingerprint_case(case, Source(["ct", "pet"])).problem


def test_an_image_in_the_labels_place_is_refused(case: dict[str, Any], write_nifti: Write) -> None:
    write_nifti(Path(case["label"]), np.arange(4000, dtype=np.int16).reshape(20, 20, 10), affine(1, 1, 3))
    assert "4000 different values" in fingerprint_case(case, Source(["ct"])).problem


def test_a_cohort_is_read_in_its_order(phantoms: list[dict[str, Any]]) -> None:
    fingerprints = fingerprint_cohort(phantoms, Source(["ct", "pet", "mr"], samples=50), workers=1)
    assert [each.case_id for each in fingerprints] == [case["case_id"] for case in phantoms]
    assert not any(each.problem for each in fingerprints)
    assert all(set(each.volumes or ()) == {0, 1} for each in fingerprints)
