# SPDX-License-Identifier: Apache-2.0
"""Read the headers of a folder of DICOM files and check that its slices form one volume.

Everything here goes through SimpleITK (GDCM), so that CT and MR series are read without the optional pydicom.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.dicom_classes import ENHANCED, IMAGES, MODALITY_OF_CLASS, no_image, sop_class_of
from scripts.image_io.dicom_enhanced import read_enhanced_header
from scripts.image_io.dicom_geometry import MAX_ROUNDING, geometry_numbers, spacing_warning, stack_affine
from scripts.image_io.dicom_structure import DamagedError, read_structure
from scripts.image_io.dicom_values import Rescale, check_pixel_format, check_rescale
from scripts.image_io.headers import Header, check_affine, check_max_voxels, itk_header

TAGS = {
    **{"SOPClassUID": "0008|0016", "SeriesInstanceUID": "0020|000e", "FrameOfReferenceUID": "0020|0052"},
    **{"PatientID": "0010|0020", "Modality": "0008|0060", "ImageType": "0008|0008", "NumberOfFrames": "0028|0008"},
    **{"ImagePositionPatient": "0020|0032", "ImageOrientationPatient": "0020|0037", "PixelSpacing": "0028|0030"},
    **{"RescaleIntercept": "0028|1052", "RescaleSlope": "0028|1053", "RescaleType": "0028|1054"},
    **{"BitsAllocated": "0028|0100", "BitsStored": "0028|0101", "HighBit": "0028|0102"},
    **{"PixelRepresentation": "0028|0103", "PhotometricInterpretation": "0028|0004"},
    **{"SpacingBetweenSlices": "0018|0088", "SliceThickness": "0018|0050", "NumberOfSlices": "0054|0081"},
}
UIDS = ("SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID")
UID_TEXT = re.compile(r"[0-9.]*")
MAX_NAMES = 4  # files that a message lists


class SeriesFiles(NamedTuple):
    """The files of one series in the order of their positions.

    Attributes:
        heads: headers by file.
        warnings, notes: about files of the folder that are left out.
    """

    heads: dict[str, sitk.ImageFileReader]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def series_files(folder: str | Path, series_uids: Sequence[str] = ()) -> SeriesFiles:
    """The files of the one series in a folder and their headers, in the order of their positions.

    Scouts (``LOCALIZER`` images) and objects that are no images, such as structure sets, are left out.

    Args:
        folder: only files directly in this folder are read.
        series_uids: series to read if there are several.

    Raises:
        ValueError: no DICOM series; several series, of which ``series_uids`` does not name exactly one; a slice without
            position, orientation or pixel size, which GDCM would guess; or a damaged file.
    """
    images, notes = _image_files(Path(folder))
    uids = sorted(images)
    if not uids:
        raise ValueError(f"{folder} contains no DICOM images. Give a file, or the folder of one series.")
    chosen = [uid for uid in uids if uid in series_uids] if len(uids) > 1 else uids
    read = {uid: _split_scouts(images[uid]) for uid in (chosen if len(chosen) == 1 else uids)}
    volumes = [uid for uid, (heads, _) in read.items() if heads]
    if not volumes:
        raise ValueError(f"{folder} contains only LOCALIZER images (scouts). Give the series of the volume.")
    if len(volumes) > 1:
        raise ValueError(
            f"{folder} contains {len(uids)} DICOM series ({', '.join(uids)}). Choose one with --series-uid."
        )
    heads = read[volumes[0]][0]
    excess = [path for path, head in heads.items() if _has_excess_pixels(head, path, images[volumes[0]][path])]
    for path, head in heads.items():
        if not all(uid.isascii() and "\\" not in uid for uid in (_text(head, keyword) for keyword in UIDS)):
            raise ValueError(f"{path} is a damaged DICOM file: its UIDs cannot be parsed. Export it again.")
        if not is_multiframe(head):
            _require_geometry(head, path)
    if len(heads) > 1 and any(is_multiframe(head) for head in heads.values()):
        raise ValueError(f"{folder} contains several multi-frame files. Keep one of them.")
    warnings = _scout_warning(folder, [path for _, scouts in read.values() for path in scouts])
    if excess:
        names = _first_names(Path(path).name for path in excess)
        warnings += (f"{folder} contains more pixel data than the sizes in its headers, which are used ({names})",)
    return SeriesFiles(_sort_by_position(heads), warnings, notes)


def _image_files(folder: Path) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """The image files of a folder by series, and a note about objects that are no images, such as structure sets.

    Returns:
        Bytes of pixel data by file by series UID (see ``Structure``); and the note, if there are such objects.

    Raises:
        ValueError: an image, or what may be one, is damaged: without it, the series would silently miss a slice.
    """
    images: dict[str, dict[str, int]] = defaultdict(dict)
    passed_over = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            structure = read_structure(path)
        except DamagedError as error:
            kind = no_image(sop_class_of(path) or "")
            if not kind:
                reason = f"is truncated or not a DICOM file (it {error})"
                raise ValueError(f"{path} {reason}. Export the series again, or remove the file.") from None
            passed_over[path.name] = kind
            continue
        if structure is None:
            if path.suffix.lower() == ".dcm" or not path.stat().st_size:
                reason = "is truncated or not a DICOM file"
                raise ValueError(f"{path} {reason}. Export the series again, or remove the file.")
        elif kind := no_image(structure.sop_class):
            passed_over[path.name] = kind
        elif structure.pixel_bytes:
            if not UID_TEXT.fullmatch(structure.series_uid):
                raise ValueError(f"{path} is a damaged DICOM file: its UIDs cannot be parsed. Export it again.")
            images[structure.series_uid][_text_name(path)] = structure.pixel_bytes
        elif structure.sop_class in IMAGES or not structure.sop_class:
            raise ValueError(f"{path} has no pixel data. Export the series again, or remove the file.")
        else:
            passed_over[path.name] = "no pixel data"
    return images, _no_image_note(folder, passed_over)


def _text_name(path: Path) -> str:
    """A path as text; ValueError if it is not UTF-8, which ends ITK."""
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError:
        name = path.name.encode("utf-8", "backslashreplace").decode("utf-8")
        raise ValueError(f"{path.parent} contains a file whose name is not UTF-8 ({name}). Rename it.") from None
    return str(path)


def _has_excess_pixels(head: sitk.ImageFileReader, path: str, pixel_bytes: int) -> bool:
    """Whether uncompressed pixel data are longer than the header states; ValueError if they are shorter."""
    bits = _text(head, "BitsAllocated")
    if pixel_bytes < 0 or not bits.isdecimal():
        return False
    stated = math.prod(head.GetSize()) * head.GetNumberOfComponents() * int(bits) // 8
    if pixel_bytes < stated:
        raise ValueError(f"{path} has {pixel_bytes} bytes of pixel data instead of {stated}. Export it again.")
    return pixel_bytes > stated + 1


def _split_scouts(paths: Iterable[str]) -> tuple[dict[str, sitk.ImageFileReader], list[str]]:
    """The headers of a series' slices, and the files of its scouts, which lie in other planes."""
    heads = {path: _read_head(path) for path in paths}
    scouts = [path for path, head in heads.items() if "LOCALIZER" in _text(head, "ImageType").upper().split("\\")]
    return {path: head for path, head in heads.items() if path not in scouts}, scouts


