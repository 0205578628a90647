# SPDX-License-Identifier: Apache-2.0
"""Choose the engine for a network by the exported files of its weights; compare it with PyTorch at the first case."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from scripts.inference.engines import ExportedEngine, TorchEngine
from scripts.runtime.engines import UnavailableError
from scripts.runtime.exported_files import (
    TOLERANCES,
    check_names,
    export_command,
    export_folder,
    exported_engine,
    read_export,
)

logger = logging.getLogger(__name__)

COMPARED_SIZE = 64  # voxels per axis of the corner that PyTorch also runs on

AnyEngine = TorchEngine | ExportedEngine


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
    check_names(engine, precision)
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
            advice = f"Export again with: {export_command(weights)}"
            record, folder = read_export(weights), export_folder(weights)
            exported, reason = exported_engine(folder, record, name, precision, advice, threads)
            selected = ExportedEngine(exported)
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
        check_names(engine, precision)
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
        """Memory of one pass per voxel of the image, see ``scripts.runtime.ENGINE_BYTES_PER_VOXEL``."""
        return int(self.choose().bytes_per_voxel)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to logits ``B classes H W D``.

        Raises:
            ValueError: the engine is not available, does not run on this size, or gives other logits than PyTorch. With
                ``auto`` PyTorch replaces an engine with other logits, and the log says so.
        """
        engine = self.choose()
        if not self.checked and not isinstance(engine, TorchEngine):
            part = image[:1] if engine.window else _middle(image[:1])
            if bool(part.any()):  # zeros outside of the patient tell nothing
                self._compare_with_torch(engine, part, image[:1])
                self.checked = True
        logits: torch.Tensor = self.choose()(image)
        return logits

    def _compare_with_torch(self, engine: ExportedEngine, part: torch.Tensor, whole: torch.Tensor) -> None:
        with torch.no_grad():
            try:
                expected = self.network(part)
            except (RuntimeError, ValueError, AssertionError):  # a network of one size, or of larger images only
                part, expected = whole, self.network(whole)
        difference = float((engine(part) - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if difference <= TOLERANCES[engine.description.split()[-1]]:
            return
        problem = f"{engine.description} differs from PyTorch by {difference:.2g} of the largest logit of a window"
        if self.engine != "auto":
            raise ValueError(
                f"{problem}. The files may have been exported with other settings: export again, or use --engine torch."
            )
        logger.warning("%s. PyTorch is used instead.", problem)
        self.selected = TorchEngine(self.network)


def _middle(image: torch.Tensor) -> torch.Tensor:
    """The middle of an image ``B M H W D``, at most ``COMPARED_SIZE`` voxels along each axis."""
    for axis in (2, 3, 4):
        length = min(COMPARED_SIZE, image.shape[axis])
        image = image.narrow(axis, (image.shape[axis] - length) // 2, length)
    return image
