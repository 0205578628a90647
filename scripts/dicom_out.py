# SPDX-License-Identifier: Apache-2.0
"""A mask as a DICOM segmentation (SEG) or structure set (RTSTRUCT) that refers to the images it was drawn on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.files import atomic_file
from scripts.study import pydicom_module

MAKER, MODEL = "multi-teacher-distillation-bundle", "distilled student"
# SNOMED CT: what the foreground is, and of what category.
CATEGORY = ("49755003", "SCT", "Morphologically abnormal structure")
PROPERTY = ("108369006", "SCT", "Neoplasm")
SHORT_STRING = 16  # characters of DICOM's VR SH
FAR = 0.01  # mm by which a slice may lie off the mask's plane


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{package} is not installed: pip install ".[dicom]".') from error


def read_slices(files: Sequence[str]) -> list[Any]:
    """The images of a series, as pydicom reads them."""
    pydicom = pydicom_module()
    return [pydicom.dcmread(file) for file in files]


def frames(mask: np.ndarray, affine: np.ndarray, slices: Sequence[Any]) -> np.ndarray:
    """The mask's planes in the order of the slices, rows before columns.

    Args:
        mask: ``H W D`` (column, row, slice), as read from the series and written as NIfTI.
        affine: of the mask, RAS, mm.
        slices: the series' images in any order.

    Returns:
        ``slices rows columns``, uint8.

    Raises:
        ValueError: the mask is not on the series' grid.
    """
    planes = []
    inverse = np.linalg.inv(affine)
    for each in slices:
        place = np.array([*each.ImagePositionPatient, 1.0], dtype=float) * [-1, -1, 1, 1]
        index = inverse @ place
        number = round(float(index[2]))
        off = np.linalg.norm(affine[:3, :3] @ (index[:3] - [0, 0, number]))
        if off > FAR or not 0 <= number < mask.shape[2] or mask.shape[:2] != (each.Columns, each.Rows):
            raise ValueError(f"The mask is not on the grid of the series {each.SeriesInstanceUID}.")
        planes.append(mask[:, :, number].T)
    return np.stack(planes).astype(np.uint8)


def write_seg(mask_file: Path, slices: Sequence[Any], label: str, version: str, path: Path) -> None:
    """Write a binary DICOM segmentation of one segment, foreground of the mask, with references to every image.

    Args:
        mask_file: NIfTI on the series' own grid.
        slices: the series' images, in the order of their positions.
        label: of the segment.
        version: of the software.
        path: of the file.

    Raises:
        ValueError: highdicom is not installed, or the mask is not on the series' grid or is empty.
    """
    highdicom = _module("highdicom", "highdicom")
    coded = _module("pydicom.sr.coding", "pydicom").Code
    image: Any = nib.Nifti1Image.from_filename(mask_file)
    planes = frames(np.asanyarray(image.dataobj) > 0, image.affine, slices)
    codes = _module("pydicom.sr.codedict", "pydicom").codes
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=MAKER, family=codes.cid7162.ArtificialIntelligence, version=version
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label=label,
        segmented_property_category=coded(*CATEGORY),
        segmented_property_type=coded(*PROPERTY),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    made = highdicom.seg.Segmentation(
        source_images=list(slices),
        pixel_array=planes,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=highdicom.UID(),
        series_number=_free_number(slices),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MODEL,
        software_versions=version,
        device_serial_number="0",
        series_description=f"{label}, research only",
        omit_empty_frames=bool(planes.any()),  # a segmentation without frames is no valid one
    )
    _shorten(made)
    with atomic_file(path) as file:
        made.save_as(file)


def _shorten(dataset: Any) -> None:
    """Ids that are longer than the standard allows are taken over from images that have them so."""
    if len(str(dataset.get("StudyID", "") or "")) > SHORT_STRING:
        dataset.StudyID = str(dataset.StudyID)[:SHORT_STRING]


def _free_number(slices: Sequence[Any]) -> int:
    return int(slices[0].get("SeriesNumber") or 0) + 1000


def write_rtstruct(mask_file: Path, folder: Path, slices: Sequence[Any], label: str, path: Path) -> None:
    """Write an RT structure set with the mask's outlines on every image of a series.

    Args:
        mask_file, slices, label, path: see ``write_seg``.
        folder: of the series, which holds no other.

    Raises:
        ValueError: rt-utils is not installed, or the mask is not on the series' grid.
    """
    builder = _module("rt_utils", "rt-utils").RTStructBuilder
    image: Any = nib.Nifti1Image.from_filename(mask_file)
    made = builder.create_new(dicom_series_path=str(folder))
    ordered = made.series_data
    planes = frames(np.asanyarray(image.dataobj) > 0, image.affine, ordered)
    if planes.any():
        made.add_roi(mask=np.moveaxis(planes, 0, -1).astype(bool), name=label)
    decimal = _module("pydicom.valuerep", "pydicom").format_number_as_ds
    for contours in made.ds.get("ROIContourSequence", []):
        for contour in contours.ContourSequence:  # at most 16 characters each
            contour.ContourData = [decimal(float(value)) for value in contour.ContourData]
    made.ds.SeriesDescription = f"{label}, research only"
    made.ds.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
    for keyword in ("ReferringPhysicianName", "AccessionNumber", "OperatorsName", "PositionReferenceIndicator"):
        setattr(made.ds, keyword, slices[0].get(keyword, ""))  # rt-utils leaves them out; they may be empty
    _shorten(made.ds)
    with atomic_file(path) as file:
        made.ds.save_as(file)
