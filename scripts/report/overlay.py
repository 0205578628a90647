# SPDX-License-Identifier: Apache-2.0
"""A case to draw, how its volumes are turned for the eye, and one slice of it as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Volumes = dict[str, NDArray[Any]]

OUTLINES = {"reference": ("#E69F00", "solid"), "prediction": ("#56B4E9", "dashed")}
# Plane, the axis that is cut (of left, anterior, superior), letters at the panel's left, right, bottom and top.
PLANES = (("axial", 2, "RLPA"), ("coronal", 1, "RLIS"), ("sagittal", 0, "PAIS"))


@dataclass(frozen=True)
class Overlay:
    """A case to draw: a caption, 3D volumes by modality and masks on one grid, mm per axis.

    ``axcodes`` says where each array axis points to (``nibabel.aff2axcodes``); the letters in the panels follow it.
    ``reference`` is None where nobody has drawn one. ``windows`` holds per image the values that are shown as black and
    as white; by default they are the 1st and the 99th percentile.

    Raises:
        ValueError: on volumes that are not 3D or not on one grid, or on a bad ``spacing``.
    """

    title: str
    images: Mapping[str, NDArray[Any]]
    reference: NDArray[Any] | None
    prediction: NDArray[Any]
    spacing: Sequence[float]
    axcodes: Sequence[str] = "RAS"
    windows: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: np.shape(volume) for name, volume in {**self.images, **self.masks()}.items()}
        if len(set(shapes.values())) > 1 or len(shapes["prediction"]) != 3:
            raise ValueError(f"{self.title}: images and masks must be 3D and share one grid, got shapes {shapes}")
        if len(self.spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"{self.title}: spacing must hold 3 finite positive values in mm, got {self.spacing}")

    def masks(self) -> Volumes:
        """The masks that there are, the reference first."""
        found = {name: getattr(self, name) for name in OUTLINES}
        return {name: np.asarray(mask) > 0 for name, mask in found.items() if mask is not None}

    def millilitres(self) -> dict[str, float]:
        """Volume of each mask."""
        return {name: float(mask.sum() * np.prod(self.spacing) / 1000) for name, mask in self.masks().items()}

    def window(self, modality: str) -> tuple[float, float]:
        """The values of an image that are shown as black and as white."""
        image = np.asarray(self.images[modality], dtype=float)
        finite = image[np.isfinite(image)]
        low, high = self.windows.get(modality) or (np.percentile(finite, (1, 99)) if finite.size else (0, 0))
        return float(low), float(high)


def turned(overlay: Overlay) -> tuple[Volumes, Volumes, NDArray[Any]]:
    """Masks, images and mm per axis, as a panel shows them: the axes run to the left, to anterior, to superior."""
    from nibabel.orientations import apply_orientation, axcodes2ornt

    turn = axcodes2ornt(tuple(overlay.axcodes), (("R", "L"), ("P", "A"), ("I", "S")))
    masks = {name: apply_orientation(mask, turn) for name, mask in overlay.masks().items()}
    images = {name: apply_orientation(np.asarray(image, dtype=float), turn) for name, image in overlay.images.items()}
    return masks, images, np.asarray(overlay.spacing, dtype=float)[np.argsort(turn[:, 0])]


def fullest(masks: Mapping[str, NDArray[Any]], axis: int) -> int:
    """The slice across this axis with the most reference or, without one, prediction; the middle without both."""
    chosen = next((mask for mask in masks.values() if mask.any()), masks["prediction"])
    area = chosen.sum(axis=tuple(a for a in range(3) if a != axis))
    return int(area.argmax()) if area.any() else chosen.shape[axis] // 2


def plain(text: str) -> str:
    """``text`` so that matplotlib shows it literally: no formula, no hidden legend entry."""
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def slice_figure(overlay: Overlay) -> Any:
    """Modalities side by side, in the axial slice with the most reference (or, without one, prediction)."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    masks, images, step = turned(overlay)
    _, axis, letters = PLANES[0]
    at = fullest(masks, axis)
    cuts = {name: np.take(mask, at, axis).T for name, mask in masks.items()}
    rows, columns = np.multiply(cuts["prediction"].shape, step[1::-1])
    height = float(np.clip(3.2 * rows / columns, 2, 6))
    figure = Figure(figsize=(3.2 * len(images), height + 1.0), layout="constrained")
    grid = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, (modality, image) in zip(grid, images.items(), strict=True):
        _draw_panel(axes, np.take(image, at, axis).T, cuts, step[:2], overlay.window(modality), letters)
        axes.set_title(plain(modality))
    figure.suptitle(plain(overlay.title))
    handles = [Line2D([], [], color=colour, ls=style, label=name) for name, (colour, style) in OUTLINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, facecolor="#333333", labelcolor="white")
    return figure


def _draw_panel(axes: Any, cut: Any, masks: Mapping[str, Any], step: Any, shown: Any, letters: str) -> None:
    grid = {"origin": "lower", "extent": (0.0, cut.shape[1] * step[0], 0.0, cut.shape[0] * step[1])}
    axes.imshow(cut, cmap="gray", vmin=shown[0], vmax=shown[1], **grid)
    for name, mask in masks.items():
        if mask.any():
            colour, style = OUTLINES[name]
            axes.contour(mask, [0.5], colors=colour, linestyles=style, linewidths=1.8, **grid)
    for letter, place in zip(letters, ((0.03, 0.5), (0.97, 0.5), (0.5, 0.03), (0.5, 0.97)), strict=True):
        box = {"facecolor": "black", "alpha": 0.6, "pad": 1, "edgecolor": "none"}
        axes.text(*place, letter, transform=axes.transAxes, color="white", ha="center", va="center", size=8, bbox=box)
    axes.set(xticks=[], yticks=[])
