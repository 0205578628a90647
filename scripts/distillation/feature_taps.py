# SPDX-License-Identifier: Apache-2.0
"""Taps: named layers of a network whose outputs are recorded during a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Layers = str | Sequence[str] | None


class Tap:
    """The output of one layer of a network, or of several.

    Args:
        owner: name of the network in error messages.
        network: the network.
        layers: dotted path of the layer, as ``named_modules`` returns it, or a list of such paths.

    Raises:
        ValueError: the network has no such layer; the message lists the valid names.
    """

    def __init__(self, owner: str, network: nn.Module, layers: str | Sequence[str]) -> None:
        # Lists and dicts of modules are never called, so a hook on them would record nothing.
        containers = (nn.ModuleList, nn.ModuleDict)
        valid = [name for name, module in network.named_modules() if name and not isinstance(module, containers)]
        self.name, self.single = f"{owner} ({type(network).__name__})", isinstance(layers, str)
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        for layer in self.layers:
            if layer not in valid:
                raise ValueError(f"{self.name} has no layer {layer!r} to tap. Its layers are: {', '.join(valid)}.")
        self.modules = [network.get_submodule(layer) for layer in self.layers]

    def output(self, recorded: Mapping[nn.Module, torch.Tensor]) -> Any:
        """Return the layer's recorded output, or the list of the layers' outputs.

        Args:
            recorded: what ``record_outputs`` yielded.
        """
        for layer, module in zip(self.layers, self.modules, strict=True):
            if module not in recorded:
                raise ValueError(f"{self.name} never calls its layer {layer!r} in forward: tap another layer.")
        outputs = [recorded[module] for module in self.modules]
        return outputs[0] if self.single else outputs


@contextmanager
def record_outputs(taps: Iterable[Tap]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Record the outputs of the tapped layers while the body runs; of a tuple the first item."""
    recorded: dict[nn.Module, torch.Tensor] = {}

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        recorded[module] = output[0] if isinstance(output, tuple) else output

    modules = {module for tap in taps for module in tap.modules}
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def layers_for(owner: str, network: nn.Module, tap: str, table: Mapping[str, Layers]) -> Layers:
    """Look up a tap's layers for one network, by the network's name and then by its class name.

    Returns:
        The layers, or None if the table excludes this network from the tap.

    Raises:
        ValueError: the table has no entry for this network.
    """
    kind = type(network).__name__
    for name in (owner, kind):
        if name in table:
            return table[name]
    raise ValueError(f"Tap {tap!r} has no layer for {owner} ({kind}). It has layers for: {', '.join(sorted(table))}.")
