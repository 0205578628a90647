# SPDX-License-Identifier: Apache-2.0
"""MONAI's UNETR, for training with several processes."""

from __future__ import annotations

from typing import Any

from monai.networks import nets


class UNETR(nets.UNETR):
    """MONAI's ``UNETR`` without gradients for the parameters that it never uses.

    MONAI adds a cross-attention norm to every block and never calls it. In a training with several processes,
    DistributedDataParallel would wait for its gradient.

    Args:
        arguments: as for ``monai.networks.nets.UNETR``.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("norm_cross_attn" not in name)
