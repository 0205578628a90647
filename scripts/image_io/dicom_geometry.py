# SPDX-License-Identifier: Apache-2.0
"""Positions, directions and distances of DICOM slices or frames."""

from __future__ import annotations

import re

import numpy as np

from scripts.image_io.headers import LPS_TO_RAS, Affine

MAX_UNEVENNESS = 0.02  # deviation of a slice distance, as a fraction of the median distance
MAX_OFFSET = 0.1  # distance of a slice from its position on an even grid, as a fraction of the median distance
MAX_ROUNDING = 1e-3  # differences between slices in direction (cosine) or voxel size (mm)
MAX_COSINE_ERROR = 1e-2  # of rounded directions: of their lengths from 1, and of their product from 0
MAX_SPACING_ERROR = 0.01  # of SpacingBetweenSlices, as a fraction of the slices' distance by their positions
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # DICOM's DS: Python's float also takes 1_0 and nan
COUNTS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}


def parse_decimals(text: str, count: int) -> np.ndarray | None:
    """The numbers of a DICOM decimal string with backslashes between them; None unless ``count`` finite ones."""
    parts = [part.strip() for part in text.split("\\")]
    if len(parts) != count or not all(DECIMAL.fullmatch(part) for part in parts):
        return None
    numbers = np.array([float(part) for part in parts])
    return numbers if np.isfinite(numbers).all() else None


def geometry_numbers(text: str, keyword: str, where: str) -> np.ndarray:
    """The numbers of a position (mm, LPS), an orientation or a pixel size (mm, between rows and between columns).

    Args:
        text: the element's text.
        keyword: one of ``COUNTS``.
        where: the file or frame, for error messages.

    Raises:
        ValueError: no numbers, not the right count, a pixel size of 0, or directions that are not perpendicular units.
    """
    if not text:
        raise ValueError(f"{where} has no {keyword}. Export the series as slices that contain it.")
    numbers = parse_decimals(text, COUNTS[keyword])
    valid = numbers is not None
    if numbers is not None and keyword == "PixelSpacing":
        valid = bool((numbers > 0).all())
    elif numbers is not None and keyword == "ImageOrientationPatient":
        axes = numbers.reshape(2, 3)
        valid = bool(np.abs(axes @ axes.T - np.eye(2)).max() <= MAX_COSINE_ERROR)
    if numbers is None or not valid:
        raise ValueError(f"{where} is a damaged DICOM file: its {keyword} is not valid. Export it again.")
    return numbers


def slice_affine(position: np.ndarray, orientation: np.ndarray, spacing: np.ndarray, thickness: float = 1.0) -> Affine:
    """The affine (RAS) of one slice, whose first axis runs along a row.

    Args:
        position, orientation, spacing: see ``geometry_numbers``.
        thickness: distance to the next slice in mm.
    """
    row, column = orientation.reshape(2, 3)
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * spacing[1], column * spacing[0], np.cross(row, column) * thickness], axis=1)
    affine[:3, 3] = position
    return LPS_TO_RAS @ affine


def stack_affine(affine: Affine, positions: np.ndarray, folder: str) -> Affine:
    """The affine (RAS) of a stack of slices.

    Args:
        affine: of the first slice.
        positions: of all slices in their order, N x 3, LPS.
        folder: for error messages.

    Raises:
        ValueError: several slices at one position, missing slices, or uneven distances.
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


def spacing_warning(stated: str, affine: Affine, folder: str) -> str:
    """A warning if ``SpacingBetweenSlices`` contradicts the positions, which are used; else empty."""
    spacing, distance = parse_decimals(stated, 1), float(np.linalg.norm(affine[:3, 2]))
    if spacing is None or spacing[0] <= 0 or abs(spacing[0] - distance) <= MAX_SPACING_ERROR * distance:
        return ""
    return (
        f"{folder} has slices {distance:.4g} mm apart by their positions, which are used, but a SpacingBetweenSlices "
        f"of {spacing[0]:.4g} mm: are slices missing?"
    )
