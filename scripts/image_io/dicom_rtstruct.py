# SPDX-License-Identifier: Apache-2.0
"""Write a mask as a DICOM RT structure set whose contours run along the edges of the pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_writer import (
    COPIED_KEYWORDS,
    MANUFACTURER,
    MODEL,
    Regions,
    character_set,
    mask_planes,
    refuse_invalid_values,
    series_description,
    shorten_strings,
)
from scripts.image_io.pixel_contours import edge_contours
from scripts.utils.atomic_files import atomic_file
from scripts.utils.colours import region_colour

DECIMALS = 5  # of a coordinate in mm; DICOM allows 16 characters
STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
# Retired, but readers expect it where a structure set refers to the study of its images.
DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"


def write_rtstruct(mask_file: Path, slices: Sequence[Any], regions: Regions, version: str, path: Path) -> list[str]:
    """Write an RT structure set with the contours of each region on every image of a series.

    The contours run along the edges of pixels, see ``edge_contours``.

    Args:
        mask_file, slices, regions, version, path: see ``write_seg``.

    Returns:
        The regions that have a structure. If all are empty, no file is written, and an existing one is removed.

    Raises:
        ValueError: pydicom is not installed.
        RefusedError: the mask is not on the series' grid, or see ``write_seg``.
    """
    planes = mask_planes(mask_file, slices)
    refuse_invalid_values(slices[0], path)
    masks = {name: np.isin(planes, list(values)) for name, values in regions.items()}
    written = [name for name, inside in masks.items() if inside.any()]  # a structure without contours is not valid
    if not written:
        path.unlink(missing_ok=True)
        return written
    dataset = _structure_set(slices, regions, version)
    for number, (name, inside) in enumerate(masks.items(), start=1):
        if name in written:
            contours = list(_contours(inside, slices))
            _add_structure(dataset, number, name, contours, slices[0].FrameOfReferenceUID)
    shorten_strings(dataset, path)
    with atomic_file(path) as file:
        dataset.save_as(file, enforce_file_format=True)
    return written


def _structure_set(slices: Sequence[Any], regions: Regions, version: str) -> Any:
    """A structure set that refers to a series and has no structure."""
    pydicom = dicom_package("pydicom")
    uid, head, now = pydicom.uid, slices[0], datetime.now()
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = STORAGE
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid.generate_uid()
    encoding = character_set(head, regions)
    if encoding:
        dataset.SpecificCharacterSet = encoding
    for keyword in (*COPIED_KEYWORDS, "PositionReferenceIndicator"):
        setattr(dataset, keyword, head.get(keyword, ""))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = head.StudyInstanceUID, uid.generate_uid()
    dataset.Modality, dataset.SeriesNumber = "RTSTRUCT", int(head.get("SeriesNumber") or 0) + 1001
    dataset.SeriesDescription = series_description(regions)
    dataset.OperatorsName = ""
    dataset.Manufacturer, dataset.ManufacturerModelName, dataset.SoftwareVersions = MANUFACTURER, MODEL, version
    dataset.InstanceCreationDate = dataset.StructureSetDate = now.strftime("%Y%m%d")
    dataset.InstanceCreationTime = dataset.StructureSetTime = now.strftime("%H%M%S")
    dataset.StructureSetLabel, dataset.ApprovalStatus = "research only", "UNAPPROVED"
    dataset.FrameOfReferenceUID = head.FrameOfReferenceUID
    series = _item(SeriesInstanceUID=head.SeriesInstanceUID, ContourImageSequence=[_image(each) for each in slices])
    study = _item(
        ReferencedSOPClassUID=DETACHED_STUDY,
        ReferencedSOPInstanceUID=head.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    dataset.ReferencedFrameOfReferenceSequence = [
        _item(FrameOfReferenceUID=head.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    ]
    dataset.StructureSetROISequence, dataset.ROIContourSequence, dataset.RTROIObservationsSequence = [], [], []
    return dataset


def _add_structure(dataset: Any, number: int, name: str, contours: list[Any], frame_uid: str) -> None:
    """Add a structure; its number is that of the region in the task, from 1."""
    dataset.StructureSetROISequence.append(
        _item(
            ROINumber=number, ReferencedFrameOfReferenceUID=frame_uid, ROIName=name, ROIGenerationAlgorithm="AUTOMATIC"
        )
    )
    colour = region_colour(number - 1).removeprefix("#")
    dataset.ROIContourSequence.append(
        _item(ROIDisplayColor=[*bytes.fromhex(colour)], ReferencedROINumber=number, ContourSequence=contours)
    )
    dataset.RTROIObservationsSequence.append(
        _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
    )


def _contours(inside: NDArray[np.bool_], slices: Sequence[Any]) -> Iterator[Any]:
    """The contours of a region on each slice."""
    element = dicom_package("pydicom").DataElement
    for plane, dataset in zip(inside, slices, strict=True):
        for corners in edge_contours(plane):
            contour = _item(
                ContourImageSequence=[_image(dataset)],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(corners),
            )
            text = "\\".join(f"{value:.{DECIMALS}f}" for value in _positions(corners, dataset).ravel())
            # As one text: pydicom would make an object of each of the numbers, of which there may be a million.
            contour.add(element("ContourData", "DS", text, already_converted=True))
            yield contour


def _positions(corners: NDArray[np.float64], dataset: Any) -> NDArray[np.float64]:
    """Points of a slice (row, column) in mm, LPS."""
    along_row, along_column = np.reshape(np.array(dataset.ImageOrientationPatient, dtype=float), (2, 3))
    between_rows, between_columns = (float(each) for each in dataset.PixelSpacing)
    axes = np.stack([along_column * between_rows, along_row * between_columns])
    return np.asarray(corners @ axes + np.array(dataset.ImagePositionPatient, dtype=float))


def _image(dataset: Any) -> Any:
    return _item(ReferencedSOPClassUID=dataset.SOPClassUID, ReferencedSOPInstanceUID=dataset.SOPInstanceUID)


def _item(**elements: str | int | Iterable[Any]) -> Any:
    """A data set with these elements."""
    item = dicom_package("pydicom").Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item
