# SPDX-License-Identifier: Apache-2.0
"""Resample every modality to the network's grid, and predictions back to the reference's own grid.

There is one linear interpolation each way, by SimpleITK, the fastest of the maintained libraries (docs/performance.md).
If two grids differ only by flipped or exchanged axes, voxels are moved and nothing is interpolated.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset, zoom_affine
from monai.transforms import MapTransform

from scripts.data.decision import Regions, classes_from_logits, classes_from_probabilities
from scripts.runtime.regions import IGNORED
from scripts.image_io.headers import Affine

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # voxels; grids closer than this are equal
SLAB = 32  # planes of a prediction that are restored at a time
TILE = 16  # planes that are copied at a time


def network_grid(affine: Affine, shape: Sequence[int], spacing: Sequence[float]) -> tuple[Affine, tuple[int, ...]]:
    """The RAS grid that covers a volume at a spacing, by the rule of MONAI's ``Spacing``.

    Args:
        affine: of the volume, voxel to world in mm.
        shape: of the volume.
        spacing: of the grid, in mm per axis.

    Returns:
        The grid's affine and shape.
    """
    axes = nib.io_orientation(affine)
    ras_affine = affine @ nib.orientations.inv_ornt_aff(axes, shape)
    shape = tuple(shape[int(np.flatnonzero(axes[:, 0] == axis)[0])] for axis in range(3))
    zoomed = zoom_affine(ras_affine, np.asarray(spacing, dtype=float), diagonal=False)
    size, offset = compute_shape_offset(shape, ras_affine, zoomed)
    zoomed[:3, 3] = offset
    return zoomed, tuple(int(n) for n in size)


def axis_moves(matrix: Affine, source: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """The axes to permute and then to flip, if that maps one grid onto the other; else None.

    Args:
        matrix: voxels of the new grid to voxels of the source, 4 x 4.
        source: shape of the source.
        shape: of the new grid.
    """
    rotation = np.rint(matrix[:3, :3])
    deviation = np.abs(matrix[:3, :3] - rotation) @ np.array(shape)
    is_permutation = (np.abs(rotation).sum(0) == 1).all() and (np.abs(rotation).sum(1) == 1).all()
    if not is_permutation or (deviation > TOLERANCE).any():
        return None
    order = [int(axis) for axis in np.abs(rotation).argmax(0)]  # source axis of each target axis
    flipped = [axis for axis in range(3) if rotation[order[axis], axis] < 0]
    start = np.zeros(3)
    for axis in flipped:
        start[order[axis]] = source[order[axis]] - 1
    if (np.abs(matrix[:3, 3] - start) > TOLERANCE).any() or [source[axis] for axis in order] != list(shape):
        return None
    return order, flipped


def _interpolator(matrix: Affine, shape: Sequence[int], nearest: bool, edge: bool) -> sitk.ResampleImageFilter:
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
    resampler.SetNumberOfThreads(torch.get_num_threads())
    return resampler


def _to_itk(volume: torch.Tensor) -> sitk.Image:
    return sitk.GetImageFromArray(volume.permute(2, 1, 0).contiguous().numpy())


def resample(
    volume: torch.Tensor, matrix: Affine, shape: Sequence[int], outside: float | None = 0.0, nearest: bool = False
) -> torch.Tensor:
    """Resample a volume to another grid.

    Args:
        volume: ``H W D``, of any type that SimpleITK supports.
        matrix: voxels of the new grid to voxels of the volume, 4 x 4.
        shape: of the new grid.
        outside: value outside the volume, which ends half a voxel beyond its outermost voxel centres. None uses the
            nearest voxel's value.
        nearest: use the nearest voxel instead of linear interpolation.

    Returns:
        ``shape``, float32.
    """
    moves = axis_moves(matrix, volume.shape, shape)
    if moves is not None:
        return volume.permute(moves[0]).flip(moves[1]).float()
    resampler = _interpolator(matrix, shape, nearest, outside is None)
    resampler.SetDefaultPixelValue(outside or 0.0)
    return torch.from_numpy(sitk.GetArrayFromImage(resampler.Execute(_to_itk(volume)))).permute(2, 1, 0)


def vanished_classes(label: torch.Tensor, resampled: torch.Tensor) -> dict[int, int]:
    """The foreground classes that a label has on its own grid, but not after resampling.

    Args:
        label, resampled: class indices, of any shape; ``IGNORED`` and ``UNLABELLED`` are no classes.

    Returns:
        The number of voxels on the label's own grid by class.
    """
    classes = range(1, int(torch.where(label < IGNORED, label, 0).max()) + 1)
    lost = [index for index in classes if not (resampled == index).any()]
    counts = {index: int((label == index).sum()) for index in lost}
    return {index: count for index, count in counts.items() if count}


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


def with_affine(volume: torch.Tensor, affine: Affine, meta: Mapping[str, Any]) -> MetaTensor:
    """A volume with a new affine and the metadata of another."""
    rest = {key: value for key, value in meta.items() if key != "affine"}  # MONAI warns about a second affine
    return MetaTensor(volume, affine=torch.as_tensor(np.asarray(affine, dtype=np.float64)), meta=rest)


def copy_between_layouts(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)`` for volumes of which one has its last axis fastest, the other (from a file) its first.

    Copying a few planes at a time uses the processor's cache: 2.4 times faster than ``copy_`` (256 x 256 x 192,
    float32).

    Args:
        target, source: ``... H W D``.
    """
    for start in range(0, target.shape[-1], TILE):
        planes = slice(start, start + TILE)
        target[..., planes].copy_(source[..., planes])


