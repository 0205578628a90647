# SPDX-License-Identifier: Apache-2.0
"""Size and operations of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def network_cost(network: nn.Module, patch: Sequence[int], channels: int) -> dict[str, Any]:
    """Count the parameters of a network and the operations of one window.

    Args:
        network: is put into eval(), and moved to the CPU unless it is on the device ``meta``, where nothing is
            computed.
        patch: size of the window in voxels.
        channels: of the image.

    Returns:
        ``parameters`` and ``gflops`` (2 operations per multiply-add).
    """
    device = torch.device("meta" if any(parameter.is_meta for parameter in network.parameters()) else "cpu")
    network = network.to(device).eval()
    with device, torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, *patch))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "gflops": round(counter.get_total_flops() / 1e9, 2)}
