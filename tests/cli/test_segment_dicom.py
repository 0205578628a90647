# SPDX-License-Identifier: Apache-2.0
"""DICOM in and out on a real study."""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from matplotlib.path import Path as Outline

from scripts.cli import segment_dicom as clinic
from scripts.cli.main import main
from scripts.image_io.dicom_rules import series_rules
from scripts.image_io.dicom_series import SeriesFiles
from scripts.image_io.dicom_study import Series, choose_series, find_series, series_named
from scripts.metrics.lesion_measures import Measures
from tests.dicom_phantom import write_study

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(require_data: Any) -> Path:
    return Path(require_data("sts_dicom")) / "STS_001"


@pytest.fixture(scope="module")
def segmented(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the shipped weights, which find something."""
    output = tmp_path_factory.mktemp("dicom")
    arguments = ["dicom", "--study", str(study), "--output-dir", str(output), "--engine", "torch", "--rtstruct", "--sr"]
    assert main(arguments) == 0
    return output


def _mask(path: Path) -> Any:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def _slices(study: Path) -> list[Any]:
    found = [pydicom.dcmread(path) for path in (study / "CT" / "image").glob("*.dcm")]
    return sorted(found, key=lambda each: float(each.ImagePositionPatient[2]))


def test_the_segmentation_read_back_is_the_mask_slice_by_slice(segmented: Path, study: Path) -> None:
    mask, slices = _mask(segmented / "mask.nii.gz"), _slices(study)
    made = highdicom.seg.segread(segmented / "seg.dcm")
    back = made.get_pixels_by_source_instance(
        [each.SOPInstanceUID for each in slices], segment_numbers=[1],
        combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True,
    )  # fmt: skip
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(back, mask.transpose(2, 1, 0))


def test_the_segmentation_says_what_made_it_of_which_images(segmented: Path, study: Path) -> None:
    made, first = highdicom.seg.segread(segmented / "seg.dcm"), _slices(study)[0]
    segment = made.SegmentSequence[0]
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert made.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert made.StudyInstanceUID == first.StudyInstanceUID
    assert made.PatientID == first.PatientID
    assert "research only" in made.SeriesDescription


def test_the_study_gives_the_mask_of_the_same_images_as_files(segmented: Path, study: Path, tmp_path: Path) -> None:
    files = []
    for key, name in (("ct", "CT"), ("pet", "PET"), ("mr", "MR_T1")):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(study / name / "image")))
        reader.SetOutputPixelType(sitk.sitkFloat32)
        sitk.WriteImage(reader.Execute(), str(tmp_path / f"{key}.nii.gz"))  # this PET is stored as SUV
        files += [f"--{key}", str(tmp_path / f"{key}.nii.gz")]
    assert main(["segment", *files, "--output", str(tmp_path / "mask.nii.gz"), "--engine", "torch"]) == 0
    a, b = _mask(tmp_path / "mask.nii.gz") > 0, _mask(segmented / "mask.nii.gz") > 0
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.99


def _filled(structures: Any, slices: list[Any]) -> Any:
    """Pixels whose centres lie within the outlines, even-odd, as a viewer fills them; by Matplotlib."""
    found = np.zeros((len(slices), slices[0].Rows, slices[0].Columns), dtype=bool)
    centres = np.argwhere(np.ones(found.shape[1:]))
    places = np.array([each.ImagePositionPatient for each in slices], float)
    for contour in structures.ROIContourSequence[0].ContourSequence:
        points = np.reshape(np.array(contour.ContourData, float), (-1, 3))
        k = int(np.abs(places[:, 2] - points[0, 2]).argmin())
        assert np.abs(places[k, 2] - points[:, 2]).max() < 0.01  # mm: in the plane of a slice
        corners = (points - places[k])[:, 1::-1] / slices[k].PixelSpacing  # rows before columns
        found[k] ^= Outline(corners).contains_points(centres).reshape(found.shape[1:])
    return found.transpose(2, 1, 0)


def _dice(a: Any, b: Any) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_the_outlines_filled_are_the_mask(segmented: Path, study: Path) -> None:
    mask = _mask(segmented / "mask.nii.gz") > 0
    np.testing.assert_array_equal(_filled(pydicom.dcmread(segmented / "rtstruct.dcm"), _slices(study)), mask)


def test_plastimatch_fills_the_outlines_back_to_the_mask(segmented: Path, study: Path, tmp_path: Path) -> None:
    if not shutil.which("plastimatch"):
        pytest.skip("plastimatch is not installed: apt-get install plastimatch")
    images = ["--input", str(segmented / "rtstruct.dcm"), "--referenced-ct", str(study / "CT" / "image")]
    command = ["plastimatch", "convert", *images, "--output-prefix", str(tmp_path), "--prefix-format", "mha"]
    subprocess.run(command, check=True, capture_output=True)
    filled = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "tumour.mha"))).T > 0
    np.testing.assert_array_equal(filled, _mask(segmented / "mask.nii.gz") > 0)


def test_the_mask_lies_in_the_frame_of_the_physicians_outlines(segmented: Path, study: Path) -> None:
    """How well it agrees is no matter here; a patient whom the shipped weights were trained on."""
    drawn, slices = pydicom.dcmread(study / "CT" / "mask" / "RS.dcm"), _slices(study)
    made = pydicom.dcmread(segmented / "rtstruct.dcm")
    for each in (drawn, made):
        assert each.StructureSetROISequence[0].ReferencedFrameOfReferenceUID == slices[0].FrameOfReferenceUID
    mask, reference = _mask(segmented / "mask.nii.gz") > 0, _filled(drawn, slices)
    print(f"Dice of the mask with the physicians': {_dice(mask, reference):.3f}")
    assert _dice(mask, reference) > 0.5
    assert np.abs(np.argwhere(mask).mean(axis=0) - np.argwhere(reference).mean(axis=0)).max() < 6  # pixels


def test_what_is_written_passes_dciodvfy(segmented: Path) -> None:
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    for name in ("seg.dcm", "rtstruct.dcm", "sr.dcm"):
        told = subprocess.run(["dciodvfy", str(segmented / name)], capture_output=True, text=True, check=False)
        assert [line for line in (told.stdout + told.stderr).splitlines() if line.startswith("Error")] == [], name


def test_the_patient_is_named_in_the_dicom_files_only(study: Path, tmp_path: Path, run_python: Any) -> None:
    """In a separate process, so that everything that is printed is caught."""
    marker = "ZZMARKER"
    for path in study.glob("*/image/*.dcm"):
        head = pydicom.dcmread(path)
        head.PatientName = head.PatientID = head.OtherPatientIDs = head.ReferringPhysicianName = marker
        folder = tmp_path / "study" / path.parts[-3]
        folder.mkdir(parents=True, exist_ok=True)
        head.save_as(folder / path.name)
    output = tmp_path / "out"
    command = ["-m", "scripts", "dicom", "--study", tmp_path / "study", "--rtstruct", "--sr"]
    done = run_python(*command, "--output-dir", output, "--engine", "torch", cwd=ROOT)
    assert done.returncode == 0
    assert "DICOM SEG: " in done.stdout
    assert marker not in done.stdout + done.stderr
    holders = []
    for path in sorted(each for each in output.rglob("*") if each.is_file()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        holders += [path.name] if marker.encode() in content else []
    assert holders == ["rtstruct.dcm", "seg.dcm", "sr.dcm"]
    assert pydicom.dcmread(output / "seg.dcm").PatientID == marker


def _series(kind: str, uid: str, patient: str = "SECRET", frame: str = "1.9") -> Series:
    return Series(uid, kind, Path("study") / uid, patient, frame, "words", 9)


def test_one_series_of_each_kind_is_chosen_and_others_are_passed_over() -> None:
    found = [_series("CT", "1.1"), _series("PT", "1.2"), _series("MR", "1.3"), _series("CT", "1.4")]
    rules = series_rules(["ct", "pet"], {})
    assert {k: s.uid for k, s in choose_series(found, rules, ["1.4"]).series.items()} == {"ct": "1.4", "pet": "1.2"}


@pytest.mark.parametrize(
    ("found", "uids", "message"),
    [
        (
            [_series("CT", "1.1"), _series("CT", "1.2")],
            [],
            r"has 2 series for ct \(Modality CT\)\. Choose one with --series-uid, or .*: 1\.1",
        ),
        ([_series("CT", "1.1")], ["7.7"], "has no series 7.7. It has 1.1"),
        ([_series("CT", "1.1"), _series("MR", "1.2", patient="OTHER")], [], "1.1, 1.2 have 2 different patients"),
        (
            [_series("CT", "1.1"), _series("MR", "1.2", frame="1.8")],
            [],
            "1.1, 1.2 have 2 different frames of reference",
        ),
        ([_series("CT", "1.1", frame=""), _series("MR", "1.2", frame="")], [], "1.1 has no FrameOfReferenceUID"),
        ([_series("CT", "1.1"), _series("MR", "1.2", frame="")], [], "1.2 has no FrameOfReferenceUID"),
        ([_series("CT", "1.1", frame="")], [], "1.1 has no FrameOfReferenceUID"),
    ],
)
def test_a_study_that_leaves_a_choice_or_mixes_things_is_refused_without_the_patient(
    found: list[Series], uids: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        choose_series(found, series_rules(["ct", "mr"], {}), uids)
    assert not {"SECRET", "OTHER"} & set(str(caught.value).split())


def test_a_study_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(ValueError, match="contains no series of DICOM images"):
        find_series(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        find_series(tmp_path / "lost")


def test_the_largest_lesions_get_segments_within_a_limit_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nib.save(nib.Nifti1Image(np.zeros((10, 10, 10), np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    sizes = {"organ": [9.0, 2.0], "tumour": [5.0, 3.0, 1.0]}
    measured = [Measures(name, None, sum(volumes)) for name, volumes in sizes.items()]
    measured += [Measures(name, k, ml) for name, volumes in sizes.items() for k, ml in enumerate(volumes, start=1)]
    assert len(clinic.largest_lesions(measured, tmp_path / "mask.nii.gz")) == 5
    monkeypatch.setattr(clinic, "MAX_SEGMENT_BYTES", 3000)
    largest = clinic.largest_lesions(measured, tmp_path / "mask.nii.gz")
    assert largest == [("organ", 1), ("tumour", 1), ("tumour", 2)]
    assert clinic._sr_line(Path("sr.dcm"), measured, largest) == (
        "SR: sr.dcm (the 3 largest of 5 lesions; measures.csv has all)"
    )


def test_objects_of_an_earlier_run_are_gone_before_a_new_mask_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be those of another patient: ``--output-dir`` has a default."""
    earlier = ["mask.nii.gz", "measures.csv", "rtstruct.dcm", "seg.dcm", "sr.dcm"]
    for name in (*earlier, "notes.txt"):
        (tmp_path / name).write_text("of another patient")
    found: list[list[str]] = []

    def segment(args: argparse.Namespace) -> list[Measures]:
        found.append(sorted(path.name for path in tmp_path.iterdir() if path.name in (*earlier, "notes.txt")))
        raise ValueError("a test")

    monkeypatch.setattr(clinic, "segment_case", segment)
    monkeypatch.setattr(clinic, "series_folders", lambda chosen, links: {key: links for key in chosen})
    task = clinic.StudyTask({"ct": {}}, {}, {"tumour": [1]}, {}, {"allow_missing": False})
    args = argparse.Namespace(rtstruct=False, sr=False, debug=False)
    with pytest.raises(ValueError, match="a test"):
        clinic.segment_chosen(args, task, {"ct": _series("CT", "1.1")}, tmp_path)
    assert found == [["notes.txt"]]


def test_an_error_names_the_series(
    phantoms: list[dict[str, Any]], tiny_student: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The series are read through links in a folder that is removed afterwards."""
    folder = write_study(phantoms[0], tmp_path) / "dicom"
    sorted(folder.glob("PT_*.dcm"))[5].unlink()
    assert main(["dicom", "--study", str(folder), "--output-dir", str(tmp_path / "out"), *tiny_student]) == 1
    error = capsys.readouterr().err
    uid = pydicom.dcmread(next(folder.glob("PT_*.dcm"))).SeriesInstanceUID
    assert f"The series {uid} (pet)" in error
    assert "/series-" not in error


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        (["t1", "t1ce"], "/links/t1ce has missing slices.", "The series 1.1 (t1ce) has missing slices."),
        (["t1", "t1ce"], "/links/t1/00003 is damaged.", "The series 1.0 (t1)/00003 is damaged."),
        (["t1", "t1ce"], "/links/t1 and /links/t1ce", "The series 1.0 (t1) and The series 1.1 (t1ce)"),
        (["t1"], "/links/t1 old has, /links/t1.old too", "The series 1.0 (t1) old has, /links/t1.old too"),
    ],
)
def test_a_series_is_named_by_its_own_folder_only(names: list[str], text: str, expected: str) -> None:
    folders = {name: f"/links/{name}" for name in names}
    chosen = {name: _series("MR", f"1.{number}") for number, name in enumerate(names)}
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"), series_named(folders, chosen):
        raise ValueError(text)


def test_a_table_of_cases_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dicom", "--study", str(tmp_path), "--data-list", "cohort.csv"]) == 1
    assert "error: dicom segments one --study. Remove --data-list." in capsys.readouterr().err


@pytest.mark.parametrize("kind", [TypeError, AttributeError, ValueError])
def test_whatever_fails_in_writing_is_told_without_its_words(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise kind("SECRET")

    monkeypatch.setattr(clinic, "series_files", lambda *_: SeriesFiles({}))
    monkeypatch.setattr(clinic, "write_seg", fail)
    words = rf"seg\.dcm was not written \({kind.__name__}\): .* series 1\.1 .* The mask was written to mask\.nii\.gz\."
    with pytest.raises(ValueError, match=words) as caught:
        clinic.write_dicom(Path("mask.nii.gz"), _series("CT", "1.1"), {}, {}, tmp_path, False)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__suppress_context__
    with pytest.raises(kind, match=r"^SECRET$"):
        clinic.write_dicom(Path("mask.nii.gz"), _series("CT", "1.1"), {}, {}, tmp_path, False, debug=True)
