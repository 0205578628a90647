# SPDX-License-Identifier: Apache-2.0
"""The supervised loss: MONAI's for a softmax, Dice and cross-entropy of each region, and nothing of ignored voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from torch import Tensor, nn

from scripts.losses import SegmentationLoss

NESTED = [[1, 2, 3], [1, 3], [3]]
IGNORED = 254


def inputs(channels: int, classes: int, ignored: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 6, 5, 4, generator=generator)
    label = torch.randint(classes, (2, 1, 6, 5, 4), generator=generator).float()
    if ignored:
        label[torch.rand(label.shape, generator=generator) < 0.3] = IGNORED
    return logits.requires_grad_(), label


@pytest.mark.parametrize("options", [{}, {"include_background": True}, {"batch": True}])
@pytest.mark.parametrize("classes", [2, 4])
def test_for_a_softmax_it_has_the_bits_of_monais_loss(classes: int, options: dict[str, bool]) -> None:
    logits, label = inputs(classes, classes)
    value = SegmentationLoss(**options)(logits, label)
    monai = DiceCELoss(to_onehot_y=True, softmax=True, **{"include_background": False, **options})(logits, label)
    assert torch.equal(value, monai)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (value, monai)]
    assert torch.equal(*gradients)


def test_each_region_of_a_sigmoid_head_has_a_dice_and_a_cross_entropy() -> None:
    logits, label = inputs(3, 4)
    target = torch.cat([torch.isin(label, torch.tensor(members, dtype=label.dtype)) for members in NESTED], 1).float()
    expected = DiceLoss(sigmoid=True)(logits, target) + nn.BCEWithLogitsLoss()(logits, target)
    torch.testing.assert_close(SegmentationLoss(NESTED)(logits, label), expected)


def test_a_head_of_one_channel_learns_its_region() -> None:
    logits, label = inputs(1, 2)
    expected = DiceLoss(sigmoid=True)(logits, label) + nn.BCEWithLogitsLoss()(logits, label)
    torch.testing.assert_close(SegmentationLoss([[1]])(logits, label), expected)


def dice_loss(p: Any, t: Any) -> float:
    """1 - (2 intersection + 1e-5) / (sums + 1e-5) of one class of one sample."""
    return float(1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5))


@pytest.mark.parametrize("regions", [None, NESTED])
def test_ignored_voxels_are_left_out_of_every_sum(regions: list[list[int]] | None) -> None:
    """Computed by NumPy on the other voxels alone."""
    logits, label = inputs(4 if regions is None else 3, 4, ignored=True)
    z, y = logits.detach().double().numpy().reshape(2, -1, 120), label.numpy().reshape(2, 120)
    members = [[1], [2], [3]] if regions is None else regions
    dice, entropy = [], []
    for sample, classes in zip(z, y, strict=True):
        counted = classes != IGNORED
        kept, classes = sample[:, counted], classes[counted]
        if regions is None:
            p = np.exp(kept) / np.exp(kept).sum(0)
            entropy += (-np.log(p[classes.astype(int), np.arange(len(classes))])).tolist()
            p = p[1:]  # without the background
        else:
            p = 1 / (1 + np.exp(-kept))
        targets = np.stack([np.isin(classes, each) for each in members])
        dice += [dice_loss(*pair) for pair in zip(p, targets, strict=True)]
        if regions is not None:
            entropy += (-np.log(np.where(targets, p, 1 - p))).ravel().tolist()
    value = SegmentationLoss(regions)(logits, label)
    assert value.item() == pytest.approx(np.mean(dice) + np.mean(entropy), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, logits)
    ignored = (label == IGNORED).expand_as(gradient)
    assert not gradient[ignored].any()
    assert gradient[~ignored].all()


@pytest.mark.parametrize("regions", [None, NESTED])
def test_a_batch_of_ignored_voxels_only_teaches_nothing(regions: list[list[int]] | None) -> None:
    logits, label = inputs(4 if regions is None else 3, 4)
    value = SegmentationLoss(regions)(logits, torch.full_like(label, IGNORED))
    assert value.item() == 0
    assert not torch.autograd.grad(value, logits)[0].any()


def test_coarser_heads_keep_ignored_voxels_ignored() -> None:
    logits, label = inputs(3, 4, ignored=True)
    label = label.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)  # so that nearest is exact
    fine = logits.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    loss = SegmentationLoss(NESTED)
    expected = loss(fine, label) + 0.5 * loss(logits, label[..., ::2, ::2, ::2])
    torch.testing.assert_close(DeepSupervisionLoss(loss)([fine, logits], label), expected)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="4 output channels, the task has 3 regions"):
        SegmentationLoss(NESTED)(*inputs(4, 4))
