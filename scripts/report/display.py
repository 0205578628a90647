# SPDX-License-Identifier: Apache-2.0
"""How a modality is shown: its window presets, inverted grey for PET, and PET in hot colours on CT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FUSION = "PET on CT"

# Width and level of the usual presets in HU, and SUV ranges that begin at 0.
_CT_PRESETS = {"soft tissue": (400, 40), "lung": (1500, -600), "bone": (1800, 400), "brain": (80, 40)}
_PET_ENDS = (5, 7, 10, 15, 20)


class Preset(NamedTuple):
    """A window: the values that are shown as black and as white (of PET: white and black)."""

    name: str
    low: float
    high: float


def is_pet(modality: str) -> bool:
    """Whether the name of a modality means PET."""
    return modality.lower().startswith(("pet", "pt", "suv", "fdg"))


def is_ct(modality: str) -> bool:
    """Whether the name of a modality means CT."""
    return modality.lower().startswith("ct")


def presets(modality: str, window: tuple[float, float], finite: NDArray[np.floating] | None = None) -> list[Preset]:
    """The windows that a reader can choose from, the first one is shown at first.

    Args:
        modality: its name.
        window: the window of the network, or of percentiles.
        finite: values of the image, for a window of all values; without them, or of CT and PET, there is none.
    """
    low, high = window
    if is_ct(modality):
        widths = {name: (level - width / 2, level + width / 2) for name, (width, level) in _CT_PRESETS.items()}
        return [Preset("default", low, high), *(Preset(name, *ends) for name, ends in widths.items())]
    if is_pet(modality):
        return [Preset("default", low, high), *(Preset(f"SUV 0 to {end}", 0.0, float(end)) for end in _PET_ENDS)]
    found = [Preset("default", low, high)]
    if finite is not None and finite.size:
        narrow, wide = np.percentile(finite, (2, 98)), (finite.min(), finite.max())
        found += [Preset("high contrast", *map(float, narrow)), Preset("all values", *map(float, wide))]
    return found


def fused_pair(modalities: Iterable[str]) -> tuple[str, str] | None:
    """The CT and the PET that are shown in one picture; None where one of them is missing."""
    names = list(modalities)
    ct = next((name for name in names if is_ct(name)), None)
    pet = next((name for name in names if is_pet(name)), None)
    return (ct, pet) if ct and pet else None


def fuse(ct: NDArray[np.uint8], pet: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """PET in hot colours (black, red, yellow, white) on CT; the higher PET, the less transparent.

    Args:
        ct: grey levels, any shape.
        pet: grey levels of the same shape; 255 is the upper end of the window.

    Returns:
        RGB, with the colours as the last axis.
    """
    share = pet[..., None] / 255.0
    hot = np.clip(3 * share - np.arange(3), 0, 1)
    return np.round((1 - share) * ct[..., None] + 255 * share * hot).astype(np.uint8)
