# SPDX-License-Identifier: Apache-2.0
"""A folder of DICOM files: which series it holds, and whether its slices make one volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.headers import Header, check_affine, itk_header

SERIES, PATIENT, FRAME = "0020|000e", "0010|0020", "0020|0052"
CLASS, POSITION, MODALITY = "0008|0016", "0020|0032", "0008|0060"
ORIENTATION, PIXELS = "0020|0037", "0028|0030"
UNEVEN = 0.02  # share of the distance between slices by which it may vary
ASTRAY = 0.1  # share of it by which a slice may lie beside its place, after all of these
ROUNDED = 1e-3  # by which slices may differ in a direction (cosine) or in the size of their voxels (mm)


def series_slices(folder: str | Path, series_uids: Sequence[str] = ()) -> dict[str, sitk.ImageFileReader]:
    """The files of the one series in a folder and their heads, in the order of their positions.

    Args:
        folder: whose own files are looked at, not those of folders in it.
        series_uids: series to take where there are several.

    Raises:
        ValueError: no DICOM series; several, of which not exactly one is named by ``series_uids``; a slice whose place
            or pixels' size GDCM would have to guess; or a folder that GDCM cannot list.
    """
    try:
        slices, listed = _listed(folder, series_uids)
    except (RuntimeError, TypeError) as error:  # of GDCM, or of a name that is no text
        raise ValueError(f"{folder} cannot be listed as DICOM: export the series again, to another folder.") from error
    for name, head in slices.items():
        if not all(_tag(head, key).isascii() and "\\" not in _tag(head, key) for key in (SERIES, FRAME, CLASS)):
            raise ValueError(f"{name} is a damaged DICOM file, whose header garbles its UIDs: export it again.")
        _require_place(head, name)
    slices = _ordered(slices)
    _refuse_lost(Path(folder), listed, _tag(next(iter(slices.values())), CLASS))
    return slices


def _listed(folder: str | Path, series_uids: Sequence[str]) -> tuple[dict[str, sitk.ImageFileReader], set[str]]:
    """The chosen series' files and their heads, and the names of all files that GDCM takes for DICOM."""
    with _quiet():
        found = sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
        if not found:
            raise ValueError(f"{folder} holds no DICOM image: give a file, or the folder of one series.")
        chosen = [uid for uid in found if uid in series_uids] if len(found) > 1 else found
        if len(chosen) != 1:
            raise ValueError(
                f"{folder} holds {len(found)} DICOM series ({', '.join(found)}): choose one by --series-uid."
            )
        files = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in found}
    heads = {str(name): _head(str(name)) for name in files[chosen[0]]}
    return heads, {Path(name).name for names in files.values() for name in names}


def _require_place(head: sitk.ImageFileReader, name: str) -> None:
    """GDCM takes pixels of 1 mm, straight axes and the origin where a file does not tell.

    A file of several frames tells them in sequences, which SimpleITK does not show: only what GDCM takes can be judged.
    """
    if head.GetSize()[2:] in ((), (1,)):
        _numbers(head, name, PIXELS, 2, "the size of its pixels")
        _numbers(head, name, ORIENTATION, 6, "its slice's orientation")
        _numbers(head, name, POSITION, 3, "its slice's position")
    elif (*head.GetOrigin(), *head.GetDirection(), *head.GetSpacing()[:2]) == (0, 0, 0, *np.eye(3).ravel(), 1, 1):
        raise ValueError(f"{name} says nothing of its frames' places and sizes: export it again, as single slices.")


def _ordered(heads: dict[str, sitk.ImageFileReader]) -> dict[str, sitk.ImageFileReader]:
    """By position along the slices' normal, which GDCM sees to for most kinds of files only."""
    if len(heads) == 1:
        return heads
    normal = np.array(next(iter(heads.values())).GetDirection()).reshape(3, 3)[:, 2]
    along = {name: float(_position(head, name) @ normal) for name, head in heads.items()}
    return {name: heads[name] for name in sorted(along, key=lambda name: along[name])}


def _refuse_lost(folder: Path, listed: set[str], sop_class: str) -> None:
    """GDCM leaves out what it cannot read, so that a series would end before a slice that is cut off."""
    kind = sop_class.strip("\0").encode()
    for path in sorted(folder.iterdir()):
        if path.name in listed or path.name.startswith(".") or not path.is_file():
            continue
        with open(path, "rb") as file:
            start = file.read(4096)
        named = path.suffix.lower() == ".dcm" and start[128:132] != b"DICM"
        if not start or named or (kind and b"UI" + bytes([len(kind) + len(kind) % 2, 0]) + kind in start):
            raise ValueError(f"{path} is cut off or no DICOM file: export the series again, or take the file away.")


