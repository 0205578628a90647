# SPDX-License-Identifier: Apache-2.0
"""Convert a network to ONNX, OpenVINO, OpenVINO int8 and TorchScript, and draw patches to calibrate int8.

The caller checks the results, see ``scripts.export.exporter``.
"""

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
from scripts.runtime.engines import import_optional, openvino_core
from scripts.runtime.regions import IGNORED
from scripts.utils.run_manifest import running_config

# Layers that stay in float32 when the rest runs in bf16: the first convolution and the logits. Chosen on training cases
# (docs/performance.md); costs no time.
FLOAT32_LAYERS = ("encoder.0.0", "head")
# Stages at half and full resolution, which are not quantised: that would change the shipped student's masks
# (docs/performance.md).
NOT_QUANTISED = ("encoder.0", "decoder.2", "upsample_full", "full", "head")
# Config ids that hold paths of this machine; an exported file must not contain them.
PRIVATE_IDS = ("dataset_dir", "output_dir", "weights", "splits_file")


def to_onnx(network: nn.Module, channels: int, window: Sequence[int], path: Path) -> None:
    """Write an ``.onnx`` for any batch size and one window size, checked by onnx. It holds no paths of this machine.

    Args:
        network: on the CPU, in eval().
        channels: number of channels of the image.
        window: its size in voxels.
        path: the file to write.

    Raises:
        UnavailableError: onnx or onnxscript is not installed.
    """
    onnx = import_optional("onnx")
    import_optional("onnxscript")
    example = torch.zeros(2, channels, *window)  # with a batch of 1 the exporter would fix the batch size
    for name in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.onnx.export(
        network, (example,), str(path), dynamo=True, input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
    )  # fmt: skip
    model = onnx.load(str(path))
    for each in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        each.ClearField("metadata_props")  # the exporter writes the source line of every node there
        each.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def to_openvino(network: nn.Module, channels: int, window: Sequence[int], path: Path) -> None:
    """Write ``.xml`` and ``.bin`` in float32, for any batch size and image size that the network runs on.

    ``FLOAT32_LAYERS`` are marked to stay in float32 when the model runs in bf16. The file is not compressed to fp16:
    that alone changes the shipped student's logits by more than the gate allows.

    Args:
        network: on the CPU, in eval().
        channels: number of channels of the image.
        window: any valid size in voxels.
        path: the ``.xml`` to write.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """
    openvino = import_optional("openvino")
    model = openvino.convert_model(network, example_input=torch.zeros(1, channels, *window))
    openvino.save_model(model, str(path), compress_to_fp16=False)
    # The Python API cannot set this mark on the model, but OpenVINO reads it from the file.
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("type") != "Const" and layer.get("name", "").startswith(_prefixes(FLOAT32_LAYERS)):
            info = layer.find("rt_info")
            info = ElementTree.SubElement(layer, "rt_info") if info is None else info
            ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, xml_declaration=True)


def _prefixes(layers: Sequence[str]) -> tuple[str, ...]:
    """Prefixes of the names that OpenVINO gives to the operations of these layers."""
    return tuple(f"__module.{name}." for name in layers)


