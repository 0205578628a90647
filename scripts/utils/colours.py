# SPDX-License-Identifier: Apache-2.0
"""Colours of regions, the same in reports, DICOM objects and lookup tables."""

from __future__ import annotations

import colorsys

# Those of Okabe and Ito's palette that are light enough for outlines on grey images.
REGION_COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#FFFFFF")
GOLDEN_RATIO = 0.618  # of a turn between two hues: none of the first hundred is the same


def region_colour(number: int) -> str:
    """The colour of a region, ``#RRGGBB``, by its place in the task from 0."""
    if number < len(REGION_COLOURS):
        return REGION_COLOURS[number]
    rgb = colorsys.hls_to_rgb(number * GOLDEN_RATIO % 1, 0.65, 0.75)
    return "#" + "".join(f"{round(255 * part):02X}" for part in rgb)
