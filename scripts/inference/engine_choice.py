# SPDX-License-Identifier: Apache-2.0
"""Choose the engine for a network by the exported files of its weights; compare it with PyTorch at the first case."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.inference import ENGINES, PRECISIONS
from scripts.inference.engines import (
    ONNXRuntimeEngine,
    OpenVINOEngine,
    TorchEngine,
    UnavailableError,
    cpu_has_bf16,
    import_optional,
)
from scripts.utils.checksums import sha256

logger = logging.getLogger(__name__)

RECORD = "export.json"
# Largest difference of the first window's logits from PyTorch's, relative to PyTorch's largest logit. Far above
# rounding (the export checks that on masks), far below the effect of other weights, other settings or a wrong kernel.
TOLERANCES = {"fp32": 1e-2, "bf16": 0.1, "int8": 0.5}
COMPARED_SIZE = 64  # voxels per axis of the corner that PyTorch also runs on

AnyEngine = TorchEngine | OpenVINOEngine | ONNXRuntimeEngine


def export_folder(weights: str | Path, output_dir: str | Path = "") -> Path:
    """Folder of the exported files of a weights file, by default next to it."""
    path = Path(weights)
    return Path(output_dir or path.parent) / f"{path.stem}_export"


def _export_command(weights: str | Path) -> str:
    return f"python -m scripts export --weights {weights}"


def read_export(weights: str | Path) -> dict[str, Any]:
    """Read the record of the files that were exported from exactly these weights.

    Raises:
        UnavailableError: there are no exported files, the record is damaged, or it belongs to other weights.
    """
    folder, command = export_folder(weights), _export_command(weights)
    if not (folder / RECORD).is_file():
        raise UnavailableError(f"no exported files next to {weights}. Create them with: {command}")
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        exported_sha256, current_sha256, _ = record["weights_sha256"], sha256(weights), record["models"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UnavailableError(f"{folder / RECORD} is damaged. Export again with: {command}") from error
    if exported_sha256 != current_sha256:
        raise UnavailableError(
            f"the files in {folder} were exported from weights with the sha256 {exported_sha256[:12]}..., but "
            f"{weights} has {current_sha256[:12]}... Export again with: {command}"
        )
    return record


def _exported_engine(engine: str, precision: str, weights: str | Path, threads: int) -> tuple[AnyEngine, str]:
    """An engine that runs exported files, and the reason for the log.

    Raises:
        UnavailableError: the engine is not installed, or its files are missing or damaged.
    """
    import_optional(engine)
    record, folder = read_export(weights), export_folder(weights)
    models, reason = record["models"], f"exported files {folder}"
    if engine == "openvino" and precision in ("auto", "bf16"):
        if cpu_has_bf16() and "openvino bf16" in models:
            precision, reason = "bf16", f"{reason}, this CPU has bf16"
        elif precision == "bf16":
            obstacle = "they were not accepted in bf16" if cpu_has_bf16() else "this CPU has no bf16"
            raise UnavailableError(f"openvino cannot run the files in {folder} in bf16: {obstacle}. Use fp32.")
    precision = "fp32" if precision == "auto" else precision
    name = f"{engine} {precision}"
    if name not in models:
        available = ", ".join(sorted(models)) or "nothing"
        raise UnavailableError(f"{folder} contains no {name}, only: {available}. See python -m scripts export --help.")
    for file, checksum in models[name]["files"].items():
        if not (folder / file).is_file() or sha256(folder / file) != checksum:
            raise UnavailableError(
                f"{folder / file} is damaged or missing. Export again with: {_export_command(weights)}"
            )
    path = folder / models[name]["file"]
    if engine == "openvino":
        return OpenVINOEngine(path, precision, threads), reason
    return ONNXRuntimeEngine(path, threads), reason


def _check_names(engine: str, precision: str) -> None:
    if engine not in ENGINES:
        raise ValueError(f"Unknown engine {engine!r}. Choose one of: {', '.join(ENGINES)}.")
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown engine precision {precision!r}. Choose one of: {', '.join(PRECISIONS)}.")


def choose_engine(engine: str, precision: str, weights: str | Path, network: nn.Module, threads: int = 0) -> AnyEngine:
    """Choose the engine for these weights, and log its name, its precision and the reason in one line.

    Args:
        engine: ``auto`` is OpenVINO if the network is on a CPU, OpenVINO is installed and files were exported from
            exactly these weights; otherwise it is PyTorch.
        precision: ``auto`` is bf16 if OpenVINO runs it by instructions of this CPU and the exported files were accepted
            in bf16; otherwise it is fp32.
        weights: file of the network's weights, from which the exported files must come.
        network: the network with these weights, for PyTorch.
        threads: number of CPU threads; 0 takes PyTorch's setting.

    Returns:
        A module with ``description`` and ``window`` (the only size that it runs on, or None).

    Raises:
        ValueError: an unknown name.
        UnavailableError: an engine or precision that was asked for is not available.
    """
    _check_names(engine, precision)
    threads = threads or torch.get_num_threads()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    selected: AnyEngine | None = None
    if engine == "torch":
        reason = "as asked"
    elif engine == "auto" and device.type != "cpu":
        reason = f"the network is on {device}"
    else:
        try:
            name = "openvino" if engine == "auto" else engine
            selected, reason = _exported_engine(name, precision, weights, threads)
        except UnavailableError as error:
            if engine != "auto" or precision == "int8":
                raise
            reason = str(error)
    selected = selected or TorchEngine(network, "fp32" if precision == "auto" else precision)
    logger.info("engine %s: %s", selected.description, reason)
    return selected


class Engine(nn.Module):
    """The evaluator's network. The engine is chosen at the first call, when the network has its weights.

    A corner of the first image also goes through PyTorch, and the logits are compared: the files may have been exported
    with other settings than the network has now, and another CPU has other kernels.

    Args:
        network: the plain network, on its device.
        weights: file of its weights.
        engine: see ``choose_engine``.
        precision: see ``choose_engine``.
        threads: see ``choose_engine``.

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
        self.selected: AnyEngine | None = None
        self.checked = False

    def choose(self) -> AnyEngine:
        """The engine; see ``choose_engine`` for its errors."""
        if self.selected is None:
            self.selected = choose_engine(self.engine, self.precision, self.weights, self.network, self.threads)
        return self.selected

    @property
    def window(self) -> tuple[int, ...] | None:
        """The only size in voxels that the engine runs on, or None."""
        return self.choose().window

    @property
    def description(self) -> str:
        """Engine and precision, such as ``openvino bf16``."""
        return str(self.choose().description)

    @property
    def bytes_per_voxel(self) -> int:
        """Memory of one pass per voxel of the image, see ``scripts.inference.ENGINE_BYTES_PER_VOXEL``."""
        return int(self.choose().bytes_per_voxel)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to logits ``B classes H W D``.

        Raises:
            ValueError: the engine is not available, does not run on this size, or gives other logits than PyTorch. With
                ``auto`` PyTorch replaces an engine with other logits, and the log says so.
        """
        engine = self.choose()
        if not self.checked and not isinstance(engine, TorchEngine):
            self._compare_with_torch(engine, image)
        self.checked = True
        logits: torch.Tensor = self.choose()(image)
        return logits

    def _compare_with_torch(self, engine: OpenVINOEngine | ONNXRuntimeEngine, image: torch.Tensor) -> None:
        size = COMPARED_SIZE
        corner = image[:1] if engine.window else image[:1, :, :size, :size, :size]
        with torch.no_grad():
            expected = self.network(corner)
        difference = float((engine(corner) - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if difference <= TOLERANCES[engine.description.split()[-1]]:
            return
        problem = f"{engine.description} differs from PyTorch by {difference:.2g} of the largest logit of a window"
        if self.engine != "auto":
            raise ValueError(
                f"{problem}. The files may have been exported with other settings: export again, or use --engine torch."
            )
        logger.warning("%s. PyTorch is used instead.", problem)
        self.selected = TorchEngine(self.network)