def _scout_warning(folder: str | Path, scouts: Sequence[str]) -> tuple[str, ...]:
    if not scouts:
        return ()
    count = f"{len(scouts)} LOCALIZER {'images' if len(scouts) > 1 else 'image'}"
    return (f"{folder}: left out {count} ({_first_names(Path(path).name for path in scouts)})",)


def _no_image_note(folder: str | Path, kinds: Mapping[str, str]) -> tuple[str, ...]:
    if not kinds:
        return ()
    return (f"{folder}: passed over what is no image ({_first_names(f'{n}: {k}' for n, k in sorted(kinds.items()))})",)


def _first_names(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - MAX_NAMES} more" if len(listed) > MAX_NAMES else ""
    return ", ".join(listed[:MAX_NAMES]) + more


def is_multiframe(head: sitk.ImageFileReader) -> bool:
    """Whether a file may contain many frames; their positions are in sequences, which SimpleITK does not show."""
    frames = _text(head, "NumberOfFrames") or "1"
    return _text(head, "SOPClassUID") in ENHANCED or frames != "1" or head.GetSize()[2:] not in ((), (1,))


def _require_geometry(head: sitk.ImageFileReader, path: str) -> None:
    """Refuse a slice without position, orientation or pixel size: GDCM would use the origin, straight axes and 1 mm."""
    for keyword in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
        geometry_numbers(_text(head, keyword), keyword, path)


def _sort_by_position(heads: dict[str, sitk.ImageFileReader]) -> dict[str, sitk.ImageFileReader]:
    """Sort slices along their normal. GDCM does this for some SOP classes only."""
    if len(heads) == 1:
        return heads
    normal = np.array(next(iter(heads.values())).GetDirection()).reshape(3, 3)[:, 2]
    along = {path: float(_position(head, path) @ normal) for path, head in heads.items()}
    return {path: heads[path] for path in sorted(along, key=lambda path: along[path])}


