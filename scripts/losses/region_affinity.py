# SPDX-License-Identifier: Apache-2.0
"""Distillation of how alike the regions of two classes are."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._class_regions import class_means, class_shares
from scripts.losses._common import to_common_grid, unit


class RegionAffinityLoss(nn.Module):
    """Squared difference of the cosine between the mean features of two classes; the channel counts may differ.

    Source: [paper] EMKD (Qin et al., IEEE TMI 2021, arXiv 2108.09987) makes the student mimic how far the
    representations of different tissue regions differ; [ours] the formula in 3D and the label's way to a coarser
    grid, where a cell i belongs to class k by the share a_(k,i) of its voxels (``scripts.losses._class_regions``)::

        v_k = sum_i a_(k,i) f_i / sum_i a_(k,i)
        L = mean over batch and pairs k < l of (cos(v_k, v_l)_student - cos(v_k, v_l)_teacher)^2,  in [0, 4]

    The pairs are those of the classes that a sample's label holds, the background among them. A sample with fewer
    than two classes counts as 0 in the mean over the batch and gives no gradient. Both maps are pooled to the smaller
    grid first. A region whose mean feature is zero has cosine 0.

    Config::

        "loss#terms#region": {"tap": "fine", "weight": 1.0, "loss": {"_target_": "scripts.losses.RegionAffinityLoss"}}
    """

    def _affinity(self, features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        vectors = unit(class_means(features.flatten(2), shares), dim=2)
        with torch.autocast(vectors.device.type, enabled=False):
            return vectors @ vectors.transpose(1, 2)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (C and the grid may differ), to a scalar, 0 where the affinities agree.

        Args:
            student: its features.
            teacher: its features.
            label: class indices, ``B 1 H W [D]``, at the image's resolution.

        Raises:
            ValueError: the maps are not two batches of one size and dimension, or the label does not fit them; both
                shapes are named.
        """
        student, teacher = to_common_grid(student.float(), teacher.detach().float())
        shares = class_shares(label, student)
        present = shares.sum(dim=2) > 0
        pairs = (present.unsqueeze(1) & present.unsqueeze(2)).triu(diagonal=1)
        difference = self._affinity(student, shares) - self._affinity(teacher, shares)
        per_sample = (difference.square() * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp_min(1)
        return per_sample.mean()
