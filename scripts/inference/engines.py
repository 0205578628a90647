# SPDX-License-Identifier: Apache-2.0
"""What runs a network's forward pass: PyTorch, OpenVINO or ONNX Runtime, each as a module that any inferer can call.

Files of the weights ``X.pt`` lie in the folder ``X_export`` beside them, see ``scripts.export.exporter``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

# One pass of the student: peak of the process less what it held, per voxel of the image (docs/performance.md).
BYTES_PER_VOXEL = {"torch fp32": 200, "torch bf16": 145, "openvino fp32": 110, "openvino bf16": 85}
STATIC = 4_000_000  # voxels from which OpenVINO's model is compiled for the very size


class UnavailableError(ValueError):
    """An engine that cannot be had, and what would help; with ``auto`` the reason for PyTorch."""


def optional(name: str) -> Any:
    """An optional package.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f'{name} is not installed: pip install ".[fast]".') from error


def _shown(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _on_cpu(image: torch.Tensor) -> torch.Tensor:
    """The image as a plain contiguous float32 tensor on the CPU: itself where it is one."""
    return image.detach().as_subclass(torch.Tensor).to("cpu", torch.float32).contiguous()


class TorchEngine(nn.Module):
    """The network itself, in bf16 under autocast where asked; B M H W D to float32 logits.

    Args:
        network: any network; kept, not copied.
        precision: ``fp32`` or ``bf16``.
    """

    window: tuple[int, int, int] | None = None

    def __init__(self, network: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise UnavailableError(f"PyTorch runs fp32 or bf16, not {precision}: {precision} needs OpenVINO.")
        self.network, self.lowered = network, precision == "bf16"
        self.description = f"torch {precision}"
        self.bytes_per_voxel = BYTES_PER_VOXEL[self.description]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to logits ``B classes H W D``."""
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.lowered):
            logits: torch.Tensor = self.network(image)
        return logits.float()


def native_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (x86-64 and Arm)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@functools.cache
def openvino_core() -> Any:
    """The only Core of this process, never freed; UnavailableError without OpenVINO.

    The first use of a Core's CPU plugin gives the thread another stack for signals, and its end puts back the one
    before (2026.4). Two Cores that end in the order in which they began leave a stack that has been freed: the next
    signal, such as the end of a child process, is a segmentation fault.
    """
    return optional("openvino").Core()


def cpu_has_bf16() -> bool:
    """Whether OpenVINO runs bfloat16 by instructions of this CPU; UnavailableError without OpenVINO.

    OpenVINO names bfloat16 also where it emulates it by AVX-512, which is slower than float32.
    """
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") and native_bf16()


class OpenVINOEngine(nn.Module):
    """An OpenVINO model on the CPU, compiled once for every size of image, and for each large size by itself.

    What is compiled for any size is as fast, but takes two to three times the memory, which counts in large images.

    Neither input nor output is copied: OpenVINO reads the image where it lies and writes into a new tensor for each
    call, so that an inferer may keep what it was given. One call at a time: a request has one input and one output.

    Args:
        path: the model (``.xml``, its ``.bin`` beside it), of inputs ``B M H W D``.
        precision: ``fp32``, ``bf16``, or ``int8`` for a quantised model, whose other layers run in bf16 where the CPU
            can.
        threads: of the CPU; 0 leaves it to OpenVINO.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """

    window: tuple[int, int, int] | None = None

    def __init__(self, path: str | Path, precision: str = "fp32", threads: int = 0) -> None:
        super().__init__()
        self.core, self.tensor, self.path = openvino_core(), optional("openvino").Tensor, Path(path)
        self.model = self.core.read_model(str(path))
        lowered = precision == "bf16" or (precision == "int8" and cpu_has_bf16())
        self.settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if lowered else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # Its fused float32 attention (2026.4) is wrong where a grid has as many cells as heads: logits of
            # 2 x 2 x 1 cells with 4 heads were off by 0.2. Unfused it is right, and no slower.
            "SNIPPETS_MODE": "DISABLE",
        }
        if threads:
            self.settings["INFERENCE_NUM_THREADS"] = threads
        self.channels = self.model.input(0).partial_shape[1].get_length()
        self.classes = self.model.output(0).partial_shape[1].get_length()
        self.request = self._compiled([-1, self.channels, -1, -1, -1])
        self.large: tuple[tuple[int, ...], Any] = ((), None)
        self.bytes_per_voxel = BYTES_PER_VOXEL["openvino bf16" if lowered else "openvino fp32"]
        self.description = f"openvino {precision}"

    def _compiled(self, shape: Sequence[int]) -> Any:
        """A request for images of a shape, -1 for any length."""
        model = self.model.clone()
        model.reshape(list(shape))
        return self.core.compile_model(model, "CPU", self.settings).create_infer_request()

    def _request(self, shape: tuple[int, ...]) -> Any:
        """The request for this shape; the last large one is kept."""
        if math.prod(shape[2:]) * shape[0] < STATIC:
            return self.request
        if self.large[0] != shape:
            self.large = ((), None)  # its memory first
            self.large = (shape, self._compiled(shape))
        return self.large[1]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to logits ``B classes H W D``, a tensor of their own.

        Raises:
            ValueError: a size that the model does not take.
        """
        source = _on_cpu(image)
        logits = torch.empty(len(source), self.classes, *source.shape[2:])
        try:
            request = self._request(tuple(source.shape))
            request.set_input_tensor(self.tensor(source.numpy(), shared_memory=True))
            request.set_output_tensor(self.tensor(logits.numpy(), shared_memory=True))
            request.infer()
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} does not take images of {_shown(source.shape)}: give the channels that it was exported "
                "with, and sizes divisible by 16."
            ) from error
        return logits.to(image.device)


class ONNXRuntimeEngine(nn.Module):
    """An ONNX model of any batch and one window, in float32 on the CPU; its output is a tensor of its own.

    Args:
        path: the model (``.onnx``), of inputs ``B M H W D``.
        threads: of the CPU; 0 leaves it to ONNX Runtime.

    Raises:
        UnavailableError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        super().__init__()
        onnxruntime = optional("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.path, self.window = Path(path), tuple(self.session.get_inputs()[0].shape[2:])
        self.description = "onnxruntime fp32"
        self.bytes_per_voxel = BYTES_PER_VOXEL["torch fp32"]  # not asked for: its window is fixed

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D``, whose sizes are ``window``, to logits ``B classes H W D``.

        Raises:
            ValueError: another size.
        """
        if tuple(image.shape[2:]) != self.window:
            raise ValueError(
                f"{self.path} takes windows of {_shown(self.window)} voxels, not {_shown(image.shape[2:])}: set "
                f"patch to {list(self.window)}, export with this patch, or use another engine."
            )
        (logits,) = self.session.run(None, {self.input: _on_cpu(image).numpy()})
        return torch.from_numpy(logits).to(image.device)
