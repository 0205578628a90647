# SPDX-License-Identifier: Apache-2.0
"""Class regions of a label on the grid of a feature map: the share of each class in each cell, and class means.

One cell of a deep feature map covers several voxels, so the label must be reduced to that grid. Nearest-neighbour
sampling and majority voting would both silently drop a lesion that is smaller than a cell. Therefore no cell is
assigned to a single class: each class gets the share of the cell's voxels that carry it. A class with a single voxel
still has a region. Where every cell holds only one class, the shares equal the usual one-hot mask.
"""

from __future__ import annotations

import torch

from scripts.losses._common import EPS, matmul_float32, pool

NO_CLASS = -1  # of a voxel that belongs to no class; every negative index does


def occurring_classes(label: torch.Tensor) -> torch.Tensor:
    """The classes that occur in a label, in ascending order, without negative ones; the first class if there are none.

    Args:
        label: class indices.
    """
    classes = torch.unique(label)
    classes = classes[classes >= 0]
    return classes if len(classes) else label.new_zeros(1)


def class_shares(label: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Compute the share of each class in each cell: one-hot label, then adaptive average pooling.

    Args:
        label: class indices, ``B 1 H W [D]``; a negative one (``NO_CLASS``) is no class.
        features: ``B C H W [D]``; only its shape is used.

    Returns:
        ``B K N`` for the K classes that occur in the batch, in ascending order, and N cells. The shares of a cell sum
        to 1, where all of its voxels have a class. A class that does not occur in a sample has zeros there.

    Raises:
        ValueError: the label is not ``B 1 H W [D]`` with the batch size and dimensions of the features, or its grid is
            coarser than theirs. The message contains both shapes.
    """
    same_layout = label.dim() == features.dim() and label.shape[:2] == (features.shape[0], 1)
    if not same_layout or any(fine < coarse for fine, coarse in zip(label.shape[2:], features.shape[2:], strict=True)):
        raise ValueError(
            f"Label {tuple(label.shape)} must be B 1 H W [D] and no coarser than features {tuple(features.shape)}."
        )
    classes = occurring_classes(label)
    one_hot = (label == classes.view(1, -1, *[1] * (label.dim() - 2))).float()
    return pool(one_hot, features.shape[2:]).flatten(2)


def class_means(features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Compute the mean feature vector of each class, with every cell weighted by its share.

    Args:
        features: ``B C N``.
        shares: ``B K N``, see ``class_shares``.

    Returns:
        ``B K C``; a class that does not occur in a sample has a zero vector there.
    """
    sums = matmul_float32(shares, features.transpose(1, 2))
    return sums / shares.sum(dim=2, keepdim=True).clamp_min(EPS)
