# SPDX-License-Identifier: Apache-2.0
"""Frames of the report's slice viewer: one slice in grey levels, the outlines above it, and strips of frames.

All frames of a panel are joined side by side into one image, the strip. Pillow is imported when it is needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.report.overlay import OUTLINES

LONGER_SIDE = 256  # pixels of the longer side of a frame
STRIP_BYTES = 110_000  # limit of one panel's strip: 3 cases x 3 planes x 3 modalities then make 4 MB of text
# Reduction of the image and WebP quality. The first pair that keeps to STRIP_BYTES is taken: noise takes many times as
# many bytes as anatomy.
_QUALITIES = ((1, 60), (1, 30), (1, 10), (2, 30), (2, 10), (4, 30))
_LINE_WIDTH, _DASH_LENGTH = 2, 8.0  # pixels


def frame_size(extent_mm: Sequence[float]) -> tuple[int, int]:
    """Width and height in pixels of a frame with this width and height in mm."""
    width, height = (max(1, round(LONGER_SIDE * float(length) / max(extent_mm))) for length in extent_mm)
    return width, height


def grey_frame(image: NDArray[Any], window: tuple[float, float], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A slice in grey levels, its last row at the top. Voxels that are NaN or infinite are black or white."""
    low, high = window
    grey = np.clip((image - low) / (high - low or 1.0), 0, 1)
    return _resize(np.round(255 * np.nan_to_num(grey)).astype(np.uint8), size)


def outline_frame(masks: Mapping[str, NDArray[Any]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The outlines of a slice as palette indices: 0 is transparent, then one colour per mask of ``OUTLINES``.

    The gaps of a dashed outline show the outline below it.
    """
    frame = np.zeros(size[::-1], np.uint8)
    for colour, (name, (_, style)) in enumerate(OUTLINES.items(), start=1):
        if name in masks and masks[name].any():
            coverage = _resize(255 * masks[name].astype(np.uint8), size)
            inside = coverage > min(127, int(coverage.max()) - 1)  # also draw what is smaller than a pixel
            frame[_edge(inside) & (_dashes(inside) if style == "dashed" else True)] = colour
    return frame


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels[::-1]).resize(size, Image.Resampling.BILINEAR))


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


def grey_strip(frames: Sequence[NDArray[np.uint8]]) -> str:
    """Join frames side by side as a WebP of at most about ``STRIP_BYTES``.

    Returns:
        A data URI.
    """
    from PIL import Image

    strip, data = Image.fromarray(np.concatenate(frames, axis=1)), b""
    for reduction, quality in _QUALITIES:
        buffer = io.BytesIO()
        strip.reduce(reduction).save(buffer, format="webp", quality=quality, method=4)
        data = buffer.getvalue()
        if len(data) <= STRIP_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def outline_strip(frames: Sequence[NDArray[np.uint8]], colours: Sequence[str] = ()) -> str:
    """Join outlines side by side as a PNG with a palette.

    Args:
        frames: from ``outline_frame``.
        colours: of the masks, as ``#RRGGBB``; by default those of ``OUTLINES``.

    Returns:
        A data URI.
    """
    from PIL import Image

    strip, buffer = Image.fromarray(np.concatenate(frames, axis=1)), io.BytesIO()
    colours = colours or [colour for colour, _ in OUTLINES.values()]
    palette = [int(colour[i : i + 2], 16) for colour in colours for i in (1, 3, 5)]
    strip.putpalette([0, 0, 0, *palette])
    strip.save(buffer, format="png", transparency=0, optimize=True, bits=2)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
