# SPDX-License-Identifier: Apache-2.0
"""Write a mask as a DICOM segmentation (SEG) or structure set (RTSTRUCT) that references the segmented images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.image_io.dicom_codes import MAX_LONG, Property
from scripts.image_io.dicom_geometry import MAX_OFFSET
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.headers import LPS_TO_RAS
from scripts.utils.atomic_files import atomic_file
from scripts.utils.colours import region_colour

logger = logging.getLogger(__name__)

MANUFACTURER, MODEL = "multi-teacher-distillation-bundle", "distilled student"
Regions = Mapping[str, Sequence[float]]  # name -> values of the mask
# Copied from the images into the written files. The standard requires these elements, but they may be empty.
COPIED_KEYWORDS = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
UTF_8 = "ISO_IR 192"
SEXES = ("", "M", "F", "O")
MAX_SHORT_STRING = 16  # characters of DICOM's VR SH


class RefusedError(ValueError):
    """The mask was not written. The message contains no patient data."""


def read_slices(files: Sequence[str]) -> list[Any]:
    """Read a series with pydicom; elements of ``COPIED_KEYWORDS`` that are missing are added empty."""
    pydicom = dicom_package("pydicom")
    slices = [pydicom.dcmread(file) for file in files]
    for dataset in slices:
        for keyword in COPIED_KEYWORDS:
            if keyword not in dataset:
                setattr(dataset, keyword, "")
    return slices


def mask_planes(mask_file: Path, slices: Sequence[Any]) -> np.ndarray:
    """The mask's planes in the order of the slices, rows before columns.

    Args:
        mask_file: NIfTI, ``H W D`` (column, row, slice), on the grid of the series. A slice may lie off its plane as
            far as ``scripts.image_io.dicom_geometry`` accepts.
        slices: the series' images in any order, or one multi-frame image.

    Returns:
        ``slices rows columns``, the mask's values; the frames of a multi-frame image in the order of the file.

    Raises:
        RefusedError: the mask is not on the series' grid.
    """
    image: Any = nib.Nifti1Image.from_filename(mask_file)
    mask, affine = np.asanyarray(image.dataobj), image.affine
    planes = []
    inverse, max_offset = np.linalg.inv(affine), MAX_OFFSET * np.linalg.norm(affine[:3, 2])
    for position, dataset in _positions(slices):
        index = inverse @ position
        number = round(float(index[2]))
        offset = np.linalg.norm(affine[:3, :3] @ (index[:3] - [0, 0, number]))
        same_size = mask.shape[:2] == (dataset.Columns, dataset.Rows)
        if offset > max_offset or not 0 <= number < mask.shape[2] or not same_size:
            uid = dataset.SeriesInstanceUID
            raise RefusedError(f"{mask_file} is not on the grid of the series {uid}. Segment that series again.")
        planes.append(mask[:, :, number].T)
    return np.stack(planes)


def _positions(slices: Sequence[Any]) -> Iterator[tuple[np.ndarray, Any]]:
    """Position (mm, RAS, homogeneous) of each slice or frame, and its data set."""
    for dataset in slices:
        frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
        for image in [frame.PlanePositionSequence[0] for frame in frames] or [dataset]:
            yield LPS_TO_RAS @ np.array([*image.ImagePositionPatient, 1.0], dtype=float), dataset


def write_seg(
    mask_file: Path,
    slices: Sequence[Any],
    regions: Regions,
    properties: Mapping[str, Property],
    version: str,
    path: Path,
) -> None:
    """Write a binary DICOM segmentation with one segment per region that references every image.

    Segments may overlap. The segment of an empty region is described and has no frames, so that a region has the same
    number in every file of a task.

    Args:
        mask_file: NIfTI on the series' own grid.
        slices: the series' images, in the order of their positions.
        regions: name -> values of the mask.
        properties: what each region is, see ``segment_properties``.
        version: of the software.
        path: the file to write.

    Raises:
        ValueError: highdicom is not installed.
        RefusedError: the mask is not on the series' grid, or the images have an invalid sex, date or time, or several
            values where DICOM allows one.
    """
    highdicom = dicom_package("highdicom")
    planes = mask_planes(mask_file, slices)
    _refuse_invalid_values(slices[0], path)
    pixels = np.stack([np.isin(planes, list(values)) for values in regions.values()], axis=-1).astype(np.uint8)
    segmentation = highdicom.seg.Segmentation(
        source_images=list(slices),
        pixel_array=pixels,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _segment(number, name, properties[name], version) for number, name in enumerate(regions, start=1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=int(slices[0].get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL,
        software_versions=version,
        device_serial_number="0",
        series_description=_description(regions),
        specific_character_set=_character_set(slices[0], [*regions, *(each.type[2] for each in properties.values())]),
        omit_empty_frames=bool(pixels.any()),  # a segmentation without frames is not valid
    )
    _shorten(segmentation, path)
    with atomic_file(path) as file:
        segmentation.save_as(file)


def _segment(number: int, name: str, what: Property, version: str) -> Any:
    """The description of a segment; ``number`` counts from 1."""
    highdicom = dicom_package("highdicom")
    code = dicom_package("pydicom.sr.coding").Code
    families = dicom_package("pydicom.sr.codedict").codes.cid7162
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=code(*what.category),
        segmented_property_type=code(*what.type),
        anatomic_regions=[code(*what.anatomy)] if what.anatomy else None,
        display_color=highdicom.color.CIELabColor.from_string(region_colour(number - 1)),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=MANUFACTURER, family=families.ArtificialIntelligence, version=version
        ),
    )


def _description(regions: Regions) -> str:
    """The description of a series; it names the regions if DICOM has room for them."""
    named = f"{', '.join(regions)}, research only"
    return named if len(named) <= MAX_LONG else "Segmentation, research only"


def _character_set(head: Any, texts: Iterable[str]) -> Any:
    """The encoding of the images, in which the patient's name is written, or UTF-8 if a text of the task needs it."""
    return head.get("SpecificCharacterSet") if all(text.isascii() for text in texts) else UTF_8


