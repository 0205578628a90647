# SPDX-License-Identifier: Apache-2.0
"""Taps: the layers of a network whose outputs are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Layers = str | Sequence[str] | None


class Tap:
    """What is wanted of one network: the output of one layer, or of several.

    Args:
        owner: how to call the network in messages.
        network: the network.
        layers: dotted path of the layer, as ``named_modules`` gives it, or a list of such paths.

    Raises:
        ValueError: the network has no such layer; the valid names are listed.
    """

    def __init__(self, owner: str, network: nn.Module, layers: str | Sequence[str]) -> None:
        # Lists and dicts of modules are never called, so that a hook on them would hear nothing.
        silent = (nn.ModuleList, nn.ModuleDict)
        valid = [name for name, module in network.named_modules() if name and not isinstance(module, silent)]
        self.name, self.single = f"{owner} ({type(network).__name__})", isinstance(layers, str)
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        for layer in self.layers:
            if layer not in valid:
                raise ValueError(f"{self.name} has no layer {layer!r} to tap; it has: {', '.join(valid)}.")
        self.modules = [network.get_submodule(layer) for layer in self.layers]

    def value(self, heard: Mapping[nn.Module, torch.Tensor]) -> Any:
        """The layer's output among those heard, or the list of the layers' outputs."""
        for layer, module in zip(self.layers, self.modules, strict=True):
            if module not in heard:
                raise ValueError(f"{self.name} never calls its layer {layer!r} in forward: tap another one.")
        outputs = [heard[module] for module in self.modules]
        return outputs[0] if self.single else outputs


@contextmanager
def listening(taps: Iterable[Tap]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Collect the tapped layers' outputs while the body runs; of a tuple its first item."""
    heard: dict[nn.Module, torch.Tensor] = {}

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        heard[module] = output[0] if isinstance(output, tuple) else output

    modules = {module for tap in taps for module in tap.modules}
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def layers_of(owner: str, network: nn.Module, tap: str, layers: Mapping[str, Layers]) -> Layers:
    """What a tap's table says of one network; None where it says that the tap is not for it."""
    kind = type(network).__name__
    for name in (owner, kind):
        if name in layers:
            return layers[name]
    raise ValueError(f"Tap {tap!r} names no layer for {owner} ({kind}); it knows {sorted(layers)}.")
