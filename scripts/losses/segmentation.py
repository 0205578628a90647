# SPDX-License-Identifier: Apache-2.0
"""The supervised loss: Dice and cross-entropy, for both heads, without the voxels that do not count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss
from monai.networks import one_hot
from torch import nn
from torch.nn import functional

Regions = Sequence[Sequence[int]]


def region_targets(label: torch.Tensor, regions: Regions) -> torch.Tensor:
    """Whether each voxel belongs to each region.

    Args:
        label: class indices, ``B 1 H W [D]``.
        regions: the classes of each region.

    Returns:
        ``B R H W [D]``, 0 or 1 in float32.
    """
    inside = [torch.stack([label == index for index in members]).any(dim=0) for members in regions]
    return torch.cat(inside, dim=1).float()


class SegmentationLoss(nn.Module):
    """Dice loss + cross-entropy of the logits and the label.

    Source: MONAI's ``DiceCELoss``, whose value it has for a softmax head without ignored voxels; [ours] the rest.
    Ignored voxels are left out of the intersection and of both sums of the Dice loss, and of the mean of the
    cross-entropy. If all voxels are ignored, the loss is 0. Each channel of a sigmoid head is a region of its own::

        L = mean over batch and regions of the Dice loss of sigmoid(logits)
          + mean over batch, regions and voxels of the binary cross-entropy

    Its target are the voxels whose class belongs to the region.

    Config::

        "segmentation_loss": {"_target_": "scripts.losses.SegmentationLoss", "regions": "@sigmoid_regions"}

    Args:
        regions: the classes of each channel of a sigmoid head; None for a softmax over the classes.
        ignored: the label's index of voxels that do not count.
        include_background: of a softmax head, include the background in the Dice loss.
        batch: one Dice loss over all voxels of the batch, instead of the mean over its samples.
    """

    def __init__(
        self, regions: Regions | None = None, ignored: int = 254, include_background: bool = False, batch: bool = False
    ) -> None:
        super().__init__()
        self.regions, self.ignored = regions, ignored
        self.dice = DiceLoss(include_background=include_background or regions is not None, batch=batch)

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Compare logits with the label.

        Args:
            logits: ``B C H W [D]``, one channel per class, or per region of a sigmoid head.
            label: class indices, ``B 1 H W [D]``, on the same grid.

        Returns:
            Scalar.

        Raises:
            ValueError: a sigmoid head has another number of channels than regions.
        """
        if self.regions is not None and logits.shape[1] != len(self.regions):
            raise ValueError(
                f"The network has {logits.shape[1]} output channels, the task has {len(self.regions)} regions. Build "
                "it with one channel per region."
            )
        counted = label != self.ignored
        number = int(counted.sum())
        if not number:
            return (logits * 0.0).sum()
        if self.regions is None:
            probabilities = logits.softmax(dim=1)
            target = one_hot(label.masked_fill(~counted, 0), logits.shape[1])
            entropy = functional.cross_entropy(logits, label[:, 0].long(), ignore_index=self.ignored)
        else:
            probabilities, target = logits.sigmoid(), region_targets(label, self.regions)
            entropies = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
            entropy = (entropies * counted).sum() / (number * len(self.regions))
        if number < label.numel():
            probabilities, target = probabilities * counted, target * counted
        return self.dice(probabilities, target) + entropy  # type: ignore[no-any-return]
