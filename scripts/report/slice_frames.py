# SPDX-License-Identifier: Apache-2.0
"""Frames of the report's still images: one slice in grey levels, the outlines above it, and strips of frames.

Every frame is a square, so that all panels have one size: the slice lies in its middle. All frames of a panel are
joined side by side into one image, the strip. Pillow is imported when it is needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 256  # pixels of a frame
STRIP_BYTES = 110_000  # limit of one panel's strip: 3 planes x 4 panels then make 1.8 MB of text per case
# Reduction of the image and WebP quality. The first pair that keeps to STRIP_BYTES is taken: noise takes many times as
# many bytes as anatomy.
_QUALITIES = ((1, 60), (1, 30), (1, 10), (2, 30), (2, 10), (4, 30))
_LINE_WIDTH, _DASH_LENGTH = 2, 8.0  # pixels


def frame_size(extent_mm: Sequence[float]) -> tuple[int, int]:
    """Width and height in pixels of a slice with this width and height in mm; the longer one is ``SIDE``."""
    width, height = (max(1, round(SIDE * float(length) / max(extent_mm))) for length in extent_mm)
    return width, height


def grey_frame(image: NDArray[Any], window: tuple[float, float], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A slice in grey levels, its last row at the top. Voxels that are NaN or infinite are black or white.

    Args:
        image: the slice; rows run up.
        window: the values that become 0 and 255.
        size: width and height in pixels, from ``frame_size``.

    Returns:
        A square of ``SIDE`` pixels.
    """
    low, high = window
    grey = np.clip((image - low) / (high - low or 1.0), 0, 1)
    return _resize(np.round(255 * np.nan_to_num(grey)).astype(np.uint8), size)


def outline_frame(mask: NDArray[Any], size: tuple[int, int], dashed: bool = False) -> NDArray[np.bool_]:
    """Where the outline of a slice of a mask runs, in a square of ``SIDE`` pixels."""
    if not mask.any():
        return np.zeros((SIDE, SIDE), dtype=bool)
    coverage = _resize(255 * mask.astype(np.uint8), size)
    inside = coverage > min(127, int(coverage.max()) - 1)  # also draw what is smaller than a pixel
    return _edge(inside) & _dashes(inside) if dashed else _edge(inside)


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    drawn = np.asarray(Image.fromarray(pixels[::-1]).resize(size, Image.Resampling.BILINEAR))
    left, top = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    return np.pad(drawn, ((top, SIDE - size[1] - top), (left, SIDE - size[0] - left)))


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The outermost pixels of a region."""
    core = np.pad(inside, 1)
    for _ in range(_LINE_WIDTH):
        core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    return inside & ~core[1:-1, 1:-1]


def _dashes(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Sectors around the region's centre, as wide as a dash on the rim of a disc of the region's area.

    Straight stripes would turn into solid lines where the outline runs along them.
    """
    rows, columns = np.ogrid[: inside.shape[0], : inside.shape[1]]
    y, x = (indices.mean() for indices in np.nonzero(inside))
    pairs = max(2, round(np.sqrt(np.pi * inside.sum()) / _DASH_LENGTH))
    turns = np.arctan2(rows - y, columns - x) / (2 * np.pi) + 0.5
    return np.asarray((turns * pairs) % 1 < 0.5)


def image_strip(frames: Sequence[NDArray[np.uint8]]) -> str:
    """Join frames side by side as a WebP of at most about ``STRIP_BYTES``.

    Args:
        frames: grey levels or RGB.

    Returns:
        A data URI.
    """
    from PIL import Image

    strip, data = Image.fromarray(np.concatenate(frames, axis=1)), b""
    for reduction, quality in _QUALITIES:
        buffer = io.BytesIO()
        strip.reduce(reduction).save(buffer, format="webp", quality=quality, method=2)
        data = buffer.getvalue()
        if len(data) <= STRIP_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def outline_strip(frames: Sequence[NDArray[np.bool_]], colour: str) -> str:
    """Join outlines side by side as a PNG that is transparent elsewhere.

    Args:
        frames: from ``outline_frame``.
        colour: as ``#RRGGBB``.

    Returns:
        A data URI.
    """
    from PIL import Image

    strip, buffer = Image.fromarray(np.concatenate(frames, axis=1).astype(np.uint8)), io.BytesIO()
    strip.putpalette([0, 0, 0, *(int(colour[i : i + 2], 16) for i in (1, 3, 5))])
    strip.save(buffer, format="png", transparency=0, optimize=True, bits=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
