# SPDX-License-Identifier: Apache-2.0
"""Weights of the teachers for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from scripts.losses.segmentation import Regions, region_targets

MODES = ("mean", "static", "confidence", "entropy")


def available_teachers(presence: torch.Tensor, channels: Sequence[Sequence[int]]) -> torch.Tensor:
    """Find the teachers that can be used for each sample: those whose modalities are all present.

    Args:
        presence: B x M, bool.
        channels: for each teacher the channels of the image that it uses.

    Returns:
        B x K, bool.
    """
    return torch.stack([presence[:, list(used)].all(dim=1) for used in channels], dim=1)


def _cross_entropy(logits: torch.Tensor, label: torch.Tensor, regions: Regions | None) -> torch.Tensor:
    """Mean cross-entropy of each sample over the voxels that have a class, (B,)."""
    counted = label >= 0
    if regions is None:
        losses = functional.cross_entropy(logits, label[:, 0].long().clamp_min(0), reduction="none")[:, None]
    else:
        targets = region_targets(label, regions)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1, keepdim=True)
    return (losses * counted).flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp_min(1)


def _entropy(logits: torch.Tensor, regions: Regions | None) -> torch.Tensor:
    """Mean predictive entropy of each sample, (B,)."""
    if regions is not None:  # each channel is a question with two answers
        logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
    log_p = functional.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).flatten(1).mean(dim=1)


def _confidence(losses: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """(1 - softmax(CE)) / (K - 1) over each sample's available teachers; 1 if there is only one."""
    share = losses.masked_fill(~available, float("-inf")).softmax(dim=1).nan_to_num(0.0)
    others = (available.sum(dim=1, keepdim=True) - 1).clamp_min(1)
    only_one = available.sum(dim=1, keepdim=True) == 1
    return torch.where(only_one, torch.ones_like(share), (1 - share) / others)


def check_weighting(mode: str, teachers: int, static: Sequence[float] | None = None) -> None:
    """Check the weighting of a number of teachers.

    Raises:
        ValueError: the mode is unknown; its static weights are missing or do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown weighting {mode!r}: choose one of {', '.join(MODES)}.")
    if mode == "static" and (static is None or len(static) != teachers or min(static) < 0 or sum(static) <= 0):
        raise ValueError(f"static weighting needs {teachers} weights >= 0 and not all 0, got {static}.")


def teacher_weights(
    mode: str,
    logits: Sequence[torch.Tensor],
    available: torch.Tensor,
    label: torch.Tensor | None = None,
    static: Sequence[float] | None = None,
    regions: Regions | None = None,
) -> torch.Tensor:
    """Compute the weights of K teachers for each sample, B x K, non-negative.

    A row sums to 1, or to 0 if no teacher (``static``: none with a weight above 0) is available for that sample.

    Source: [ours]. ``mean`` 1/K; ``static`` the weights passed as ``static``; ``confidence``
    ``(1 - softmax_k(CE_k)) / (K - 1)`` with the teacher's cross-entropy CE_k on the sample's label; ``entropy``
    ``softmax_k`` of minus the mean predictive entropy, which needs no label. Unavailable teachers get 0 and the
    remaining weights are renormalised. No gradient flows.

    Args:
        mode: one of ``MODES``.
        logits: for each teacher ``B C H W [D]``.
        available: B x K, bool, see ``available_teachers``.
        label: class indices ``B 1 H W [D]``, for ``confidence``; voxels of no class have a negative one.
        static: K weights >= 0, not all 0, for ``static``.
        regions: the classes of each channel of a sigmoid head; None for a softmax, or for a single channel.

    Raises:
        ValueError: the mode needs a label that is missing, or ``check_weighting`` refuses it.
    """
    check_weighting(mode, available.shape[1], static)
    detached = [z.detach().float() for z in logits]
    if detached[0].shape[1] == 1:
        regions = regions or [[1]]
    if mode == "mean":
        weights = torch.ones_like(available, dtype=torch.float32)
    elif mode == "static":
        weights = torch.tensor(list(static or ()), device=available.device).float().expand(available.shape)
    elif mode == "confidence":
        if label is None:
            raise ValueError("confidence weighting needs the label.")
        weights = _confidence(torch.stack([_cross_entropy(z, label, regions) for z in detached], dim=1), available)
    else:
        # Unavailable teachers must not enter the softmax: a teacher whose input is zeros may have a very low entropy.
        entropies = torch.stack([_entropy(z, regions) for z in detached], dim=1).masked_fill(~available, float("inf"))
        weights = (-entropies).softmax(dim=1).nan_to_num(0.0)
    weights = weights * available
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
