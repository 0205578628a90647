# SPDX-License-Identifier: Apache-2.0
"""The largest patch, the student's strides and the batch that fit in a given memory.

The rules are those of nnU-Net's planner, for a student with a fixed number of stages (docs/how_to/own_data.md says what
is alike and what is not).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scripts.runtime import GIB

MIN_EDGE = 2  # cells along an axis of the student's deepest grid
LARGEST_PATCH = 128**3  # voxels
MIN_BATCH = 2
COVERED = 0.05  # largest share of the data set's voxels in a batch
FLOAT_BYTES = 4
HEADS = 4  # of the student's attention
LOSS_VALUES = 4  # tensors of logits that the loss keeps for its gradient
PEAK_FACTOR = 2  # peak memory of a step over what it keeps for the gradient, an upper estimate

Strides = list[list[int]]


class StudentSize(NamedTuple):
    """What decides how much memory a step of the student takes.

    Attributes:
        in_channels: number of modalities.
        out_channels: number of classes or regions.
        features: channels of each stage.
        full_features: channels of the full-resolution stage.
    """

    in_channels: int
    out_channels: int
    features: Sequence[int]
    full_features: int


class PatchPlan(NamedTuple):
    """A patch and what follows from it.

    Attributes:
        patch: voxels per axis.
        strides: of each of the student's stages, per axis.
        batch: patches of a step.
        gib: memory of a step.
    """

    patch: list[int]
    strides: Strides
    batch: int
    gib: float


def student_strides(spacing: Sequence[float], patch: Sequence[int], stages: int) -> Strides:
    """Halve, in each stage, the axes whose voxels are less than twice as long as the shortest.

    An axis is no longer halved when fewer than ``MIN_EDGE`` cells would be left; it then does not count as the
    shortest.

    Args:
        spacing: of the network's grid in mm.
        patch: in voxels.
        stages: number of the student's stages.

    Returns:
        1 or 2 per stage and axis.
    """
    lengths, sizes, strides = list(spacing), list(patch), []
    for _ in range(stages):
        large = [axis for axis in range(3) if sizes[axis] >= 2 * MIN_EDGE]
        shortest = min((lengths[axis] for axis in large), default=0.0)
        step = [2 if axis in large and lengths[axis] < 2 * shortest else 1 for axis in range(3)]
        lengths = [length * n for length, n in zip(lengths, step, strict=True)]
        sizes = [size // n for size, n in zip(sizes, step, strict=True)]
        strides.append(step)
    return strides


def divisor(strides: Strides) -> list[int]:
    """Per axis the number that sizes must be multiples of."""
    return [math.prod(along_axis) for along_axis in zip(*strides, strict=True)]


def training_bytes(patch: Sequence[int], batch: int, strides: Strides, size: StudentSize) -> int:
    """Peak memory that one training step of the student adds to the process, in bytes.

    Each convolution with its normalisation and activation keeps two tensors of its output for the gradient. The student
    concatenates before the first convolution of each decoder stage. The attention keeps one matrix per head.

    Args:
        patch: in voxels.
        batch: patches of a step.
        strides: of each stage, per axis.
        size: of the student.
    """
    voxels = [math.prod(patch)]
    for step in strides:
        voxels.append(voxels[-1] // math.prod(step))
    values = voxels[0] * (size.in_channels + LOSS_VALUES * size.out_channels)
    values += sum(4 * features * cells for features, cells in zip(size.features, voxels[1:], strict=True))
    # Each decoder stage: the concatenation (2 x its channels) and two convolutions.
    values += sum(6 * features * cells for features, cells in zip(size.features[:-1], voxels[1:-1], strict=True))
    values += voxels[0] * (3 * size.full_features + size.in_channels)
    values += HEADS * voxels[-1] ** 2
    return PEAK_FACTOR * FLOAT_BYTES * batch * values


def plan_patch(
    spacing: Sequence[float],
    shapes: Sequence[Sequence[int]],
    size: StudentSize,
    gib: float,
    patch: Sequence[int] | None = None,
    strides: Strides | None = None,
    batch: int | None = None,
    training: int | None = None,
) -> PatchPlan:
    """The largest patch of which a batch fits in the memory, and the largest batch of it.

    The patch begins with ``LARGEST_PATCH`` voxels, equally long in mm along all axes, at most the median shape. While
    ``MIN_BATCH`` of it need too much memory, the axis that covers the largest part of the median shape is made
    shorter. The batch grows as far as the memory allows, to ``COVERED`` of the data set at most, and has no case twice.

    Args:
        spacing: of the network's grid in mm.
        shapes: of all cases on that grid, in voxels.
        size: of the student.
        gib: memory of a step in GiB.
        patch, strides, batch: fixed ones; by default they are chosen.
        training: number of training cases; by default those of one of five folds.
    """
    training = training or trained_cases(len(shapes))
    stages, least = len(size.features), batch or min(MIN_BATCH, training)
    median = median_shape(shapes)
    if patch:
        chosen, steps = list(patch), strides or _dividing(patch, spacing, stages)
    else:
        chosen, steps = _fitted(_first_patch(spacing, median), spacing, stages, strides)
    while not patch and least * training_bytes(chosen, 1, steps, size) > gib * GIB:
        shorter = [_fitted(_shortened(chosen, axis), spacing, stages, strides) for axis in range(3)]
        axes = [axis for axis in range(3) if math.prod(shorter[axis][0]) < math.prod(chosen)]
        if not axes:
            break
        longest = max(axes, key=lambda axis: chosen[axis] / median[axis])
        chosen, steps = shorter[longest]
    if not batch:
        fitting = int(gib * GIB // training_bytes(chosen, 1, steps, size))
        covered = round(COVERED * sum(math.prod(shape) for shape in shapes) / math.prod(chosen))
        batch = min(max(least, min(fitting, covered)), training)
    return PatchPlan(chosen, steps, batch, training_bytes(chosen, batch, steps, size) / GIB)


def _first_patch(spacing: Sequence[float], median: Sequence[int]) -> list[int]:
    edge = (LARGEST_PATCH * math.prod(spacing)) ** (1 / 3)
    return [max(1, min(round(edge / length), n)) for length, n in zip(spacing, median, strict=True)]


def _shortened(patch: Sequence[int], axis: int) -> list[int]:
    return [max(1, n - (index == axis)) for index, n in enumerate(patch)]


def _fitted(
    patch: Sequence[int], spacing: Sequence[float], stages: int, strides: Strides | None
) -> tuple[list[int], Strides]:
    """The largest patch within another one that its strides divide, and those strides."""
    steps = strides or student_strides(spacing, patch, stages)
    return [max(n // step, 1) * step for n, step in zip(patch, divisor(steps), strict=True)], steps


def _dividing(patch: Sequence[int], spacing: Sequence[float], stages: int) -> Strides:
    """The strides for a patch that cannot be changed: where they do not divide it, the deepest stages halve less."""
    strides = student_strides(spacing, patch, stages)
    for step in reversed(strides):
        for axis in range(3):
            if patch[axis] % divisor(strides)[axis]:
                step[axis] = 1
    return strides


def trained_cases(cases: int) -> int:
    """The cases that one of five folds trains on, at least 1."""
    return max(1, cases - math.ceil(cases / 5))


def median_shape(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The median of the shapes along each axis, in voxels."""
    return [sorted(along_axis)[len(shapes) // 2] for along_axis in zip(*shapes, strict=True)]
