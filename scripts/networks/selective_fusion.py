# SPDX-License-Identifier: Apache-2.0
"""A block of the student that weights local features against wider context. Each can have its own teacher."""

from __future__ import annotations

import torch
from torch import nn


class SelectiveFusion(nn.Module):
    """Per-channel selection between local and context features: ``B C H W [D]`` -> ``B C H W [D]``.

    Source: [paper] dual distillation (Cui et al., Med Phys 2024, 10.1002/mp.17506) uses Selective Fusion in
    the student; [ours] the formula, after selective kernels (Li et al., arXiv 1903.06586)::

        l = local(x), depthwise 3^n                  taught by a CNN
        g = context(x), depthwise 3^n, dilation 3    taught by a transformer
        z = ReLU(LayerNorm(W GAP(l + g))),  width max(C / 16, 32)
        (a, b) = softmax, per channel, of two linear heads of z,  a + b = 1
        out = x + conv1(a * l + b * g)

    Layers that can be tapped: ``local`` and ``context``, each ``B C H W [D]``.

    Args:
        channels: number of channels C.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        width = max(channels // 16, 32)
        self.local = conv(channels, channels, 3, padding=1, groups=channels)
        self.context = conv(channels, channels, 3, padding=3, dilation=3, groups=channels)
        self.squeeze = nn.Sequential(nn.Linear(channels, width, bias=False), nn.LayerNorm(width), nn.ReLU())
        self.prefer_local = nn.Linear(width, channels)
        self.prefer_context = nn.Linear(width, channels)
        self.project = conv(channels, channels, 1)

    def select(self, local: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the weights a and b of local and context features (``B C H W [D]``).

        Returns:
            a and b, each ``B C``; they sum to 1 in every channel.
        """
        z = self.squeeze((local + context).flatten(2).mean(dim=2))
        shares = torch.stack([self.prefer_local(z), self.prefer_context(z)]).softmax(dim=0)
        return shares[0], shares[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of the same shape as ``x``, ``B C H W [D]``."""
        local, context = self.local(x), self.context(x)
        a, b = self.select(local, context)
        shape = [x.shape[0], x.shape[1]] + [1] * (x.dim() - 2)
        return x + self.project(a.view(shape) * local + b.view(shape) * context)
