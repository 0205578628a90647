# SPDX-License-Identifier: Apache-2.0
"""Check that a network fits the data, with one patch of zeros, before any case is read."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from scripts.networks.deep_supervision import output_heads


def check_network(
    network: nn.Module,
    in_channels: int,
    out_channels: int,
    patch: Sequence[int],
    batch_size: int = 1,
    training: bool = False,
    advice: str = "",
) -> None:
    """Refuse a network that does not take the patches of a run, or does not return logits for them.

    The network, its buffers and the random numbers of the run stay as they are.

    Args:
        network: on its device; ``B M H W D`` -> logits, see ``scripts.networks.deep_supervision.output_heads``.
        in_channels: channels of the image, M.
        out_channels: number of classes, including the background.
        patch: size in voxels.
        batch_size: patches of a training step, since normalisations need several values.
        training: check the outputs in train(), where a network may have several heads.
        advice: what to do, as a sentence; by default to correct the definition of the network.

    Raises:
        ValueError: the network raises an error, its outputs are not tensors of logits for every class, or the first
            output has not the size of the patch.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    image = torch.zeros(batch_size, in_channels, *patch, device=device)
    name = type(network).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            output = copy.deepcopy(network).train(training)(image)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{name} cannot segment an image of {in_channels} channels, one per modality, and {list(patch)} voxels: "
            f"{reason}. " + (advice or f"Correct the network's definition (in_channels: {in_channels}), or the patch.")
        ) from error
    is_list = isinstance(output, (list, tuple)) and bool(output)
    if not (isinstance(output, torch.Tensor) or (is_list and all(isinstance(each, torch.Tensor) for each in output))):
        raise ValueError(f"{name} returns {_described(output)}. A network must return logits, or a list of logits.")
    for index, logits in enumerate(output_heads(output, image)):
        shape, expected = list(logits.shape[1:]), [out_channels, *patch]
        fits = logits.dim() == image.dim() and shape[0] == out_channels and (index > 0 or shape == expected)
        if not fits:
            wanted = f"{expected}" if index == 0 else f"{out_channels} channels"
            raise ValueError(
                f"{name} returns {shape} for a patch, not {wanted}: one channel per class on the patch's grid. "
                + (advice or f"Correct the network's definition (out_channels: {out_channels}).")
            )


def _described(output: object) -> str:
    kind = type(output).__name__
    if isinstance(output, (list, tuple)):
        return f"a {kind} of {', '.join(type(each).__name__ for each in output) or 'nothing'}"
    return f"a {kind}"
