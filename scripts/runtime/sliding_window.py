# SPDX-License-Identifier: Apache-2.0
"""Run a network on a whole volume in one pass where memory allows, and on overlapping windows where it does not.

The functions take numpy arrays and PyTorch tensors, on any device: they only index, multiply and add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.runtime import BYTES_PER_VOXEL, GIB

PART_OVERLAP = 0.25
SIGMA = 0.125  # standard deviation of the weights of a window, as a share of its length
MIN_WEIGHT = 1e-3

Array = Any  # numpy.ndarray or torch.Tensor
Network = Callable[[Array], Array]


@dataclass(frozen=True)
class WindowPlan:
    """How a volume is cut into windows.

    Args:
        window: size in voxels for ``whole=False`` and for networks of one size (attribute ``window``).
        overlap: overlap of windows, as a share of their length. Parts are large and overlap by at most
            ``PART_OVERLAP``.
        whole: False slides windows over every volume, as MONAI does.
        memory_gib: limit in GiB of one pass of the network. A larger volume is cut into overlapping parts, which are
            blended.
        divisor: the network needs sizes that are multiples of it, per axis; the volume is padded with zeros.
        skip_air: of the windows that are 0 in every modality run only one; the result is the same.
        batch: windows that the network runs on at a time.
        gaussian: weight windows by a Gaussian when they are blended; False weights all voxels alike.
    """

    window: tuple[int, ...]
    overlap: float = 0.5
    whole: bool = True
    memory_gib: float = 1.25
    divisor: tuple[int, ...] = (16, 16, 16)
    skip_air: bool = True
    batch: int = 1
    gaussian: bool = True


def predict_volume(image: Array, network: Network, plan: WindowPlan) -> Array:
    """Logits of a volume.

    Args:
        image: ``B M H W D``.
        network: ``B M h w d`` to ``B classes h w d``. It may have the attributes ``window``, the only size that it runs
            on, and ``bytes_per_voxel`` of one pass.
        plan: how the volume is cut.

    Returns:
        ``B classes H W D``, of the image's type and on its device.

    Raises:
        ValueError: the network runs on another window size than the plan's.
    """
    window = getattr(network, "window", None)
    if not plan.whole or window is not None:
        if window is not None and tuple(window) != plan.window:
            raise ValueError(
                f"The network runs on windows of {tuple(window)} voxels only, but patch is {plan.window}. Set "
                f"patch to {list(window)}, or choose another engine."
            )
        return slide(image, network, plan.window, plan.overlap, plan)
    size = tuple(image.shape[2:])
    padded_size = [math.ceil(n / d) * d for n, d in zip(size, plan.divisor, strict=True)]
    bytes_per_voxel = getattr(network, "bytes_per_voxel", BYTES_PER_VOXEL)
    max_voxels = plan.memory_gib * GIB / bytes_per_voxel / image.shape[0]
    overlap = min(plan.overlap, PART_OVERLAP)
    part = part_size(padded_size, max_voxels, overlap, plan.divisor)
    if part != padded_size:
        return slide(image, network, part, overlap, plan)
    padded, inside = _padded(image, padded_size)
    logits = network(padded)
    return logits if padded is image else logits[inside]


def slide(image: Array, network: Network, window: Sequence[int], overlap: float, plan: WindowPlan) -> Array:
    """MONAI's ``sliding_window_inference``: the same windows, weights and order of additions, so equal bits."""
    whole, inside = _padded(image, [max(n, w) for n, w in zip(image.shape[2:], window, strict=True)])
    size = whole.shape[2:]
    places = window_places(size, window, overlap)
    weights = _like(image, window_weights(window, plan.gaussian))
    predict = _run_air_once(network) if plan.skip_air else network
    every = [(sample, place) for sample in range(len(whole)) for place in places]
    sums: Array = None
    counts: Array = None
    for start in range(0, len(every), plan.batch):
        batch = every[start : start + plan.batch]
        windows = _zeros(image, (len(batch), whole.shape[1], *window)) if len(batch) > 1 else None
        for index, (sample, place) in enumerate(batch):
            if windows is None:
                windows = whole[(slice(sample, sample + 1), slice(None), *place)]
            else:
                windows[index] = whole[(sample, slice(None), *place)]
        logits = predict(windows)
        if sums is None:
            sums, counts = _zeros(image, (len(whole), logits.shape[1], *size)), _zeros(image, (1, 1, *size))
            for place in places:
                counts[(slice(None), slice(None), *place)] += weights
        for index, (sample, place) in enumerate(batch):
            sums[(sample, slice(None), *place)] += logits[index] * weights
    sums /= counts
    return sums[inside]


def window_places(size: Sequence[int], window: Sequence[int], overlap: float) -> list[tuple[slice, ...]]:
    """The places of windows that cover a volume, in the order and by the rule of MONAI.

    Args:
        size: of the volume, at least ``window``.
        window: size of the windows.
        overlap: of neighbours, as a share of their length.
    """
    starts = []
    for length, width in zip(size, window, strict=True):
        step = width if width == length else max(1, int(width * (1 - overlap)))
        count = 1 + max(0, math.ceil((length - width) / step))
        starts.append([min(index * step, length - width) for index in range(count)])
    return [
        tuple(slice(start, start + width) for start, width in zip(place, window, strict=True))
        for place in itertools.product(*starts)
    ]


def window_weights(window: Sequence[int], gaussian: bool = True) -> NDArray[np.float32]:
    """The weight of each voxel of a window: MONAI's Gaussian, or 1."""
    if not gaussian:
        return np.ones(window, dtype=np.float32)
    weights = np.ones((), dtype=np.float32)
    for length in window:
        distance = np.arange(length, dtype=np.float32) - np.float32((length - 1) / 2)
        weights = weights[..., None] * np.exp(distance**2 / np.float32(-2 * (SIGMA * length) ** 2))
    return np.maximum(weights, np.float32(max(float(weights.min()), MIN_WEIGHT)))


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


def _padded(image: Array, size: Sequence[int]) -> tuple[Array, tuple[slice, ...]]:
    """The image padded with zeros, and the place of the image in it; the image itself where there is nothing to pad.

    Half of the padding is on each side, as MONAI pads windows and training pads patches: one side only costs Dice.
    """
    own = tuple(image.shape[2:])
    before = [(m - n) // 2 for n, m in zip(own, size, strict=True)]
    inside = (slice(None), slice(None), *(slice(b, b + n) for b, n in zip(before, own, strict=True)))
    if own == tuple(size):
        return image, inside
    padded = _zeros(image, (*image.shape[:2], *size))
    padded[inside] = image
    return padded, inside


def _zeros(like: Array, shape: Sequence[int]) -> Array:
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(tuple(shape))


def _like(image: Array, values: NDArray) -> Array:
    return values.astype(image.dtype) if isinstance(image, np.ndarray) else image.new_tensor(values)


def _run_air_once(network: Network) -> Network:
    """The network, which runs on the first window of zeros only and repeats its logits for the others."""
    air_logits: list[Array] = []

    def predict(windows: Array) -> Array:
        is_air = [not window.any() for window in windows]
        if not any(is_air):
            return network(windows)
        if not air_logits:
            air_logits.append(network(_zeros(windows, (1, *windows.shape[1:]))))
        logits = _zeros(air_logits[0], (len(windows), *air_logits[0].shape[1:]))
        logits[:] = air_logits[0]
        others = [index for index, air in enumerate(is_air) if not air]
        if others:
            logits[others] = network(windows[others])
        return logits

    return predict
