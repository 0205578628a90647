# SPDX-License-Identifier: Apache-2.0
"""Regions of a label on the grid of a feature map: the classes' shares of each cell and their mean features.

A deep feature map has cells of several voxels, so the label must come down to its grid. Nearest sampling and the
majority of each cell both lose a lesion that is smaller than a cell, and nobody would notice. Hence no cell is
given to one class: a cell belongs to each class by the share of its voxels that carry this class. A class with a
single voxel in the label so keeps a region, and where each cell holds one class only this is the usual mask.
"""

from __future__ import annotations

import torch

from scripts.losses._common import EPS, pool


def class_shares(label: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Share of each class in each cell of the features' grid: one-hot label, adaptive average pooling.

    Args:
        label: class indices, ``B 1 H W [D]``.
        features: ``B C H W [D]``; only its shape is used.

    Returns:
        ``B K N``: K classes that the batch's label holds, in ascending order, and N cells. The shares of a cell
        sum to 1; a class that a sample does not hold has zeros there.

    Raises:
        ValueError: the label is not ``B 1 H W [D]`` of the features' batch and dimension, or is coarser than they
            are; both shapes are named.
    """
    fits = label.dim() == features.dim() and label.shape[:2] == (features.shape[0], 1)
    if not fits or any(fine < coarse for fine, coarse in zip(label.shape[2:], features.shape[2:], strict=True)):
        raise ValueError(
            f"Label {tuple(label.shape)} must be B 1 H W [D] and no coarser than features {tuple(features.shape)}."
        )
    classes = torch.unique(label)
    one_hot = (label == classes.view(1, -1, *[1] * (label.dim() - 2))).float()
    return pool(one_hot, features.shape[2:]).flatten(2)


def class_means(features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mean feature of each class, every cell weighted by its share: ``B C N`` and ``B K N`` to ``B K C``.

    A class that a sample does not hold has a zero vector there.
    """
    with torch.autocast(features.device.type, enabled=False):
        sums = shares @ features.transpose(1, 2)
    return sums / shares.sum(dim=2, keepdim=True).clamp_min(EPS)
