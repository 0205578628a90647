# SPDX-License-Identifier: Apache-2.0
"""Dice, HD95 and ASSD per case, their aggregates over a cohort, and measures of lesions.

``monai_metric`` offers the same as a MONAI metric and as an ignite handler. The names below are imported at their first
use, so that reading a table does not load SciPy and PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.utils.lazy_names import import_name

if TYPE_CHECKING:
    from scripts.metrics.aggregates import aggregate as aggregate
    from scripts.metrics.aggregates import aggregate_regions as aggregate_regions
    from scripts.metrics.aggregates import paired_difference as paired_difference
    from scripts.metrics.case_rows import COLUMNS as COLUMNS
    from scripts.metrics.case_rows import FOREGROUND as FOREGROUND
    from scripts.metrics.case_rows import METRICS as METRICS
    from scripts.metrics.case_rows import STATUSES as STATUSES
    from scripts.metrics.case_rows import Row as Row
    from scripts.metrics.case_rows import checked_rows as checked_rows
    from scripts.metrics.case_rows import filled_value as filled_value
    from scripts.metrics.case_rows import read_rows as read_rows
    from scripts.metrics.case_rows import region_of as region_of
    from scripts.metrics.case_rows import write_rows as write_rows
    from scripts.metrics.frechet import FrechetSemanticDistance as FrechetSemanticDistance
    from scripts.metrics.surface import dice as dice
    from scripts.metrics.surface import image_diagonal_mm as image_diagonal_mm
    from scripts.metrics.surface import region_metrics as region_metrics
    from scripts.metrics.surface import surface_metrics as surface_metrics

NAMES = {
    "aggregates": ("aggregate", "aggregate_regions", "paired_difference"),
    "case_rows": (
        "COLUMNS",
        "FOREGROUND",
        "METRICS",
        "STATUSES",
        "Row",
        "checked_rows",
        "filled_value",
        "read_rows",
        "region_of",
        "write_rows",
    ),
    "frechet": ("FrechetSemanticDistance",),
    "surface": ("dice", "image_diagonal_mm", "region_metrics", "surface_metrics"),
}


def __getattr__(name: str) -> Any:
    return import_name(__name__, NAMES, name)
