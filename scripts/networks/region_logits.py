# SPDX-License-Identifier: Apache-2.0
"""From the classes of a softmax to the regions of a sigmoid head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Regions = Sequence[Sequence[int]]  # the classes of each channel of a sigmoid head


def region_logits(logits: torch.Tensor, regions: Regions) -> torch.Tensor:
    """The logits of regions that a softmax over classes implies: log p(region) - log(1 - p(region)).

    Args:
        logits: of disjoint classes, ``B C H W [D]``; any constant may be added to those of a voxel.
        regions: the classes of each region; none has all of them.

    Returns:
        ``B R H W [D]``, whose sigmoid is the sum of the region's probabilities.
    """
    channels = []
    for members in regions:
        others = [index for index in range(logits.shape[1]) if index not in members]
        inside, outside = (logits[:, chosen].logsumexp(dim=1, keepdim=True) for chosen in (list(members), others))
        channels.append(inside - outside)
    return torch.cat(channels, dim=1)
