# SPDX-License-Identifier: Apache-2.0
"""Engines that run a network's exported files on numpy arrays: OpenVINO and ONNX Runtime, on the CPU.

The exported files of ``X.pt`` lie in the folder ``X_export`` next to it, see ``scripts.export.exporter``.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.runtime import BYTES_PER_VOXEL, ENGINE_BYTES_PER_VOXEL

# Voxels of an image from which OpenVINO's model is compiled for exactly its size.
LARGE_IMAGE_VOXELS = 4_000_000
USUAL_STEP = 16  # voxels
CPU_FLAGS = Path("/proc/cpuinfo")


class UnavailableError(ValueError):
    """An engine that is not available; the message says what would make it available."""


def import_optional(name: str) -> Any:
    """Import an optional package.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f'{name} is not installed: pip install -e ".[fast]".') from error


def _format_shape(shape: Any) -> str:
    return " x ".join(map(str, shape))


def native_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (x86-64 and Arm), as Linux lists them; else False."""
    with suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_FLAGS.read_text(encoding="utf-8"), re.MULTILINE)
        return bool(flags and {"avx512_bf16", "amx_bf16", "bf16"} & set(flags[1].split()))
    return False


@functools.cache
def openvino_core() -> Any:
    """The only OpenVINO Core of this process; it is never freed.

    The first use of a Core's CPU plugin gives the thread another stack for signals, and the end of the Core restores
    the stack before it (2026.4). If two Cores end in the order in which they began, the restored stack has already been
    freed, and the next signal, such as the end of a child process, is a segmentation fault.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """
    return import_optional("openvino").Core()


def cpu_has_bf16() -> bool:
    """Whether OpenVINO runs bfloat16 by instructions of this CPU.

    OpenVINO also lists bfloat16 where it emulates it by AVX-512, which is slower than float32.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """
    return native_bf16() and "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOEngine:
    """An OpenVINO model on the CPU.

    It is compiled once for images of any size, and again for each large size: a model for any size is as fast, but
    needs two to three times the memory, which matters for large images.

    Neither input nor output is copied: OpenVINO reads the image in place and writes into a new array for each call, so
    that the caller may keep the result. Calls must not overlap: a request has one input and one output.

    Args:
        path: the model (``.xml``, with its ``.bin`` next to it), for inputs ``B M H W D``.
        precision: ``fp32``, ``bf16``, or ``int8`` for a quantised model, whose other layers run in bf16 where the CPU
            supports it.
        threads: number of CPU threads; 0 leaves it to OpenVINO.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """

    window: tuple[int, ...] | None = None

    def __init__(self, path: str | Path, precision: str = "fp32", threads: int = 0) -> None:
        self.core, self.tensor, self.path = openvino_core(), import_optional("openvino").Tensor, Path(path)
        self.model = self.core.read_model(str(path))
        bf16 = precision == "bf16" or (precision == "int8" and cpu_has_bf16())
        self.settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # OpenVINO's fused float32 attention (2026.4) is wrong where a grid has as many cells as heads: logits of
            # 2 x 2 x 1 cells with 4 heads were off by 0.2. Without fusion it is right, and no slower.
            "SNIPPETS_MODE": "DISABLE",
            # A pinned thread stays on one core, and OpenVINO gives the threads of two processes the same one.
            "ENABLE_CPU_PINNING": False,
        }
        if threads:
            self.settings["INFERENCE_NUM_THREADS"] = threads
        self.checked: set[tuple[int, ...]] = set()
        self.channels = self.model.input(0).partial_shape[1].get_length()
        self.classes = self.model.output(0).partial_shape[1].get_length()
        self.request = self._compile([-1, self.channels, -1, -1, -1])
        self.large_shape: tuple[int, ...] = ()
        self.large_request: Any = None
        self.bytes_per_voxel = ENGINE_BYTES_PER_VOXEL["openvino bf16" if bf16 else "openvino fp32"]
        self.description = f"openvino {precision}"

    def _compile(self, shape: Sequence[int]) -> Any:
        """A request for images of a shape, with -1 for any length."""
        model = self.model.clone()
        model.reshape(list(shape))
        return self.core.compile_model(model, "CPU", self.settings).create_infer_request()

    def _require_size(self, shape: tuple[int, ...]) -> None:
        """Refuse a size that the model does not take: with one CPU, OpenVINO runs it all the same and damages memory.

        Multiples of ``USUAL_STEP`` voxels are not looked at, because the included networks take them.

        Raises:
            RuntimeError: by OpenVINO, that the shapes of the layers do not fit together.
        """
        if shape[1] != self.channels or (shape not in self.checked and any(n % USUAL_STEP for n in shape[2:])):
            self.model.clone().reshape(list(shape))
            self.checked.add(shape)

    def _request_for(self, shape: tuple[int, ...]) -> Any:
        """The request for images of a shape; only the last one for a large size is kept."""
        if math.prod(shape[2:]) * shape[0] < LARGE_IMAGE_VOXELS:
            return self.request
        if self.large_shape != shape:
            self.large_shape, self.large_request = (), None  # free its memory before the next one is compiled
            self.large_request = self._compile(shape)
            self.large_shape = shape
        return self.large_request

    def __call__(self, image: NDArray) -> NDArray[np.float32]:
        """Image ``B M H W D`` to logits ``B classes H W D``, in a new array.

        Raises:
            ValueError: the model does not run on this number of channels or this size.
        """
        source = np.ascontiguousarray(image, dtype=np.float32)
        logits = np.empty((len(source), self.classes, *source.shape[2:]), dtype=np.float32)
        try:
            self._require_size(source.shape)
            request = self._request_for(source.shape)
            request.set_input_tensor(self.tensor(source, shared_memory=True))
            request.set_output_tensor(self.tensor(logits, shared_memory=True))
            request.infer()
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} does not run on images of {_format_shape(source.shape)}. It needs the channels that it "
                "was exported with, and sizes divisible by 16."
            ) from error
        return logits


class ONNXRuntimeEngine:
    """An ONNX model in float32 on the CPU, for any batch size and one window size. Each call returns a new array.

    Args:
        path: the model (``.onnx``), for inputs ``B M H W D``.
        threads: number of CPU threads; 0 leaves it to ONNX Runtime.

    Raises:
        UnavailableError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        onnxruntime = import_optional("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.path = Path(path)
        self.window: tuple[int, ...] | None = tuple(self.session.get_inputs()[0].shape[2:])
        self.description = "onnxruntime fp32"
        self.bytes_per_voxel = BYTES_PER_VOXEL  # not used, since the window is fixed

    def __call__(self, image: NDArray) -> NDArray[np.float32]:
        """Image ``B M H W D``, of size ``window``, to logits ``B classes H W D``.

        Raises:
            ValueError: another size.
        """
        if image.shape[2:] != self.window:
            raise ValueError(
                f"{self.path} runs on windows of {_format_shape(self.window)} voxels, not "
                f"{_format_shape(image.shape[2:])}. Set patch to {list(self.window or ())}, export with this patch, or "
                "use another engine."
            )
        logits: NDArray[np.float32]
        (logits,) = self.session.run(None, {self.input: np.ascontiguousarray(image, dtype=np.float32)})
        return logits


NumpyEngine = OpenVINOEngine | ONNXRuntimeEngine
