# SPDX-License-Identifier: Apache-2.0
"""DICOM in and out on a real study; a cohort in batches."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from scripts.__main__ import main
from scripts.networks import Student
from scripts.study import Series, choose_series, find_series

FEATURES, NORM = (4, 8, 8, 8), ("group", {"num_groups": 4})
TINY = [
    "--threads", "1", "--device", "cpu", "--set", "patch=[32,32,32]", "--set", f"student_features={list(FEATURES)}",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--set", "spacing=[6,6,6]",
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": Student(3, 2, FEATURES, norm=NORM).state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def study(require_data: Any) -> Path:
    pytest.importorskip("pydicom", reason='DICOM needs pip install ".[dicom]"')
    pytest.importorskip("highdicom", reason='DICOM needs pip install ".[dicom]"')
    return Path(require_data("sts_dicom")) / "STS_001"


@pytest.fixture(scope="module")
def segmented(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the shipped weights, which find something."""
    pytest.importorskip("rt_utils", reason='RTSTRUCT needs pip install ".[dicom]"')
    output = tmp_path_factory.mktemp("dicom")
    arguments = ["dicom", "--study", str(study), "--output-dir", str(output), "--engine", "torch", "--rtstruct"]
    assert main(arguments) == 0
    return output


def _mask(path: Path) -> Any:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def _slices(study: Path) -> list[Any]:
    import pydicom

    found = [pydicom.dcmread(path) for path in (study / "CT" / "image").glob("*.dcm")]
    return sorted(found, key=lambda each: float(each.ImagePositionPatient[2]))


def test_the_segmentation_read_back_is_the_mask_slice_by_slice(segmented: Path, study: Path) -> None:
    import highdicom

    mask, slices = _mask(segmented / "mask.nii.gz"), _slices(study)
    made = highdicom.seg.segread(segmented / "seg.dcm")
    back = made.get_pixels_by_source_instance(
        [each.SOPInstanceUID for each in slices],
        combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True,
    )  # fmt: skip
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(back, mask.transpose(2, 1, 0))


def test_the_segmentation_says_what_made_it_of_which_images(segmented: Path, study: Path) -> None:
    import highdicom

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


def test_the_structure_set_has_the_masks_outlines(segmented: Path, study: Path) -> None:
    """An outline runs through the centres of the outermost pixels: those inside or on it are the mask, holes filled."""
    import pydicom

    mask, slices = _mask(segmented / "mask.nii.gz"), _slices(study)
    made = pydicom.dcmread(segmented / "rtstruct.dcm")
    contours = made.ROIContourSequence[0].ContourSequence
    places = {float(each.ImagePositionPatient[2]): k for k, each in enumerate(slices)}
    outlined = {min(places, key=lambda z, c=c: abs(z - float(c.ContourData[2]))) for c in contours}
    assert {places[z] for z in outlined} == set(np.flatnonzero(mask.any((0, 1))).tolist())
    origin, spacing = np.array(slices[0].ImagePositionPatient[:2], float), float(slices[0].PixelSpacing[0])
    for contour in contours[:50]:
        points = np.reshape(np.array(contour.ContourData, float), (-1, 3))
        columns, rows = np.rint((points[:, :2] - origin) / spacing).astype(int).T
        assert mask[columns, rows, places[min(places, key=lambda z, p=points: abs(z - p[0, 2]))]].all()


def _series(kind: str, uid: str, patient: str = "SECRET", frame: str = "1.9") -> Series:
    return Series(uid, kind, Path("study") / uid, patient, frame, "words", 9)


def test_one_series_of_each_kind_is_chosen_and_others_are_passed_over() -> None:
    found = [_series("CT", "1.1"), _series("PT", "1.2"), _series("MR", "1.3"), _series("CT", "1.4")]
    assert {k: s.uid for k, s in choose_series(found, ["ct", "pet"], ["1.4"]).items()} == {"ct": "1.4", "pet": "1.2"}


@pytest.mark.parametrize(
    ("found", "uids", "message"),
    [
        ([_series("CT", "1.1"), _series("CT", "1.2")], [], "has 2 CT series: choose one by --series-uid: 1.1"),
        ([_series("CT", "1.1")], ["7.7"], "has no series 7.7: it has 1.1"),
        ([_series("CT", "1.1"), _series("MR", "1.2", patient="OTHER")], [], "1.1, 1.2 are of 2 patients"),
        ([_series("CT", "1.1"), _series("MR", "1.2", frame="1.8")], [], "1.1, 1.2 are of 2 frames of reference"),
    ],
)
def test_a_study_that_leaves_a_choice_or_mixes_things_is_refused_without_the_patient(
    found: list[Series], uids: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        choose_series(found, ["ct", "mr"], uids)
    assert not {"SECRET", "OTHER"} & set(str(caught.value).split())


def test_a_study_without_images_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no series of DICOM images"):
        find_series(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        find_series(tmp_path / "lost")


@pytest.fixture
def table(phantoms: list[dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Three phantoms as a table; ``table(pet=path)`` gives the second another PET."""

    def make(**other: Path) -> Path:
        path = tmp_path / "cohort.csv"
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["case_id", "ct", "pet", "mr"])
            for number, case in enumerate(phantoms[:3]):
                files = {key: case[key] for key in ("ct", "pet", "mr")} | (other if number == 1 else {})
                writer.writerow([case["case_id"], *files.values()])
        return path

    return make


def test_a_batch_lists_what_failed_and_goes_on_where_it_was_stopped(
    table: Callable[..., Path], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, output = tmp_path / "pet.nii.gz", tmp_path / "masks"
    bad.write_bytes(b"")
    command = ["segment", "--data", "phantom", "--output-dir", str(output), "--weights", weights, "--allow-outside"]
    command += [*TINY, "--workers", "2", "--data-list"]
    assert main([*command, str(table(pet=bad))]) == 1
    told = capsys.readouterr()
    assert "3 cases: 2 segmented, 0 there already, 1 failed" in told.out
    assert f"1 of 3 cases failed (PHANTOM_002: {bad} is an empty file" in told.err
    assert sorted(path.name for path in output.glob("*.nii.gz")) == ["PHANTOM_001.nii.gz", "PHANTOM_003.nii.gz"]
    (output / "PHANTOM_003.nii.gz").write_bytes((output / "PHANTOM_003.nii.gz").read_bytes()[:-9])  # stopped half way
    kept = (output / "PHANTOM_001.nii.gz").stat().st_mtime_ns
    assert main([*command, str(table())]) == 0
    assert "3 cases: 2 segmented, 1 there already, 0 failed" in capsys.readouterr().out
    assert (output / "PHANTOM_001.nii.gz").stat().st_mtime_ns == kept
    results = json.loads((output / "segment.json").read_text())["cases"]
    assert [each["result"] for each in results.values()] == ["there already", "segmented", "segmented"]
    assert all(_mask(output / f"PHANTOM_00{k}.nii.gz").ndim == 3 for k in (1, 2, 3))


def test_a_batch_is_named_as_bids_derivatives(table: Callable[..., Path], weights: str, tmp_path: Path) -> None:
    output = tmp_path / "bids"
    command = ["segment", "--data", "phantom", "--output-dir", str(output), "--weights", weights, "--allow-outside"]
    assert main([*command, *TINY, "--bids", "--data-list", str(table())]) == 0
    names = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.nii.gz"))
    assert names[0] == "sub-PHANTOM001/anat/sub-PHANTOM001_space-ct_label-tumour_mask.nii.gz"
    assert len(names) == 3
    assert json.loads((output / "dataset_description.json").read_text())["DatasetType"] == "derivative"
