# SPDX-License-Identifier: Apache-2.0
"""Decide the class of every voxel from a network's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from scripts.runtime.regions import own_classes

Regions = Sequence[Sequence[int]]


def classes_from_logits(logits: NDArray, regions: Regions | None = None) -> NDArray[np.uint8]:
    """The class of every voxel.

    Args:
        logits: ``C H W D``, on any grid and of any number of axes.
        regions: the classes of each channel of a sigmoid head (``regions.sigmoid_regions``); None for a softmax over
            the classes.

    Returns:
        Class indices ``H W D``. Of a softmax the class with the largest logit. Of a sigmoid head the regions are
        decided at a probability of 0.5, one after the other: each voxel inside gets the class that is the region's own
        (``regions.own_classes``), and is 0 in no region.

    Raises:
        ValueError: there is another number of channels than regions.
    """
    if regions is not None:
        return _classes_of_regions(logits, regions, 0.0)
    # Two classes are compared directly, which is far faster than argmax.
    return (logits[1] > logits[0]).view(np.uint8) if len(logits) == 2 else logits.argmax(0).astype(np.uint8)


def classes_from_probabilities(probabilities: Iterable[NDArray], regions: Regions | None = None) -> NDArray[np.uint8]:
    """As ``classes_from_logits``, from the probabilities of each channel, ``H W D`` each.

    Of a softmax only two channels are in memory at a time, if ``probabilities`` is a generator.
    """
    if regions is not None:
        return _classes_of_regions(list(probabilities), regions, 0.5)
    channels = iter(probabilities)
    largest = next(channels).copy()
    classes = np.zeros(largest.shape, dtype=np.uint8)
    for index, channel in enumerate(channels, start=1):
        classes[channel > largest] = index
        np.maximum(largest, channel, out=largest)
    return classes


def _classes_of_regions(channels: Sequence[NDArray] | NDArray, regions: Regions, limit: float) -> NDArray[np.uint8]:
    if len(channels) != len(regions):
        raise ValueError(
            f"The network has {len(channels)} output channels, the task has {len(regions)} regions. Use the weights of "
            "this task."
        )
    classes = np.zeros(channels[0].shape, dtype=np.uint8)
    for channel, own in zip(channels, own_classes(regions), strict=True):
        classes[channel > limit] = own
    return classes
