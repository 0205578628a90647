# SPDX-License-Identifier: Apache-2.0
"""Studies from and to a real Orthanc by DICOMweb: what it holds afterwards equals what is made from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from scripts.cli.main import main
from scripts.image_io.dicomweb import Pacs
from tests.dicom_phantom import MARKER, write_study
from tests.orthanc import PASSWORD, USER, Orthanc, orthanc

pytest.importorskip("dicomweb_client")
pytestmark = pytest.mark.pacs
try:
    import rt_utils  # noqa: F401

    RTSTRUCT = ["--rtstruct"]
except ImportError:
    RTSTRUCT = []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@pytest.fixture(autouse=True)
def _login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMWEB_USER", USER)
    monkeypatch.setenv("DICOMWEB_PASSWORD", PASSWORD)
    monkeypatch.delenv("DICOMWEB_TOKEN", raising=False)


@pytest.fixture(scope="module")
def studies(
    server: Orthanc, phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two phantoms as studies, stored in Orthanc; the CT of the second is compressed. Folders by UID."""
    folders = {}
    for number, case in enumerate(phantoms[:2]):
        folder = write_study(case, tmp_path_factory.mktemp(f"study{number}")) / "dicom"
        for path in folder.glob("CT_*") if number else []:
            head = pydicom.dcmread(path)
            head.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
            head.save_as(path)
        files = sorted(folder.glob("*.dcm"))
        server.stow(files)
        folders[str(pydicom.dcmread(files[0]).StudyInstanceUID)] = folder
    return folders


def _mask(path: Path) -> Any:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def _stored_segmentation(server: Orthanc, study: str) -> Any:
    """The one SEG of a study as Orthanc gives it out, found by QIDO-RS."""
    (series,) = server.qido(study, "SEG")
    (data,) = server.files(series["0020000E"]["Value"][0])
    return highdicom.seg.segread(BytesIO(data))


def _pixels(segmentation: Any, folder: Path, pattern: str) -> Any:
    heads = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.glob(pattern)]
    heads.sort(key=lambda each: float(each.ImagePositionPatient[2]))
    return segmentation.get_pixels_by_source_instance(
        [each.SOPInstanceUID for each in heads],
        combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True,
    ).transpose(2, 1, 0)  # fmt: skip


def test_the_segmentation_in_orthanc_is_the_mask_of_a_local_run(
    server: Orthanc, studies: dict[str, Path], tiny_student: list[str], tmp_path: Path, capsys: Any
) -> None:
    study, folder = next(iter(studies.items()))
    local, output = tmp_path / "local", tmp_path / "pacs"
    assert main(["dicom", "--study", str(folder), "--output-dir", str(local), *tiny_student]) == 0
    command = ["dicom", "--dicomweb", server.url, "--study-uid", study, "--store", *RTSTRUCT]
    assert main([*command, "--output-dir", str(output), *tiny_student]) == 0
    out, err = capsys.readouterr()
    assert f"stored in the study {study}: seg.dcm" in out
    assert MARKER not in out + err
    expected = _mask(local / "mask.nii.gz")
    assert 0 < (expected > 0).sum() < expected.size
    np.testing.assert_array_equal(_mask(output / "mask.nii.gz"), expected)
    segmentation = _stored_segmentation(server, study)
    np.testing.assert_array_equal(_pixels(segmentation, folder, "CT_*") > 0, expected > 0)
    assert segmentation.PatientID == f"{MARKER}ID"
    assert len(server.qido(study, "RTSTRUCT")) == len(RTSTRUCT)
    assert len(server.get("/studies")) == len(studies)  # the results lie in the study of the images


def test_a_list_of_studies_is_segmented_once_and_gone_on_with(
    server: Orthanc, studies: dict[str, Path], tiny_student: list[str], tmp_path: Path, capsys: Any
) -> None:
    output, table = tmp_path / "cohort", tmp_path / "studies.txt"
    study, folder = list(studies.items())[1]  # a compressed CT
    table.write_text(f"{study}\n1.2.3.4\n")
    command = ["dicom", "--dicomweb", server.url, "--study-list", str(table), "--output-dir", str(output), "--store"]
    assert main([*command, *tiny_student]) == 1
    out, err = capsys.readouterr()
    assert "2 studies: 1 segmented, 0 already there, 1 failed" in out
    assert "error: 1 of 2 studies failed." in err
    assert "1.2.3.4: " in err
    assert "has no study 1.2.3.4" in err
    table.write_text(f"{study}\n")
    assert main([*command, *tiny_student]) == 0
    assert "1 studies: 0 segmented, 1 already there, 0 failed" in capsys.readouterr().out
    assert main(["dicom", "--study", str(folder), "--output-dir", str(tmp_path / "local"), *tiny_student]) == 0
    expected = _mask(tmp_path / "local" / "mask.nii.gz") > 0
    np.testing.assert_array_equal(_pixels(_stored_segmentation(server, study), folder, "CT_*") > 0, expected)
    record = json.loads((output / "dicom.json").read_text())["studies"]
    assert record[study]["stored"] == {"seg.dcm": str(_stored_segmentation(server, study).SOPInstanceUID)}
    assert "has no study" in record["1.2.3.4"]["result"]


def test_what_orthanc_refuses_is_one_sentence(
    server: Orthanc, studies: dict[str, Path], tiny_student: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def error(url: str, study: str) -> str:
        command = [
            "dicom",
            "--dicomweb",
            url,
            "--study-uid",
            study,
            "--output-dir",
            str(tmp_path / "out"),
            *tiny_student,
        ]
        assert main(command) == 1
        last: str = capsys.readouterr().err.splitlines()[-1]
        return last

    study, folder = next(iter(studies.items()))
    assert error(server.url, "1.2.3.4").startswith(f"error: {server.url} has no study 1.2.3.4")
    assert "has no such thing (404)" in error(f"{server.root}/wrong", study)
    other = sorted(folder.glob("CT_*"))[0]
    with pytest.raises(ValueError, match=rf"refused {other.name} \(.*, [0-9A-F]{{4}}\)"):
        Pacs(server.url).store("1.2.3.4", [other])
    monkeypatch.setenv("DICOMWEB_PASSWORD", "wrong")
    assert f"error: {server.url} wants another login (401)." in error(server.url, study)


def test_a_real_patient_goes_there_and_back(server: Orthanc, require_data: Any, tmp_path: Path, capsys: Any) -> None:
    """By the shipped weights: the segmentation in Orthanc equals the mask of the folder, voxel for voxel."""
    folder = require_data("sts_dicom") / "STS_001"
    images = sorted(folder.glob("*/image/*.dcm"))
    server.stow([*images, *folder.glob("*/mask/*.dcm")])
    study = str(pydicom.dcmread(images[0], stop_before_pixels=True).StudyInstanceUID)
    local, output = tmp_path / "local", tmp_path / "pacs"
    assert main(["dicom", "--study", str(folder), "--output-dir", str(local), "--engine", "torch"]) == 0
    command = ["dicom", "--dicomweb", server.url, "--study-uid", study, "--store", *RTSTRUCT]
    assert main([*command, "--output-dir", str(output), "--engine", "torch"]) == 0
    expected = _mask(local / "mask.nii.gz")
    assert expected.sum() > 10_000
    np.testing.assert_array_equal(_mask(output / "mask.nii.gz"), expected)
    pixels = _pixels(_stored_segmentation(server, study), folder, "CT/image/*.dcm")
    print(f"{(pixels != expected).sum()} of {expected.size} voxels differ, {expected.sum()} are tumour")
    np.testing.assert_array_equal(pixels, expected)