def read_series_header(folder: str | Path, series_uids: Sequence[str] = (), max_voxels: int | None = None) -> Header:
    """Read every slice's head and judge whether they make one volume.

    Raises:
        ValueError: see ``series_slices``; slices of several patients, frames of reference or grids, a missing or a
            doubled slice, uneven distances, a tilted gantry, or more than ``max_voxels``.
    """
    slices = series_slices(folder, series_uids)
    heads = list(slices.values())
    tags = [{key: _tag(head, key) for key in (SERIES, PATIENT, FRAME)} for head in heads]
    for key, what in ((PATIENT, "patients"), (FRAME, "frames of reference")):
        if len({tag[key] for tag in tags}) > 1:
            raise ValueError(f"{folder} holds slices of several {what}: keep those of one series.")
    axes = np.array([head.GetDirection() for head in heads])
    if np.ptp(axes, axis=0).max() > ROUNDED:
        raise ValueError(f"{folder} holds slices of several orientations: keep those of one series.")
    spacings = np.array([head.GetSpacing()[:2] for head in heads])
    if len({head.GetSize() for head in heads}) > 1 or np.ptp(spacings, axis=0).max() > ROUNDED:
        raise ValueError(f"{folder} holds slices of several sizes: keep those of one series.")
    series = (tags[0][SERIES], tags[0][PATIENT], tags[0][FRAME])
    header = itk_header(heads[0], str(folder))._replace(series=series, slices=tuple(slices))
    if len(slices) > 1:
        if header.shape[2:] != (1,):
            raise ValueError(f"{folder} holds several files of several slices each: keep one of them.")
        positions = np.array([_position(head, name) for name, head in slices.items()])
        affine = _stacked(header.affine, positions, str(folder))
        header = header._replace(affine=affine, shape=(*header.shape[:2], len(slices)))
    if max_voxels is not None and header.voxels > max_voxels:
        raise ValueError(f"{folder} holds {header.voxels} voxels, more than the cap of {max_voxels}: see --max-voxels.")
    check_affine(header.affine, str(folder))
    return header


def _stacked(affine: np.ndarray, positions: np.ndarray, name: str) -> np.ndarray:
    """The affine of the stack; positions are LPS, in the order of the slices."""
    places = positions * [-1, -1, 1]
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    along = np.diff(np.sort(places @ (normal / np.linalg.norm(normal))))
    usual = float(np.median(along))
    if usual == 0 or (along < UNEVEN * usual).any():
        raise ValueError(f"{name} holds several slices of one position: keep one of each.")
    off = np.abs(along - usual) > UNEVEN * usual
    if off.any():
        gap = int(np.flatnonzero(off)[0])
        missing = round(float(along[gap]) / usual) - 1
        distance = f"{along[gap]:.2f} mm behind slice {gap + 1} of {len(places)}, {usual:.2f} mm elsewhere"
        what = "lacks slices" if missing > 0 and abs(along[gap] / usual - missing - 1) < 0.1 else "is uneven"
        raise ValueError(f"{name} {what} ({distance}): export the whole series again, or resample it evenly.")
    stacked = affine.copy()
    stacked[:3, 2] = (places[-1] - places[0]) / (len(places) - 1)
    stacked[:3, 3] = places[0]
    astray = np.linalg.norm(places - places[0] - np.arange(len(places))[:, None] * stacked[:3, 2], axis=1)
    if astray.max() > ASTRAY * usual:
        number = int(astray.argmax()) + 1
        where = f"slice {number} of {len(places)} lies {astray.max():.2f} mm beside its place in the row"
        raise ValueError(f"{name} is uneven ({where}): export the whole series again, or resample it evenly.")
    return stacked


def _head(name: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(name)
    try:
        with _quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{name} is a damaged DICOM file: export it again.") from error
    return reader


def _tag(head: sitk.ImageFileReader, key: str) -> str:
    """As text that can be written anywhere; bytes that are no UTF-8, as of names or of damage, stay distinct."""
    text = str(head.GetMetaData(key)).strip() if head.HasMetaDataKey(key) else ""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _position(head: sitk.ImageFileReader, name: str) -> np.ndarray:
    return _numbers(head, name, POSITION, 3, "its slice's position")


def _numbers(head: sitk.ImageFileReader, name: str, key: str, count: int, what: str) -> np.ndarray:
    text = _tag(head, key)
    if not text:
        raise ValueError(f"{name} says nothing of {what}: export the series as slices that do.")
    try:
        numbers = np.array([float(part) for part in text.split("\\") if part])
    except ValueError:
        numbers = np.array([])
    if numbers.shape != (count,) or not np.isfinite(numbers).all() or (key == PIXELS and (numbers <= 0).any()):
        raise ValueError(f"{name} is a damaged DICOM file, whose header garbles {what}: export it again.")
    return numbers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ITK's warnings on standard error, which repeat per slice."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def is_pet(file: str) -> bool:
    """Whether a slice is of a PET, whose stored values are not SUV yet."""
    return _tag(_head(file), MODALITY) == "PT"
