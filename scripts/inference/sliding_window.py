# SPDX-License-Identifier: Apache-2.0
"""One pass over the whole volume where memory allows, MONAI's sliding window where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch.nn import functional

GIB = 2**30
# What a pass of the student needs per voxel of the volume beside its input (docs/performance.md, "Memory"): peak of the
# process less what it held before, eager PyTorch in float32. Engines name their own.
BYTES_PER_VOXEL = 200
PART_OVERLAP = 0.25

Network = Callable[[torch.Tensor], torch.Tensor]


class WholeVolumeInferer(SlidingWindowInferer):
    """The student sees the whole volume at once, in as few parts as the memory allows.

    Memory grows linearly up to ``memory_gib`` and stays there; beside it stand the image and the logits,
    4 (modalities + classes) bytes per voxel.

    Args:
        roi_size: window in voxels for ``whole=False`` and for networks that know only one size (attribute ``window``).
        overlap: of windows; parts, which are large, overlap by ``PART_OVERLAP`` at most.
        whole: False slides ``roi_size`` over every volume, as MONAI does.
        memory_gib: for one pass of the network; a larger volume is cut into parts that overlap and are blended.
        divisor: sizes that the network takes are multiples of it; the volume is padded by zeros.
        skip_air: run only one of the windows that are 0 in every modality; the result is the same.
        sw_batch_size, mode: see ``monai.inferers.SlidingWindowInferer``.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        whole: bool = True,
        memory_gib: float = 1.25,
        divisor: int = 16,
        skip_air: bool = True,
        sw_batch_size: int = 1,
        mode: str = "gaussian",
    ) -> None:
        super().__init__(roi_size, sw_batch_size, overlap, mode)
        self.window, self.share = tuple(roi_size), overlap
        self.whole, self.memory_gib, self.divisor, self.skip_air = whole, memory_gib, divisor, skip_air

    def __call__(self, inputs: torch.Tensor, network: Network, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Logits of the volume.

        Args:
            inputs: ``B M H W D``.
            network: ``B M h w d`` to ``B classes h w d``. Its attributes, where it has them: ``window``, the only size
                that it takes; ``bytes_per_voxel`` of one pass.

        Returns:
            ``B classes H W D``.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        window = getattr(network, "window", None)
        if not self.whole or window is not None:
            if window is not None and tuple(window) != self.window:
                raise ValueError(
                    f"The network takes windows of {tuple(window)} voxels only, and patch is {self.window}: "
                    "set patch to that, or choose another engine."
                )
            return self._slide(image, network, self.window, self.share)
        size = [math.ceil(n / self.divisor) * self.divisor for n in image.shape[2:]]
        limit = self.memory_gib * GIB / getattr(network, "bytes_per_voxel", BYTES_PER_VOXEL) / image.shape[0]
        overlap = min(self.share, PART_OVERLAP)
        part = part_size(size, limit, overlap, self.divisor)
        if part != size:
            return self._slide(image, network, part, overlap)
        if size == list(image.shape[2:]):  # PyTorch would copy even where there is nothing to pad
            return network(image)
        # Half on either side, as MONAI pads windows and training pads patches: on one side only costs Dice.
        shape = image.shape[2:]
        before = [(m - n) // 2 for n, m in zip(shape, size, strict=True)]
        sides = [(b, m - n - b) for b, n, m in zip(before, shape, size, strict=True)]
        logits = network(functional.pad(image, [margin for side in reversed(sides) for margin in side]))
        x, y, z = (slice(b, b + n) for b, n in zip(before, shape, strict=True))
        return logits[..., x, y, z]

    def _slide(self, image: torch.Tensor, network: Network, window: Sequence[int], overlap: float) -> torch.Tensor:
        """MONAI's sliding window."""
        slide = SlidingWindowInferer(window, self.sw_batch_size, overlap, self.mode)
        return slide(image, _without_air(network) if self.skip_air else network)  # type: ignore[return-value]


def part_size(size: Sequence[int], limit: float, overlap: float, divisor: int) -> list[int]:
    """Size of the fewest equal parts of at most ``limit`` voxels that cover a volume: its longest axes are cut.

    Args:
        size: of the volume, multiples of ``divisor``.
        limit: voxels of a part; one cell of ``divisor`` voxels a side is the least.
        overlap: share of a part's length that the next one repeats.
        divisor: lengths are multiples of it.
    """
    cuts, part = [1, 1, 1], list(size)
    while math.prod(part) > limit and max(part) > divisor:
        axis = max(range(3), key=lambda a: part[a])
        cuts[axis] += 1
        length = size[axis] / (1 + (cuts[axis] - 1) * (1 - overlap))
        part[axis] = max(divisor, math.ceil(length / divisor) * divisor)
    return part


def _without_air(network: Network) -> Network:
    """The network, but windows of zeros only, which all get the same answer, are answered from the first of them."""
    known: list[torch.Tensor] = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        alive = windows.flatten(1).any(dim=1)
        if alive.all():
            return network(windows)
        if not known:
            known.append(network(torch.zeros_like(windows[:1])))
        logits = known[0].repeat(len(windows), *[1] * (windows.dim() - 1))  # MONAI weighs them in place
        if alive.any():
            logits[alive] = network(windows[alive])
        return logits

    return predict
