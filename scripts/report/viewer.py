# SPDX-License-Identifier: Apache-2.0
"""A case in three planes, each with a slider: all frames of a panel lie side by side in one picture, which is shifted.

Outlines are a second, transparent picture above the first, so that they can be hidden.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .overlay import OUTLINES, PLANES, Overlay, fullest, turned

FRAMES = 24  # at most, per plane
SIDE = 256  # pixels of the longer side of a frame
STRIP_BYTES = 110_000  # of one panel's frames: 3 cases x 3 planes x 3 modalities make 4 MB of text
# Shrinkage and WebP's quality; the first pair that is small enough, as noise takes many times as much as anatomy.
_QUALITIES = ((1, 60), (1, 30), (1, 10), (2, 30), (2, 10), (4, 30))
_LINE, _DASH = 2, 8.0  # width of an outline and length of a dash, in pixels


def viewers(overlays: Sequence[Overlay]) -> Iterator[str]:
    """One figure per case, after a note on how to read them."""
    yield (
        f"<p>Up to {FRAMES} slices per plane around the outlines; first the one with the most tumour. Drag the slider, "
        "or press arrow keys on it. Slices are counted from the patient's feet, back and right side; R, L, A, P, S "
        "and I mark right, left, front, back, head and feet. Above an image stand the values that are shown as black "
        "and as white.</p>\n"
        "<noscript><p>Without JavaScript the sliders and the order of the table do not move.</p></noscript>"
    )
    for number, overlay in enumerate(overlays):
        yield viewer(overlay, f"case{number}")


def viewer(overlay: Overlay, name: str) -> str:
    """The figure of one case; ``name`` is the start of its elements' ids."""
    masks, images, step = turned(overlay)
    windows = {modality: overlay.window(modality) for modality in overlay.images}
    volumes = ", ".join(f"{mask} {value:,.2f} ml" for mask, value in overlay.millilitres().items())
    planes = []
    for plane, axis, letters in PLANES:
        size = frame_size(np.delete(masks["prediction"].shape * step, axis).tolist())
        places, count = shown_slices(masks, axis), masks["prediction"].shape[axis]
        drawn = outline_strip([outline(_cut(masks, place, axis), size) for place in places])
        panels = []
        for modality, shown in windows.items():
            strip = grey_strip([frame(_cut(images, place, axis)[modality], shown, size) for place in places])
            alt = f"{overlay.title}: {modality}, {plane}, outlines of {' and '.join(masks)}"
            head = f"<b>{escape(modality)}</b><small>{shown[0]:.4g} to {shown[1]:.4g}</small>"
            panels.append(_panel(head, strip, drawn, size, letters, alt))
        control = _control(overlay.title, f"{name}-{plane}", plane, places, places.index(fullest(masks, axis)), count)
        planes.append(f'{control}<div class="panels">{"".join(panels)}</div></div>')
    return (
        f'<figure class="case"><figcaption>{escape(overlay.title)}<small>Volume: {volumes}</small></figcaption>'
        f"{_key(masks)}{''.join(planes)}</figure>"
    )