def to_int8(source: Path, patches: Sequence[torch.Tensor], path: Path) -> None:
    """Quantise an OpenVINO model after training (NNCF) and write ``.xml`` and ``.bin``.

    Args:
        source: ``.xml`` from ``to_openvino``.
        patches: images ``1 M H W D`` of training cases; they set the ranges of the activations.
        path: the ``.xml`` to write.

    Raises:
        UnavailableError: nncf is not installed.
    """
    nncf, openvino = import_optional("nncf"), import_optional("openvino")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    not_quantised = [f"{re.escape(prefix)}.*" for prefix in _prefixes(NOT_QUANTISED)]
    quantised = nncf.quantize(
        openvino_core().read_model(str(source)),
        nncf.Dataset([patch.numpy() for patch in patches]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(patches),
        ignored_scope=nncf.IgnoredScope(patterns=not_quantised, validate=False),
    )
    openvino.save_model(quantised, str(path), compress_to_fp16=False)


def to_torchscript(network: nn.Module, channels: int, window: Sequence[int], path: Path) -> None:
    """Write ``.ts`` by ``monai.bundle ckpt_export``, which includes the bundle's metadata and the running config.

    Args:
        network: with its weights. The config's ``network_def`` is scripted, with these weights.
        channels: number of channels of the image.
        window: any valid size in voxels.
        path: the file to write; temporary files are put next to it.

    Raises:
        RuntimeError: no bundle is running, so there is no config that defines the network.
        ValueError: PyTorch cannot script the network, or the script returns several outputs.
    """
    from monai.bundle import ckpt_export

    config = running_config()
    if config is None:
        raise RuntimeError("TorchScript can only be exported from a running bundle: use python -m scripts export.")
    configs = Path(bundle_root()) / "configs"
    defaults = json.loads((configs / "inference.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key != "_meta_"} | {
        key: defaults[key] for key in PRIVATE_IDS
    }
    config_path, weights_path = path.with_name("inference.json"), path.with_name("plain.pt")
    try:
        config_path.write_text(json.dumps(config), encoding="utf-8")
        torch.save(network.state_dict(), weights_path)
        ckpt_export(
            net_id="network_def", filepath=str(path), ckpt_file=str(weights_path),
            meta_file=str(configs / "metadata.json"), config_file=str(config_path),
        )  # fmt: skip
        with torch.no_grad():
            output = torch.jit.load(str(path), map_location="cpu").eval()(torch.zeros(1, channels, *window))
    except RuntimeError as error:
        raise ValueError(_not_scripted(network, "PyTorch cannot script it")) from error
    finally:
        config_path.unlink(missing_ok=True)
        weights_path.unlink(missing_ok=True)
    if not isinstance(output, torch.Tensor):
        raise ValueError(_not_scripted(network, "its script returns several outputs"))


def _not_scripted(network: nn.Module, reason: str) -> str:
    return (
        f"{type(network).__name__} cannot be exported to TorchScript: {reason}. Leave it out: --formats onnx openvino."
    )


def draw_patches(
    volumes: Iterable[dict[str, Any]], window: Sequence[int], each: int = 4, seed: int = 0
) -> list[torch.Tensor]:
    """Draw patches for the calibration of int8; every second one contains a foreground voxel, if there is any.

    Args:
        volumes: ``image`` (M H W D) and ``label`` (1 H W D) per case; images smaller than the window are padded with
            zeros.
        window: size in voxels.
        each: patches per case.
        seed: seed of the positions.

    Returns:
        Patches ``1 M window``.
    """
    generator, patches = torch.Generator().manual_seed(seed), []
    for item in volumes:
        image, label = (torch.as_tensor(item[key]).as_subclass(torch.Tensor) for key in ("image", "label"))
        missing = [max(0, size - length) for size, length in zip(window, image.shape[1:], strict=True)]
        image = nn.functional.pad(image.float(), [margin for size in reversed(missing) for margin in (0, size)])
        foreground = ((label[0] > 0) & (label[0] != IGNORED)).nonzero()
        for i in range(each):
            last_corner = torch.tensor([length - size for size, length in zip(window, image.shape[1:], strict=True)])
            if i % 2 == 0 and len(foreground):
                centre = foreground[int(torch.randint(len(foreground), (1,), generator=generator))]
                corner = (centre - torch.tensor(list(window)) // 2).clamp(min=0).minimum(last_corner)
            else:
                corner = (torch.rand(3, generator=generator) * (last_corner + 1)).long()
            box = tuple(slice(start, start + size) for start, size in zip(corner.tolist(), window, strict=True))
            patches.append(image[(slice(None), *box)][None].contiguous())
    return patches
