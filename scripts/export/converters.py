# SPDX-License-Identifier: Apache-2.0
"""A network to ONNX, OpenVINO, OpenVINO int8 and TorchScript; whether the files are good is for the caller to see."""

from __future__ import annotations

import json
import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts import bundle_root
from scripts.inference.engines import openvino_core, optional
from scripts.utils.run_manifest import running_config

# Kept in float32 when the rest runs in bf16: what reads the image itself and what gives the logits. Chosen on training
# cases (docs/performance.md), where it costs no time.
FLOAT32_LAYERS = ("encoder.0.0", "head")
# The stages at half and full resolution: quantised, the shipped student's masks change (docs/performance.md).
NOT_QUANTISED = ("encoder.0", "decoder.2", "upsample_full", "full", "head")
PRIVATE = ("dataset_dir", "output_dir", "weights", "splits_file")  # paths of the machine, not for a file that travels


def to_onnx(network: nn.Module, channels: int, window: Sequence[int], path: Path) -> None:
    """Write ``.onnx`` of any batch and one window, checked by onnx; one file, without paths of this machine.

    Args:
        network: on the CPU, in eval().
        channels: of the image.
        window: its size in voxels.
        path: of the file.

    Raises:
        UnavailableError: onnx or onnxscript is not installed.
    """
    onnx = optional("onnx")
    optional("onnxscript")
    example = torch.zeros(2, channels, *window)  # a batch of one would be taken for a constant
    for name in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.onnx.export(
        network, (example,), str(path), dynamo=True, input_names=["image"], output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}}, external_data=False, verbose=False,
    )  # fmt: skip
    model = onnx.load(str(path))
    for each in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        each.ClearField("metadata_props")  # the exporter notes the source line of every node
        each.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def to_openvino(network: nn.Module, channels: int, window: Sequence[int], path: Path) -> None:
    """Write ``.xml`` and ``.bin`` in float32, of any batch and size that the network takes.

    ``FLOAT32_LAYERS`` are marked to stay in float32 when the model is run in bf16. The file is not compressed to fp16:
    that alone moves the shipped student's logits by more than the gate allows.

    Args:
        network: on the CPU, in eval().
        channels: of the image.
        window: any size in voxels.
        path: of the ``.xml``.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """
    openvino = optional("openvino")
    model = openvino.convert_model(network, example_input=torch.zeros(1, channels, *window))
    openvino.save_model(model, str(path), compress_to_fp16=False)
    # Python cannot set this mark on the model, but OpenVINO reads it from the file.
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("type") != "Const" and layer.get("name", "").startswith(_prefixes(FLOAT32_LAYERS)):
            info = layer.find("rt_info")
            info = ElementTree.SubElement(layer, "rt_info") if info is None else info
            ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, xml_declaration=True)


def _prefixes(layers: Sequence[str]) -> tuple[str, ...]:
    """How OpenVINO names the operations of the layers."""
    return tuple(f"__module.{name}." for name in layers)


def to_int8(source: Path, patches: Sequence[torch.Tensor], path: Path) -> None:
    """Quantise an OpenVINO model after training (NNCF) and write ``.xml`` and ``.bin``.

    Args:
        source: the ``.xml`` that ``to_openvino`` wrote.
        patches: images ``1 M H W D`` of training cases, by which the ranges of activations are set.
        path: of the ``.xml``.

    Raises:
        UnavailableError: nncf is not installed.
    """
    nncf, openvino = optional("nncf"), optional("openvino")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    kept = [f"{re.escape(prefix)}.*" for prefix in _prefixes(NOT_QUANTISED)]
    quantised = nncf.quantize(
        openvino_core().read_model(str(source)),
        nncf.Dataset([patch.numpy() for patch in patches]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(patches),
        ignored_scope=nncf.IgnoredScope(patterns=kept, validate=False),
    )
    openvino.save_model(quantised, str(path), compress_to_fp16=False)


def to_torchscript(network: nn.Module, path: Path) -> None:
    """Write ``.ts`` through ``monai.bundle ckpt_export``, with the bundle's metadata and the running config in it.

    Args:
        network: with its weights; the config's ``network_def`` is what gets scripted.
        path: of the file; what is needed on the way lies beside it.

    Raises:
        RuntimeError: no bundle is running, whose config would say what the network is.
    """
    from monai.bundle import ckpt_export

    config = running_config()
    if config is None:
        raise RuntimeError("TorchScript is exported from a running bundle: python -m scripts export.")
    configs = Path(bundle_root()) / "configs"
    plain = json.loads((configs / "inference.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key != "_meta_"} | {key: plain[key] for key in PRIVATE}
    beside, weights = path.with_name("inference.json"), path.with_name("plain.pt")
    try:
        beside.write_text(json.dumps(config), encoding="utf-8")
        torch.save(network.state_dict(), weights)
        ckpt_export(
            net_id="network_def", filepath=str(path), ckpt_file=str(weights),
            meta_file=str(configs / "metadata.json"), config_file=str(beside),
        )  # fmt: skip
    finally:
        beside.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)


def draw_patches(
    volumes: Iterable[dict[str, Any]], window: Sequence[int], each: int = 4, seed: int = 0
) -> list[torch.Tensor]:
    """Patches to calibrate on, half of them around a voxel of the foreground, where there is any.

    Args:
        volumes: ``image`` (M H W D) and ``label`` (1 H W D) per case; images smaller than the window get zeros around.
        window: size in voxels.
        each: patches per case.
        seed: of the places.

    Returns:
        Patches ``1 M window``.
    """
    generator, patches = torch.Generator().manual_seed(seed), []
    for item in volumes:
        image, label = (torch.as_tensor(item[key]).as_subclass(torch.Tensor) for key in ("image", "label"))
        missing = [max(0, size - found) for size, found in zip(window, image.shape[1:], strict=True)]
        image = nn.functional.pad(image.float(), [side for size in reversed(missing) for side in (0, size)])
        inside = (label[0] > 0).nonzero()
        for i in range(each):
            room = torch.tensor([found - size for size, found in zip(window, image.shape[1:], strict=True)])
            if i % 2 == 0 and len(inside):
                centre = inside[int(torch.randint(len(inside), (1,), generator=generator))]
                corner = (centre - torch.tensor(list(window)) // 2).clamp(min=0).minimum(room)
            else:
                corner = (torch.rand(3, generator=generator) * (room + 1)).long()
            box = tuple(slice(a, a + size) for a, size in zip(corner.tolist(), window, strict=True))
            patches.append(image[(slice(None), *box)][None].contiguous())
    return patches
