# SPDX-License-Identifier: Apache-2.0
"""A phantom is written as a DICOM study and segmented; the written SEG, SR and RTSTRUCT are read back."""

from __future__ import annotations

import gzip
import importlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from scipy import ndimage

from scripts.cli import segment_dicom as clinic
from scripts.cli.main import main
from scripts.image_io.dicom_codes import segment_properties
from scripts.image_io.dicom_rtstruct import write_rtstruct
from scripts.image_io.dicom_study import Series, find_series
from scripts.image_io.dicom_writer import read_slices, write_seg
from scripts.metrics.lesion_measures import read_measures
from scripts.networks import Student
from tests.dicom_phantom import MARKER, PERSON, make_slice, write_study

Array = NDArray[Any]
FEATURES, NORM = (4, 8, 8, 8), ("group", {"num_groups": 4})
TINY = [
    "--threads", "1", "--device", "cpu", "--engine", "torch", "--set", "patch=[32,32,32]", "--set", "spacing=[6,6,6]",
    "--set", f"student_features={list(FEATURES)}", "--set", 'student_norm=["group",{"num_groups":4}]',
]  # fmt: skip
TUMOUR = {"tumour": [1]}
NEOPLASM = segment_properties(TUMOUR, {"tumour": ["108369006", "SCT", "Neoplasm"]})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(9)  # whose mask is neither empty nor full
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": Student(3, 2, FEATURES, norm=NORM).state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def study(phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One phantom as DICOM, all series in one folder, and next to it the same images as NIfTI files, in SUV."""
    return write_study(phantoms[0], tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def dicom_output(study: Path, weights: str) -> Path:
    """The output folder of ``dicom`` for the study."""
    arguments = ["dicom", "--study", str(study / "dicom"), "--output-dir", str(study / "out"), "--rtstruct", "--sr"]
    assert main([*arguments, "--weights", weights, *TINY]) == 0
    return study / "out"


def _mask(path: Path) -> tuple[Array, Array]:
    image = nib.Nifti1Image.from_filename(path)
    return np.asanyarray(image.dataobj) > 0, image.affine


def _heads(study: Path) -> list[Any]:
    """The CT's slices upwards."""
    found = [pydicom.dcmread(path) for path in (study / "dicom").glob("CT_*.dcm")]
    return sorted(found, key=lambda each: float(each.ImagePositionPatient[2]))


def test_the_study_gives_the_same_mask_as_the_images_in_files(dicom_output: Path, study: Path, weights: str) -> None:
    """SUV by hand in the files, by the headers in the study."""
    files = [word for key in ("ct", "pet", "mr") for word in (f"--{key}", str(study / f"{key}.nii.gz"))]
    assert main(["segment", *files, "--output", str(study / "files.nii.gz"), "--weights", weights, *TINY]) == 0
    (found, affine), (expected, other) = _mask(dicom_output / "mask.nii.gz"), _mask(study / "files.nii.gz")
    np.testing.assert_allclose(affine, other, atol=1e-3)
    assert 0.01 < expected.mean() < 0.99
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.99


def test_the_segmentation_contains_the_mask_and_the_patient(dicom_output: Path, study: Path) -> None:
    back, heads = highdicom.seg.segread(dicom_output / "seg.dcm"), _heads(study)
    pixels = back.get_pixels_by_source_instance(
        [each.SOPInstanceUID for each in heads], segment_numbers=[1],
        combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True,
    )  # fmt: skip
    np.testing.assert_array_equal(pixels > 0, _mask(dicom_output / "mask.nii.gz")[0].transpose(2, 1, 0))
    assert (str(back.PatientName), back.PatientID) == (PERSON["PatientName"], PERSON["PatientID"])
    assert back.FrameOfReferenceUID == heads[0].FrameOfReferenceUID


def test_a_study_folder_named_like_an_expression_is_never_evaluated(
    study: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, name in (("CT", "$open('RAN','w').write('x')"), ("PT", "@p#1"), ("MR", "%mr")):
        (tmp_path / name).mkdir()
        for path in (study / "dicom").glob(f"{kind}_*.dcm"):
            shutil.copy(path, tmp_path / name)
    assert main(["dicom", "--study", ".", "--output-dir", "out #2", "--weights", weights, *TINY]) == 0
    assert {path.name for path in tmp_path.glob("out*")} == {"out #2"}
    assert (tmp_path / "out #2" / "seg.dcm").is_file()
    assert not list(tmp_path.rglob("RAN"))


def _filled(structures: Any, heads: list[Any]) -> Array:
    """Pixels whose centres lie inside the outlines, even-odd, of each slice (slice, row, column), by Matplotlib."""
    found = np.zeros((len(heads), heads[0].Rows, heads[0].Columns), dtype=bool)
    centres = np.argwhere(np.ones(found.shape[1:]))
    numbers = {each.SOPInstanceUID: k for k, each in enumerate(heads)}
    for contour in structures.ROIContourSequence[0].ContourSequence:
        k = numbers[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
        directions = np.reshape(np.array(heads[k].ImageOrientationPatient, float), (2, 3))
        points = np.reshape(np.array(contour.ContourData, float), (-1, 3)) - heads[k].ImagePositionPatient
        assert np.abs(points @ np.cross(*directions)).max() < 0.01  # mm: in the slice's plane
        corners = (points @ directions.T / np.array(heads[k].PixelSpacing, float)[::-1])[:, ::-1]
        np.testing.assert_allclose(corners % 1, 0.5, atol=0.01)  # edges of pixels
        found[k] ^= Outline([*corners, corners[0]], closed=True).contains_points(centres).reshape(found.shape[1:])
    return found


def test_the_contours_filled_by_another_program_are_the_mask(dicom_output: Path, study: Path) -> None:
    """Pixels of unequal sides; all series in one folder."""
    structures, heads = pydicom.dcmread(dicom_output / "rtstruct.dcm"), _heads(study)
    np.testing.assert_array_equal(_filled(structures, heads), _mask(dicom_output / "mask.nii.gz")[0].transpose(2, 1, 0))
    listed = structures.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    assert len(listed.RTReferencedSeriesSequence[0].ContourImageSequence) == len(heads)
    assert structures.PatientID == PERSON["PatientID"]


def test_the_measures_are_those_of_the_mask_and_of_the_pet_in_suv(dicom_output: Path, study: Path) -> None:
    """By SimpleITK: the mask by nearest neighbour on the grid of the PET in files, which is in SUV."""
    rows = read_measures(dicom_output / "measures.csv")
    assert [(row["case_id"], row["region"]) for row in rows] == [("out", "tumour")] * len(rows)
    mask, pet = (sitk.ReadImage(str(path)) for path in (dicom_output / "mask.nii.gz", study / "pet.nii.gz"))
    on_pet = sitk.GetArrayFromImage(sitk.Resample(mask, pet, sitk.Transform(), sitk.sitkNearestNeighbor)) > 0
    values = sitk.GetArrayFromImage(pet)[on_pet]
    assert rows[0]["lesion"] == "all"
    assert rows[0]["volume_ml"] == pytest.approx(
        sitk.GetArrayFromImage(mask).astype(bool).sum() * np.prod(mask.GetSpacing()) / 1000, rel=1e-4
    )
    assert rows[0]["suvmax"] == pytest.approx(values.max(), rel=0.01)
    assert rows[0]["suvmean"] == pytest.approx(values.mean(), rel=0.01)
    assert rows[0]["mtv_ml"] == pytest.approx(on_pet.sum() * np.prod(pet.GetSpacing()) / 1000, rel=0.01)
    assert rows[0]["suvmean"] <= rows[0]["suvpeak"] <= rows[0]["suvmax"]
    lesions = ndimage.label(sitk.GetArrayFromImage(mask) > 0, np.ones((3, 3, 3)))[1]
    assert [row["lesion"] for row in rows[1:]] == [str(number) for number in range(1, lesions + 1)]


def test_the_report_names_the_segments(dicom_output: Path) -> None:
    segmentation = highdicom.seg.segread(dicom_output / "seg.dcm")
    report = highdicom.sr.srread(dicom_output / "sr.dcm")
    groups = report.content.get_volumetric_roi_measurement_groups()
    lesions = len(read_measures(dicom_output / "measures.csv")) - 1
    assert len(groups) == len(segmentation.SegmentSequence) == 1 + min(lesions, clinic.MAX_LESIONS)
    assert [group.tracking_uid for group in groups] == [each.TrackingUID for each in segmentation.SegmentSequence]


def test_patient_data_is_only_in_the_dicom_files(
    study: Path, weights: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = ["--output-dir", str(tmp_path / "out"), "--rtstruct", "--sr", "--weights", weights, *TINY]
    assert main(["dicom", "--study", str(study / "dicom"), *output]) == 0
    assert main(["dicom", "--study", str(study / "dicom"), "--series-uid", "1.2", *output]) == 1
    out, err = capfd.readouterr()
    assert "mask: " in out and "has no series 1.2" in err  # noqa: PT018
    assert MARKER not in out + err + caplog.text
    assert files_containing(tmp_path / "out", MARKER) == ["rtstruct.dcm", "seg.dcm", "sr.dcm"]


def files_containing(folder: Path, marker: str) -> list[str]:
    """Names of the files below a folder that contain a text, unpacked or in their name."""
    found = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if marker.encode() in content or marker in str(path.relative_to(folder)):
            found.append(path.name)
    return found


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'highdicom'", name="highdicom"),
            'is not installed. Run: pip install -e "',
        ),
        (ImportError("libz.so: cannot open", name="PIL"), r"cannot be loaded \(libz\.so: cannot open\)\. Install"),
    ],
    ids=["package", "library"],
)
def test_a_missing_package_or_library_is_reported_before_anything_runs(
    error: ImportError,
    message: str,
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str) -> Any:
        if name.startswith("highdicom"):
            raise error
        return importlib.import_module(name)

    monkeypatch.setattr("scripts.image_io.dicom_packages.import_module", fail)
    command = ["dicom", "--study", str(study / "dicom"), "--output-dir", str(tmp_path / "out"), "--rtstruct"]
    assert main(command) == 1
    assert re.search(f"^error: highdicom {message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_pydicom_warnings_that_quote_values_are_not_logged(
    study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A frame of reference that is no UID: pydicom quotes it."""
    pydicom_log, head = logging.getLogger("pydicom"), _heads(study)[0]
    with pydicom.config.disable_value_validation():
        head.FrameOfReferenceUID = MARKER
        head.save_as(tmp_path / "one.dcm")
    pydicom_log.setLevel(logging.NOTSET)
    with pytest.warns(UserWarning, match=MARKER):
        assert pydicom.dcmread(tmp_path / "one.dcm").FrameOfReferenceUID == MARKER
    assert MARKER in caplog.text
    caplog.clear()
    assert find_series(tmp_path)[0].frame == MARKER
    assert MARKER not in caplog.text


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientSex", MARKER), ("PatientBirthDate", MARKER), ("StudyDate", MARKER), ("StudyTime", "11:00:00")],
)
def test_values_that_are_invalid_in_a_segmentation_are_refused_without_quoting_them(
    keyword: str, value: str, dicom_output: Path, study: Path, tmp_path: Path
) -> None:
    slices = _heads(study)
    with pydicom.config.disable_value_validation():
        for each in slices:
            setattr(each, keyword, value)
    with pytest.raises(ValueError, match=f"has an invalid {keyword}\\. Correct it") as caught:
        write_seg(dicom_output / "mask.nii.gz", slices, TUMOUR, NEOPLASM, "1", tmp_path / "seg.dcm")
    assert value not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")),
        {
            "PatientName": "山田^太郎",
            "SpecificCharacterSet": "ISO_IR 192",
            "PatientSex": "",
            "PatientBirthDate": "19500101",
        },
    ],
    ids=["anonymised", "Japanese"],
)
def test_headers_with_missing_optional_values_or_other_character_sets_are_copied(
    changes: dict[str, Any], dicom_output: Path, study: Path, tmp_path: Path
) -> None:
    for path in (study / "dicom").glob("CT_*.dcm"):
        head = pydicom.dcmread(path)
        for keyword, value in changes.items():
            if value is None:
                delattr(head, keyword)
            else:
                setattr(head, keyword, value)
        head.save_as(tmp_path / path.name)
    slices = read_slices(sorted(map(str, tmp_path.glob("CT_*.dcm"))))
    before = [list(each.PixelSpacing) for each in slices]
    write_seg(dicom_output / "mask.nii.gz", slices, TUMOUR, NEOPLASM, "1", tmp_path / "seg.dcm")
    write_rtstruct(dicom_output / "mask.nii.gz", slices, TUMOUR, "1", tmp_path / "rtstruct.dcm")
    assert [list(each.PixelSpacing) for each in slices] == before
    for path in (tmp_path / "seg.dcm", *tmp_path.glob("rtstruct.dcm")):
        written = pydicom.dcmread(path)
        assert str(written.PatientName) == (changes["PatientName"] or "")
        assert written.StudyDate == ("" if "StudyDate" in changes else "20200102")


def test_frames_of_a_single_frame_class_are_refused_before_anything_is_segmented(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = {"Rows": 1, "Columns": 1, "NumberOfFrames": 2, "PixelData": b"\0\0" * 2, "PixelSpacing": [1, 1]}
    make_slice("CT", "1.2.3", "1.2.4", "1.2.5", **pixels).save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    command = ["dicom", "--study", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--allow-missing", *TINY]
    assert main([*command, "--weights", weights]) == 1
    assert "ct.dcm has several frames, but is no enhanced CT, PET or MR" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.*"))


@pytest.mark.parametrize("share", [0.09, 0.11])
def test_a_slice_may_lie_off_the_even_grid_as_far_as_the_reader_accepts(
    share: float, dicom_output: Path, study: Path, tmp_path: Path
) -> None:
    """The reader's limit is a tenth of the distance between slices."""
    slices = _heads(study)
    distance = float(slices[1].ImagePositionPatient[2]) - float(slices[0].ImagePositionPatient[2])
    slices[5].ImagePositionPatient[0] += share * distance
    if share > 0.1:
        with pytest.raises(
            ValueError, match=r"mask\.nii\.gz is not on the grid of the series .*\. Segment that series"
        ):
            write_seg(dicom_output / "mask.nii.gz", slices, TUMOUR, NEOPLASM, "1", tmp_path / "seg.dcm")
        return
    write_seg(dicom_output / "mask.nii.gz", slices, TUMOUR, NEOPLASM, "1", tmp_path / "seg.dcm")
    pixels = highdicom.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        [slices[5].SOPInstanceUID], combine_segments=True, ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )  # fmt: skip
    np.testing.assert_array_equal(pixels[0] > 0, _mask(dicom_output / "mask.nii.gz")[0][:, :, 5].T)


def _reference(study: Path) -> Series:
    return next(series for series in find_series(study / "dicom") if series.kind == "CT")


def test_an_empty_mask_gives_no_structure_set(
    dicom_output: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An existing structure set of an earlier mask is removed."""
    mask, affine = _mask(dicom_output / "mask.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(mask.shape, np.uint8), affine), tmp_path / "mask.nii.gz")
    (tmp_path / "rtstruct.dcm").write_bytes(b"earlier")
    clinic.write_dicom(tmp_path / "mask.nii.gz", _reference(study), TUMOUR, NEOPLASM, tmp_path, True)
    assert "RTSTRUCT: not written, because the mask is empty" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.nii.gz", "seg.dcm"]
    assert not highdicom.seg.segread(tmp_path / "seg.dcm").pixel_array.any()


@pytest.mark.parametrize(("length", "kept"), [(16, True), (17, False)])
def test_a_short_string_that_is_too_long_is_left_empty_and_logged(
    length: int, kept: bool, dicom_output: Path, study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slices, number = _heads(study), MARKER.ljust(length, "7")
    for each in slices:
        each.AccessionNumber = each.StudyID = number
    write_seg(dicom_output / "mask.nii.gz", slices, TUMOUR, NEOPLASM, "1", tmp_path / "seg.dcm")
    assert write_rtstruct(dicom_output / "mask.nii.gz", slices, TUMOUR, "1", tmp_path / "rtstruct.dcm")
    for path in tmp_path.glob("*.dcm"):
        written = pydicom.dcmread(path)
        assert (written.AccessionNumber, written.StudyID) == (number if kept else "", number[:16])
        assert (f"{path}: AccessionNumber is left empty" in caplog.text) is not kept
    assert MARKER not in caplog.text
    assert {(each.AccessionNumber, each.StudyID) for each in slices} == {(number, number)}


@pytest.mark.parametrize("keyword", ["PatientName", "PatientID", "AccessionNumber"])
def test_several_values_of_a_single_valued_element_are_refused_without_quoting_them(
    keyword: str, dicom_output: Path, study: Path, tmp_path: Path
) -> None:
    slices = _heads(study)
    for each in slices:
        setattr(each, keyword, f"{MARKER}\\{MARKER}")
    with pytest.raises(ValueError, match=f"has several values of {keyword}, where DICOM allows one") as caught:
        write_seg(dicom_output / "mask.nii.gz", slices, TUMOUR, NEOPLASM, "1", tmp_path / "seg.dcm")
    assert MARKER not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_damaged_file_next_to_the_series_does_not_stop_the_search(study: Path, tmp_path: Path) -> None:
    """The length of a number is one that no number has: pydicom raises when the value is asked for."""
    shutil.copytree(study, tmp_path / "study")
    head, rows, rest = next(study.rglob("*.dcm")).read_bytes().partition(b"\x28\x00\x10\x00US\x02\x00")
    (tmp_path / "study" / "odd.bin").write_bytes(head + rows[:-2] + b"\x03\x00\x01\x02\x03" + rest[2:])
    assert [each.uid for each in find_series(tmp_path / "study")] == [each.uid for each in find_series(study)]
