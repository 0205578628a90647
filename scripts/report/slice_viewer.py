# SPDX-License-Identifier: Apache-2.0
"""What ``templates/case.html`` shows of a case: three planes, each with a slider over frames of every modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.report.overlay import (
    OUTLINES,
    PLANES,
    Overlay,
    Plane,
    Volumes,
    largest_slice,
    take_slice,
    to_view,
    viewing_orientation,
)
from scripts.report.slice_frames import frame_size, grey_frame, grey_strip, outline_frame, outline_strip
from scripts.utils.colours import region_colour

MAX_FRAMES = 24  # per plane


@dataclass(frozen=True)
class OutlineKey:
    """An entry of the legend."""

    mask: str
    colour: str
    dashed: bool


@dataclass(frozen=True)
class RegionKey:
    """A switch of the legend; ``number`` counts the regions of the case."""

    number: int
    name: str
    colour: str


@dataclass(frozen=True)
class PanelView:
    """One modality in one plane; ``strip`` is a data URI."""

    modality: str
    window: str
    strip: str
    alt: str


@dataclass(frozen=True)
class PlaneView:
    """One plane and its slider.

    Args:
        id: of the slider, unique in the page.
        name: of the plane.
        letters: the patient's directions at the left, right, bottom and top edge.
        slice_numbers: counted from 1, one per frame.
        slice_count: number of slices of the volume.
        first_frame: index of the frame that is shown first.
        outline_strips: data URIs of the outlines, for every panel; of several regions one each.
        width: of a frame, in pixels.
        height: of a frame, in pixels.
        panels: one per modality.
    """

    id: str
    name: str
    letters: str
    slice_numbers: Sequence[int]
    slice_count: int
    first_frame: int
    outline_strips: Sequence[str]
    width: int
    height: int
    panels: Sequence[PanelView]

    @property
    def text(self) -> str:
        """What the slider says at first; ``script.js`` says the same of every other frame."""
        return f"slice {self.slice_numbers[self.first_frame]} of {self.slice_count}"

    @property
    def max_width_rem(self) -> str:
        """Width of a panel that keeps the anatomy's proportions and at most 20 rem of height."""
        return f"{20 * min(1, self.width / self.height):.2f}"


@dataclass(frozen=True)
class CaseView:
    """One case; ``source`` says what made the prediction. ``regions`` is empty unless there are several."""

    title: str
    source: str
    volumes: str
    outlines: Sequence[OutlineKey]
    regions: Sequence[RegionKey]
    planes: Sequence[PlaneView]


def case_view(overlay: Overlay, element_id: str) -> CaseView:
    """Draw a case in three planes.

    Args:
        overlay: images and masks.
        element_id: start of the ids of the case's elements, unique in the page.
    """
    masks, images, step = viewing_orientation(overlay)
    values = to_view(overlay, overlay.value_masks()) if overlay.has_regions else masks
    windows = {modality: overlay.window(modality) for modality in overlay.images}
    volumes = ", ".join(f"{mask} {value:,.2f} ml" for mask, value in overlay.volumes_ml().items())
    regions = [RegionKey(i, name, region_colour(i)) for i, name in enumerate(overlay.regions)]
    regions = regions if overlay.has_regions else []
    keys = [
        OutlineKey(mask, "#FFFFFF" if regions else colour, style == "dashed")
        for mask, (colour, style) in OUTLINES.items()
        if mask in masks
    ]
    planes = [_plane_view(overlay, element_id, plane, masks, values, images, step, windows) for plane in PLANES]
    return CaseView(overlay.title, overlay.source, volumes, keys, regions, planes)


def _plane_view(
    overlay: Overlay,
    element_id: str,
    plane: Plane,
    masks: Volumes,
    values: Volumes,
    images: Volumes,
    step: NDArray[Any],
    windows: Mapping[str, tuple[float, float]],
) -> PlaneView:
    shape = masks["prediction"].shape
    size = frame_size(np.delete(shape * step, plane.axis).tolist())
    indices = slice_indices(masks, plane.axis)
    panels = []
    for modality, window in windows.items():
        slices = [np.take(images[modality], index, plane.axis).T for index in indices]
        unused = ", not given to the network" if modality in overlay.unused else ""
        panels.append(
            PanelView(
                modality,
                f"{window[0]:.4g} to {window[1]:.4g}{unused}",
                grey_strip([grey_frame(image, window, size) for image in slices]),
                f"{overlay.title}: {modality}, {plane.name}, outlines of {' and '.join(masks)}",
            )
        )
    return PlaneView(
        id=f"{element_id}-{plane.name}",
        name=plane.name,
        letters=plane.letters,
        slice_numbers=[index + 1 for index in indices],
        slice_count=shape[plane.axis],
        first_frame=indices.index(largest_slice(masks, plane.axis)),
        outline_strips=_outline_strips(overlay, [take_slice(values, index, plane.axis) for index in indices], size),
        width=size[0],
        height=size[1],
        panels=panels,
    )


def _outline_strips(overlay: Overlay, slices: Sequence[Volumes], size: tuple[int, int]) -> list[str]:
    """The outlines of all slices: of everything in the colours of the masks, or of each region in its own colour."""
    if not overlay.has_regions:
        return [outline_strip([outline_frame(masks, size) for masks in slices])]
    strips = []
    for i, values in enumerate(overlay.regions.values()):
        regions = [{name: np.isin(mask, list(values)) for name, mask in masks.items()} for masks in slices]
        strips.append(
            outline_strip([outline_frame(masks, size) for masks in regions], [region_colour(i)] * len(OUTLINES))
        )
    return strips


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