class OntoGridd(MapTransform):
    """Resample every key by its full affine to one grid: the reference's field of view, RAS, at a spacing.

    Args:
        keys: modalities, and the label if there is one; absent ones are skipped.
        reference: one of the keys. Its field of view is kept, and its nearest voxels fill the space outside it.
        spacing: of the grid, in mm.
        outside: per key the value outside its own field of view.
        nearest: keys of labels, which are resampled to the nearest voxel. A warning names a label of which a class
            vanishes.

    Every volume becomes ``1 H W D``, float32. The reference's metadata entries ``source_affine`` and ``source_shape``
    describe its own grid.
    """

    def __init__(
        self,
        keys: Sequence[str],
        reference: str,
        spacing: Sequence[float],
        outside: Mapping[str, float],
        nearest: Sequence[str] = (),
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.reference, self.spacing, self.outside, self.nearest = reference, spacing, dict(outside), nearest

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        reference = item[self.reference]
        source = np.asarray(reference.affine, dtype=np.float64)
        affine, shape = network_grid(source, reference.shape[1:], self.spacing)
        for key in self.key_iterator(item):
            volume = item[key]
            if volume.ndim != 4 or len(volume) != 1:
                name, size = volume.meta.get("filename_or_obj", key), " x ".join(map(str, volume.shape[1:]))
                raise ValueError(
                    f"{name} contains {len(volume)} channels of {size} voxels. Give one 3D volume per file."
                )
            matrix = np.linalg.solve(np.asarray(volume.affine, dtype=np.float64), affine)
            outside = None if key == self.reference else self.outside.get(str(key), 0.0)
            resampled = resample(volume[0].as_tensor(), matrix, shape, outside, key in self.nearest)
            if key in self.nearest:
                lost = vanished_classes(volume.as_tensor(), resampled)
                message = vanished_message(volume.meta.get("filename_or_obj", key), lost, self.spacing)
                if message:
                    logger.warning("Case %s: %s", item.get("case_id"), message)
            item[key] = with_affine(resampled[None], affine, volume.meta)
        own_grid = {"source_affine": source, "source_shape": np.array(reference.shape[1:])}
        item[self.reference].meta.update(own_grid)
        return item


class RestoreGridd(MapTransform):
    """Turn logits on the network's grid into labels on the reference image's own grid, ``1 H W D`` uint8.

    Probabilities are interpolated, not labels, so that borders stay smooth if voxels become smaller. If nothing has to
    be interpolated, the logits decide. The volume is processed in slabs to save memory.

    Args:
        key: the logits, ``C H W D``.
        image: key of the image whose metadata describe the grids, see ``OntoGridd`` and ``CropToBoxd``.
        regions: the classes of each channel of a sigmoid head, see ``scripts.data.decision``; None for a softmax.
    """

    def __init__(self, key: str, image: str, regions: Regions | None = None) -> None:
        super().__init__(key)
        self.image, self.regions = image, regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, logits = data[self.image], torch.as_tensor(data[self.keys[0]]).float().cpu()
        logits = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
        meta = image.meta
        source = np.asarray(meta["source_affine"], dtype=np.float64)
        shape = [int(n) for n in meta["source_shape"]]
        matrix = np.linalg.solve(np.asarray(image.affine, dtype=np.float64), source)
        moves = axis_moves(matrix, logits.shape[1:], shape)
        if moves is not None:
            labels = classes_from_logits(logits, self.regions).permute(moves[0]).flip(moves[1])
        else:
            labels = _interpolated_labels(logits, matrix, shape, self.regions)
        whole = torch.zeros([int(n) for n in meta["spatial_shape"]][::-1], dtype=torch.uint8).permute(2, 1, 0)
        start = [int(n) for n in meta.get("crop_start", (0, 0, 0))]
        copy_between_layouts(whole[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))], labels)
        return {**data, self.keys[0]: with_affine(whole[None], np.asarray(meta["original_affine"]), meta)}


def _interpolated_labels(
    logits: torch.Tensor, matrix: Affine, shape: Sequence[int], regions: Regions | None
) -> torch.Tensor:
    """Labels from the probabilities on another grid, computed a slab of its last axis at a time."""
    probabilities = logits.softmax(0) if regions is None else logits.sigmoid()
    if regions is None and len(logits) == 2:
        # One of two classes is enough: they sum to 1 before and after the interpolation.
        probabilities, regions = probabilities[1:], [[1]]
    images = [_to_itk(channel) for channel in probabilities]
    labels = torch.empty(tuple(shape)[::-1], dtype=torch.uint8)
    for start in range(0, shape[2], SLAB):
        planes = min(SLAB, shape[2] - start)
        shifted = matrix.copy()
        shifted[:3, 3] += matrix[:3, 2] * start
        resampler = _interpolator(shifted, (*shape[:2], planes), nearest=False, edge=True)
        slabs = [torch.from_numpy(sitk.GetArrayFromImage(resampler.Execute(image))) for image in images]
        labels[start : start + planes] = classes_from_probabilities(slabs, regions)
    return labels.permute(2, 1, 0)
