# SPDX-License-Identifier: Apache-2.0
"""Masks of class indices as one binary channel per region, for MONAI's metrics in a validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.utils import CommonKeys
from torch import Tensor

from scripts.data.modalities import UNLABELLED
from scripts.losses.segmentation import region_targets
from scripts.runtime.regions import IGNORED


class RegionMasks:
    """The ``output_transform`` of a metric handler: prediction and label of each case by region.

    Args:
        regions: name -> class indices.
    """

    def __init__(self, regions: Mapping[str, Sequence[int]]) -> None:
        self.regions = [list(classes) for classes in regions.values()]

    def __call__(self, output: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """Split the masks of an engine's decollated output, which are class indices ``1 H W D``.

        Voxels whose label is ignored or unknown are in no region of either mask.

        Returns:
            Predictions and labels, one per case, ``R H W D`` with R regions, of the values 0 and 1.
        """
        predictions, labels = ([item[key] for item in output] for key in (CommonKeys.PRED, CommonKeys.LABEL))
        counted = [(label != IGNORED) & (label != UNLABELLED) for label in labels]
        predictions, labels = (
            [region_targets(mask[None], self.regions)[0] * where for mask, where in zip(masks, counted, strict=True)]
            for masks in (predictions, labels)
        )
        return predictions, labels