def read_series_header(folder: str | Path, series_uids: Sequence[str] = (), max_voxels: int | None = None) -> Header:
    """Read the header of every slice and check that they form one volume with values of a known unit.

    Raises:
        ValueError: see ``series_files``, ``check_rescale``, ``check_pixel_format`` and ``read_enhanced_header``; slices
            of several patients, frames of reference or grids; missing or duplicate slices, uneven distances, a tilted
            gantry, or more than ``max_voxels`` voxels.
    """
    files = series_files(folder, series_uids)
    heads = list(files.heads.values())
    series = _one_identity(heads, folder)
    if is_multiframe(heads[0]):
        (path,) = files.heads
        header = read_enhanced_header(path, str(folder), _modality(heads[0]), max_voxels)
        header = header._replace(series=series, slices=(path,), notes=files.notes, modality=_modality(heads[0]))
        return header._replace(warnings=files.warnings + header.warnings)
    for path, head in files.heads.items():
        check_pixel_format(lambda keyword, head=head: _text(head, keyword), path)  # type: ignore[misc]
    rescales = {
        path: Rescale(*(_text(head, f"Rescale{part}") for part in ("Slope", "Intercept", "Type")))
        for path, head in files.heads.items()
    }
    warnings = [*files.warnings, *check_rescale(rescales, _modality(heads[0]), str(folder))]
    header = itk_header(heads[0], str(folder))._replace(series=series, slices=tuple(files.heads), notes=files.notes)
    if len(heads) > 1:
        positions = np.array([_position(head, path) for path, head in files.heads.items()])
        affine = stack_affine(header.affine, positions, str(folder))
        header = header._replace(affine=affine, shape=(*header.shape[:2], len(heads)))
        warnings.append(spacing_warning(_text(heads[0], "SpacingBetweenSlices"), affine, str(folder)))
    elif not (_text(heads[0], "SpacingBetweenSlices") or _text(heads[0], "SliceThickness")):
        warnings.append(f"{folder} is one slice without SliceThickness: {header.affine[:3, 2].max():.3g} mm is used")
    header = header._replace(modality=_modality(heads[0]))
    warnings.append(_count_warning(heads, folder))
    if max_voxels is not None:
        check_max_voxels(folder, header.shape, max_voxels)
    check_affine(header.affine, str(folder))
    return header._replace(warnings=tuple(text for text in warnings if text))


def _one_identity(heads: Sequence[sitk.ImageFileReader], folder: str | Path) -> tuple[str, str, str]:
    """Series, patient and frame of reference; ValueError if slices have several, or several grids or modalities."""
    identities = [tuple(_text(h, k) for k in ("SeriesInstanceUID", "PatientID", "FrameOfReferenceUID")) for h in heads]
    axes = np.array([head.GetDirection() for head in heads])
    spacings = np.array([head.GetSpacing()[:2] for head in heads])
    differing = {
        "patients": len({patient for _, patient, _ in identities}) > 1,
        "frames of reference": len({frame for _, _, frame in identities}) > 1,
        "modalities": len({_modality(head) for head in heads}) > 1,
        "orientations": np.ptp(axes, axis=0).max() > MAX_ROUNDING,
        "sizes": len({head.GetSize() for head in heads}) > 1 or np.ptp(spacings, axis=0).max() > MAX_ROUNDING,
    }
    for what, differ in differing.items():
        if differ:
            raise ValueError(f"{folder} contains slices of several {what}. Keep those of one series.")
    uid, patient, frame = identities[0]
    return uid, patient, frame


def _modality(head: sitk.ImageFileReader) -> str:
    """DICOM's modality; that of the SOP class if the header has none."""
    return _text(head, "Modality") or MODALITY_OF_CLASS.get(_text(head, "SOPClassUID"), "")


def _count_warning(heads: Sequence[sitk.ImageFileReader], folder: str | Path) -> str:
    """A warning if a PET states more slices than there are files."""
    stated = _text(heads[0], "NumberOfSlices")
    if not stated.isdecimal() or int(stated) <= len(heads):
        return ""
    return f"{folder} has {len(heads)} slices, but a NumberOfSlices of {stated}: are slices missing?"


def _read_head(path: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    try:
        with _no_itk_warnings():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path} is a damaged DICOM file. Export it again.") from error
    return reader


def _text(head: sitk.ImageFileReader, keyword: str) -> str:
    """An element's text. Bytes that are not UTF-8 are escaped, so that different values stay different."""
    key = TAGS[keyword]
    text = str(head.GetMetaData(key)).strip(" \0") if head.HasMetaDataKey(key) else ""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _position(head: sitk.ImageFileReader, path: str) -> np.ndarray:
    return geometry_numbers(_text(head, "ImagePositionPatient"), "ImagePositionPatient", path)


@contextmanager
def _no_itk_warnings() -> Iterator[None]:
    """Suppress ITK's warnings on standard error, which repeat for every slice."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def is_pet(file: str) -> bool:
    """Whether a file belongs to a PET, whose values must still be converted to SUV."""
    return _modality(_read_head(file)) == "PT"
