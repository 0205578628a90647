# SPDX-License-Identifier: Apache-2.0
"""Write measures as a DICOM structured report (TID 1500, Comprehensive 3D SR) that refers to a segmentation.

Each region, and each lesion that has a segment, is a group of measurements (TID 1411) with the tracking id and UID of
its segment. The centroid is left out: the template has no place for it, and the segment shows where the lesion lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.image_io.dicom_codes import Property, Triple
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_writer import MANUFACTURER, MODEL, new_series, shorten_strings, tracking_id
from scripts.metrics.lesion_measures import Measures
from scripts.utils.atomic_files import atomic_file

VOLUME: Triple = ("118565006", "SCT", "Volume")
VOXEL_SUM: Triple = ("126030", "DCM", "Sum of segmented voxel method for volume")
AXIAL_DIAMETER: Triple = ("103339001", "SCT", "Long axis")
DIAMETER: Triple = ("L0JK", "IBSI", "Maximum 3D Diameter of a Mesh")
SUV: Triple = ("126401", "DCM", "SUVbw")
SUV_DERIVATIONS: dict[str, Triple] = {
    "suvmax": ("56851009", "SCT", "Maximum"),
    "suvmean": ("373098007", "SCT", "Mean"),
    "suvpeak": ("126031", "DCM", "Peak Value Within ROI"),
}
METABOLIC_VOLUME: Triple = ("126032", "DCM", "Metabolic Volume")
GLYCOLYSIS: Triple = ("126033", "DCM", "Total Lesion Glycolysis")
MILLIMETRE: Triple = ("mm", "UCUM", "mm")
CUBIC_CENTIMETRE: Triple = ("cm3", "UCUM", "cubic centimeter")  # 1 ml
GRAM: Triple = ("g", "UCUM", "g")
SUV_UNIT: Triple = ("g/ml{SUVbw}", "UCUM", "Standardized Uptake Value body weight")
PROCEDURE: Triple = ("363679005", "SCT", "Imaging procedure")
DIGITS = 6  # significant digits of a value; DICOM allows 16 characters
DESCRIPTION = "Measures, research only"


def write_sr(
    measured: Sequence[Measures],
    seg_file: Path,
    slices: Sequence[Any],
    properties: Mapping[str, Property],
    version: str,
    path: Path,
) -> None:
    """Write the measures of the segments of a segmentation.

    Args:
        measured: of every region and lesion; lesions without a segment are left out.
        seg_file: segmentation by ``write_seg``.
        slices: the series that was segmented.
        properties: what each region is, see ``segment_properties``.
        version: of the software.
        path: the file to write.

    Raises:
        ValueError: highdicom is not installed.
    """
    highdicom, segmentation = dicom_package("highdicom"), dicom_package("pydicom").dcmread(seg_file)
    segments = {str(each.TrackingID): each for each in segmentation.SegmentSequence}
    groups = [
        _group(each, segment, segmentation, slices[0], properties[each.region], version)
        for each in measured
        if (segment := segments.get(tracking_id(each.region, each.lesion)))
    ]
    observer = highdicom.sr.ObserverContext(
        observer_type=highdicom.sr.CodedConcept("121007", "DCM", "Device"),
        observer_identifying_attributes=highdicom.sr.DeviceObserverIdentifyingAttributes(
            uid=highdicom.UID(), name=MANUFACTURER, manufacturer_name=MANUFACTURER, model_name=MODEL
        ),
    )
    content = highdicom.sr.MeasurementReport(
        observation_context=highdicom.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_code(PROCEDURE),
        imaging_measurements=groups,
        title=_code(("126000", "DCM", "Imaging Measurement Report")),
    )
    report = highdicom.sr.Comprehensive3DSR(
        evidence=[segmentation, *slices],
        content=content[0],
        **new_series(slices[0], 1002, version),
        series_description=DESCRIPTION,
        is_complete=True,
        specific_character_set=segmentation.get("SpecificCharacterSet"),
    )
    shorten_strings(report, path)
    with atomic_file(path) as file:
        report.save_as(file)


def _group(measured: Measures, segment: Any, segmentation: Any, head: Any, what: Property, version: str) -> Any:
    """The measurements of one segment."""
    sr = dicom_package("highdicom.sr")
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=segment.TrackingUID, identifier=str(segment.TrackingID)),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=segmentation.SOPClassUID,
            sop_instance_uid=segmentation.SOPInstanceUID,
            segment_number=int(segment.SegmentNumber),
            source_series=sr.SourceSeriesForSegmentation(head.SeriesInstanceUID),
        ),
        finding_category=_code(what.category),
        finding_type=_code(what.type),
        finding_sites=[sr.FindingSite(_code(what.anatomy))] if what.anatomy else None,
        algorithm_id=sr.AlgorithmIdentification(name=MANUFACTURER, version=version),
        measurements=list(_measurements(measured)),
    )


def _measurements(measured: Measures) -> Iterator[Any]:
    """The measures that are defined."""
    yield _measurement(VOLUME, measured.volume_ml, CUBIC_CENTIMETRE, method=_code(VOXEL_SUM))
    for name, length in ((AXIAL_DIAMETER, measured.axial_diameter_mm), (DIAMETER, measured.diameter_mm)):
        if length is not None:
            yield _measurement(name, length, MILLIMETRE)
    if measured.uptake is not None:
        for key, derivation in SUV_DERIVATIONS.items():
            value = getattr(measured.uptake, key)
            if value is not None:
                yield _measurement(SUV, value, SUV_UNIT, derivation=_code(derivation))
        yield _measurement(METABOLIC_VOLUME, measured.uptake.mtv_ml, CUBIC_CENTIMETRE)
        yield _measurement(GLYCOLYSIS, measured.uptake.tlg_g, GRAM)


def _measurement(name: Triple, value: float, unit: Triple, **options: Any) -> Any:
    return dicom_package("highdicom.sr").Measurement(
        name=_code(name), value=float(f"{value:.{DIGITS}g}"), unit=_code(unit), **options
    )


def _code(triple: Triple) -> Any:
    return dicom_package("highdicom.sr").CodedConcept(*triple)
