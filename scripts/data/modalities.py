# SPDX-License-Identifier: Apache-2.0
"""Transforms that MONAI does not have: complete, crop, map, scale and stack the modalities of one case."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from scripts.data.label_values import class_indices
from scripts.data.resampling import copy_between_layouts, with_affine
from scripts.image_io.headers import LPS_TO_RAS, Affine

UNLABELLED = 255  # every voxel of the label of a case without one


def _siblings(reference: Path, layout: Mapping[str, str], key: str) -> dict[str, str]:
    """Existing files of the other modalities by a naming layout; empty if the layout does not fit ``reference``."""
    head, _, tail = layout[key].partition("{case}")
    name = reference.name
    if "{case}" not in layout[key]:
        case = name if name == layout[key] else ""
    else:
        case = name[len(head) : len(name) - len(tail)] if name.startswith(head) and name.endswith(tail) else ""
    if not case:
        return {}
    paths = {k: reference.parent / pattern.replace("{case}", case) for k, pattern in layout.items() if k != key}
    return {k: str(path) for k, path in paths.items() if path.exists()}


def modalities_used(modalities: Sequence[str], present: Sequence[str] | None = None) -> list[str]:
    """The modalities that ``present`` names, in the order of ``modalities``; all of them if it is None.

    Raises:
        ValueError: ``present`` is empty, or names an unknown modality.
    """
    if present is not None and (not present or not set(present) <= set(modalities)):
        raise ValueError(f"present is {list(present)}. Name one or more of {', '.join(modalities)}.")
    return [key for key in modalities if present is None or key in present]


def stack_advice(case: Mapping[Any, Any], modalities: Sequence[str]) -> str:
    """The advice for a case of several modalities that names one image only; empty for others."""
    if len(modalities) > 1 and "image" in case and not any(key in case for key in modalities):
        return " If the image is a 4D file of all modalities, use --set stacked=true."
    return ""


class GatherModalitiesd(Transform):
    """Complete an item of a data list: explicit keys first, then the data set's naming rules.

    Args:
        modalities: keys to find.
        naming: layouts that are tried in order. Each gives a file name per modality, relative to the reference's
            folder; ``{case}`` is the variable part: ``{"ct": "{case}_ct.nii.gz", "pet": "{case}_pt.nii.gz"}``.
        allow_missing: accept absent modalities (they become zeros) instead of refusing the case.
        reference: the modality that ``image`` names if its own key is absent; by default the first.
        present: modalities to use, by default all. The others are left out and need not exist. Only the reference's
            file is always kept, because it defines the grid.
        stacked: ``image`` is one 4D file of all modalities.

    Raises:
        ValueError: an unknown reference or ``present``; (when called) the item names neither ``image`` nor the
            reference modality, or a modality is absent.
        FileNotFoundError: (when called) a file that the item names does not exist.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        naming: Sequence[Mapping[str, str]] = (),
        allow_missing: bool = False,
        reference: str | None = None,
        present: Sequence[str] | None = None,
        stacked: bool = False,
    ) -> None:
        self.modalities, self.allow_missing, self.stacked = list(modalities), allow_missing, stacked
        self.reference, self.used = reference or self.modalities[0], modalities_used(modalities, present)
        if self.reference not in self.modalities:
            raise ValueError(f"The reference {reference!r} is not a modality. Choose one of {', '.join(modalities)}.")
        self.naming = [layout for layout in naming if self.reference in layout]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        reference = self.reference
        if self.stacked and "image" in data:
            data = {**data, **dict.fromkeys(self.modalities, data["image"])}
        # If the item also names `image` as another modality, it is not the reference.
        others = [str(data[k]) for k in self.modalities if k != reference and k in data]
        if reference not in data and ("image" not in data or str(data["image"]) in others):
            case = f"Case {data['case_id']}" if "case_id" in data else "A case"
            raise ValueError(
                f"{case} needs 'image' or '{reference}', the reference modality. It has {sorted(map(str, data))}."
            )
        item = dict(data)
        item.setdefault(reference, data.get("image"))
        item["image"] = item[reference]
        if isinstance(item[reference], str | Path):
            for layout in self.naming:
                for key, path in _siblings(Path(item[reference]), layout, reference).items():
                    if key in self.modalities:
                        item.setdefault(key, path)
            item.setdefault("case_id", Path(item[reference]).name.split(".")[0])
        for key in set(self.modalities) - {reference, *self.used}:
            item.pop(key, None)
        files = [Path(item[k]) for k in self.modalities if isinstance(item.get(k), str | Path)]
        missing_paths = [str(path) for path in files if not path.exists()]
        if missing_paths:
            raise FileNotFoundError(f"Case {item.get('case_id')}: no such file: {', '.join(missing_paths)}.")
        absent = [k for k in self.used if k not in item]
        if absent and not self.allow_missing:
            raise ValueError(
                f"Case {item.get('case_id')}: no {', '.join(absent)} was given or found next to {item['image']}. "
                f"Add the file, or allow absent modalities.{stack_advice(data, self.modalities)}"
            )
        return item


