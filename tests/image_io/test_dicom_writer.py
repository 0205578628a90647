# SPDX-License-Identifier: Apache-2.0
"""Several regions of one mask as DICOM SEG and RTSTRUCT, read back by pydicom and highdicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from scripts.image_io.dicom_codes import segment_properties
from scripts.image_io.dicom_writer import write_rtstruct, write_seg

REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
PROPERTIES = segment_properties(
    REGIONS,
    {
        "WT": ["108369006", "SCT", "Neoplasm"],
        "TC": {"type": ["6574001", "SCT", "Necrosis"], "anatomy": ["12738006", "SCT", "Brain"]},
    },
)
SHAPE = (12, 10, 5)  # columns, rows, slices
SPACING = (0.8, 1.2, 4.0)  # mm


@pytest.fixture
def slices() -> list[Any]:
    """An MR series whose columns and rows run along the patient's axes, upwards."""
    study, series, frame = (generate_uid() for _ in range(3))
    images = []
    for number in range(SHAPE[2]):
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.SOPClassUID, image.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.PatientID = image.PatientName = image.StudyID = image.AccessionNumber = image.StudyTime = ""
        image.PatientBirthDate = image.PatientSex = image.ReferringPhysicianName = ""
        image.StudyDate, image.Modality, image.SeriesNumber = "20200102", "MR", 3
        image.Columns, image.Rows = SHAPE[:2]
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.ImagePositionPatient = [-5.0, 7.0, number * SPACING[2]]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.PixelSpacing, image.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        image.InstanceNumber, image.PixelData = number + 1, bytes(2 * SHAPE[0] * SHAPE[1])
        images.append(image)
    return images


def _write_mask(voxels: Any, folder: Path) -> Path:
    """A NIfTI on the series' grid: RAS, where DICOM is LPS."""
    affine = np.array([[-SPACING[0], 0, 0, 5.0], [0, -SPACING[1], 0, -7.0], [0, 0, SPACING[2], 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), affine), folder / "mask.nii.gz")
    return folder / "mask.nii.gz"


def _nested() -> Any:
    """A block of value 2 that contains one of 1 that contains one of 4."""
    voxels = np.zeros(SHAPE)
    voxels[1:11, 1:9, :] = 2
    voxels[2:9, 2:7, 1:4] = 1
    voxels[3:6, 3:6, 2] = 4
    return voxels


def _frames(path: Path, slices: list[Any], regions: int) -> Any:
    """The frames of a segmentation by segment and slice, read from its sequences with pydicom alone."""
    written = pydicom.dcmread(path)
    pixels = np.reshape(written.pixel_array, (-1, written.Rows, written.Columns))
    found = np.zeros((regions, len(slices), written.Rows, written.Columns), dtype=bool)
    heights = [float(image.ImagePositionPatient[2]) for image in slices]
    for frame, groups in zip(pixels, written.PerFrameFunctionalGroupsSequence, strict=True):
        segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        height = float(groups.PlanePositionSequence[0].ImagePositionPatient[2])
        found[segment - 1, heights.index(height)] = frame > 0
    return found


