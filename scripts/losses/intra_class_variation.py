# SPDX-License-Identifier: Apache-2.0
"""Distillation of how the features of a class vary around their prototype."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._class_regions import class_means, class_shares
from scripts.losses._common import to_common_grid, unit


class IntraClassVariationLoss(nn.Module):
    """Mean squared difference of the voxel-to-prototype cosine maps; the channel counts may differ.

    Source: [paper] IFVD (Wang et al., ECCV 2020) transfers the similarity between the feature of each pixel and the
    prototype of its class, the centre of that class's features; [ours] the formula in 3D and the label's way to a
    coarser grid, where a cell i belongs to class k by the share a_(k,i) of its voxels
    (``scripts.losses._class_regions``)::

        P_k = sum_i a_(k,i) f_i / sum_i a_(k,i),   M(f)_i = sum_k a_(k,i) cos(f_i, P_k)
        L = mean over batch and cells of (M(student)_i - M(teacher)_i)^2,  in [0, 4]

    A cell of one class is so compared with the prototype of its own class. Student and teacher have their own
    prototypes, per sample and for the classes that this sample's label holds. Both maps are pooled to the smaller
    grid first. A zero feature has cosine 0.

    Config::

        "loss#terms#ifv": {"tap": "fine", "weight": 1.0, "loss": {"_target_": "scripts.losses.IntraClassVariationLoss"}}
    """

    def _variation(self, features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        features = features.flatten(2)
        prototypes = unit(class_means(features, shares), dim=2)
        with torch.autocast(features.device.type, enabled=False):
            cosines = prototypes @ unit(features, dim=1)
        return (shares * cosines).sum(dim=1)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (C and the grid may differ), to a scalar, 0 where the maps agree.

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
        return functional.mse_loss(self._variation(student, shares), self._variation(teacher, shares))
