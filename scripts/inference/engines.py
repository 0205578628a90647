# SPDX-License-Identifier: Apache-2.0
"""What runs a network's forward pass: PyTorch, OpenVINO or ONNX Runtime, each as a module that any inferer can call.

Files of the weights ``X.pt`` lie in the folder ``X_export`` beside them, see ``scripts.export.exporter``.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.training.checkpoint import sha256

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
RECORD = "export.json"
# Largest difference of the first window's logits from PyTorch's, as a share of PyTorch's largest one. Far above what
# rounding does (export gates that on masks), far below what other weights, settings or a wrong kernel do.
TOLERANCES = {"fp32": 1e-2, "bf16": 0.1, "int8": 0.5}
# One pass of the student: peak of the process less what it held, per voxel of the image (docs/performance.md).
BYTES_PER_VOXEL = {"torch fp32": 200, "torch bf16": 145, "openvino fp32": 110, "openvino bf16": 85}
STATIC = 4_000_000  # voxels from which OpenVINO's model is compiled for the very size
COMPARED = 64  # voxels a side, of what is given to PyTorch as well


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


def export_folder(weights: str | Path, output_dir: str | Path = "") -> Path:
    """Where the exported files of a weights file are, by default beside it."""
    path = Path(weights)
    return Path(output_dir or path.parent) / f"{path.stem}_export"


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


def read_export(weights: str | Path) -> dict[str, Any]:
    """The record of the files that were exported from exactly these weights.

    Raises:
        UnavailableError: there are none, or they are of other weights.
    """
    folder, again = export_folder(weights), f"python -m scripts export --weights {weights}"
    if not (folder / RECORD).is_file():
        raise UnavailableError(f"no exported files beside {weights}: {again} makes them.")
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found, now, _ = record["weights_sha256"], sha256(weights), record["models"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UnavailableError(f"{folder / RECORD} is damaged: {again} makes it anew.") from error
    if found != now:
        raise UnavailableError(
            f"the exported files in {folder} are of weights with the sha256 {found[:12]}..., but {weights} has "
            f"{now[:12]}...: {again} makes them anew."
        )
    return record


def _exported(engine: str, precision: str, weights: str | Path, threads: int) -> tuple[nn.Module, str]:
    """An engine from exported files, and why this precision.

    Raises:
        UnavailableError: it is not installed, there are no such files, or they are damaged.
    """
    optional(engine)
    record, folder, why = read_export(weights), export_folder(weights), ""
    models = record["models"]
    if engine == "openvino" and precision in ("auto", "bf16"):
        if cpu_has_bf16() and "openvino bf16" in models:
            precision, why = "bf16", ", this CPU has bf16"
        elif precision == "bf16":
            lacking = "they did not pass in bf16" if cpu_has_bf16() else "this CPU has no bf16"
            raise UnavailableError(f"openvino bf16 cannot be had of the files in {folder}, since {lacking}: use fp32.")
    precision = "fp32" if precision == "auto" else precision
    name = f"{engine} {precision}"
    if name not in models:
        there = ", ".join(sorted(models)) or "nothing"
        raise UnavailableError(f"{folder} holds no {name} (it holds {there}): see python -m scripts export --help.")
    for file, checksum in models[name]["files"].items():
        if not (folder / file).is_file() or sha256(folder / file) != checksum:
            raise UnavailableError(
                f"{folder / file} is damaged or missing: python -m scripts export --weights {weights} makes it anew."
            )
    path = folder / models[name]["file"]
    made = OpenVINOEngine(path, precision, threads) if engine == "openvino" else ONNXRuntimeEngine(path, threads)
    return made, f"exported files {folder}{why}"


def _check_names(engine: str, precision: str) -> None:
    if engine not in ENGINES:
        raise ValueError(f"Unknown engine {engine!r}: choose one of {', '.join(ENGINES)}.")
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown engine precision {precision!r}: choose one of {', '.join(PRECISIONS)}.")


def choose_engine(
    engine: str, precision: str, weights: str | Path, network: nn.Module, threads: int = 0
) -> TorchEngine | OpenVINOEngine | ONNXRuntimeEngine:
    """The engine for these weights; one line of the log names it, its precision and why.

    Args:
        engine: ``auto`` is OpenVINO where the network is on a CPU, OpenVINO is installed and files were exported from
            exactly these weights, else PyTorch.
        precision: ``auto`` is bf16 where OpenVINO says that the CPU has it and the files passed in it, else fp32.
        weights: file of the network's weights, which the exported files must be of.
        network: with these weights; PyTorch's engine runs it.
        threads: of the CPU; 0 is as many as PyTorch has.

    Returns:
        A module with ``description`` and ``window`` (the only size that it takes, or None).

    Raises:
        ValueError: an unknown name.
        UnavailableError: what was named cannot be had, with what would help.
    """
    _check_names(engine, precision)
    threads = threads or torch.get_num_threads()
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    made: nn.Module | None = None
    if engine == "torch":
        why = "as asked"
    elif engine == "auto" and device.type != "cpu":
        why = f"the network is on {device}"
    else:
        try:
            made, why = _exported("openvino" if engine == "auto" else engine, precision, weights, threads)
        except UnavailableError as error:
            if engine != "auto" or precision == "int8":
                raise
            why = str(error)
    made = made or TorchEngine(network, "fp32" if precision == "auto" else precision)
    logger.info("engine %s: %s", made.description, why)
    return made  # type: ignore[return-value]


class Engine(nn.Module):
    """The evaluator's network: the engine is chosen at the first call, when the network has its weights.

    A corner of the first image is also given to PyTorch, and the two answers are compared: what the files were exported
    from may have had other settings than the network has now, and another CPU has other kernels.

    Args:
        network: the plain network, on its device.
        weights: file that its weights come from.
        engine, precision, threads: see ``choose_engine``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self, network: nn.Module, weights: str, engine: str = "auto", precision: str = "auto", threads: int = 0
    ) -> None:
        super().__init__()
        _check_names(engine, precision)
        self.network, self.weights = network, weights
        self.engine, self.precision, self.threads = engine, precision, threads
        self.chosen: TorchEngine | OpenVINOEngine | ONNXRuntimeEngine | None = None
        self.checked = False

    def choose(self) -> TorchEngine | OpenVINOEngine | ONNXRuntimeEngine:
        """The engine; see ``choose_engine`` for its errors."""
        if self.chosen is None:
            self.chosen = choose_engine(self.engine, self.precision, self.weights, self.network, self.threads)
        return self.chosen

    @property
    def window(self) -> tuple[int, ...] | None:
        """The only size of image that it takes, in voxels, or None."""
        return self.choose().window

    @property
    def description(self) -> str:
        """Engine and precision, such as ``openvino bf16``."""
        return str(self.choose().description)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to logits ``B classes H W D``.

        Raises:
            ValueError: the engine cannot be had, does not take this size, or does not answer as PyTorch does (with
                ``auto`` PyTorch takes over then, and the log says so).
        """
        chosen = self.choose()
        if not self.checked and not isinstance(chosen, TorchEngine):
            self._compare(chosen, image)
        self.checked = True
        logits: torch.Tensor = self.choose()(image)
        return logits

    @property
    def bytes_per_voxel(self) -> int:
        """Memory of one pass per voxel of the image, see ``scripts.inference.sliding_window``."""
        return int(self.choose().bytes_per_voxel)

    def _compare(self, chosen: OpenVINOEngine | ONNXRuntimeEngine, image: torch.Tensor) -> None:
        corner = image[:1] if chosen.window else image[:1, :, :COMPARED, :COMPARED, :COMPARED]
        with torch.no_grad():
            expected = self.network(corner)
        difference = float((chosen(corner) - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if difference <= TOLERANCES[chosen.description.split()[-1]]:
            return
        problem = f"{chosen.description} differs from PyTorch by {difference:.2g} of the largest logit of a window"
        if self.engine != "auto":
            raise ValueError(f"{problem}: were the files exported with other settings? Use --engine torch.")
        logger.warning("%s: PyTorch takes over", problem)
        self.chosen = TorchEngine(self.network)
