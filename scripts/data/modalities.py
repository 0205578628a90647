# SPDX-License-Identifier: Apache-2.0
"""The transforms that MONAI does not have: complete, crop, map, scale and stack the modalities of one case."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from scripts.data.resampling import copy_across, on_grid


def _siblings(reference: Path, layout: Mapping[str, str], key: str) -> dict[str, str]:
    """Files beside ``reference`` that a layout names, if the layout fits the reference's own name."""
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
    """Those of ``modalities`` that ``present`` names, in their own order; all of them where it is None.

    Raises:
        ValueError: it names none, or one that there is not.
    """
    if present is not None and (not present or not set(present) <= set(modalities)):
        raise ValueError(f"present is {list(present)}: name one or more of {', '.join(modalities)}.")
    return [key for key in modalities if present is None or key in present]


class GatherModalitiesd(Transform):
    """Complete a data list's item: explicit keys first, then the data set's naming rule.

    Args:
        modalities: keys to find.
        naming: layouts, each a file name per modality relative to the reference's folder, tried in turn;
            ``{case}`` stands for what varies, as in ``{"ct": "{case}_ct.nii.gz", "pet": "{case}_pt.nii.gz"}``.
        allow_missing: accept absent modalities (they become zeros) instead of refusing the case.
        reference: the modality that ``image`` names where its own key is absent; by default the first.
        present: modalities to use, by default all. The others are left out where they exist and not asked for where
            they do not; only the reference's file stays, since it gives the grid.
        stacked: ``image`` is one 4D file of all modalities.

    Raises:
        ValueError: an unknown reference or ``present``; (when called) the item names neither ``image`` nor the
            reference modality, or a modality is absent.
        FileNotFoundError: a file that the item names does not exist.
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
            raise ValueError(f"The reference {reference!r} is no modality: choose one of {', '.join(modalities)}.")
        self.naming = [layout for layout in naming if self.reference in layout]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        reference = self.reference
        if self.stacked and "image" in data:
            data = {**data, **dict.fromkeys(self.modalities, data["image"])}
        # An image that the item also names as another modality is not the reference.
        others = [str(data[k]) for k in self.modalities if k != reference and k in data]
        if reference not in data and ("image" not in data or str(data["image"]) in others):
            found = sorted(map(str, data))
            who = f"Case {data['case_id']}" if "case_id" in data else "A case"
            raise ValueError(f"{who} needs 'image' or '{reference}', the reference modality; got {found}.")
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
        lost = [str(path) for path in files if not path.exists()]
        if lost:
            raise FileNotFoundError(f"Case {item.get('case_id')}: no such file: {', '.join(lost)}.")
        absent = [k for k in self.used if k not in item]
        if absent and not self.allow_missing:
            raise ValueError(
                f"Case {item.get('case_id')}: no {', '.join(absent)} was given or found beside {item['image']}."
            )
        return item


class CropToBoxd(MapTransform):
    """Crop the reference to the item's ``bbox_mm`` (x1, y1, z1, x2, y2, z2 in mm, LPS), where it has one.

    Its metadata then note ``crop_start``, the first voxel that is kept.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        if "bbox_mm" not in item:
            return item
        image = item[self.keys[0]]
        lps = np.asarray(item["bbox_mm"], dtype=float).reshape(2, 3)
        corners = np.stack(np.meshgrid(*(lps * [-1, -1, 1]).T, indexing="ij"), -1).reshape(-1, 3)
        affine = np.array(image.affine, dtype=float)
        voxels = (corners - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
        low = np.clip(np.floor(voxels.min(0)), 0, image.shape[1:]).astype(int)
        high = np.clip(np.ceil(voxels.max(0)) + 1, 0, image.shape[1:]).astype(int)
        if (high <= low).any():
            raise ValueError(f"Case {item.get('case_id')}: its bounding box lies outside of {item['image']}.")
        kept = image.as_tensor()[:, *(slice(a, b) for a, b in zip(low, high, strict=True))]
        affine[:3, 3] += affine[:3, :3] @ low
        item[self.keys[0]] = on_grid(kept, affine, {**image.meta, "crop_start": low})
        return item


class MapLabelsd(MapTransform):
    """Label file values to class indices.

    Args:
        key: the label's key.
        classes: per class the values that mean it: ``[[0], [1, 2, 3]]`` maps 1, 2 and 3 to class 1.

    Raises:
        ValueError: (when called) the label is missing or holds any other value, NaN included; the file is named.
    """

    def __init__(self, key: str, classes: Sequence[Sequence[float]]) -> None:
        super().__init__(key)
        self.classes = [list(values) for values in classes]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        key = self.keys[0]
        if key not in item:
            raise ValueError(f"Case {item.get('case_id')}: it has no label, which training and validation need.")
        values, plain = item[key], _plain(item[key])  # each step on the plain one: MONAI's would copy its metadata
        mapped, known = torch.zeros_like(values), torch.zeros_like(plain, dtype=torch.bool)
        for index, members in enumerate(self.classes):
            for value in members:
                hit = plain == value
                known |= hit
                if index:
                    _plain(mapped)[hit] = index
        if not known.all():
            strange = list(dict.fromkeys(f"{v:.7g}" for v in plain[~known].unique().tolist()))  # one NaN for all
            raise ValueError(
                f"{values.meta.get('filename_or_obj', 'The label')} holds the values {', '.join(strange[:5])}, which "
                f"the data set's mapping {self.classes} does not know: correct the file or the config's `labels`."
            )
        item[key] = mapped
        return item


class ScaleToUnitd(MapTransform):
    """Range [low, high] -> [0, 1], clipped: MONAI's ``ScaleIntensityRanged`` in place, for a volume of one's own.

    Args:
        key: modality.
        low, high: of the range, in the modality's units.
    """

    def __init__(self, key: str, low: float, high: float) -> None:
        super().__init__(key, allow_missing_keys=True)
        self.low, self.high = low, high

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            # On the plain tensor: MONAI's would copy its metadata at every step.
            _plain(data[key]).sub_(self.low).div_(self.high - self.low).clamp_(0, 1)
        return dict(data)


class StackModalitiesd(Transform):
    """Zeros for absent modalities and ``presence`` (M, bool); with ``stack`` also ``image`` (M H W D).

    The stacked image takes over the reference's metadata, which know the way back to its own grid. The reference's
    channel is zeros too where ``present`` does not name it. See ``GatherModalitiesd`` for both.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        stack: bool,
        reference: str | None = None,
        present: Sequence[str] | None = None,
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
            # An absent modality stays zero whatever augmentation (noise, gain) was drawn for it.
            stacked = torch.zeros(len(self.modalities), *reference.shape[1:], dtype=reference.dtype)
            for channel, key, present in zip(stacked, self.modalities, item["presence"], strict=True):
                volume = _plain(item.pop(key))
                if present:
                    copy_across(channel, volume[0])
            known = isinstance(reference, MetaTensor)
            item["image"] = MetaTensor(stacked, meta=dict(reference.meta)) if known else stacked
        return item


def _plain(volume: torch.Tensor) -> torch.Tensor:
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume
