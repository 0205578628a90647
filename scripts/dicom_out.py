# SPDX-License-Identifier: Apache-2.0
"""A mask as a DICOM segmentation (SEG) or structure set (RTSTRUCT) that refers to the images it was drawn on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.data.packages import dicom_package
from scripts.files import atomic_file

MAKER, MODEL = "multi-teacher-distillation-bundle", "distilled student"
# SNOMED CT: what the foreground is, and of what category.
CATEGORY = ("49755003", "SCT", "Morphologically abnormal structure")
PROPERTY = ("108369006", "SCT", "Neoplasm")
# What the written files take over from the images, and the standard wants there, be it empty.
EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
         "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
SEXES = ("", "M", "F", "O")
SHORT_STRING = 16  # characters of DICOM's VR SH
FAR = 0.01  # mm by which a slice may lie off the mask's plane


def read_slices(files: Sequence[str]) -> list[Any]:
    """The images of a series, as pydicom reads them; what may be empty and was left out is there, empty."""
    pydicom = dicom_package("pydicom")
    slices = [pydicom.dcmread(file) for file in files]
    for each in slices:
        for keyword in EMPTY:
            if keyword not in each:
                setattr(each, keyword, "")
    return slices


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
        ValueError: highdicom is not installed, the mask is not on the series' grid, or the images have a sex, date or
            time that is none.
    """
    highdicom = dicom_package("highdicom")
    coded = dicom_package("pydicom.sr.coding").Code
    image: Any = nib.Nifti1Image.from_filename(mask_file)
    planes = frames(np.asanyarray(image.dataobj) > 0, image.affine, slices)
    _refuse_strange(slices[0], path)
    codes = dicom_package("pydicom.sr.codedict").codes
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


def _refuse_strange(head: Any, path: Path) -> None:
    """What highdicom would refuse with a word that quotes the patient's data."""
    values = dicom_package("pydicom.valuerep")
    kinds = {"PatientBirthDate": values.DA, "StudyDate": values.DA, "StudyTime": values.TM, "PatientSex": SEXES.index}
    for keyword, kind in kinds.items():
        try:
            kind(head.get(keyword) or "")
        except ValueError:
            raise ValueError(
                f"{path} was not written, since the series {head.SeriesInstanceUID} has a {keyword} that is none in "
                "DICOM: correct it or leave it empty. The mask is there."
            ) from None


def _shorten(dataset: Any) -> None:
    """Ids that are longer than the standard allows are taken over from images that have them so."""
    if len(str(dataset.get("StudyID", "") or "")) > SHORT_STRING:
        dataset.StudyID = str(dataset.StudyID)[:SHORT_STRING]


def _free_number(slices: Sequence[Any]) -> int:
    return int(slices[0].get("SeriesNumber") or 0) + 1000


def write_rtstruct(mask_file: Path, slices: Sequence[Any], label: str, path: Path) -> None:
    """Write an RT structure set with the mask's outlines on every image of a series.

    Args:
        mask_file, slices, label, path: see ``write_seg``.

    Raises:
        ValueError: rt-utils is not installed, or the mask is not on the series' grid.
    """
    made = _structure_set(slices)
    image: Any = nib.Nifti1Image.from_filename(mask_file)
    planes = frames(np.asanyarray(image.dataobj) > 0, image.affine, made.series_data)
    if planes.any():
        made.add_roi(mask=np.moveaxis(planes, 0, -1).astype(bool), name=label)
    decimal = dicom_package("pydicom.valuerep").format_number_as_ds
    for contours in made.ds.get("ROIContourSequence", []):
        for contour in contours.ContourSequence:  # at most 16 characters each
            contour.ContourData = [decimal(float(value)) for value in contour.ContourData]
    made.ds.SeriesDescription = f"{label}, research only"
    made.ds.Manufacturer, made.ds.ManufacturerModelName = MAKER, MODEL
    del made.ds.InstitutionName  # rt-utils puts its own
    made.ds.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
    for keyword in ("ReferringPhysicianName", "AccessionNumber", "OperatorsName", "PositionReferenceIndicator"):
        setattr(made.ds, keyword, slices[0].get(keyword, ""))  # rt-utils leaves them out; they may be empty
    if slices[0].get("SpecificCharacterSet"):  # which the patient's name is written in
        made.ds.SpecificCharacterSet = slices[0].SpecificCharacterSet
    _shorten(made.ds)
    with atomic_file(path) as file:
        made.ds.save_as(file)


def _structure_set(slices: Sequence[Any]) -> Any:
    """A structure set by rt-utils without structures.

    Its own reader takes every image at and below a folder, of any series, so it is given the images. Of their
    ``PixelSpacing`` (between rows, between columns) it takes the first for a step along a row: it gets them turned.
    """
    helper = dicom_package("rt_utils.image_helper")
    turned = []
    for each in slices:
        turned.append(dicom_package("pydicom").Dataset())
        turned[-1].update(each)  # shares the elements, so that this one is put anew
        turned[-1].add_new("PixelSpacing", "DS", each.PixelSpacing[::-1])
    turned.sort(key=helper.get_slice_position)
    made = dicom_package("rt_utils.ds_helper").create_rtstruct_dataset(turned)
    return dicom_package("rt_utils").RTStruct(turned, made)
