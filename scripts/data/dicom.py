# SPDX-License-Identifier: Apache-2.0
"""A folder of DICOM files: which series it holds, and whether its slices make one volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.data.headers import Header, check_affine, itk_header

SERIES, PATIENT, FRAME = "0020|000e", "0010|0020", "0020|0052"
POSITION, ORIENTATION, MODALITY = "0020|0032", "0020|0037", "0008|0060"
UNEVEN = 0.02  # share of the distance between slices by which it may vary


def series_files(folder: str | Path, series_uids: Sequence[str] = ()) -> list[str]:
    """The files of the one series in a folder, in the order of their positions.

    Args:
        folder: whose own files are looked at, not those of folders in it.
        series_uids: series to take where there are several.

    Raises:
        ValueError: no DICOM series; several, of which not exactly one is named by ``series_uids``.
    """
    with _quiet():
        found = sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
        if not found:
            raise ValueError(f"{folder} holds no DICOM image: give a file, or the folder of one series.")
        chosen = [uid for uid in found if uid in series_uids] if len(found) > 1 else found
        if len(chosen) != 1:
            raise ValueError(
                f"{folder} holds {len(found)} DICOM series ({', '.join(found)}): choose one by --series-uid."
            )
        return [str(name) for name in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), chosen[0])]


def read_series_header(folder: str | Path, series_uids: Sequence[str] = (), max_voxels: int | None = None) -> Header:
    """Read every slice's head and judge whether they make one volume.

    Raises:
        ValueError: see ``series_files``; slices of several patients, frames of reference or grids, a missing or a
            doubled slice, uneven distances, a tilted gantry, or more than ``max_voxels``.
    """
    files = series_files(folder, series_uids)
    heads = [_head(name) for name in files]
    tags = [{key: _tag(head, key) for key in (SERIES, PATIENT, FRAME, ORIENTATION)} for head in heads]
    for key, what in ((PATIENT, "patients"), (FRAME, "frames of reference"), (ORIENTATION, "orientations")):
        if len({tag[key] for tag in tags}) > 1:
            raise ValueError(f"{folder} holds slices of several {what}: keep those of one series.")
    if len({(head.GetSize(), head.GetSpacing()) for head in heads}) > 1:
        raise ValueError(f"{folder} holds slices of several sizes: keep those of one series.")
    first = itk_header(heads[0], str(folder))
    series = (tags[0][SERIES], tags[0][PATIENT], tags[0][FRAME])
    if len(files) == 1:
        return first._replace(series=series)
    positions = np.array([_position(head, name) for head, name in zip(heads, files, strict=True)])
    affine = _stacked(first.affine, positions, str(folder))
    shape = (*first.shape[:2], len(files))
    header = first._replace(affine=affine, shape=shape, series=series)
    if max_voxels is not None and header.voxels > max_voxels:
        raise ValueError(f"{folder} holds {header.voxels} voxels, more than the cap of {max_voxels}: see --max-voxels.")
    check_affine(affine, str(folder))
    return header


def _stacked(affine: np.ndarray, positions: np.ndarray, name: str) -> np.ndarray:
    """The affine of the stack; positions are LPS, in the order of the slices."""
    places = positions * [-1, -1, 1]
    steps = np.diff(places, axis=0)
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    along = steps @ (normal / np.linalg.norm(normal))
    usual = float(np.median(np.abs(along)))
    if usual == 0 or (np.abs(along) < UNEVEN * usual).any():
        raise ValueError(f"{name} holds several slices of one position: keep one of each.")
    off = np.abs(np.abs(along) - usual) > UNEVEN * usual
    if off.any():
        gap = int(np.flatnonzero(off)[0])
        missing = round(float(abs(along[gap])) / usual) - 1
        distance = f"{abs(along[gap]):.2f} mm behind slice {gap + 1} of {len(places)}, {usual:.2f} mm elsewhere"
        what = "lacks slices" if missing > 0 and abs(abs(along[gap]) / usual - missing - 1) < 0.1 else "is uneven"
        raise ValueError(f"{name} {what} ({distance}): export the whole series again, or resample it evenly.")
    stacked = affine.copy()
    stacked[:3, 2] = (places[-1] - places[0]) / (len(places) - 1)
    stacked[:3, 3] = places[0]
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
    return str(head.GetMetaData(key)).strip() if head.HasMetaDataKey(key) else ""


def _position(head: sitk.ImageFileReader, name: str) -> list[float]:
    parts = [float(part) for part in _tag(head, POSITION).split("\\") if part]
    if len(parts) != 3:
        raise ValueError(f"{name} says nothing of its slice's position: export the series as slices with positions.")
    return parts


class _quiet:  # noqa: N801
    """Without ITK's warnings on standard error, which repeat per slice."""

    def __enter__(self) -> None:
        self.before = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)

    def __exit__(self, *_: object) -> None:
        sitk.ProcessObject.SetGlobalWarningDisplay(self.before)
