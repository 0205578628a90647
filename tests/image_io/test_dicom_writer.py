# SPDX-License-Identifier: Apache-2.0
"""Several regions of one mask as DICOM SEG, read back by pydicom and highdicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from scipy import ndimage

from scripts.image_io.dicom_codes import segment_properties
from scripts.image_io.dicom_writer import read_slices, write_seg
from tests.dicom_slices import SHAPE, nested, series, write_mask

REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
PROPERTIES = segment_properties(
    REGIONS,
    {
        "WT": ["108369006", "SCT", "Neoplasm"],
        "TC": {"type": ["6574001", "SCT", "Necrosis"], "anatomy": ["12738006", "SCT", "Brain"]},
    },
)


@pytest.fixture
def slices() -> list[Any]:
    """An MR series whose columns and rows run along the patient's axes, upwards."""
    return series()


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
    voxels = nested() if kind == "nested" else np.random.default_rng(5).choice(values, SHAPE)
    write_seg(write_mask(voxels, tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    expected = np.stack([sum(voxels == value for value in members) for members in REGIONS.values()]).astype(bool)
    expected = expected.transpose(0, 3, 2, 1)  # region, slice, row, column
    assert expected[-1].any() == (kind != "without ET")
    np.testing.assert_array_equal(_frames(tmp_path / "seg.dcm", slices, 3), expected)
    by_highdicom = highdicom.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        [image.SOPInstanceUID for image in slices], assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(by_highdicom, np.moveaxis(expected, 0, -1))


def test_segments_have_the_names_and_codes_of_the_task(slices: list[Any], tmp_path: Path):
    write_seg(write_mask(nested(), tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
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


def test_every_segment_has_a_tracking_id_and_a_tracking_uid_of_its_own(slices: list[Any], tmp_path: Path):
    write_seg(write_mask(nested(), tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    segments = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
    assert [each.TrackingID for each in segments] == ["WT", "TC", "ET"]
    assert len({each.TrackingUID for each in segments}) == 3


def test_lesions_get_segments_after_those_of_all_regions(slices: list[Any], tmp_path: Path):
    """Their numbers are those of the measures: the largest is 1."""
    voxels = np.zeros(SHAPE)
    voxels[1:3, 1:3, 0] = voxels[8:11, 4:8, 2:4] = 1
    voxels[5, 5, 2] = 4
    lesions = [("TC", 1), ("TC", 2), ("ET", 1)]
    path = tmp_path / "seg.dcm"
    write_seg(write_mask(voxels, tmp_path), slices, REGIONS, PROPERTIES, "1.0", path, lesions)
    segments = pydicom.dcmread(path).SegmentSequence
    names = ["WT", "TC", "ET", "TC lesion 1", "TC lesion 2", "ET lesion 1"]
    assert [(each.SegmentLabel, each.TrackingID) for each in segments] == [(name, name) for name in names]
    assert segments[3].AnatomicRegionSequence[0].CodeMeaning == "Brain"
    assert list(segments[3].RecommendedDisplayCIELabValue) == list(segments[1].RecommendedDisplayCIELabValue)
    frames = _frames(path, slices, 6)
    components, count = ndimage.label(np.isin(voxels, [1, 4]), np.ones((3, 3, 3)))
    by_size = sorted(range(1, count + 1), key=lambda number: -int((components == number).sum()))
    for segment, number in ((3, by_size[0]), (4, by_size[1])):
        np.testing.assert_array_equal(frames[segment], (components == number).transpose(2, 1, 0))
    np.testing.assert_array_equal(frames[5], frames[2])


def test_an_empty_mask_keeps_its_segments(slices: list[Any], tmp_path: Path):
    write_seg(write_mask(np.zeros(SHAPE), tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    assert len(pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence) == 3
    assert not _frames(tmp_path / "seg.dcm", slices, 3).any()


def test_names_of_any_alphabet_are_kept_beside_the_patients(slices: list[Any], tmp_path: Path):
    for image in slices:
        image.SpecificCharacterSet, image.PatientName = "ISO_IR 100", "Müller^Eva"
    regions = {"腫瘍": [1, 4], "ödem": [2]}
    mask, properties = write_mask(nested(), tmp_path), segment_properties(regions, {})
    write_seg(mask, slices, regions, properties, "1.0", tmp_path / "seg.dcm")
    segmentation = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [each.SegmentLabel for each in segmentation.SegmentSequence] == ["腫瘍", "ödem"]
    assert str(segmentation.PatientName) == "Müller^Eva"


@pytest.mark.parametrize(
    ("encoding", "patient"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"), (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞"),
        ("", "Doe^Jane"), (None, "Doe^Jane"), ("ISO_IR 100", "Müller^Eva"), ("GB18030", "Wang^XiaoDong=王^小东"),
    ],
)  # fmt: skip
def test_the_patients_name_is_kept_in_any_encoding(
    encoding: Any, patient: str, slices: list[Any], tmp_path: Path
) -> None:
    files = []
    for number, image in enumerate(slices):
        if encoding is not None:
            image.SpecificCharacterSet = encoding
        image.PatientName = patient
        files.append(str(tmp_path / f"{number}.dcm"))
        image.save_as(files[-1], enforce_file_format=True)
    read = read_slices(files)
    write_seg(write_mask(nested(), tmp_path), read, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    assert str(pydicom.dcmread(tmp_path / "seg.dcm").PatientName) == patient


def test_slices_without_a_thickness_are_segmented(slices: list[Any], tmp_path: Path) -> None:
    files = []
    for number, image in enumerate(slices):
        if "SliceThickness" in image:
            del image.SliceThickness
        files.append(str(tmp_path / f"{number}.dcm"))
        image.save_as(files[-1], enforce_file_format=True)
    write_seg(write_mask(nested(), tmp_path), read_slices(files), REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    assert _frames(tmp_path / "seg.dcm", slices, 3).any()


def test_a_description_leaves_out_names_that_are_too_long_for_it(slices: list[Any], tmp_path: Path):
    regions = {f"region number {number}": [number] for number in range(1, 9)}
    properties = segment_properties(regions, {})
    write_seg(write_mask(nested(), tmp_path), slices, regions, properties, "1.0", tmp_path / "seg.dcm")
    assert pydicom.dcmread(tmp_path / "seg.dcm").SeriesDescription == "Segmentation, research only"
