# SPDX-License-Identifier: Apache-2.0
"""Read the headers of a folder of DICOM files and check that its slices form one volume.

Everything here goes through SimpleITK (GDCM), so that CT and MR series are read without the optional pydicom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.headers import LPS_TO_RAS, Header, check_affine, check_max_voxels, itk_header

SERIES_UID, PATIENT_ID, FRAME_UID = "0020|000e", "0010|0020", "0020|0052"
SOP_CLASS_UID, POSITION, MODALITY = "0008|0016", "0020|0032", "0008|0060"
ORIENTATION, PIXEL_SPACING = "0020|0037", "0028|0030"
MAX_UNEVENNESS = 0.02  # deviation of a slice distance, as a fraction of the median distance
MAX_OFFSET = 0.1  # distance of a slice from its position on an even grid, as a fraction of the median distance
MAX_ROUNDING = 1e-3  # differences between slices in direction (cosine) or voxel size (mm)


def series_slices(folder: str | Path, series_uids: Sequence[str] = ()) -> dict[str, sitk.ImageFileReader]:
    """The files of the one series in a folder and their headers, in the order of their positions.

    Args:
        folder: only files directly in this folder are read.
        series_uids: series to read if there are several.

    Raises:
        ValueError: no DICOM series; several series, of which ``series_uids`` does not name exactly one; a slice without
            position, orientation or pixel size, which GDCM would guess; or a folder that GDCM cannot list.
    """
    try:
        slices, listed_names = _list_series(folder, series_uids)
    except (RuntimeError, TypeError) as error:  # raised by GDCM, or for a file name that is not text
        raise ValueError(f"{folder} cannot be listed as DICOM. Export the series again, to another folder.") from error
    for path, head in slices.items():
        uids = [_tag(head, key) for key in (SERIES_UID, FRAME_UID, SOP_CLASS_UID)]
        if not all(uid.isascii() and "\\" not in uid for uid in uids):
            raise ValueError(f"{path} is a damaged DICOM file: its UIDs cannot be parsed. Export it again.")
        _require_geometry(head, path)
    slices = _sort_by_position(slices)
    _refuse_unreadable_slices(Path(folder), listed_names, _tag(next(iter(slices.values())), SOP_CLASS_UID))
    return slices


def _list_series(folder: str | Path, series_uids: Sequence[str]) -> tuple[dict[str, sitk.ImageFileReader], set[str]]:
    """Headers of the chosen series by file, and the names of all files that GDCM recognises as DICOM."""
    with _no_itk_warnings():
        uids = sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
        if not uids:
            raise ValueError(f"{folder} contains no DICOM images. Give a file, or the folder of one series.")
        chosen = [uid for uid in uids if uid in series_uids] if len(uids) > 1 else uids
        if len(chosen) != 1:
            raise ValueError(
                f"{folder} contains {len(uids)} DICOM series ({', '.join(uids)}). Choose one with --series-uid."
            )
        paths = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in uids}
    heads = {str(path): _read_head(str(path)) for path in paths[chosen[0]]}
    return heads, {Path(path).name for files in paths.values() for path in files}


def _require_geometry(head: sitk.ImageFileReader, path: str) -> None:
    """Refuse a file without position, orientation or pixel size: GDCM would use the origin, straight axes and 1 mm.

    A multi-frame file stores them in sequences, which SimpleITK does not show, so only GDCM's result can be checked.
    """
    if head.GetSize()[2:] in ((), (1,)):
        _numbers(head, path, PIXEL_SPACING, 2)
        _numbers(head, path, ORIENTATION, 6)
        _numbers(head, path, POSITION, 3)
    elif (*head.GetOrigin(), *head.GetDirection(), *head.GetSpacing()[:2]) == (0, 0, 0, *np.eye(3).ravel(), 1, 1):
        raise ValueError(f"{path} has no position and pixel size of its frames. Export it as single slices.")


def _sort_by_position(heads: dict[str, sitk.ImageFileReader]) -> dict[str, sitk.ImageFileReader]:
    """Sort slices along their normal. GDCM does this for some SOP classes only."""
    if len(heads) == 1:
        return heads
    normal = np.array(next(iter(heads.values())).GetDirection()).reshape(3, 3)[:, 2]
    along = {path: float(_position(head, path) @ normal) for path, head in heads.items()}
    return {path: heads[path] for path in sorted(along, key=lambda path: along[path])}


def _refuse_unreadable_slices(folder: Path, listed_names: set[str], sop_class: str) -> None:
    """Refuse a folder with truncated slices: GDCM skips them, and the series would silently miss slices."""
    uid = sop_class.strip("\0").encode()
    for path in sorted(folder.iterdir()):
        if path.name in listed_names or path.name.startswith(".") or not path.is_file():
            continue
        with open(path, "rb") as file:
            start = file.read(4096)
        not_dicom = path.suffix.lower() == ".dcm" and start[128:132] != b"DICM"
        if not start or not_dicom or (uid and b"UI" + bytes([len(uid) + len(uid) % 2, 0]) + uid in start):
            raise ValueError(f"{path} is truncated or not a DICOM file. Export the series again, or remove the file.")


def read_series_header(folder: str | Path, series_uids: Sequence[str] = (), max_voxels: int | None = None) -> Header:
    """Read the header of every slice and check that they form one volume.

    Raises:
        ValueError: see ``series_slices``; slices of several patients, frames of reference or grids; missing or
            duplicate slices, uneven distances, a tilted gantry, or more than ``max_voxels`` voxels.
    """
    slices = series_slices(folder, series_uids)
    heads = list(slices.values())
    tags = [{key: _tag(head, key) for key in (SERIES_UID, PATIENT_ID, FRAME_UID)} for head in heads]
    axes = np.array([head.GetDirection() for head in heads])
    spacings = np.array([head.GetSpacing()[:2] for head in heads])
    differing = {
        "patients": len({tag[PATIENT_ID] for tag in tags}) > 1,
        "frames of reference": len({tag[FRAME_UID] for tag in tags}) > 1,
        "orientations": np.ptp(axes, axis=0).max() > MAX_ROUNDING,
        "sizes": len({head.GetSize() for head in heads}) > 1 or np.ptp(spacings, axis=0).max() > MAX_ROUNDING,
    }
    for what, differ in differing.items():
        if differ:
            raise ValueError(f"{folder} contains slices of several {what}. Keep those of one series.")
    series = (tags[0][SERIES_UID], tags[0][PATIENT_ID], tags[0][FRAME_UID])
    header = itk_header(heads[0], str(folder))._replace(series=series, slices=tuple(slices))
    if len(slices) > 1:
        if header.shape[2:] != (1,):
            raise ValueError(f"{folder} contains several multi-frame files. Keep one of them.")
        positions = np.array([_position(head, path) for path, head in slices.items()])
        affine = _stack_affine(header.affine, positions, str(folder))
        header = header._replace(affine=affine, shape=(*header.shape[:2], len(slices)))
    if max_voxels is not None:
        check_max_voxels(folder, header.shape, max_voxels)
    check_affine(header.affine, str(folder))
    return header


def _stack_affine(affine: np.ndarray, positions: np.ndarray, folder: str) -> np.ndarray:
    """The affine (RAS) of a stack of slices.

    Args:
        affine: of the first slice.
        positions: of all slices in their order, N x 3, LPS.
        folder: for error messages.
    """
    advice = "Export the whole series again, or resample it to even distances."
    places = positions @ LPS_TO_RAS[:3, :3]
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    distances = np.diff(np.sort(places @ (normal / np.linalg.norm(normal))))
    median = float(np.median(distances))
    if median == 0 or (distances < MAX_UNEVENNESS * median).any():
        raise ValueError(f"{folder} contains several slices at one position. Keep one of each.")
    uneven = np.abs(distances - median) > MAX_UNEVENNESS * median
    if uneven.any():
        gap = int(np.flatnonzero(uneven)[0])
        missing = round(float(distances[gap]) / median) - 1
        where = f"{distances[gap]:.2f} mm after slice {gap + 1} of {len(places)}, {median:.2f} mm elsewhere"
        lacks_slices = missing > 0 and abs(distances[gap] / median - missing - 1) < 0.1
        fault = "has missing slices" if lacks_slices else "has uneven slice distances"
        raise ValueError(f"{folder} {fault} ({where}). {advice}")
    stacked = affine.copy()
    stacked[:3, 2] = (places[-1] - places[0]) / (len(places) - 1)
    stacked[:3, 3] = places[0]
    offsets = np.linalg.norm(places - places[0] - np.arange(len(places))[:, None] * stacked[:3, 2], axis=1)
    if offsets.max() > MAX_OFFSET * median:
        where = f"slice {int(offsets.argmax()) + 1} of {len(places)} lies {offsets.max():.2f} mm off the even grid"
        raise ValueError(f"{folder} has uneven slice distances ({where}). {advice}")
    return stacked


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


def _tag(head: sitk.ImageFileReader, key: str) -> str:
    """A tag's text. Bytes that are not UTF-8 are escaped, so that different values stay different."""
    text = str(head.GetMetaData(key)).strip() if head.HasMetaDataKey(key) else ""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _position(head: sitk.ImageFileReader, path: str) -> np.ndarray:
    return _numbers(head, path, POSITION, 3)


def _numbers(head: sitk.ImageFileReader, path: str, key: str, count: int) -> np.ndarray:
    """The numbers of a tag; ValueError if there are none, or not ``count`` finite ones."""
    keyword = {POSITION: "ImagePositionPatient", ORIENTATION: "ImageOrientationPatient", PIXEL_SPACING: "PixelSpacing"}
    text = _tag(head, key)
    if not text:
        raise ValueError(f"{path} has no {keyword[key]}. Export the series as slices that contain it.")
    try:
        numbers = np.array([float(part) for part in text.split("\\") if part])
    except ValueError:
        numbers = np.array([])
    if numbers.shape != (count,) or not np.isfinite(numbers).all() or (key == PIXEL_SPACING and (numbers <= 0).any()):
        raise ValueError(f"{path} is a damaged DICOM file: its {keyword[key]} is not valid. Export it again.")
    return numbers


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
    """Whether a slice belongs to a PET, whose stored values must still be converted to SUV."""
    return _tag(_read_head(file), MODALITY) == "PT"
