# SPDX-License-Identifier: Apache-2.0
"""Online teachers need no memory for the backward pass, counted byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from scripts.distillation.distiller import Distiller

TEACHERS = {
    "ct": {"architecture": "unetr", "modalities": ["ct"], "weights": None},
    "pet": {"architecture": "hdenseformer", "modalities": ["pet"], "weights": None},
    "all": {"architecture": "dynunet", "modalities": ["ct", "pet", "mr"], "weights": None},
}
SMALL = {
    "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    "hdenseformer": {"features": 4, "depth": 4},
    "dynunet": {"filters": [2, 4, 4, 4]},
}


def saved_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that autograd keeps for the backward pass of a run, and what it returned."""
    sizes: list[int] = []

    def pack(value: Tensor) -> Tensor:
        sizes.append(value.numel() * value.element_size())
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        returned = run()
    return sum(sizes), returned


def student_alone(distiller: Distiller, image: Tensor, layer: str | None) -> list[Tensor]:
    """The student's logits, and its layer's output after every teacher's adapter, computed without a Distiller."""
    features: list[Tensor] = []
    handles = []
    if layer:
        module = distiller.student.get_submodule(layer)
        handles.append(module.register_forward_hook(lambda module, inputs, output: features.append(output)))
    outputs = [distiller.student(image)]
    for handle in handles:
        handle.remove()
    adapters = distiller.adapters["hint"].values() if layer else ()
    return [*outputs, *(adapter(features[0]) for adapter in adapters)]


@pytest.mark.parametrize(("method", "layer"), [("hinton", None), ("hint", "decoder.1")])
@pytest.mark.parametrize("trainable", [False, True])
def test_three_online_teachers_keep_no_byte_for_the_backward_pass(
    tiny_bundle: Callable[..., ConfigParser], tmp_path: Path, method: str, layer: str | None, trainable: bool
) -> None:
    parser = tiny_bundle(
        tmp_path, "distill", f"methods/{method}",
        teacher_specs=TEACHERS, architectures=SMALL, patch=[32, 32, 32], seed=3,
    )  # fmt: skip
    distiller = parser.get_parsed_content("distiller").train()
    distiller.teachers.requires_grad_(trainable)  # were they not frozen, they would still run without a graph
    image = torch.rand(2, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    alone, expected = saved_bytes(lambda: student_alone(distiller, image, layer))
    together, outputs = saved_bytes(lambda: distiller(image))
    assert together == alone > image.numel() * image.element_size()
    taught = [name for name in outputs if name.split(".")[0] in TEACHERS]
    assert len(taught) == (6 if layer else 3)
    assert not any(outputs[name].requires_grad for name in taught)
    learning = [name for name, value in outputs.items() if value.requires_grad]
    assert len(learning) == len(expected) + (layer is not None)  # with the tapped feature itself
    # The count would see a teacher that keeps its graph.
    if trainable:
        assert all(saved_bytes(lambda t=t: t(image))[0] > 0 for t in distiller.teachers.values())
