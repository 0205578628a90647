# SPDX-License-Identifier: Apache-2.0
"""Run a network on a whole volume in one pass where memory allows, and by MONAI's sliding window where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch.nn import functional

from scripts.inference import BYTES_PER_VOXEL

GIB = 2**30
PART_OVERLAP = 0.25

Network = Callable[[torch.Tensor], torch.Tensor]


class WholeVolumeInferer(SlidingWindowInferer):
    """Run the network on the whole volume at once, or on as few large parts as the memory allows.

    Memory grows linearly up to ``memory_gib`` and stays there. The image and the logits are additional:
    4 (modalities + classes) bytes per voxel.

    Args:
        roi_size: window in voxels for ``whole=False`` and for networks of one size (attribute ``window``).
        overlap: overlap of windows, as a share of their length. Parts are large and overlap by at most
            ``PART_OVERLAP``.
        whole: False slides windows of ``roi_size`` over every volume, as MONAI does.
        memory_gib: limit in GiB of one pass of the network. A larger volume is cut into overlapping parts, which are
            blended.
        divisor: the network needs sizes that are multiples of it, one number or one per axis; the volume is padded with
            zeros.
        skip_air: of the windows that are 0 in every modality run only one; the result is the same.
        sw_batch_size: see ``monai.inferers.SlidingWindowInferer``.
        mode: see ``monai.inferers.SlidingWindowInferer``.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        whole: bool = True,
        memory_gib: float = 1.25,
        divisor: int | Sequence[int] = 16,
        skip_air: bool = True,
        sw_batch_size: int = 1,
        mode: str = "gaussian",
    ) -> None:
        super().__init__(roi_size, sw_batch_size, overlap, mode)
        self.window, self.window_overlap = tuple(roi_size), overlap
        self.whole, self.memory_gib, self.skip_air = whole, memory_gib, skip_air
        self.divisor = [divisor] * 3 if isinstance(divisor, int) else list(divisor)

    def __call__(self, inputs: torch.Tensor, network: Network, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Logits of the volume.

        Args:
            inputs: ``B M H W D``.
            network: ``B M h w d`` to ``B classes h w d``. It may have the attributes ``window``, the only size that it
                runs on, and ``bytes_per_voxel`` of one pass.

        Returns:
            ``B classes H W D``.

        Raises:
            ValueError: the network runs on another window size than ``roi_size``.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        window = getattr(network, "window", None)
        if not self.whole or window is not None:
            if window is not None and tuple(window) != self.window:
                raise ValueError(
                    f"The network runs on windows of {tuple(window)} voxels only, but patch is {self.window}. Set "
                    f"patch to {list(window)}, or choose another engine."
                )
            return self._slide(image, network, self.window, self.window_overlap)
        padded_size = [math.ceil(n / d) * d for n, d in zip(image.shape[2:], self.divisor, strict=True)]
        bytes_per_voxel = getattr(network, "bytes_per_voxel", BYTES_PER_VOXEL)
        max_voxels = self.memory_gib * GIB / bytes_per_voxel / image.shape[0]
        overlap = min(self.window_overlap, PART_OVERLAP)
        part = part_size(padded_size, max_voxels, overlap, self.divisor)
        if part != padded_size:
            return self._slide(image, network, part, overlap)
        if padded_size == list(image.shape[2:]):  # PyTorch would copy even where there is nothing to pad
            return network(image)
        # Half of the padding on each side, as MONAI pads windows and training pads patches: one side only costs Dice.
        size = image.shape[2:]
        before = [(m - n) // 2 for n, m in zip(size, padded_size, strict=True)]
        margins = [(b, m - n - b) for b, n, m in zip(before, size, padded_size, strict=True)]
        logits = network(functional.pad(image, [n for axis_margins in reversed(margins) for n in axis_margins]))
        x, y, z = (slice(b, b + n) for b, n in zip(before, size, strict=True))
        return logits[..., x, y, z]

    def _slide(self, image: torch.Tensor, network: Network, window: Sequence[int], overlap: float) -> torch.Tensor:
        """MONAI's sliding window."""
        slide = SlidingWindowInferer(window, self.sw_batch_size, overlap, self.mode)
        return slide(image, _run_air_once(network) if self.skip_air else network)  # type: ignore[return-value]


def part_size(size: Sequence[int], max_voxels: float, overlap: float, divisor: Sequence[int]) -> list[int]:
    """Size of the fewest equal parts of at most ``max_voxels`` that cover a volume; the longest axes are cut.

    Args:
        size: of the volume, multiples of ``divisor``.
        max_voxels: largest number of voxels of a part. A part is never smaller than ``divisor`` voxels along its axis.
        overlap: share of a part's length that the next part repeats.
        divisor: per axis, lengths of a part are multiples of it.
    """
    cuts, part = [1, 1, 1], list(size)
    while math.prod(part) > max_voxels:
        longer = [axis for axis in range(3) if part[axis] > divisor[axis]]
        if not longer:
            break
        axis = max(longer, key=lambda a: part[a])
        cuts[axis] += 1
        length = size[axis] / (1 + (cuts[axis] - 1) * (1 - overlap))
        part[axis] = max(divisor[axis], math.ceil(length / divisor[axis]) * divisor[axis])
    return part


def _run_air_once(network: Network) -> Network:
    """The network, which runs on the first window of zeros only and repeats its logits for the others."""
    air_logits: list[torch.Tensor] = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        not_air = windows.flatten(1).any(dim=1)
        if not_air.all():
            return network(windows)
        if not air_logits:
            air_logits.append(network(torch.zeros_like(windows[:1])))
        logits = air_logits[0].repeat(len(windows), *[1] * (windows.dim() - 1))  # a copy: MONAI weights it in place
        if not_air.any():
            logits[not_air] = network(windows[not_air])
        return logits

    return predict
