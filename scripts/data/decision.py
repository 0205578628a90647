# SPDX-License-Identifier: Apache-2.0
"""Decide the class of every voxel from a network's output."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from scripts.runtime.regions import own_classes

Regions = Sequence[Sequence[int]]


def classes_from_logits(logits: torch.Tensor, regions: Regions | None = None) -> torch.Tensor:
    """The class of every voxel.

    Args:
        logits: ``C H W D``, on any grid and of any number of axes.
        regions: the classes of each channel of a sigmoid head (``regions.sigmoid_regions``); None for a softmax over
            the classes.

    Returns:
        Class indices ``H W D``, uint8. Of a softmax the class with the largest logit. Of a sigmoid head the regions are
        decided at a probability of 0.5, one after the other: each voxel inside gets the class that is the region's own
        (``regions.own_classes``), and is 0 in no region.

    Raises:
        ValueError: there is another number of channels than regions.
    """
    if regions is not None:
        return _classes_of_regions(logits, regions, 0.0)
    # Two classes are compared directly, which is far faster than argmax.
    return (logits[1] > logits[0]).to(torch.uint8) if len(logits) == 2 else logits.argmax(0).to(torch.uint8)


def classes_from_probabilities(probabilities: Sequence[torch.Tensor], regions: Regions | None = None) -> torch.Tensor:
    """As ``classes_from_logits``, from the probabilities of each channel, ``H W D`` each."""
    if regions is not None:
        return _classes_of_regions(probabilities, regions, 0.5)
    return torch.stack(list(probabilities)).argmax(0).to(torch.uint8)


def _classes_of_regions(
    channels: Sequence[torch.Tensor] | torch.Tensor, regions: Regions, limit: float
) -> torch.Tensor:
    if len(channels) != len(regions):
        raise ValueError(
            f"The network has {len(channels)} output channels, the task has {len(regions)} regions. Use the weights of "
            "this task."
        )
    classes = torch.zeros(channels[0].shape, dtype=torch.uint8, device=channels[0].device)
    for channel, own in zip(channels, own_classes(regions), strict=True):
        classes.masked_fill_(channel > limit, own)
    return classes


class DecideClassesd(MapTransform):
    """Turn logits ``C H W D`` into class indices ``1 H W D``, uint8; see ``classes_from_logits``.

    Args:
        keys: of the logits.
        regions: see ``classes_from_logits``.
    """

    def __init__(self, keys: str | Sequence[str], regions: Regions | None = None) -> None:
        super().__init__(keys)
        self.regions = regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            logits = item[key]
            plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
            item[key] = classes_from_logits(plain, self.regions)[None]
        return item
