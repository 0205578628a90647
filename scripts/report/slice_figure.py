# SPDX-License-Identifier: Apache-2.0
"""One axial slice of a case as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.report.overlay import OUTLINES, PLANES, Overlay, largest_slice, take_slice, viewing_orientation

# Places of the direction letters in a panel, as shares of its width and height: left, right, bottom, top.
_LETTER_PLACES = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.03), (0.5, 0.97))


def literal_text(text: str) -> str:
    """``text`` so that matplotlib shows it literally: dollars start no formula, a leading underscore hides no label."""
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def slice_figure(overlay: Overlay) -> Any:
    """Draw all modalities side by side, in the axial slice with the largest reference (or else predicted) area.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    masks, images, step = viewing_orientation(overlay)
    _, axis, letters = PLANES[0]
    index = largest_slice(masks, axis)
    mask_slices, image_slices = take_slice(masks, index, axis), take_slice(images, index, axis)
    rows, columns = np.multiply(mask_slices["prediction"].shape, step[1::-1])
    height = float(np.clip(3.2 * rows / columns, 2, 6))
    figure = Figure(figsize=(3.2 * len(images), height + 1.0), layout="constrained")
    panels = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, (modality, image) in zip(panels, image_slices.items(), strict=True):
        _draw_panel(axes, image, mask_slices, step[:2], overlay.window(modality), letters)
        axes.set_title(literal_text(modality))
    figure.suptitle(literal_text(overlay.title))
    handles = [Line2D([], [], color=colour, label=name) for name, colour in OUTLINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, facecolor="#333333", labelcolor="white")
    return figure


def _draw_panel(
    axes: Any,
    image: NDArray[Any],
    masks: Mapping[str, NDArray[Any]],
    step: NDArray[Any],
    window: tuple[float, float],
    letters: str,
) -> None:
    extent_mm = (0.0, image.shape[1] * step[0], 0.0, image.shape[0] * step[1])
    axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], origin="lower", extent=extent_mm)
    for name, mask in masks.items():
        if mask.any():
            axes.contour(mask, [0.5], colors=OUTLINES[name], linewidths=1.8, origin="lower", extent=extent_mm)
    for letter, place in zip(letters, _LETTER_PLACES, strict=True):
        box = {"facecolor": "black", "alpha": 0.6, "pad": 1, "edgecolor": "none"}
        axes.text(*place, letter, transform=axes.transAxes, color="white", ha="center", va="center", size=8, bbox=box)
    axes.set(xticks=[], yticks=[])
