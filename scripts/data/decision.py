# SPDX-License-Identifier: Apache-2.0
"""The MONAI transform that decides the class of every voxel."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from scripts.runtime.decision import Regions, classes_from_logits


def decide_classes(logits: torch.Tensor, regions: Regions | None = None) -> torch.Tensor:
    """``classes_from_logits`` of a tensor on any device; the classes are on the CPU."""
    plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
    return torch.from_numpy(classes_from_logits(plain.float().cpu().numpy(), regions))


class DecideClassesd(MapTransform):
    """Turn logits ``C H W D`` into class indices ``1 H W D``, uint8, on their device; see ``classes_from_logits``.

    Args:
        keys: of the logits.
        regions: see ``classes_from_logits``.
    """

    def __init__(self, keys: str | Sequence[str], regions: Regions | None = None) -> None:
        super().__init__(keys)
        self.regions = regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = decide_classes(item[key], self.regions)[None].to(item[key].device)
        return item
