# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a network: chosen by the weights' exported files, checked against PyTorch at the first case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.inference.engines import (
    ONNXRuntimeEngine,
    OpenVINOEngine,
    TorchEngine,
    UnavailableError,
    cpu_has_bf16,
    logger,
    optional,
)
from scripts.utils.checksums import sha256

ENGINES = ("auto", "torch", "openvino", "onnxruntime")


PRECISIONS = ("auto", "fp32", "bf16", "int8")


RECORD = "export.json"


# Largest difference of the first window's logits from PyTorch's, as a share of PyTorch's largest one. Far above what
# rounding does (export gates that on masks), far below what other weights, settings or a wrong kernel do.
TOLERANCES = {"fp32": 1e-2, "bf16": 0.1, "int8": 0.5}


COMPARED = 64  # voxels a side, of what is given to PyTorch as well


def export_folder(weights: str | Path, output_dir: str | Path = "") -> Path:
    """Where the exported files of a weights file are, by default beside it."""
    path = Path(weights)
    return Path(output_dir or path.parent) / f"{path.stem}_export"


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