def box_bounds(affine: Affine, shape: Sequence[int], box: Sequence[float]) -> tuple[Affine, Affine]:
    """The first voxels inside a box and the first ones behind it.

    Args:
        affine, shape: of the image.
        box: ``x1 y1 z1 x2 y2 z2`` in mm, LPS.
    """
    lps = np.asarray(box, dtype=float).reshape(2, 3)
    corners = np.stack(np.meshgrid(*(lps @ LPS_TO_RAS[:3, :3]).T, indexing="ij"), -1).reshape(-1, 3)
    voxels = (corners - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    low = np.clip(np.floor(voxels.min(0)), 0, shape).astype(int)
    return low, np.clip(np.ceil(voxels.max(0)) + 1, 0, shape).astype(int)


def cropped_grid(item: Mapping[Hashable, Any], affine: Affine, shape: Sequence[int]) -> tuple[Affine, Affine, Affine]:
    """The part of the reference's grid that an item's ``bbox_mm`` keeps; all of it without one.

    Returns:
        Its affine, the index of its first voxel, and that of the first voxel behind it.

    Raises:
        ValueError: the box lies outside the image.
    """
    low, high = np.zeros(3, dtype=int), np.array(shape[:3], dtype=int)
    if "bbox_mm" in item:
        low, high = box_bounds(affine, shape, item["bbox_mm"])
    if (high <= low).any():
        raise ValueError(
            f"Case {item.get('case_id')}: its bounding box lies outside {item['image']}. Correct bbox_mm (mm, LPS)."
        )
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ low
    return moved, low, high


class CropToBoxd(MapTransform):
    """Crop the reference to the item's ``bbox_mm`` (x1, y1, z1, x2, y2, z2 in mm, LPS), if it has one.

    The metadata entry ``crop_start`` is the index of the first voxel that is kept.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        if "bbox_mm" not in item:
            return item
        image = item[self.keys[0]]
        affine, low, high = cropped_grid(item, np.asarray(image.affine, dtype=float), image.shape[1:])
        crop = image.as_tensor()[:, *(slice(a, b) for a, b in zip(low, high, strict=True))]
        item[self.keys[0]] = with_affine(crop, affine, {**image.meta, "crop_start": low})
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
        mapped = torch.from_numpy(class_indices(_plain(label).numpy(), self.classes, path, self.ignore))
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


class ScaleToUnitd(MapTransform):
    """Scale [low, high] to [0, 1] and clip: MONAI's ``ScaleIntensityRanged``, but in place.

    Args:
        key: modality.
        low, high: of the range, in the modality's units.
    """

    def __init__(self, key: str, low: float, high: float) -> None:
        super().__init__(key, allow_missing_keys=True)
        self.low, self.high = low, high

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            # On the plain tensor: a MetaTensor would copy its metadata at every step.
            _plain(data[key]).sub_(self.low).div_(self.high - self.low).clamp_(0, 1)
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
                    copy_between_layouts(channel, volume[0])
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
