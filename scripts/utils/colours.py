# SPDX-License-Identifier: Apache-2.0
"""Colours of regions, the same in reports, DICOM objects and lookup tables."""

from __future__ import annotations

# Those of Okabe and Ito's palette that are light enough for outlines on grey images.
REGION_COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#FFFFFF")


def region_colour(number: int) -> str:
    """The colour of a region, ``#RRGGBB``, by its place in the task from 0."""
    return REGION_COLOURS[number % len(REGION_COLOURS)]
