# SPDX-License-Identifier: Apache-2.0
"""Outlines of a mask along the edges of its pixels, for programs that fill outlines.

No centre of a pixel lies on an outline, so that every program that fills outlines gets the same pixels back. A hole is
joined to the outline around it by a channel without width (a keyhole), as DICOM wants for closed contours: it stays
empty in programs that fill each contour on its own, and in those that count crossings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vertex = tuple[int, int]  # row and column of a corner of pixels; pixel 0, 0 has the corners 0, 0 to 1, 1
Edge = tuple[int, int, int]  # the vertex where it begins, and its heading
Loop = list[Vertex]

RIGHT, DOWN, LEFT, UP = range(4)
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # row and column, by heading


def edge_contours(inside: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """The outlines of a slice.

    Pixels that touch only at a corner get an outline each.

    Args:
        inside: ``rows columns``.

    Returns:
        The corners of each closed outline in pixels, ``n x 2``, rows before columns; centres of pixels are integers, so
        all corners are halves. The last corner is joined to the first.
    """
    loops = _join_holes(_trace(_edges(np.asarray(inside, dtype=bool))))
    return [np.array(_corners(loop)) - 0.5 for loop in loops]


def _edges(inside: NDArray[np.bool_]) -> set[Edge]:
    """All edges between a pixel inside and one outside, with the inside to the right of the heading."""
    rows, columns = inside.shape
    padded = np.pad(inside, 1)
    outside = {
        RIGHT: padded[:rows, 1:-1],  # above the pixel
        DOWN: padded[1:-1, 2:],
        LEFT: padded[2:, 1:-1],
        UP: padded[1:-1, :columns],
    }
    begins = {RIGHT: (0, 0), DOWN: (0, 1), LEFT: (1, 1), UP: (1, 0)}  # corner of the pixel
    edges: set[Edge] = set()
    for heading, neighbours in outside.items():
        corners = np.argwhere(inside & ~neighbours) + begins[heading]
        edges.update((row, column, heading) for row, column in corners.tolist())
    return edges


def _trace(edges: set[Edge]) -> list[tuple[Loop, bool]]:
    """The closed loops of edges from their first vertex (topmost, then leftmost), and whether each is a hole."""
    loops, done = [], set()
    for start in sorted(edges):
        loop, edge = [], start
        while edge not in done:
            done.add(edge)
            row, column, heading = edge
            loop.append((row, column))
            row, column = row + STEPS[heading][0], column + STEPS[heading][1]
            # To the right first: where two pixels touch at a corner, this stays at the same one.
            turns = ((heading + 1) % 4, heading, (heading + 3) % 4)
            edge = (row, column, next(each for each in turns if (row, column, each) in edges))
        if loop:
            loops.append((loop, start[2] == DOWN))
    return loops


def _join_holes(loops: list[tuple[Loop, bool]]) -> list[Loop]:
    """Join each hole to the loop on its left, from the first vertex of the hole along the edges of pixels."""
    owner = {vertex: number for number, (loop, _) in enumerate(loops) for vertex in loop}
    joined: dict[int, Loop] = {number: loop for number, (loop, _) in enumerate(loops)}
    part_of: dict[int, int] = {}
    for number, (hole, is_hole) in enumerate(loops):
        if not is_hole:
            continue
        row, column = first = hole[0]
        column -= 1
        while (row, column) not in owner:
            column -= 1
        target = owner[row, column]
        while target in part_of:
            target = part_of[target]
        around, inner = joined[target], joined.pop(number)
        at, begin = around.index((row, column)), inner.index(first)
        joined[target] = [*around[: at + 1], *inner[begin:], *inner[:begin], first, *around[at:]]
        part_of[number] = target
    return list(joined.values())


def _corners(loop: Loop) -> Loop:
    """The vertices where the heading changes."""
    vertices = np.array(loop)
    to_next = np.sign(np.roll(vertices, -1, axis=0) - vertices)
    turns = (to_next != np.roll(to_next, 1, axis=0)).any(axis=1)
    return [vertex for vertex, is_corner in zip(loop, turns, strict=True) if is_corner]
