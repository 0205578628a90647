# SPDX-License-Identifier: Apache-2.0
"""What a user of MONAI would write without this bundle, to compare with: MONAI's own transforms around a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai import transforms as mt
from torch import nn

from scripts.data.modalities import GatherModalitiesd, StackModalitiesd
from scripts.networks.teacher import load_teachers


def _scaled(key: str, rule: Sequence[float] | str) -> mt.Transform:
    """A modality's normalisation; see ``intensity`` in the data sets' configs."""
    if isinstance(rule, str):
        return mt.NormalizeIntensityd(key, nonzero=True)
    low, high = rule
    return mt.ScaleIntensityRanged(key, low, high, 0.0, 1.0, clip=True)


def stock_preprocessing(
    modalities: Sequence[str],
    intensity: Mapping[str, Sequence[float] | str],
    spacing: Sequence[float],
    naming: Sequence[Mapping[str, str]] = (),
    reference: str | None = None,
) -> mt.Compose:
    """Files -> the network's input, every modality present; the arguments are those of ``preprocessing``."""
    keys, first = list(modalities), reference or modalities[0]
    moving = [key for key in keys if key != first]
    return mt.Compose(
        [
            GatherModalitiesd(keys, naming, False, first),
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.Orientationd(first, axcodes="RAS", labels=None),
            mt.Spacingd(first, pixdim=spacing, mode="bilinear"),
            *(_scaled(key, intensity[key]) for key in keys),
            *([mt.ResampleToMatchd(moving, first, mode="bilinear", padding_mode="zeros")] if moving else []),
            StackModalitiesd(keys, False, first),
            mt.ConcatItemsd(keys, "image"),
            mt.SelectItemsd(["image", "case_id", first]),
        ]
    )


def stock_postprocessing(preprocessing: mt.Compose, reference: str, output_dir: str) -> mt.Compose:
    """Logits -> labels on the reference's own grid, written as ``<case_id>.nii.gz``."""
    saver: dict[str, Any] = {"output_ext": ".nii.gz", "output_postfix": "", "separate_folder": False}
    return mt.Compose(
        [
            mt.Activationsd("pred", softmax=True),
            mt.Invertd("pred", preprocessing, orig_keys=reference, nearest_interp=False, to_tensor=True),
            mt.AsDiscreted("pred", argmax=True),
            mt.SaveImaged(
                "pred", output_dir=output_dir, output_dtype="uint8", resample=False, print_log=False,
                output_name_formatter=lambda meta, _: {"subject": meta["case_id"], "idx": None}, **saver,
            ),
        ]
    )  # fmt: skip


class Ensemble(nn.Module):
    """Networks one after another on the same input; the logarithm of their mean probabilities.

    Args:
        specs: name -> what ``scripts.networks.teacher.Teacher`` takes for it alone.
        common: what it takes for all.
    """

    def __init__(self, specs: Mapping[str, Mapping[str, Any]], **common: Any) -> None:
        super().__init__()
        self.members = nn.ModuleDict(load_teachers(specs, **common))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image to log-probabilities, whose softmax are the mean probabilities."""
        total = sum(member(image).softmax(dim=1) for member in self.members.values())
        return (total / len(self.members)).clamp_min(1e-12).log()  # type: ignore[operator, no-any-return, union-attr]
