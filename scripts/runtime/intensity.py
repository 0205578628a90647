# SPDX-License-Identifier: Apache-2.0
"""Normalise a modality for the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rule = Sequence[float] | str
ZSCORE = "zscore"


def normalise(volume: NDArray[np.float32], rule: Rule) -> NDArray[np.float32]:
    """Normalise a volume in place, and return it.

    Args:
        volume: of any shape, in the modality's units.
        rule: ``[low, high]`` is scaled to [0, 1] and clipped; ``"zscore"`` gives the voxels that are not 0 zero mean
            and unit variance, as MONAI's ``NormalizeIntensity(nonzero=True)`` does; other text changes nothing.
    """
    if rule == ZSCORE:
        inside = volume != 0
        values = volume[inside]
        if len(values):
            spread = values.std(dtype=np.float64)
            volume[inside] = (values - np.float32(values.mean(dtype=np.float64))) / np.float32(spread or 1.0)
    elif not isinstance(rule, str):
        low, high = rule
        volume -= np.float32(low)
        volume /= np.float32(high - low)
        np.clip(volume, 0, 1, out=volume)
    return volume


def value_outside(rule: Rule) -> float:
    """The value outside a modality's field of view, which becomes 0 as in an absent modality."""
    return 0.0 if isinstance(rule, str) else float(rule[0])
