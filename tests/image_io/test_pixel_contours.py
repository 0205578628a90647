# SPDX-License-Identifier: Apache-2.0
"""Outlines on the edges of pixels, filled back by Matplotlib in two ways: even-odd, and each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from numpy.typing import NDArray

from scripts.image_io.pixel_contours import edge_contours


def fill(contours: list[NDArray[np.float64]], shape: tuple[int, ...], exclusive: bool) -> NDArray[np.bool_]:
    """The pixels whose centres lie in the outlines, each filled on its own; in two of them counts as outside or not."""
    filled, centres = np.zeros(shape, dtype=bool), np.argwhere(np.ones(shape))
    for corners in contours:
        inside = Outline([*corners, corners[0]], closed=True).contains_points(centres).reshape(shape)
        filled = filled ^ inside if exclusive else filled | inside
    return filled


def mask_of(rows: str) -> NDArray[np.bool_]:
    return np.array([[letter == "#" for letter in row] for row in rows.split()])


def area(corners: NDArray[np.float64]) -> float:
    """By the shoelace formula."""
    following = np.roll(corners, -1, axis=0)
    return abs(float((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum())) / 2


SHAPES = {
    "one pixel": ("#", 1),
    "a rectangle": ("..... .###. .###.", 1),
    "at the border": ("## ##", 1),
    "touching at corners": ("#.# .#. #.#", 5),
    "a hole": ("#### #..# ####", 1),
    "a hole at a corner of another": ("##### #.### ##.## #####", 1),
    "two holes in a row": ("####### #.#.#.# #######", 1),
    "holes above each other": ("##### #...# ##### #.#.# #####", 1),
    "an island in a hole": ("##### #...# #.#.# #...# #####", 2),
    "a spiral": ("##### #...# #.#.# #.### #....", 1),
    "a hole that opens at a corner": ("###. #.#. ##.. ....", 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_outlines_of_shapes_with_holes_and_corners_are_those_of_their_pixels(name: str):
    mask = mask_of(SHAPES[name][0])
    contours = edge_contours(mask)
    assert len(contours) == SHAPES[name][1]
    assert sum(area(corners) for corners in contours) == mask.sum()
    for exclusive in (True, False):
        np.testing.assert_array_equal(fill(contours, mask.shape, exclusive), mask)


@pytest.mark.parametrize("density", [0.1, 0.4, 0.6, 0.9])
def test_noise_is_filled_back_pixel_by_pixel(density: float):
    rng = np.random.default_rng(7)
    for shape in ((1, 9), (13, 1), (12, 17), (25, 20)):
        for _ in range(5):
            mask = rng.random(shape) < density
            for exclusive in (True, False):
                np.testing.assert_array_equal(fill(edge_contours(mask), shape, exclusive), mask)


def test_corners_are_those_of_pixels_and_none_is_needless():
    contours = edge_contours(mask_of("..... .###. .###."))
    np.testing.assert_array_equal(
        sorted(map(tuple, contours[0])), sorted([(0.5, 0.5), (0.5, 3.5), (2.5, 3.5), (2.5, 0.5)])
    )


@pytest.mark.parametrize("value", [0, 1])
def test_an_empty_and_a_full_slice(value: Any):
    contours = edge_contours(np.full((4, 6), value, dtype=bool))
    assert [area(corners) for corners in contours] == [24.0] * value
