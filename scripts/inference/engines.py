# SPDX-License-Identifier: Apache-2.0
"""Engines as modules for any inferer: PyTorch, and those that run exported files (``scripts.runtime.engines``)."""

from __future__ import annotations

import torch
from torch import nn

from scripts.runtime import ENGINE_BYTES_PER_VOXEL
from scripts.runtime.engines import NumpyEngine, UnavailableError


class TorchEngine(nn.Module):
    """The network itself, in float32 or in bf16 under autocast.

    Args:
        network: any network; kept, not copied.
        precision: ``fp32`` or ``bf16``.

    Raises:
        UnavailableError: another precision.
    """

    window: tuple[int, ...] | None = None

    def __init__(self, network: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise UnavailableError(f"PyTorch runs fp32 or bf16, not {precision}: {precision} needs OpenVINO.")
        self.network, self.bf16 = network, precision == "bf16"
        self.description = f"torch {precision}"
        self.bytes_per_voxel = ENGINE_BYTES_PER_VOXEL[self.description]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to float32 logits ``B classes H W D``."""
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.bf16):
            logits: torch.Tensor = self.network(image)
        return logits.float()


class ExportedEngine(nn.Module):
    """An engine on numpy arrays as a module on tensors. A contiguous float32 tensor on the CPU is not copied.

    Args:
        engine: runs the exported files.
    """

    def __init__(self, engine: NumpyEngine) -> None:
        super().__init__()
        self.engine = engine
        self.window, self.description = engine.window, engine.description
        self.bytes_per_voxel = engine.bytes_per_voxel

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W D`` to logits ``B classes H W D``, in a new tensor on the image's device.

        Raises:
            ValueError: the engine does not run on this size.
        """
        plain = image.detach().as_subclass(torch.Tensor).to("cpu", torch.float32)
        return torch.from_numpy(self.engine(plain.numpy())).to(image.device)
