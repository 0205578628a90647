# SPDX-License-Identifier: Apache-2.0
"""The still images of a case: three planes, each with a slider over frames of every modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.report.display import FUSION, fuse, fused_pair, is_pet
from scripts.report.overlay import OUTLINES, PLANES, Overlay, Plane, Volumes, largest_slice
from scripts.report.slice_frames import frame_size, grey_frame, image_strip, outline_frame, outline_strip
from scripts.utils.colours import region_colour

MAX_FRAMES = 24  # per plane
_SCALE_BARS_MM = (200, 100, 50, 20, 10, 5)


@dataclass(frozen=True)
class Outline:
    """What is outlined in one colour.

    Args:
        mask: ``reference`` or ``prediction``.
        region: number of the region from 0; None where everything is one region.
        colour: as ``#RRGGBB``.
        dashed: where the colour tells the region, the prediction is dashed.
        values: of the mask; empty where everything but 0 is outlined.
    """

    mask: str
    region: int | None
    colour: str
    dashed: bool
    values: tuple[float, ...]

    def of(self, mask: NDArray[Any]) -> NDArray[np.bool_]:
        """Where it is in a mask of values."""
        return np.isin(mask, self.values) if self.values else mask > 0


@dataclass(frozen=True)
class OutlineStrip:
    """The outlines of all frames of a plane; ``strip`` is a data URI."""

    outline: Outline
    strip: str


@dataclass(frozen=True)
class PanelView:
    """One modality in one plane; ``strip`` is a data URI. ``light`` says that its background is white."""

    modality: str
    window: str
    strip: str
    alt: str
    light: bool = False


@dataclass(frozen=True)
class PlaneView:
    """One plane and its slider.

    Args:
        id: of the slider, unique in the page.
        name: of the plane.
        axis: of the view grid that the plane cuts.
        letters: the patient's directions at the left, right, bottom and top edge.
        indices: of the slices in the view grid, one per frame.
        slice_count: number of slices of the volume.
        first_frame: index of the frame that is shown first.
        outlines: for every panel.
        panels: one per modality.
        drawn: share of the frame's width and height that the slice takes.
        scale_mm: length of the scale bar.
        scale_share: that length as a share of the frame's width.
    """

    id: str
    name: str
    axis: int
    letters: str
    indices: Sequence[int]
    slice_count: int
    first_frame: int
    outlines: Sequence[OutlineStrip]
    panels: Sequence[PanelView]
    drawn: tuple[float, float]
    scale_mm: int
    scale_share: float

    @property
    def text(self) -> str:
        """What the slider says at first; ``stills.js`` says the same of every other frame."""
        return f"slice {self.indices[self.first_frame] + 1} of {self.slice_count}"


def outlines_of(overlay: Overlay) -> list[Outline]:
    """What is outlined: both masks in a colour each, or each region in its own colour with a dashed prediction."""
    masks = [name for name in OUTLINES if name in overlay.value_masks()]
    if not overlay.has_regions:
        values = tuple(value for members in overlay.regions.values() for value in members)
        return [Outline(mask, None, OUTLINES[mask], False, values) for mask in masks]
    return [
        Outline(mask, number, region_colour(number), mask == "prediction", tuple(values))
        for number, values in enumerate(overlay.regions.values())
        for mask in masks
    ]


def plane_views(
    overlay: Overlay,
    element_id: str,
    masks: Volumes,
    images: Volumes,
    step: NDArray[Any],
    windows: Mapping[str, tuple[float, float]],
) -> list[PlaneView]:
    """Draw a case in three planes.

    Args:
        overlay: the case.
        element_id: start of the ids of the case's elements, unique in the page.
        masks: its masks of values in the view grid.
        images: its images in the view grid.
        step: voxel size in mm of the view grid.
        windows: per modality the values that are shown as black and as white.
    """
    return [_plane_view(overlay, element_id, plane, masks, images, step, windows) for plane in PLANES]


def _plane_view(
    overlay: Overlay,
    element_id: str,
    plane: Plane,
    masks: Volumes,
    images: Volumes,
    step: NDArray[Any],
    windows: Mapping[str, tuple[float, float]],
) -> PlaneView:
    shape = masks["prediction"].shape
    extent = np.delete(shape * step, plane.axis).tolist()
    size, outlines = frame_size(extent), outlines_of(overlay)
    covered = {
        name: np.logical_or.reduce([each.of(mask) for each in outlines if each.mask == name])
        for name, mask in masks.items()
    }
    indices = slice_indices(covered, plane.axis)
    scale = next((mm for mm in _SCALE_BARS_MM if mm <= max(extent) / 3), _SCALE_BARS_MM[-1])
    return PlaneView(
        id=f"{element_id}-{plane.name}",
        name=plane.name,
        axis=plane.axis,
        letters=plane.letters,
        indices=indices,
        slice_count=shape[plane.axis],
        first_frame=indices.index(largest_slice(covered, plane.axis)),
        outlines=[_strip(outline, masks, indices, plane.axis, size) for outline in outlines],
        panels=_panels(overlay, plane, images, windows, indices, size),
        drawn=(extent[0] / max(extent), extent[1] / max(extent)),
        scale_mm=scale,
        scale_share=scale / max(extent),
    )


def _panels(
    overlay: Overlay,
    plane: Plane,
    images: Volumes,
    windows: Mapping[str, tuple[float, float]],
    indices: Sequence[int],
    size: tuple[int, int],
) -> list[PanelView]:
    """Every modality, PET in inverted grey, then PET on CT."""
    outlines = " and ".join(name for name in OUTLINES if name in overlay.value_masks())
    frames = {
        modality: [grey_frame(np.take(image, index, plane.axis).T, windows[modality], size) for index in indices]
        for modality, image in images.items()
    }
    panels = []
    for modality, window in windows.items():
        unused = ", not given to the network" if modality in overlay.unused else ""
        light = is_pet(modality)
        panels.append(
            PanelView(
                modality,
                f"{window[0]:.4g} to {window[1]:.4g}{unused}",
                image_strip([255 - frame if light else frame for frame in frames[modality]]),
                f"{overlay.name}: {modality}, {plane.name}, outlines of {outlines}",
                light,
            )
        )
    if pair := fused_pair(images):
        fused = [fuse(ct, pet) for ct, pet in zip(*(frames[modality] for modality in pair), strict=True)]
        alt = f"{overlay.name}: {FUSION}, {plane.name}, outlines of {outlines}"
        low, high = windows[pair[1]]
        panels.append(PanelView(FUSION, f"{low:.4g} to {high:.4g}", image_strip(fused), alt))
    return panels


def _strip(outline: Outline, masks: Volumes, indices: Sequence[int], axis: int, size: tuple[int, int]) -> OutlineStrip:
    slices = [outline.of(np.take(masks[outline.mask], index, axis).T) for index in indices]
    return OutlineStrip(
        outline, outline_strip([outline_frame(each, size, outline.dashed) for each in slices], outline.colour)
    )


def slice_indices(masks: Mapping[str, NDArray[Any]], axis: int, limit: int = MAX_FRAMES) -> list[int]:
    """Evenly spaced slices through the masks and a quarter of their extent on each side.

    The slice with the largest area is always among them (`largest_slice`).
    """
    count = masks["prediction"].shape[axis]
    other_axes = tuple(a for a in range(3) if a != axis)
    covered = np.flatnonzero(np.logical_or.reduce([mask.any(axis=other_axes) for mask in masks.values()]))
    low, high = (int(covered[0]), int(covered[-1])) if covered.size else (0, count - 1)
    margin = max(2, (high - low + 1) // 4)
    low, high = max(0, low - margin), min(count - 1, high + margin)
    spacing = -(-(high - low + 1) // limit)
    first = low + (largest_slice(masks, axis) - low) % spacing
    return list(range(first, high + 1, spacing))
