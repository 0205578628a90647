# SPDX-License-Identifier: Apache-2.0
"""The label in a teacher's place."""

from __future__ import annotations

import torch
from torch import nn

from scripts.networks.region_logits import Regions, region_logits

LABEL_LOGIT = 20.0  # of the label's class; with two classes its probability is 1 - 2e-9


class LabelTeacher(nn.Module):
    """The label in a teacher's place: the control that every claim of transferred knowledge needs.

    It answers with ``LABEL_LOGIT`` for the label's class and 0 for the others, or with the logits of regions that
    follow from those. It has no layers to tap, and is there for every sample.

    Args:
        classes: number of classes, including the background.
        regions: the classes of each channel of a task with a sigmoid head.
    """

    uses_label = True

    def __init__(self, classes: int, regions: Regions | None = None) -> None:
        super().__init__()
        self.classes, self.regions, self.sha256 = classes, regions, None
        self.channels: list[int] = []

    def forward(self, label: torch.Tensor) -> torch.Tensor:
        """Class indices ``B 1 H W [D]`` to logits ``B C H W [D]``, one channel per class or region."""
        classes = torch.arange(self.classes, device=label.device).view(1, -1, *[1] * (label.dim() - 2))
        logits = LABEL_LOGIT * (label.long() == classes).float()
        return logits if self.regions is None else region_logits(logits, self.regions)
