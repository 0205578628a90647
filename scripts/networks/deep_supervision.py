# SPDX-License-Identifier: Apache-2.0
"""Networks with several outputs (deep supervision): the full-resolution logits come first, the other heads after them.

MONAI's networks return them as a list (SegResNetDS), as a tuple, or as one stacked tensor (DynUNet).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Output = torch.Tensor | Sequence[torch.Tensor]


def output_heads(output: Output, image: torch.Tensor) -> list[torch.Tensor]:
    """The logits of every head.

    Args:
        output: of a network: logits ``B classes H W [D]``; a list or tuple of logits, the full resolution first; or a
            tensor ``B heads classes H W [D]`` of stacked logits.
        image: what the network was given, ``B M H W [D]``; a tensor with one more dimension is stacked.
    """
    if isinstance(output, torch.Tensor):
        return list(output.unbind(1)) if output.dim() > image.dim() else [output]
    return list(output)


def first_output(output: Output, image: torch.Tensor) -> torch.Tensor:
    """The full-resolution logits ``B classes H W [D]``; arguments as for ``output_heads``."""
    return output_heads(output, image)[0]


def segmentation_network(network: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """Prepare a network for training and inference, in place: its outputs and where it lies.

    In eval() it then returns the full-resolution logits, a tensor, whatever its class returns. In train() it returns a
    list of logits if it has several heads, else a tensor.

    Args:
        network: ``B M H W D`` -> one of the outputs of ``output_heads``. Its weights keep their names.
        device: where to move it; by default it stays. Its memory format becomes channels_last_3d. Only group
            normalisation trains on contiguous tensors, as it always does on a GPU: on a CPU, PyTorch 2.13 computes its
            gradients in channels_last_3d several times more slowly.

    Returns:
        The network itself.
    """
    network.register_forward_hook(_select_heads)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(_contiguous)
    return channels_last(network.to(device))


def channels_last(network: nn.Module) -> nn.Module:
    """Store the weights of 3D convolutions in channels_last_3d, in place; returns the network.

    ``network.to(memory_format=...)`` fails where a weight has four dimensions, as of a 2D convolution.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 5:  # not contiguous(): it keeps the strides of kernels of one voxel, which changes rounding
            tensor.data = tensor.data.to(memory_format=torch.channels_last_3d)
    return network


def _select_heads(network: nn.Module, inputs: Any, output: Output) -> Output:
    heads = output_heads(output, inputs[0])
    return heads if network.training and len(heads) > 1 else heads[0]


def _contiguous(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each.contiguous() for each in inputs) if norm.training else inputs
