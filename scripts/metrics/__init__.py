# SPDX-License-Identifier: Apache-2.0
"""Dice, HD95 and ASSD per case, and their aggregates over a cohort (``cumulative``: as MONAI's metric and handler)."""

from .aggregate import (
    COLUMNS,
    METRICS,
    STATUSES,
    Row,
    aggregate,
    paired_difference,
    read_rows,
    write_rows,
)
from .frechet import FrechetSemanticDistance
from .surface import ASSD_DEFINITION, DICE_DEFINITION, HD95_DEFINITION, image_diagonal_mm, surface_metrics

__all__ = [
    "ASSD_DEFINITION",
    "COLUMNS",
    "DICE_DEFINITION",
    "HD95_DEFINITION",
    "METRICS",
    "STATUSES",
    "FrechetSemanticDistance",
    "Row",
    "aggregate",
    "image_diagonal_mm",
    "paired_difference",
    "read_rows",
    "surface_metrics",
    "write_rows",
]
