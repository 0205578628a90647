# SPDX-License-Identifier: Apache-2.0
"""Taps: named layers of a network whose outputs are recorded during a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from scripts.networks.architecture import STUDENT, architecture_names, read_architecture
from scripts.networks.student import Student

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


def layers_for(owner: str, tap: str, table: Mapping[str, Layers]) -> Layers:
    """Look up a tap's layers for one network by its name.

    Returns:
        The layers, or None if the table excludes this network from the tap.

    Raises:
        ValueError: the table has no entry for this network.
    """
    if owner not in table:
        raise ValueError(f"Tap {tap!r} has no layer for {owner}. It has layers for: {', '.join(sorted(table))}.")
    return table[owner]


def tap_layers(
    terms: Mapping[str, Mapping[str, Any]],
    taps: Mapping[str, Mapping[str, Any]],
    student: Mapping[str, Layers],
    teachers: Mapping[str, nn.Module],
    network: nn.Module,
) -> dict[str, dict[str, Layers]]:
    """Find the layers of every tap that the terms use.

    The layers of a network are those of its architecture (configs/teachers); a teacher's specification and
    ``student`` may replace them.

    Args:
        terms: name -> ``tap``: the name of a layer (``deep``, ``middle``, ``fine``), or of one of ``taps``.
        taps: tap name -> ``layer``: which layer it takes of every network; ``student``: the student's layers instead,
            several if an adapter fuses them; ``kind``: the only kind of teacher that it applies to.
        student: the student's layers; those that it leaves out are, for the included student, those of
            configs/teachers/student.json.
        teachers: name -> teacher; a cached one and the label have no layers of their own.
        network: the student.

    Returns:
        Tap name -> network (``student`` or a teacher's name) -> layer; None for a teacher that the tap leaves out. A
        term's tap that is no layer of any network is left out; ``DistillationLoss`` knows whether it exists.

    Raises:
        ValueError: a network that a tap needs names no such layer, or no teacher has the tap's kind.
    """
    own = {**(read_architecture(STUDENT).layers if isinstance(network, Student) else {}), **student}
    networks = {name: each for name, each in teachers.items() if hasattr(each, "layers")}
    known = {*taps, *own, *(layer for each in networks.values() for layer in each.layers)}  # type: ignore[union-attr]
    used = [term["tap"] for term in terms.values() if term["tap"] in known]
    return {tap: _layers_of(tap, taps.get(tap, {"layer": tap}), own, networks) for tap in dict.fromkeys(used)}


def _layers_of(
    tap: str, definition: Mapping[str, Any], student: Mapping[str, Layers], teachers: Mapping[str, Any]
) -> dict[str, Layers]:
    layer, kind = definition["layer"], definition.get("kind")
    if "student" not in definition and layer not in student:
        raise ValueError(
            f'The student names no layer {layer!r}. Name it under "layers" in the file of --network, or by --set '
            f"+student_layers#{layer}=LAYER."
        )
    layers: dict[str, Layers] = {STUDENT: definition.get("student") or student[layer]}
    layers |= {name: teacher_layer(name, teacher, tap, definition) for name, teacher in teachers.items()}
    if kind and teachers and not any(layers[name] for name in teachers):
        raise ValueError(
            f"No teacher in this run provides a layer for tap {tap!r}. Add a teacher of the kind {kind}: "
            f"{', '.join(architecture_names(kind))}."
        )
    return layers


def teacher_layer(name: str, teacher: Any, tap: str, definition: Mapping[str, Any]) -> str | None:
    """The layer of a teacher for a tap; None if the tap is for another kind of teacher.

    Args:
        name: of the teacher, for errors.
        teacher: has ``layers`` and ``kind``.
        tap: name of the tap.
        definition: of the tap, see ``tap_layers``.

    Raises:
        ValueError: the teacher names no such layer.
    """
    layer, kind = definition["layer"], definition.get("kind")
    if kind not in (None, teacher.kind or kind):
        return None
    if layer not in teacher.layers:
        raise ValueError(
            f'The teacher {name} names no layer {layer!r}, which the tap {tap!r} needs. Add it to "layers" in its '
            "specification (an ensemble has none), or use a method on predictions: hinton or dist."
        )
    return str(teacher.layers[layer])
