# SPDX-License-Identifier: Apache-2.0
"""Write a mask as a DICOM segmentation (SEG) that references the segmented images.

Structure sets and structured reports share its planes on the slices of a series, and the elements copied from these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def without_patient_data(
    path: Path, series_uid: str, mask: Path, hint: str = "", debug: bool = False
) -> Iterator[None]:
    """Replace errors of the DICOM packages, whose text may quote the patient's data.

    Args:
        path: the file that is written in the block.
        series_uid: of the images.
        mask: the NIfTI mask.
        hint: what to do, as the last sentence.
        debug: let the errors through.

    Raises:
        ValueError: the file could not be written.
    """
    try:
        yield
    except (RefusedError, OSError):
        raise
    except Exception as error:
        if debug:
            raise
        raise ValueError(
            f"{path} was not written ({type(error).__name__}): the headers of the series {series_uid} do not fit. "
            f"The mask was written to {mask}. {hint}".rstrip()
        ) from None


def read_slices(files: Sequence[str]) -> list[Any]:
    """Read a series with pydicom; elements that are missing and that highdicom asks for are added empty."""
    pydicom = dicom_package("pydicom")
    slices = [pydicom.dcmread(file) for file in files]
    for dataset in slices:
        for keyword in (*COPIED_KEYWORDS, "SliceThickness"):
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
    return order_planes(np.asanyarray(image.dataobj), image.affine, slices, mask_file)


def order_planes(voxels: np.ndarray, affine: np.ndarray, slices: Sequence[Any], mask_file: Path) -> np.ndarray:
    """The planes of voxels on the grid of a mask; arguments and errors as for ``mask_planes``."""
    planes = []
    inverse, max_offset = np.linalg.inv(affine), MAX_OFFSET * np.linalg.norm(affine[:3, 2])
    for position, dataset in _positions(slices):
        index = inverse @ position
        number = round(float(index[2]))
        offset = np.linalg.norm(affine[:3, :3] @ (index[:3] - [0, 0, number]))
        same_size = voxels.shape[:2] == (dataset.Columns, dataset.Rows)
        if offset > max_offset or not 0 <= number < voxels.shape[2] or not same_size:
            uid = dataset.SeriesInstanceUID
            raise RefusedError(f"{mask_file} is not on the grid of the series {uid}. Segment that series again.")
        planes.append(voxels[:, :, number].T)
    return np.stack(planes)


def _positions(slices: Sequence[Any]) -> Iterator[tuple[np.ndarray, Any]]:
    """Position (mm, RAS, homogeneous) of each slice or frame, and its data set."""
    for dataset in slices:
        frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
        for image in [frame.PlanePositionSequence[0] for frame in frames] or [dataset]:
            yield LPS_TO_RAS @ np.array([*image.ImagePositionPatient, 1.0], dtype=float), dataset


def new_series(source: Any, offset: int, version: str) -> dict[str, Any]:
    """The arguments of highdicom's objects for a new series of one object, written by this program.

    Args:
        source: header of an image that the object refers to.
        offset: from the number of its series to that of the new one.
        version: of this program.
    """
    highdicom = dicom_package("highdicom")
    return {
        "series_instance_uid": highdicom.UID(),
        "series_number": int(source.get("SeriesNumber") or 0) + offset,
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL,
        "software_versions": version,
        "device_serial_number": "0",
    }


def write_seg(
    mask_file: Path,
    slices: Sequence[Any],
    regions: Regions,
    properties: Mapping[str, Property],
    version: str,
    path: Path,
    lesions: Sequence[tuple[str, int]] = (),
) -> None:
    """Write a binary DICOM segmentation with one segment per region that references every image.

    Segments may overlap. The segment of an empty region is described and has no frames, so that a region has the same
    number in every file of a task. Every segment has a tracking id, which is its full name, and a tracking UID.

    Args:
        mask_file: NIfTI on the series' own grid.
        slices: the series' images, in the order of their positions.
        regions: name -> values of the mask.
        properties: what each region is, see ``segment_properties``.
        version: of the software.
        path: the file to write.
        lesions: region and number of each lesion that gets a segment of its own, after those of all regions; the
            numbers are those of ``find_lesions``.

    Raises:
        ValueError: highdicom is not installed.
        RefusedError: the mask is not on the series' grid, or the images have an invalid sex, date or time, or several
            values where DICOM allows one.
    """
    highdicom = dicom_package("highdicom")
    planes = _planes(mask_file, slices, regions, lesions)
    refuse_invalid_values(slices[0], path)
    pixels = np.stack(planes, axis=-1).astype(np.uint8)
    segmentation = highdicom.seg.Segmentation(
        source_images=list(slices),
        pixel_array=pixels,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=_segments(regions, properties, version, lesions),
        series_description=series_description(regions),
        **new_series(slices[0], 1000, version),
        specific_character_set=character_set(slices[0], [*regions, *(each.type[2] for each in properties.values())]),
        omit_empty_frames=bool(pixels.any()),  # a segmentation without frames is not valid
    )
    shorten_strings(segmentation, path)
    with atomic_file(path) as file:
        segmentation.save_as(file)


def tracking_id(region: str, lesion: int | None = None) -> str:
    """The tracking id of a region, or of a lesion by its number."""
    return region if lesion is None else f"{region} lesion {lesion}"


def _planes(
    mask_file: Path, slices: Sequence[Any], regions: Regions, lesions: Sequence[tuple[str, int]]
) -> list[np.ndarray]:
    """The planes of each segment, see ``mask_planes``."""
    image: Any = nib.Nifti1Image.from_filename(mask_file)
    mask = np.asanyarray(image.dataobj)
    inside = {name: np.isin(mask, list(values)) for name, values in regions.items()}
    volumes = [*inside.values()]
    if lesions:
        from scripts.metrics.lesion_shape import find_lesions  # needs SciPy, which a runtime folder does without

        components = {name: find_lesions(inside[name]) for name in {name for name, _ in lesions}}
        volumes += [components[name][number - 1].within(mask.shape) for name, number in lesions]
    return [order_planes(each, image.affine, slices, mask_file) for each in volumes]


def _segments(
    regions: Regions, properties: Mapping[str, Property], version: str, lesions: Sequence[tuple[str, int]]
) -> list[Any]:
    """The descriptions of all segments."""
    colours = {name: region_colour(number) for number, name in enumerate(regions)}
    keys = [*((name, None) for name in regions), *lesions]
    return [
        _segment(number, name, lesion, properties[name], colours[name], version)
        for number, (name, lesion) in enumerate(keys, start=1)
    ]


def _segment(number: int, region: str, lesion: int | None, what: Property, colour: str, version: str) -> Any:
    """The description of a segment; ``number`` counts from 1."""
    highdicom = dicom_package("highdicom")
    code = dicom_package("pydicom.sr.coding").Code
    families = dicom_package("pydicom.sr.codedict").codes.cid7162
    name = tracking_id(region, lesion)
    suffix = name.removeprefix(region)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=region[: MAX_LONG - len(suffix)] + suffix,
        segmented_property_category=code(*what.category),
        segmented_property_type=code(*what.type),
        anatomic_regions=[code(*what.anatomy)] if what.anatomy else None,
        tracking_id=name,
        tracking_uid=highdicom.UID(),
        display_color=highdicom.color.CIELabColor.from_string(colour),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=MANUFACTURER, family=families.ArtificialIntelligence, version=version
        ),
    )


def series_description(regions: Regions) -> str:
    """The description of a series; it names the regions if DICOM has room for them."""
    named = f"{', '.join(regions)}, research only"
    return named if len(named) <= MAX_LONG else "Segmentation, research only"


def character_set(head: Any, texts: Iterable[str]) -> Any:
    """The encoding of the images, in which the patient's name is written.

    It is UTF-8 if a text of the task needs it, or if highdicom does not take that of the images: an empty value, or one
    of several that is empty, as in Japan and Korea.
    """
    value = head.get("SpecificCharacterSet")
    given = [value] if isinstance(value, str) else list(value or [""])
    known = dicom_package("pydicom.charset").python_encoding
    fits = "SpecificCharacterSet" not in head or all(each and each in known for each in given)
    return value if fits and all(text.isascii() for text in texts) else UTF_8


def refuse_invalid_values(head: Any, path: Path) -> None:
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


def shorten_strings(dataset: Any, path: Path) -> None:
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
