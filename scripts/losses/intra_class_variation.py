# SPDX-License-Identifier: Apache-2.0
"""Distil how the features of a class vary around their prototype."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._class_regions import class_means, class_shares
from scripts.losses._common import matmul_float32, to_common_grid, unit_vectors


class IntraClassVariationLoss(nn.Module):
    """Mean squared difference of the maps of cosines between each voxel and the prototype of its class.

    Source: [paper] IFVD (Wang et al., ECCV 2020) transfers the similarity between the feature of each pixel and the
    prototype of its class, which is the centre of that class's features; [ours] the formula in 3D and the reduction of
    the label to a coarser grid, where a cell i belongs to class k by the share a_(k,i) of its voxels (see
    ``scripts.losses._class_regions``)::

        P_k = sum_i a_(k,i) f_i / sum_i a_(k,i),   M(f)_i = sum_k a_(k,i) cos(f_i, P_k)
        L = mean over batch and cells of (M(student)_i - M(teacher)_i)^2

    The range of L is [0, 4]. A cell of a single class is thus compared with the prototype of that class. Student and
    teacher have their own prototypes, computed for each sample from the classes in its label. Both maps are pooled to
    their common (smaller) grid first. A zero feature has cosine 0. The numbers of channels may differ.

    Config::

        "loss#terms#ifv": {"tap": "fine", "weight": 1.0, "loss": {"_target_": "scripts.losses.IntraClassVariationLoss"}}
    """

    def _variation(self, features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        features = features.flatten(2)
        prototypes = unit_vectors(class_means(features, shares), dim=2)
        cosines = matmul_float32(prototypes, unit_vectors(features, dim=1))
        return (shares * cosines).sum(dim=1)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Compare the cosine maps.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; C and the grid may differ from the student's.
            label: class indices, ``B 1 H W [D]``, at the image's resolution.

        Returns:
            Scalar, 0 if the cosine maps agree.

        Raises:
            ValueError: the batch sizes or numbers of dimensions differ, or the label is coarser than the features. The
                message contains both shapes.
        """
        student, teacher = to_common_grid(student.float(), teacher.detach().float())
        shares = class_shares(label, student)
        return functional.mse_loss(self._variation(student, shares), self._variation(teacher, shares))
