# SPDX-License-Identifier: Apache-2.0
"""Measures as a DICOM structured report, read back from its content tree, by highdicom and by dcmtk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest

from scripts.image_io.dicom_codes import segment_properties
from scripts.image_io.dicom_sr import write_sr
from scripts.image_io.dicom_writer import write_seg
from scripts.metrics.lesion_measures import Measures, measure_mask
from scripts.metrics.lesion_shape import Volume
from tests.dicom_slices import SHAPE, SPACING, nested, series, write_mask

REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "cyst": [9]}
PROPERTIES = segment_properties(
    REGIONS, {"TC": {"type": ["6574001", "SCT", "Necrosis"], "anatomy": ["12738006", "SCT", "Brain"]}}
)
LESIONS = [("WT", 1), ("TC", 1)]


def measured(with_pet: bool) -> list[Measures]:
    mask = Volume(nested(), np.diag([*SPACING, 1.0]))
    pet = Volume(np.arange(np.prod(SHAPE), dtype=float).reshape(SHAPE) / 100, mask.affine)
    return measure_mask(mask, REGIONS, pet if with_pet else None)


def written(folder: Path, with_pet: bool = True) -> tuple[Path, list[Measures], list[Any]]:
    slices, found = series(), measured(with_pet)
    write_seg(write_mask(nested(), folder), slices, REGIONS, PROPERTIES, "1.0", folder / "seg.dcm", LESIONS)
    write_sr(found, folder / "seg.dcm", slices, PROPERTIES, "1.0", folder / "sr.dcm")
    return folder / "sr.dcm", found, slices


def groups(path: Path) -> list[dict[str, Any]]:
    """The content of each measurement group: codes and values by the meaning of their concept."""
    content = pydicom.dcmread(path).ContentSequence
    (measurements,) = [
        item for item in content if item.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurements"
    ]
    return [_values(group) for group in measurements.ContentSequence]


def _values(group: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in group.ContentSequence:
        name = item.ConceptNameCodeSequence[0].CodeMeaning
        if item.ValueType == "NUM":
            measure = item.MeasuredValueSequence[0]
            derivations = [each.ConceptCodeSequence[0].CodeMeaning for each in item.get("ContentSequence", [])]
            unit = measure.MeasurementUnitsCodeSequence[0].CodeValue
            values[" ".join([name, *derivations])] = (float(measure.NumericValue), unit)
        elif item.ValueType == "CODE":
            values[name] = item.ConceptCodeSequence[0].CodeValue
        elif item.ValueType == "IMAGE":
            values[name] = item.ReferencedSOPSequence[0]
        else:
            values[name] = item.get("TextValue") or item.get("UID")
    return values


def test_every_region_and_lesion_is_a_group_with_its_measures(tmp_path: Path):
    path, found, _ = written(tmp_path)
    named = {group["Tracking Identifier"]: group for group in groups(path)}
    assert list(named) == ["WT", "WT lesion 1", "TC", "TC lesion 1", "cyst"]
    by_name = {"WT": found[0], "WT lesion 1": found[1], "TC": found[2], "TC lesion 1": found[3]}
    for name, measures in by_name.items():
        group, values = named[name], measures.values()
        columns = {
            "Volume Sum of segmented voxel method for volume": ("volume_ml", "cm3"),
            "Long axis": ("axial_diameter_mm", "mm"),
            "Maximum 3D Diameter of a Mesh": ("diameter_mm", "mm"),
            "SUVbw Maximum": ("suvmax", "g/ml{SUVbw}"),
            "SUVbw Mean": ("suvmean", "g/ml{SUVbw}"),
            "SUVbw Peak Value Within ROI": ("suvpeak", "g/ml{SUVbw}"),
            "Metabolic Volume": ("mtv_ml", "cm3"),
            "Total Lesion Glycolysis": ("tlg_g", "g"),
        }
        for concept, (column, unit) in columns.items():
            assert group[concept] == (pytest.approx(values[column], rel=1e-5), unit), concept
    assert named["WT"]["Volume Sum of segmented voxel method for volume"][0] == pytest.approx(10 * 8 * 5 * 3.84e-3)
    assert named["cyst"]["Volume Sum of segmented voxel method for volume"] == (0, "cm3")
    assert "Long axis" not in named["cyst"]
    assert (named["TC"]["Finding"], named["TC"]["Finding Site"]) == ("6574001", "12738006")
    assert "Finding Site" not in named["WT"]


def test_groups_refer_to_the_segments_by_number_and_tracking_uid(tmp_path: Path):
    path, _, slices = written(tmp_path)
    segmentation = pydicom.dcmread(tmp_path / "seg.dcm")
    segments = {each.SegmentNumber: each for each in segmentation.SegmentSequence}
    for group in groups(path):
        reference = group["Referenced Segment"]
        assert reference.ReferencedSOPInstanceUID == segmentation.SOPInstanceUID
        segment = segments[reference.ReferencedSegmentNumber]
        assert group["Tracking Unique Identifier"] == segment.TrackingUID
        assert group["Tracking Identifier"] == segment.TrackingID
        assert group["Source Series for Segmentation"] == slices[0].SeriesInstanceUID
    report = pydicom.dcmread(path)
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    listed = {item.ReferencedSOPInstanceUID for each in evidence for item in each.ReferencedSOPSequence}
    assert segmentation.SOPInstanceUID in listed
    assert report.StudyInstanceUID == slices[0].StudyInstanceUID


def test_without_a_pet_there_is_no_suv(tmp_path: Path):
    for group in groups(written(tmp_path, with_pet=False)[0]):
        assert not {"Metabolic Volume", "SUVbw Maximum"} & set(group)


def test_highdicom_reads_the_volumes(tmp_path: Path):
    path, found, _ = written(tmp_path)
    report = highdicom.sr.srread(path)
    (group,) = report.content.get_volumetric_roi_measurement_groups(
        tracking_uid=pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence[1].TrackingUID
    )
    (volume,) = group.get_measurements(name=highdicom.sr.CodedConcept("118565006", "SCT", "Volume"))
    assert volume.value == pytest.approx(found[2].volume_ml, rel=1e-5)


def test_lesions_without_a_segment_are_left_out(tmp_path: Path):
    slices = series()
    write_seg(write_mask(nested(), tmp_path), slices, REGIONS, PROPERTIES, "1.0", tmp_path / "seg.dcm")
    write_sr(measured(False), tmp_path / "seg.dcm", slices, PROPERTIES, "1.0", tmp_path / "sr.dcm")
    assert [group["Tracking Identifier"] for group in groups(tmp_path / "sr.dcm")] == ["WT", "TC", "cyst"]


@pytest.mark.parametrize(("program", "package"), [("dciodvfy", "dicom3tools"), ("dsrdump", "dcmtk")])
def test_other_programs_find_no_error(program: str, package: str, tmp_path: Path):
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed: apt-get install {package}")
    path, _, _ = written(tmp_path)
    for file in [path, tmp_path / "seg.dcm"] if program == "dciodvfy" else [path]:
        done = subprocess.run([program, file], capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        assert [line for line in lines if line.startswith(("Error", "E:", "F:"))] == []
        assert done.returncode == 0