def _refuse_invalid_values(head: Any, path: Path) -> None:
    """Refuse values that highdicom would refuse with a message that quotes patient data."""
    valuerep = dicom_package("pydicom.valuerep")
    parsers = {
        **{"PatientBirthDate": valuerep.DA, "StudyDate": valuerep.DA, "StudyTime": valuerep.TM},
        "PatientSex": SEXES.index,
    }
    for keyword in COPIED_KEYWORDS:
        fault = ""
        if keyword in head and head[keyword].VM > 1:
            fault = f"several values of {keyword}, where DICOM allows one"
        elif keyword in parsers:
            try:
                parsers[keyword](head.get(keyword) or "")
            except ValueError:
                fault = f"an invalid {keyword}"
        if fault:
            raise RefusedError(
                f"{path} was not written: the series {head.SeriesInstanceUID} has {fault}. Correct it or leave it "
                "empty. The NIfTI mask has been written."
            )


def _shorten(dataset: Any, path: Path) -> None:
    """Bring short strings (VR SH) that were copied from the images to the length that DICOM allows.

    The study id is truncated. All others are emptied, which the standard allows, because half of an accession number
    would be another number.
    """
    for element in list(dataset):
        if element.VR != "SH" or element.VM > 1 or len(str(element.value or "")) <= MAX_SHORT_STRING:
            continue
        shortened = str(element.value)[:MAX_SHORT_STRING] if element.keyword == "StudyID" else ""
        dataset.add_new(element.tag, "SH", shortened)  # a new element: the old one may be shared with the images
        if not shortened:
            message = "%s: %s is left empty, because the images' value exceeds DICOM's limit of %d characters."
            logger.warning(message, path, element.keyword, MAX_SHORT_STRING)


def write_rtstruct(mask_file: Path, slices: Sequence[Any], regions: Regions, path: Path) -> list[str]:
    """Write an RT structure set with the contours of each region on every image of a series.

    Args:
        mask_file, slices, regions, path: see ``write_seg``.

    Returns:
        The regions that have a structure. If all are empty, no file is written, and an existing one is removed.

    Raises:
        ValueError: rt-utils is not installed.
        RefusedError: the mask is not on the series' grid.
    """
    structure_set = _empty_structure_set(slices)
    planes = mask_planes(mask_file, structure_set.series_data)
    written = []
    for number, (name, values) in enumerate(regions.items()):
        inside = np.isin(planes, list(values))
        if inside.any():  # a structure without contours is not valid
            structure_set.add_roi(mask=np.moveaxis(inside, 0, -1), color=region_colour(number), name=name)
            written.append(name)
    if not written:
        path.unlink(missing_ok=True)
        return written
    to_decimal_string = dicom_package("pydicom.valuerep").format_number_as_ds  # at most 16 characters each
    dataset = structure_set.ds
    for contours in dataset.get("ROIContourSequence", []):
        for contour in contours.ContourSequence:
            contour.ContourData = [to_decimal_string(float(value)) for value in contour.ContourData]
    dataset.SeriesDescription = _description(regions)
    dataset.Manufacturer, dataset.ManufacturerModelName = MANUFACTURER, MODEL
    del dataset.InstitutionName  # rt-utils writes its own
    dataset.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
    for keyword in ("ReferringPhysicianName", "AccessionNumber", "OperatorsName", "PositionReferenceIndicator"):
        setattr(dataset, keyword, slices[0].get(keyword, ""))  # required, may be empty, and omitted by rt-utils
    dataset.SpecificCharacterSet = _character_set(slices[0], regions) or dataset.SpecificCharacterSet
    _shorten(dataset, path)
    with atomic_file(path) as file:
        dataset.save_as(file)
    return written


def _empty_structure_set(slices: Sequence[Any]) -> Any:
    """An rt-utils structure set without structures.

    rt-utils' own reader would read every image below a folder, of any series, so it is given the images. It takes the
    first ``PixelSpacing`` (between rows) for the step along a row, so the images get the two exchanged.
    """
    helper = dicom_package("rt_utils.image_helper")
    exchanged = []
    for dataset in slices:
        copy = dicom_package("pydicom").Dataset()
        copy.update(dataset)  # shares the elements, therefore the next line adds a new one
        copy.add_new("PixelSpacing", "DS", dataset.PixelSpacing[::-1])
        exchanged.append(copy)
    exchanged.sort(key=helper.get_slice_position)
    empty = dicom_package("rt_utils.ds_helper").create_rtstruct_dataset(exchanged)
    return dicom_package("rt_utils").RTStruct(exchanged, empty)
