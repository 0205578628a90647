# SPDX-License-Identifier: Apache-2.0
"""A mask as a DICOM segmentation (SEG) or structure set (RTSTRUCT) that refers to the images it was drawn on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_series import ASTRAY
from scripts.utils.atomic_files import atomic_file

logger = logging.getLogger(__name__)

MAKER, MODEL = "multi-teacher-distillation-bundle", "distilled student"
# SNOMED CT: what the foreground is, and of what category.
CATEGORY = ("49755003", "SCT", "Morphologically abnormal structure")
PROPERTY = ("108369006", "SCT", "Neoplasm")
# What the written files take over from the images, and the standard wants there, be it empty.
EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
         "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
SEXES = ("", "M", "F", "O")
SHORT_STRING = 16  # characters of DICOM's VR SH


class RefusedError(ValueError):
    """A sentence of ours, which quotes nothing of the patient."""


def read_slices(files: Sequence[str]) -> list[Any]:
    """The images of a series, as pydicom reads them; what may be empty and was left out is there, empty."""
    pydicom = dicom_package("pydicom")
    slices = [pydicom.dcmread(file) for file in files]
    for each in slices:
        for keyword in EMPTY:
            if keyword not in each:
                setattr(each, keyword, "")
    return slices


def frames(mask_file: Path, slices: Sequence[Any]) -> np.ndarray:
    """The mask's planes in the order of the slices, rows before columns.

    Args:
        mask_file: NIfTI, ``H W D`` (column, row, slice), as read from the series. A slice may lie beside its plane as
            far as the series' reader allows.
        slices: the series' images in any order.

    Returns:
        ``slices rows columns``, uint8.

    Raises:
        RefusedError: the mask is not on the series' grid.
    """
    image: Any = nib.Nifti1Image.from_filename(mask_file)
    mask, affine = np.asanyarray(image.dataobj) > 0, image.affine
    planes = []
    inverse, far = np.linalg.inv(affine), ASTRAY * np.linalg.norm(affine[:3, 2])
    for each in slices:
        place = np.array([*each.ImagePositionPatient, 1.0], dtype=float) * [-1, -1, 1, 1]
        index = inverse @ place
        number = round(float(index[2]))
        off = np.linalg.norm(affine[:3, :3] @ (index[:3] - [0, 0, number]))
        if off > far or not 0 <= number < mask.shape[2] or mask.shape[:2] != (each.Columns, each.Rows):
            uid = each.SeriesInstanceUID
            raise RefusedError(f"{mask_file} is not on the grid of the series {uid}: segment that series again.")
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
        ValueError: highdicom is not installed.
        RefusedError: the mask is not on the series' grid, or the images have a sex, date or time that is none, or
            several values where DICOM allows one.
    """
    highdicom = dicom_package("highdicom")
    coded = dicom_package("pydicom.sr.coding").Code
    planes = frames(mask_file, slices)
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
    _shorten(made, path)
    with atomic_file(path) as file:
        made.save_as(file)


def _refuse_strange(head: Any, path: Path) -> None:
    """What highdicom would refuse with a word that quotes the patient's data."""
    values = dicom_package("pydicom.valuerep")
    kinds = {"PatientBirthDate": values.DA, "StudyDate": values.DA, "StudyTime": values.TM, "PatientSex": SEXES.index}
    for keyword in EMPTY:
        wrong = ""
        if keyword in head and head[keyword].VM > 1:
            wrong = f"several values of {keyword}, where DICOM allows one"
        elif keyword in kinds:
            try:
                kinds[keyword](head.get(keyword) or "")
            except ValueError:
                wrong = f"a {keyword} that is none in DICOM"
        if wrong:
            raise RefusedError(
                f"{path} was not written, since the series {head.SeriesInstanceUID} has {wrong}: correct it or leave "
                "it empty. The mask is there."
            )


def _shorten(dataset: Any, path: Path) -> None:
    """Short strings that are longer than the standard allows are taken over from images that have them so.

    Half a number would be another number, so it is left empty, which the standard allows of these; a study's id is cut.
    """
    for element in list(dataset):
        if element.VR != "SH" or element.VM > 1 or len(str(element.value or "")) <= SHORT_STRING:
            continue
        kept = str(element.value)[:SHORT_STRING] if element.keyword == "StudyID" else ""
        dataset.add_new(element.tag, "SH", kept)  # anew, since the element may be the images' own
        if not kept:
            words = "%s: %s is left empty, since the images have one of more than the %d characters that DICOM allows."
            logger.warning(words, path, element.keyword, SHORT_STRING)


def _free_number(slices: Sequence[Any]) -> int:
    return int(slices[0].get("SeriesNumber") or 0) + 1000


def write_rtstruct(mask_file: Path, slices: Sequence[Any], label: str, path: Path) -> bool:
    """Write an RT structure set with the mask's outlines on every image of a series.

    Args:
        mask_file, slices, label, path: see ``write_seg``.

    Returns:
        Whether it was written: of an empty mask there is none, nor is one of an earlier mask left.

    Raises:
        ValueError: rt-utils is not installed.
        RefusedError: the mask is not on the series' grid.
    """
    made = _structure_set(slices)
    planes = frames(mask_file, made.series_data)
    if not planes.any():  # a structure set without structures is no valid one
        path.unlink(missing_ok=True)
        return False
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
    _shorten(made.ds, path)
    with atomic_file(path) as file:
        made.ds.save_as(file)
    return True


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
