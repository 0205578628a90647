# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms to the network's grid and back, on the functions of ``scripts.runtime.resampling``."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from scripts.data.case_io import to_tensor
from scripts.image_io.headers import Affine
from scripts.runtime import resampling
from scripts.runtime.decision import Regions
from scripts.runtime.grids import OwnGrid, network_grid
from scripts.runtime.resampling import restore_mask, vanished_classes, vanished_message

logger = logging.getLogger(__name__)


def resample(
    volume: torch.Tensor, matrix: Affine, shape: Sequence[int], outside: float | None = 0.0, nearest: bool = False
) -> torch.Tensor:
    """``scripts.runtime.resampling.resample`` of a tensor ``H W D`` on the CPU, with PyTorch's number of threads."""
    threads = torch.get_num_threads()
    return to_tensor(resampling.resample(volume.numpy(), matrix, shape, outside, nearest, threads))


def with_affine(volume: torch.Tensor, affine: Affine, meta: Mapping[str, Any]) -> MetaTensor:
    """A volume with a new affine and the metadata of another."""
    rest = {key: value for key, value in meta.items() if key != "affine"}  # MONAI warns about a second affine
    return MetaTensor(volume, affine=torch.as_tensor(np.asarray(affine, dtype=np.float64)), meta=rest)


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
                lost = vanished_classes(volume.as_tensor().numpy(), resampled.numpy())
                message = vanished_message(volume.meta.get("filename_or_obj", key), lost, self.spacing)
                if message:
                    logger.warning("Case %s: %s", item.get("case_id"), message)
            item[key] = with_affine(resampled[None], affine, volume.meta)
        own_grid = {"source_affine": source, "source_shape": np.array(reference.shape[1:])}
        item[self.reference].meta.update(own_grid)
        return item


class RestoreGridd(MapTransform):
    """Turn logits on the network's grid into labels on the reference image's own grid, ``1 H W D`` uint8.

    See ``scripts.runtime.resampling.restore_mask``.

    Args:
        key: the logits, ``C H W D``.
        image: key of the image whose metadata describe the grids, see ``OntoGridd`` and ``CropToBoxd``.
        regions: the classes of each channel of a sigmoid head, see ``scripts.runtime.decision``; None for a softmax.
    """

    def __init__(self, key: str, image: str, regions: Regions | None = None) -> None:
        super().__init__(key)
        self.image, self.regions = image, regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, logits = data[self.image], torch.as_tensor(data[self.keys[0]]).float().cpu()
        plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
        own = _own_grid(image.meta)
        affine = np.asarray(image.affine, dtype=np.float64)
        mask = restore_mask(plain.detach().numpy(), affine, own, self.regions, torch.get_num_threads())
        return {**data, self.keys[0]: with_affine(to_tensor(mask)[None], own.affine, image.meta)}


def _own_grid(meta: Mapping[str, Any]) -> OwnGrid:
    """The grid of the reference's file, from the entries of its metadata."""
    shape, part = (tuple(int(n) for n in meta[key]) for key in ("spatial_shape", "source_shape"))
    start = tuple(int(n) for n in meta.get("crop_start", (0, 0, 0)))
    affine, part_affine = (np.asarray(meta[key], dtype=np.float64) for key in ("original_affine", "source_affine"))
    return OwnGrid(affine, shape, start, part, part_affine)
