# SPDX-License-Identifier: Apache-2.0
"""Measures of every lesion and region of a mask, and their table ``measures.csv``.

Volumes, diameters and centroids are those of the mask on its own grid (``lesion_shape``), uptakes those of the PET on
its own grid (``lesion_uptake``).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.metrics.lesion_shape import (
    Floats,
    Lesion,
    Volume,
    centroid,
    find_lesions,
    longest_axial_diameter,
    longest_diameter,
)
from scripts.metrics.lesion_uptake import Uptake, lesion_uptakes
from scripts.utils.atomic_files import write_text

Row = dict[str, Any]

ALL = "all"  # the row of a region with all of its lesions
UPTAKE = Uptake._fields
CENTROID = ("centroid_x_mm", "centroid_y_mm", "centroid_z_mm")
NUMBERS = ("volume_ml", "axial_diameter_mm", "diameter_mm", *UPTAKE, *CENTROID)
COLUMNS = ("case_id", "region", "lesion", *NUMBERS, "centroid_space")
SPACE = "RAS"  # of the centroid: x to the right, y to the front, z to the head
DIGITS = 6  # significant digits of a number in the table


@dataclass(frozen=True)
class Measures:
    """Measures of a lesion, or of a region with all of its lesions.

    Attributes:
        region: its name.
        lesion: number of the lesion, 1 for the largest; None for all lesions of the region.
        volume_ml: number of voxels times their volume.
        axial_diameter_mm, diameter_mm: longest diameter in an axial slice and in space; of a region, the longest of its
            lesions. None where the region is empty.
        centroid: mean of the voxel centres in mm (RAS); None where the region is empty.
        uptake: None without a PET, and where the whole lesion lies outside of it.
    """

    region: str
    lesion: int | None
    volume_ml: float
    axial_diameter_mm: float | None = None
    diameter_mm: float | None = None
    centroid: Floats | None = None
    uptake: Uptake | None = None

    def values(self) -> dict[str, float | None]:
        """The measures by the names of their columns, ``NUMBERS``; None where one is undefined."""
        place = [None] * 3 if self.centroid is None else [float(each) for each in self.centroid]
        uptakes = [None] * len(UPTAKE) if self.uptake is None else [*self.uptake]
        return dict(
            zip(NUMBERS, [self.volume_ml, self.axial_diameter_mm, self.diameter_mm, *uptakes, *place], strict=True)
        )


def measure_mask(mask: Volume, regions: Mapping[str, Sequence[float]], pet: Volume | None = None) -> list[Measures]:
    """Measure every region of a mask and every lesion of each.

    Args:
        mask: its affine leads to RAS.
        regions: name -> values of the mask.
        pet: SUV in g/ml, on any grid.

    Returns:
        For each region the measures of all lesions, then those of each lesion, the largest first.
    """
    measured = []
    for region, values in regions.items():
        measured += measure_region(region, mask._replace(voxels=np.isin(mask.voxels, list(values))), pet)
    return measured


def measure_region(region: str, mask: Volume, pet: Volume | None = None) -> list[Measures]:
    """Measure one region and each of its lesions.

    Args:
        region: its name.
        mask: the voxels of the region are true.
        pet: SUV in g/ml, on any grid.
    """
    lesions = find_lesions(mask.voxels)
    uptakes = [None] * (len(lesions) + 1) if pet is None else lesion_uptakes(lesions, mask, pet)
    if not lesions:
        return [Measures(region, None, 0.0, uptake=uptakes[0])]
    by_lesion = [
        _measure_lesion(region, number, lesion, mask, uptakes[number]) for number, lesion in enumerate(lesions, start=1)
    ]
    return [_sum(region, by_lesion, uptakes[0]), *by_lesion]


def _measure_lesion(region: str, number: int, lesion: Lesion, mask: Volume, taken: Uptake | None) -> Measures:
    return Measures(
        region,
        number,
        lesion.voxel_count * mask.voxel_ml,
        longest_axial_diameter(lesion, mask),
        longest_diameter(lesion, mask),
        centroid(lesion, mask),
        taken,
    )


def _sum(region: str, lesions: Sequence[Measures], taken: Uptake | None) -> Measures:
    """The measures of a region from those of its lesions."""
    volumes = np.array([each.volume_ml for each in lesions])
    axial, spatial = (
        max(value for each in lesions if (value := getattr(each, name)) is not None)
        for name in ("axial_diameter_mm", "diameter_mm")
    )
    centre = volumes @ np.array([each.centroid for each in lesions]) / volumes.sum()
    return Measures(region, None, float(volumes.sum()), axial, spatial, centre, taken)


def measure_rows(case_id: str, measured: Sequence[Measures]) -> list[Row]:
    """The rows of a table, with the keys ``COLUMNS``: numbers, or None where a measure is undefined."""
    return [
        {
            "case_id": case_id,
            "region": each.region,
            "lesion": ALL if each.lesion is None else str(each.lesion),
            **each.values(),
            "centroid_space": "" if each.centroid is None else SPACE,
        }
        for each in measured
    ]


def write_measures(rows: Sequence[Row], path: str | Path) -> None:
    """Write ``measures.csv`` with the columns ``COLUMNS`` and ``DIGITS`` digits; undefined measures are empty.

    An earlier file is replaced only when the new one is complete.
    """
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, **{name: _text(row[name]) for name in NUMBERS}})
    write_text(buffer.getvalue(), path)


def read_measures(path: str | Path) -> list[Row]:
    """Read a file of ``write_measures``.

    Raises:
        ValueError: it has other columns, or a cell that is no number.
        OSError: it cannot be read.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows: list[Row] = list(reader)
    try:
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"its columns are {', '.join(reader.fieldnames or ())}")
        return [{**row, **{name: float(row[name]) if row[name] else None for name in NUMBERS}} for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no table of measures ({error}). Remove it and run the command again.") from error


def _text(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{DIGITS}g}"
