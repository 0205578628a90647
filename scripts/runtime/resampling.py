# SPDX-License-Identifier: Apache-2.0
"""Resample volumes to the network's grid, and predictions back to the reference's own grid.

There is one linear interpolation each way, by SimpleITK, the fastest of the maintained libraries (docs/performance.md).
If two grids differ only by flipped or exchanged axes, voxels are moved and nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from scripts.image_io.headers import Affine
from scripts.runtime.decision import Regions, classes_from_logits, classes_from_probabilities
from scripts.runtime.grids import OwnGrid, axis_moves
from scripts.runtime.regions import IGNORED

SLAB = 32  # planes of a prediction that are restored at a time
TILE = 16  # planes that are copied at a time


def _interpolator(
    matrix: Affine, shape: Sequence[int], nearest: bool, edge: bool, threads: int
) -> sitk.ResampleImageFilter:
    """A resampler between two grids, both in voxels of the source, so that any affine works, including sheared ones."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    resampler = sitk.ResampleImageFilter()
    resampler.SetTransform(transform)
    resampler.SetSize([int(n) for n in shape])
    resampler.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
    resampler.SetUseNearestNeighborExtrapolator(edge)
    resampler.SetOutputPixelType(sitk.sitkFloat32)
    if threads:
        resampler.SetNumberOfThreads(threads)
    return resampler


def _to_itk(volume: NDArray) -> sitk.Image:
    return sitk.GetImageFromArray(np.ascontiguousarray(volume.T))


def move_axes(volume: NDArray, order: Sequence[int], flipped: Sequence[int]) -> NDArray:
    """A view of a volume with its axes permuted and then flipped, see ``axis_moves``."""
    return np.flip(volume.transpose(order), tuple(flipped))


def resample(
    volume: NDArray,
    matrix: Affine,
    shape: Sequence[int],
    outside: float | None = 0.0,
    nearest: bool = False,
    threads: int = 0,
) -> NDArray[np.float32]:
    """Resample a volume to another grid.

    Args:
        volume: ``H W D``, of any type that SimpleITK supports.
        matrix: voxels of the new grid to voxels of the volume, 4 x 4.
        shape: of the new grid.
        outside: value outside the volume, which ends half a voxel beyond its outermost voxel centres. None uses the
            nearest voxel's value.
        nearest: use the nearest voxel instead of linear interpolation.
        threads: number of CPU threads; 0 leaves it to SimpleITK.

    Returns:
        ``shape``.
    """
    moves = axis_moves(matrix, volume.shape, shape)
    if moves is not None:
        return move_axes(volume, *moves).astype(np.float32)
    resampler = _interpolator(matrix, shape, nearest, outside is None, threads)
    resampler.SetDefaultPixelValue(outside or 0.0)
    resampled: NDArray[np.float32] = sitk.GetArrayFromImage(resampler.Execute(_to_itk(volume))).T
    return resampled


def vanished_classes(label: NDArray, resampled: NDArray) -> dict[int, int]:
    """The foreground classes that a label has on its own grid, but not after resampling.

    Args:
        label, resampled: class indices, of any shape; those from ``IGNORED`` on are no classes.

    Returns:
        The number of voxels on the label's own grid by class.
    """
    counts = np.bincount(label.ravel(order="K").astype(np.uint8), minlength=IGNORED)[:IGNORED]
    present = [index for index in np.flatnonzero(counts).tolist() if index]
    return {index: int(counts[index]) for index in present if not (resampled == index).any()}


def vanished_message(path: str, classes: Mapping[int, int], spacing: Sequence[float]) -> str:
    """The warning about a label of which nothing is left on the network's grid; empty if there is no such class."""
    if not classes:
        return ""
    voxels = " and ".join(f"{count} voxel(s) of class {index}" for index, count in classes.items())
    sizes = " x ".join(f"{size:g}" for size in spacing)
    return (
        f"{path} has {voxels}, but none at the network's spacing of {sizes} mm: too small for this spacing, or outside "
        "the reference image"
    )


def copy_between_layouts(target: NDArray, source: NDArray) -> None:
    """``target[...] = source`` for volumes of which one has its last axis fastest, the other (from a file) its first.

    Copying a few planes at a time uses the processor's cache: 2.4 times faster than one copy (256 x 256 x 192,
    float32).

    Args:
        target, source: ``... H W D``.
    """
    for start in range(0, target.shape[-1], TILE):
        planes = slice(start, start + TILE)
        target[..., planes] = source[..., planes]


def restore_mask(
    logits: NDArray[np.float32], affine: Affine, own: OwnGrid, regions: Regions | None = None, threads: int = 0
) -> NDArray[np.uint8]:
    """Turn logits on the network's grid into class indices on the reference image's own grid.

    Probabilities are interpolated, not labels, so that borders stay smooth if voxels become smaller. If nothing has to
    be interpolated, the logits decide. The volume is processed in slabs to save memory.

    Args:
        logits: ``C H W D``.
        affine: of the network's grid, voxel to world in mm.
        own: the reference image's grid; outside of its part the mask is 0.
        regions: the classes of each channel of a sigmoid head, see ``scripts.runtime.decision``; None for a softmax.
        threads: number of CPU threads; 0 leaves it to SimpleITK.

    Returns:
        Class indices of ``own.shape``, with the first axis fastest as in NIfTI files.
    """
    matrix = np.linalg.solve(np.asarray(affine, dtype=np.float64), own.part_affine)
    moves = axis_moves(matrix, logits.shape[1:], own.part)
    if moves is not None:
        labels = move_axes(classes_from_logits(logits, regions), *moves)
    else:
        labels = _interpolated_classes(logits, matrix, own.part, regions, threads)
    mask = np.zeros(own.shape, dtype=np.uint8, order="F")
    copy_between_layouts(mask[tuple(slice(s, s + n) for s, n in zip(own.start, own.part, strict=True))], labels)
    return mask


def _probabilities(logits: NDArray[np.float32], is_softmax: bool) -> NDArray[np.float32]:
    """Softmax over the channels, or the sigmoid of each. Of two classes only the second: they sum to 1."""
    one = np.float32(1)
    with np.errstate(over="ignore"):  # exp may overflow to infinity, of which the probability is 0
        if not is_softmax:
            return one / (one + np.exp(-logits))
        if len(logits) == 2:
            return one / (one + np.exp(logits[:1] - logits[1:]))
    powers = np.exp(logits - logits.max(axis=0))
    probabilities: NDArray[np.float32] = powers / powers.sum(axis=0)
    return probabilities


def _interpolated_classes(
    logits: NDArray[np.float32], matrix: Affine, shape: Sequence[int], regions: Regions | None, threads: int
) -> NDArray[np.uint8]:
    """Class indices from the probabilities on another grid, computed a slab of its last axis at a time."""
    probabilities = _probabilities(logits, regions is None)
    if regions is None and len(logits) == 2:
        regions = [[1]]
    images = [_to_itk(channel) for channel in probabilities]
    labels = np.empty(tuple(shape)[::-1], dtype=np.uint8)
    for start in range(0, shape[2], SLAB):
        planes = min(SLAB, shape[2] - start)
        shifted = matrix.copy()
        shifted[:3, 3] += matrix[:3, 2] * start
        resampler = _interpolator(shifted, (*shape[:2], planes), nearest=False, edge=True, threads=threads)
        slabs = (sitk.GetArrayFromImage(resampler.Execute(image)) for image in images)
        labels[start : start + planes] = classes_from_probabilities(slabs, regions)
    return labels.T
