# SPDX-License-Identifier: Apache-2.0
"""Images of a report are read as the network reads them and lie on the grid of the mask."""

from __future__ import annotations

import hashlib
import json
import locale
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from scripts.cli.main import main
from scripts.data import Rules
from scripts.image_io.reader import read_itk
from scripts.metrics.lesion_measures import read_measures
from scripts.networks import Student
from scripts.report.case_images import load_overlay
from scripts.report.mask_report import write_mask_report
from tests.report_cases import case_html

TINY = ["--data", "phantom", "--threads", "1", "--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]"]
TINY += ["--set", "student_features=[8,8,8,8]", "--engine", "torch"]


def oblique() -> sitk.Image:
    """An image on an oblique, anisotropic grid away from the origin."""
    rng = np.random.default_rng(4)
    image = sitk.GetImageFromArray(rng.normal(size=(5, 6, 7)).astype(np.float32))
    cosine, sine = np.cos(0.3), np.sin(0.3)
    image.SetDirection((cosine, -sine, 0, sine, cosine, 0, 0, 0, 1))
    image.SetSpacing((1.5, 2.0, 4.0))
    image.SetOrigin((10, -20, 30))
    return image


@pytest.fixture
def _locale_stays() -> Iterator[None]:
    """ITK's DICOM writer sets the locale to C, in which later tests would read text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize("name", ["image.nii.gz", "image.mha"])
def test_a_file_is_read_with_the_voxels_and_the_grid_that_itk_reads(name: str, tmp_path: Path) -> None:
    image = oblique()
    sitk.WriteImage(image, str(tmp_path / name))
    image_read = read_itk(str(tmp_path / name), Rules())
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(image_read, get)(), getattr(image, get)(), atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image_read), sitk.GetArrayFromImage(image))


@pytest.mark.usefixtures("_locale_stays")
def test_a_folder_of_dicom_files_is_read_like_a_file(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 5)).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, plane in enumerate(voxels):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((2, 2, 3))
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3", "0020|000d": "1.2", "0008|0018": f"1.2.3.{z + 1}",
                "0020|0032": f"0\\0\\{3 * z}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(z)}  # fmt: skip
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(tmp_path / f"{z}.dcm"))
        writer.Execute(image)
    image_read = read_itk(str(tmp_path), Rules())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image_read), voxels)
    np.testing.assert_allclose(image_read.GetSpacing(), (2, 2, 3))


def test_one_channel_of_a_4d_file_is_read(tmp_path: Path, write_nifti: Any) -> None:
    voxels = np.random.default_rng(1).normal(size=(4, 5, 6, 3)).astype(np.float32)
    path = str(write_nifti(tmp_path / "all.nii.gz", voxels, np.diag([1, 2, 3, 1])))
    for channel in range(3):
        image_read = sitk.GetArrayFromImage(read_itk(path, Rules(), channel)).T
        np.testing.assert_array_equal(image_read, voxels[..., channel])


def test_an_image_on_another_grid_is_resampled_onto_the_grid_of_the_mask(tmp_path: Path, write_nifti: Any) -> None:
    ramp = np.arange(8, dtype=np.float32)[:, None, None] * np.ones((8, 4, 4), np.float32)
    path = str(write_nifti(tmp_path / "ct.nii.gz", ramp, np.diag([-2.0, -2, 2, 1])))  # 2 mm along the patient's left
    grid = sitk.Image((6, 4, 4), sitk.sitkUInt8)
    grid.SetOrigin((3, 0, 0))
    overlay = load_overlay(
        "a", {"ct": (path, 0)}, grid, np.zeros((4, 4, 6), bool), None, {"ct": [0, 7], "mr": "zscore"}
    )
    np.testing.assert_allclose(overlay.images["CT"][:, 0, 0], (3 + np.arange(6)) / 2)
    assert overlay.axcodes == "LPS"
    assert overlay.window("CT") == (0, 7)
    images = {"T1Gd": (path, 0), "FLAIR": (path, 0)}
    overlay = load_overlay("a", images, grid, np.zeros((4, 4, 6), bool), None, given=["T1Gd"])
    assert overlay.unused == ["FLAIR"]


def test_segment_writes_a_report_only_with_report(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    torch.save({"model": Student(3, 2, (8, 8, 8, 8)).state_dict()}, tmp_path / "model.pt")
    case, output = cohort / "PHANTOM_001", tmp_path / "out" / "who & what.nii.gz"
    files = ["--ct", case / "CT_image.nii.gz", "--pet", case / "PET_image.nii.gz", "--allow-missing"]
    arguments = [str(a) for a in ["segment", *TINY, *files, "--output", output, "--weights", tmp_path / "model.pt"]]
    assert main(arguments) == 0
    report = output.with_name("who & what.report.html")
    assert not report.exists()
    assert main([*arguments, "--report"]) == 0
    assert f"report: {report}" in capsys.readouterr().out
    page = report.read_text()
    mask = sitk.ReadImage(str(output))
    volume = sitk.GetArrayFromImage(mask).sum() * np.prod(mask.GetSpacing()) / 1000
    assert volume > 0
    assert f'<td class="number">{volume:,.2f}</td>' in page
    assert "<h1>Segmentation of who &amp; what</h1>" in page
    assert "Segmented without MR." in page
    html = case_html(report)
    (region, *_) = read_measures(output.with_name("who & what.measures.csv"))
    assert (region["case_id"], region["volume_ml"]) == ("who & what", pytest.approx(volume, rel=1e-4))
    assert f'<td class="number">{region["suvpeak"]:,.2f}</td>' in html
    assert html.count("data:image/webp") == 3 * 3  # planes; CT, PET, and both in one
    assert "CT</b> <small>-200 to 300</small>" in html
    assert f'data-sha256="{hashlib.sha256(output.read_bytes()).hexdigest()}"' in page


def test_a_mask_report_needs_neither_a_manifest_nor_readable_images(tmp_path: Path, write_nifti: Any) -> None:
    mask = write_nifti(tmp_path / "m.nii.gz", np.ones((4, 4, 4), np.uint8))
    path = write_mask_report(mask, {"ct": str(tmp_path / "nowhere.nii.gz")})
    assert path == tmp_path / "m.report.html"
    assert "<b>no image</b>" in case_html(path)
    (tmp_path / "m.manifest.json").write_text(json.dumps({"seed": 4711}))
    assert "4711" in write_mask_report(mask, {}).read_text()


def test_a_mask_report_lists_every_region_by_the_values_of_the_mask(tmp_path: Path, write_nifti: Any) -> None:
    voxels = np.zeros((10, 10, 10), np.uint8)
    voxels[:5], voxels[0] = 2, 4
    mask = write_nifti(tmp_path / "m.nii.gz", voxels)
    path = write_mask_report(mask, {}, regions={"WT": [2, 4], "ET": [4]})
    page = path.read_text()
    assert 'm: WT prediction</th><td class="number">0.50</td>' in page
    assert 'm: ET prediction</th><td class="number">0.10</td>' in page
    assert 'data-region="1"' in case_html(path)
