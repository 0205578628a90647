# SPDX-License-Identifier: Apache-2.0
"""Several networks of one architecture that answer as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from scripts.networks.deep_supervision import first_output


class Ensemble(nn.Module):
    """The logarithm of the mean softmax of several networks, such as the five folds of a cross-validation.

    The result has the meaning of logits: its softmax is the mean probability of the members. For a sigmoid head it
    is the logit of the mean sigmoid of each channel.

    Args:
        members: networks with the same input and output, ``B M H W D`` -> logits ``B C H W D``.
        sigmoid: whether each channel has a sigmoid of its own; a single channel always has.

    Raises:
        ValueError: there is no member.
    """

    def __init__(self, members: Sequence[nn.Module], sigmoid: bool = False) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        if not members:
            raise ValueError("An ensemble needs at least one network.")
        self.members = nn.ModuleList(members)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to logits ``B C H W D``, in float32."""
        logits = torch.stack([first_output(member(image), image).float() for member in self.members])
        if self.sigmoid or logits.shape[2] == 1:
            return torch.logit(logits.sigmoid().mean(0), eps=1e-7)
        return torch.logsumexp(logits.log_softmax(dim=2), dim=0) - math.log(len(self.members))