@pytest.mark.parametrize("kind", ["nested", "random", "without ET"])
def test_overlapping_regions_read_back_are_those_of_the_mask(kind: str, slices: list[Any], tmp_path: Path):
    values = [0, 1, 2, 4] if kind == "random" else [0, 1, 2]
    voxels = _nested() if kind == "nested" else np.random.default_rng(5).choice(values, SHAPE)
    write_seg(_write_mask(voxels, tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    expected = np.stack([sum(voxels == value for value in members) for members in REGIONS.values()]).astype(bool)
    expected = expected.transpose(0, 3, 2, 1)  # region, slice, row, column
    assert expected[-1].any() == (kind != "without ET")
    np.testing.assert_array_equal(_frames(tmp_path / "seg.dcm", slices, 3), expected)
    by_highdicom = highdicom.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        [image.SOPInstanceUID for image in slices], assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(by_highdicom, np.moveaxis(expected, 0, -1))


def test_segments_have_the_names_and_codes_of_the_task(slices: list[Any], tmp_path: Path):
    write_seg(_write_mask(_nested(), tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    segments = list(written.SegmentSequence)
    assert [(each.SegmentNumber, each.SegmentLabel) for each in segments] == [(1, "WT"), (2, "TC"), (3, "ET")]
    types = [each.SegmentedPropertyTypeCodeSequence[0] for each in segments]
    assert [(each.CodeValue, each.CodeMeaning) for each in types] == [
        ("108369006", "Neoplasm"),
        ("6574001", "Necrosis"),
        ("85756007", "Tissue"),
    ]
    categories = [each.SegmentedPropertyCategoryCodeSequence[0].CodeValue for each in segments]
    assert categories == ["49755003", "49755003", "85756007"]
    assert segments[1].AnatomicRegionSequence[0].CodeMeaning == "Brain"
    assert "AnatomicRegionSequence" not in segments[0]
    assert len({tuple(each.RecommendedDisplayCIELabValue) for each in segments}) == 3
    assert (written.SegmentationType, written.SeriesDescription) == ("BINARY", "WT, TC, ET, research only")


def test_an_empty_mask_keeps_its_segments(slices: list[Any], tmp_path: Path):
    write_seg(_write_mask(np.zeros(SHAPE), tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    assert len(pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence) == 3
    assert not _frames(tmp_path / "seg.dcm", slices, 3).any()


def test_each_region_that_is_not_empty_is_a_structure(slices: list[Any], tmp_path: Path):
    pytest.importorskip("rt_utils", reason="rt-utils does not load: its OpenCV needs libGL", exc_type=ImportError)
    mask = _write_mask(_nested(), tmp_path)
    assert write_rtstruct(mask, slices, {**REGIONS, "cyst": [3]}, tmp_path / "rtstruct.dcm") == ["WT", "TC", "ET"]
    written = pydicom.dcmread(tmp_path / "rtstruct.dcm")
    assert [each.ROIName for each in written.StructureSetROISequence] == ["WT", "TC", "ET"]
    blocks = ((1, 10, 1, 8, range(5)), (2, 8, 2, 6, range(1, 4)), (3, 5, 3, 5, [2]))  # first and last column and row
    for structure, (left, right, top, bottom, numbers) in zip(written.ROIContourSequence, blocks, strict=True):
        points = [np.reshape(np.array(each.ContourData, float), (-1, 3)) for each in structure.ContourSequence]
        assert sorted({each[0, 2] for each in points}) == [number * SPACING[2] for number in numbers]
        for outline in points:
            pixels = (outline[:, :2] - [-5.0, 7.0]) / SPACING[:2]
            np.testing.assert_allclose([pixels.min(0), pixels.max(0)], [[left, top], [right, bottom]], atol=1e-3)


def test_names_of_any_alphabet_are_kept_beside_the_patients(slices: list[Any], tmp_path: Path):
    for image in slices:
        image.SpecificCharacterSet, image.PatientName = "ISO_IR 100", "Müller^Eva"
    regions = {"腫瘍": [1, 4], "ödem": [2]}
    mask, properties = _write_mask(_nested(), tmp_path), segment_properties(regions, {})
    write_seg(mask, slices, regions, properties, "1.0", tmp_path / "seg.dcm")
    segmentation = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [each.SegmentLabel for each in segmentation.SegmentSequence] == ["腫瘍", "ödem"]
    assert str(segmentation.PatientName) == "Müller^Eva"
    pytest.importorskip("rt_utils", reason="rt-utils does not load: its OpenCV needs libGL", exc_type=ImportError)
    write_rtstruct(mask, slices, regions, tmp_path / "rtstruct.dcm")
    structures = pydicom.dcmread(tmp_path / "rtstruct.dcm")
    assert [each.ROIName for each in structures.StructureSetROISequence] == ["腫瘍", "ödem"]
    assert str(structures.PatientName) == "Müller^Eva"


def test_a_description_leaves_out_names_that_are_too_long_for_it(slices: list[Any], tmp_path: Path):
    regions = {f"region number {number}": [number] for number in range(1, 9)}
    properties = segment_properties(regions, {})
    write_seg(_write_mask(_nested(), tmp_path), slices, regions, properties, "1.0", tmp_path / "seg.dcm")
    assert pydicom.dcmread(tmp_path / "seg.dcm").SeriesDescription == "Segmentation, research only"