def shown_slices(masks: Mapping[str, NDArray[Any]], axis: int, most: int = FRAMES) -> list[int]:
    """Evenly spaced slices through the masks and a quarter of their extent on each side, the fullest among them."""
    count = masks["prediction"].shape[axis]
    others = tuple(a for a in range(3) if a != axis)
    found = np.flatnonzero(np.logical_or.reduce([mask.any(axis=others) for mask in masks.values()]))
    low, high = (int(found[0]), int(found[-1])) if found.size else (0, count - 1)
    margin = max(2, (high - low + 1) // 4)
    low, high = max(0, low - margin), min(count - 1, high + margin)
    apart = -(-(high - low + 1) // most)
    first = low + (fullest(masks, axis) - low) % apart
    return list(range(first, high + 1, apart))


def frame_size(extent: Sequence[float]) -> tuple[int, int]:
    """Width and height in pixels of a frame of this extent in mm."""
    width, height = (max(1, round(SIDE * float(length) / max(extent))) for length in extent)
    return width, height


def frame(cut: NDArray[Any], shown: tuple[float, float], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A slice in grey levels, its last row at the top; voxels that are no numbers are black."""
    low, high = shown
    grey = np.clip((cut - low) / (high - low or 1.0), 0, 1)
    return _resized(np.round(255 * np.nan_to_num(grey)).astype(np.uint8), size)


def outline(cuts: Mapping[str, NDArray[Any]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Numbers of colours: 0 transparent, then one per mask of ``OUTLINES``; dashes let what is below through."""
    drawn = np.zeros(size[::-1], np.uint8)
    for colour, (name, (_, style)) in enumerate(OUTLINES.items(), start=1):
        if name in cuts and cuts[name].any():
            covered = _resized(255 * cuts[name].astype(np.uint8), size)
            inside = covered > min(127, int(covered.max()) - 1)  # what is smaller than a pixel is drawn, too
            drawn[_edge(inside) & (_dashes(inside) if style == "dashed" else True)] = colour
    return drawn


def _cut(volumes: Mapping[str, NDArray[Any]], place: int, axis: int) -> dict[str, NDArray[Any]]:
    return {name: np.take(volume, place, axis).T for name, volume in volumes.items()}


def _resized(cut: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(cut[::-1]).resize(size, Image.Resampling.BILINEAR))


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The outermost pixels of a region."""
    core = np.pad(inside, 1)
    for _ in range(_LINE):
        core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    return inside & ~core[1:-1, 1:-1]


def _dashes(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Sectors around the region's middle, wide as a dash where a disc of its area ends; any straight stripes would
    turn into solid lines where the outline runs along them."""
    rows, columns = np.ogrid[: inside.shape[0], : inside.shape[1]]
    y, x = (where.mean() for where in np.nonzero(inside))
    pairs = max(2, round(np.sqrt(np.pi * inside.sum()) / _DASH))
    turns = np.arctan2(rows - y, columns - x) / (2 * np.pi) + 0.5
    return np.asarray((turns * pairs) % 1 < 0.5)


def grey_strip(frames: Sequence[NDArray[np.uint8]]) -> str:
    """All frames side by side as WebP, as a data URI."""
    from PIL import Image

    picture, data = Image.fromarray(np.concatenate(frames, axis=1)), b""
    for shrinkage, quality in _QUALITIES:
        buffer = io.BytesIO()
        picture.reduce(shrinkage).save(buffer, format="webp", quality=quality, method=4)
        data = buffer.getvalue()
        if len(data) <= STRIP_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def outline_strip(frames: Sequence[NDArray[np.uint8]]) -> str:
    """All outlines side by side as a PNG with a palette, as a data URI."""
    from PIL import Image

    picture, buffer = Image.fromarray(np.concatenate(frames, axis=1)), io.BytesIO()
    colours = [int(colour[i : i + 2], 16) for colour, _ in OUTLINES.values() for i in (1, 3, 5)]
    picture.putpalette([0, 0, 0, *colours])
    picture.save(buffer, format="png", transparency=0, optimize=True, bits=2)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _key(masks: Mapping[str, Any]) -> str:
    """What the lines mean, and the switch that hides them."""
    lines = (
        f'<span><svg viewBox="0 0 40 12" aria-hidden="true"><path d="M3 6H37" stroke="{colour}" stroke-width="3"'
        f"{' stroke-dasharray=7' if style == 'dashed' else ''}></path></svg>{name}</span>"
        for name, (colour, style) in OUTLINES.items()
        if name in masks
    )
    switch = '<label><input type="checkbox" class="outlined" autocomplete="off" checked> Outlines</label>'
    return f'<div class="key">{switch}{"".join(lines)}</div>'


def _control(title: str, own: str, plane: str, places: Sequence[int], start: int, count: int) -> str:
    """The opening of a plane's block and its slider, whose id is ``own``."""
    text = f"slice {places[start] + 1} of {count}"
    return (
        f'<div class="plane" data-places="{" ".join(str(place + 1) for place in places)}" data-slices="{count}" '
        f'style="--frames:{len(places)};--at:{start}"><div class="control">'
        f'<label for="{own}">{plane.capitalize()}</label>'
        f'<input type="range" id="{own}" min="0" max="{len(places) - 1}" value="{start}" autocomplete="off" '
        f'aria-label="{plane} slice of {escape(title)}" aria-valuetext="{text}">'
        f'<output for="{own}">{text}</output></div>'
    )


def _panel(head: str, strip: str, drawn: str, size: tuple[int, int], letters: str, alt: str) -> str:
    """Image and outlines of one modality; its frame keeps the anatomy's proportions and at most 20 rem of height."""
    width, height = size
    marks = "".join(f'<i aria-hidden="true">{letter}</i>' for letter in letters)
    return (
        f'<div class="panel" style="max-width:{20 * min(1, width / height):.2f}rem">{head}'
        f'<div class="frame" style="aspect-ratio:{width}/{height}"><img alt="{escape(alt)}" src="{strip}">'
        f'<img class="outline" alt="" src="{drawn}">{marks}</div></div>'
    )
