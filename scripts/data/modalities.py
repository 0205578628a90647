# SPDX-License-Identifier: Apache-2.0
"""Transforms that MONAI does not have: complete, crop, map, normalise and stack the modalities of one case."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from scripts.data.case_io import to_tensor
from scripts.data.resampling import with_affine
from scripts.runtime.grids import own_grid
from scripts.runtime.intensity import Rule, normalise
from scripts.runtime.label_values import class_indices
from scripts.runtime.modalities import GatherModalities, modalities_used
from scripts.runtime.resampling import copy_between_layouts

UNLABELLED = 255  # every voxel of the label of a case without one


class GatherModalitiesd(GatherModalities, Transform):
    """``GatherModalities`` as a MONAI transform."""


class CropToBoxd(MapTransform):
    """Crop the reference to the item's ``bbox_mm`` (x1, y1, z1, x2, y2, z2 in mm, LPS), if it has one.

    The metadata entry ``crop_start`` is the index of the first voxel that is kept.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        if "bbox_mm" not in item:
            return item
        image = item[self.keys[0]]
        own = own_grid(item, np.asarray(image.affine), image.shape[1:])
        crop = image.as_tensor()[:, *(slice(a, a + n) for a, n in zip(own.start, own.part, strict=True))]
        item[self.keys[0]] = with_affine(crop, own.part_affine, {**image.meta, "crop_start": own.start})
        return item


class MapLabelsd(MapTransform):
    """Map a label file's values to class indices.

    Args:
        key: the label's key.
        classes: per class its values: ``[[0], [1, 2, 3]]`` maps 1, 2 and 3 to class 1.
        optional: leave an item without a label as it is.
        ignore: the value of voxels that count in no loss and no score; they become ``IGNORED``.

    Raises:
        ValueError: (when called) the label is missing, or contains any other value, including NaN.
    """

    def __init__(
        self, key: str, classes: Sequence[Sequence[float]], optional: bool = False, ignore: float | None = None
    ) -> None:
        super().__init__(key, allow_missing_keys=optional)
        self.classes, self.ignore = classes, ignore

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        key = self.keys[0]
        if key not in item and self.allow_missing_keys:
            return item
        if key not in item:
            raise ValueError(f"Case {item.get('case_id')} has no label. Training and validation need one.")
        label = item[key]
        path = label.meta.get("filename_or_obj", "The label")
        mapped = to_tensor(class_indices(_plain(label).numpy(), self.classes, path, self.ignore))
        item[key] = with_affine(mapped, np.asarray(label.affine), label.meta)
        return item


class FillLabeld(Transform):
    """Give a case without a label one of ``UNLABELLED`` only, on the grid of another volume.

    Args:
        key: the label's key.
        like: key of the other volume.
    """

    def __init__(self, key: str, like: str) -> None:
        self.key, self.like = key, like

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {self.key: torch.full_like(data[self.like], UNLABELLED), **data}


class NormaliseModalityd(MapTransform):
    """``scripts.runtime.intensity.normalise`` of a modality, in place.

    Args:
        key: modality.
        rule: see ``normalise``.
    """

    def __init__(self, key: str, rule: Rule) -> None:
        super().__init__(key, allow_missing_keys=True)
        self.rule = rule

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            normalise(_plain(data[key]).numpy(), self.rule)
        return dict(data)


class StackModalitiesd(Transform):
    """Add zeros for absent modalities and ``presence`` (M, bool); with ``stack`` also ``image`` (M H W D).

    The stacked image gets the reference's metadata, from which its own grid can be restored. If ``present`` does not
    name the reference, its channel is zeros, too. See ``GatherModalitiesd`` for ``reference`` and ``present``.
    """

    def __init__(
        self, modalities: Sequence[str], stack: bool, reference: str | None = None, present: Sequence[str] | None = None
    ) -> None:
        self.modalities, self.stack = list(modalities), stack
        self.reference, self.used = reference or self.modalities[0], modalities_used(modalities, present)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        reference = item[self.reference]
        if "presence" not in item:
            item["presence"] = torch.tensor([key in item and key in self.used for key in self.modalities])
            for key in self.modalities:
                if key not in item:
                    item[key] = torch.zeros_like(reference)
            if isinstance(reference, MetaTensor) and "case_id" in item:
                reference.meta["case_id"] = item["case_id"]
        if self.stack:
            # An absent modality stays zero, although augmentation (noise, gain) has changed its volume.
            stacked = torch.zeros(len(self.modalities), *reference.shape[1:], dtype=reference.dtype)
            for channel, key, present in zip(stacked, self.modalities, item["presence"], strict=True):
                volume = _plain(item.pop(key))
                if present:
                    copy_between_layouts(channel.numpy(), volume[0].numpy())
            has_meta = isinstance(reference, MetaTensor)
            item["image"] = MetaTensor(stacked, meta=dict(reference.meta)) if has_meta else stacked
        return item


class SplitStackd(Transform):
    """Split a stack of volumes (C H W D) into one channel per name; the reverse of ``ConcatItemsd``.

    Args:
        key: the stack's key, which is removed.
        names: keys of the first channels, (1 H W D) each.
        rest: key of all channels after them; None if there are none.
    """

    def __init__(self, key: str, names: Sequence[str], rest: str | None = None) -> None:
        self.key, self.names, self.rest = key, list(names), rest

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        stack = item.pop(self.key)
        item |= {name: stack[i : i + 1] for i, name in enumerate(self.names)}
        if self.rest is not None:
            item[self.rest] = stack[len(self.names) :]
        return item


def _plain(volume: torch.Tensor) -> torch.Tensor:
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume
