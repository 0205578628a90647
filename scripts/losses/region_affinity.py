# SPDX-License-Identifier: Apache-2.0
"""Distil how similar the regions of two classes are."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._class_regions import class_means, class_shares
from scripts.losses._common import matmul_float32, to_common_grid, unit_vectors


class RegionAffinityLoss(nn.Module):
    """Squared difference of the cosines between the mean features of two classes.

    Source: [paper] EMKD (Qin et al., IEEE TMI 2021, arXiv 2108.09987) makes the student reproduce how much the
    representations of different tissue regions differ; [ours] the formula in 3D and the reduction of the label to a
    coarser grid, where a cell i belongs to class k by the share a_(k,i) of its voxels (see
    ``scripts.losses._class_regions``)::

        v_k = sum_i a_(k,i) f_i / sum_i a_(k,i)
        L = mean over batch and pairs k < l of (cos(v_k, v_l)_student - cos(v_k, v_l)_teacher)^2

    The range of L is [0, 4]. The pairs are those of the classes in a sample's label, including the background. A sample
    with fewer than two classes counts as 0 in the mean over the batch and gives no gradient. Both maps are pooled to
    their common (smaller) grid first. A region whose mean feature is zero has cosine 0. The numbers of channels may
    differ. This is the third part of EMKD, beside the prediction map (``SoftPredictionLoss``, temperature 4) and the
    importance maps (``AttentionMapLoss``, p 4): configs/methods/emkd.json.

    Config::

        "loss#terms#region": {"tap": "fine", "weight": 1.0, "loss": {"_target_": "scripts.losses.RegionAffinityLoss"}}
    """

    def _affinity(self, features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        vectors = unit_vectors(class_means(features.flatten(2), shares), dim=2)
        return matmul_float32(vectors, vectors.transpose(1, 2))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Compare the affinities of the class regions.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; C and the grid may differ from the student's.
            label: class indices, ``B 1 H W [D]``, at the image's resolution.

        Returns:
            Scalar, 0 if the affinities agree.

        Raises:
            ValueError: the batch sizes or numbers of dimensions differ, or the label is coarser than the features. The
                message contains both shapes.
        """
        student, teacher = to_common_grid(student.float(), teacher.detach().float())
        shares = class_shares(label, student)
        present = shares.sum(dim=2) > 0
        pairs = (present.unsqueeze(1) & present.unsqueeze(2)).triu(diagonal=1)
        difference = self._affinity(student, shares) - self._affinity(teacher, shares)
        per_sample = (difference.square() * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp_min(1)
        return per_sample.mean()
