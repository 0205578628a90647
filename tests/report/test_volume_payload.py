# SPDX-License-Identifier: Apache-2.0
"""What the viewer loads: NIfTI files and masks in the patient's place, read back by nibabel and SimpleITK."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.report import Overlay
from scripts.report.case_images import load_overlay
from scripts.report.case_view import case_view
from scripts.report.volume_payload import MAX_VOXELS, thinning, viewer_library, volume_payload


def unpacked(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


@pytest.fixture
def overlay(tmp_path: Path) -> tuple[Overlay, sitk.Image]:
    """A case on an oblique, flipped grid, and its image as SimpleITK reads it."""
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(100, 30, (5, 6, 7)).astype(np.float32))
    cosine, sine = np.cos(0.2), np.sin(0.2)
    image.SetDirection((0, 0, 1, -cosine, sine, 0, sine, cosine, 0))
    image.SetSpacing((1.5, 2.0, 4.0))
    image.SetOrigin((10, -20, 30))
    sitk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    mask = np.zeros((5, 6, 7), np.uint8)
    mask[1:3, 2:4, 3:6] = 1
    drawn = load_overlay("case", {"ct": (str(tmp_path / "ct.nii.gz"), 0)}, image, mask, mask)
    return drawn, image


def test_voxels_of_the_viewer_lie_where_simpleitk_puts_them(overlay: tuple[Overlay, sitk.Image]) -> None:
    drawn, image = overlay
    view = case_view(drawn, "case0", with_volumes=True)
    assert view.volumes is not None
    file = nib.Nifti1Image.from_bytes(unpacked(view.volumes["images"]["CT"]))
    values, affine = np.asarray(file.dataobj), np.array(view.payload["affine"])
    masks = np.frombuffer(unpacked(view.volumes["masks"]["prediction"]), np.uint8)
    masks = masks.reshape(values.shape, order="F")
    rng = np.random.default_rng(1)
    for index in rng.integers(0, values.shape, (20, 3)):
        place = affine @ [*index, 1]
        original = image.TransformPhysicalPointToIndex(place[:3].tolist())
        assert values[tuple(index)] == pytest.approx(image.GetPixel(*original), abs=0.01)
        assert masks[tuple(index)] == drawn.prediction[original]
        ras = file.affine @ [*index, 1]  # NIfTI's axes run to the right and to anterior
        np.testing.assert_allclose(ras[:3], place[:3] * (-1, -1, 1), atol=1e-4)
    assert file.get_data_dtype() == np.int16
    assert file.header.get_xyzt_units()[0] == "mm"


def test_the_first_axes_of_the_viewer_run_to_the_left_to_anterior_and_up(overlay: tuple[Overlay, sitk.Image]) -> None:
    affine = np.array(case_view(overlay[0], "case0", with_volumes=False).payload["affine"])
    assert nib.aff2axcodes(np.diag([-1, -1, 1, 1]) @ affine) == ("L", "A", "S")


def test_a_grid_without_a_position_has_its_middle_at_the_origin() -> None:
    mask = np.zeros((3, 5, 7), np.uint8)
    for codes in ("RAS", "LPS", "SLP"):
        view = case_view(Overlay("a", {"ct": mask * 1.0}, None, mask, (1, 2, 3), codes), "case0", with_volumes=False)
        middle = (np.array(view.payload["shape"]) - 1) / 2
        np.testing.assert_allclose(np.array(view.payload["affine"]) @ [*middle, 1], [0, 0, 0, 1], atol=1e-6)


def test_values_of_regions_become_codes_of_a_byte() -> None:
    mask = np.zeros((4, 4, 4), np.int32)
    mask[0], mask[1] = 500, 1000
    regions = {"whole": [500, 1000], "core": [1000]}
    view = case_view(Overlay("a", {"ct": mask * 1.0}, None, mask, (1, 1, 1), "LAS", regions=regions), "case0", True)
    assert view.volumes is not None
    codes = np.frombuffer(unpacked(view.volumes["masks"]["prediction"]), np.uint8).reshape(mask.shape, order="F")
    outlines = {each["region"]: each["codes"] for each in view.payload["outlines"]}
    np.testing.assert_array_equal(np.isin(codes, outlines[0]), mask > 0)
    np.testing.assert_array_equal(np.isin(codes, outlines[1]), mask == 1000)


@pytest.mark.parametrize("shape", [(10, 10, 10), (512, 512, 100), (256, 256, 800), (1000, 30, 30), (2000, 2000, 2)])
def test_large_grids_are_thinned_out(shape: tuple[int, int, int]) -> None:
    steps = thinning(shape)
    count = np.prod([len(range(0, n, step)) for n, step in zip(shape, steps, strict=True)])
    assert count <= MAX_VOXELS
    assert (steps == (1, 1, 1)) == (np.prod(shape) <= MAX_VOXELS)


def test_a_thinned_volume_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.report.volume_payload.MAX_VOXELS", 100)
    image = np.arange(12 * 6 * 6, dtype=float).reshape(12, 6, 6)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    payload: dict[str, Any] = volume_payload({"ct": image}, {"prediction": (image > 5).astype(np.uint8)}, affine)
    file = nib.Nifti1Image.from_bytes(unpacked(payload["images"]["ct"]))
    steps = payload["steps"]
    assert file.shape == tuple(len(range(0, n, step)) for n, step in zip(image.shape, steps, strict=True))
    np.testing.assert_allclose(np.abs(np.diag(file.affine)[:3]), np.multiply(steps, (2, 3, 4)))
    np.testing.assert_allclose(np.asarray(file.dataobj)[1, 1, 1], image[steps[0], steps[1], steps[2]], atol=0.02)


def test_the_viewer_is_the_file_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert viewer_library() is None  # REPORT_VIEWER is empty in tests
    monkeypatch.setenv("REPORT_VIEWER", str(tmp_path / "niivue.js"))
    with pytest.raises(FileNotFoundError, match=r"niivue\.js, which does not exist\. Run `make viewer`"):
        viewer_library()
    (tmp_path / "niivue.js").write_text("viewer")
    assert viewer_library() == "viewer"
    monkeypatch.delenv("REPORT_VIEWER")
    monkeypatch.setattr("scripts.report.volume_payload.LIBRARY", tmp_path / "none.js")
    assert viewer_library() is None
