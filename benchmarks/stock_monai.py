# SPDX-License-Identifier: Apache-2.0
"""Inference with MONAI's own transforms, as users write it without this bundle: a baseline for the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai import transforms as mt
from torch import nn

from scripts.data.modalities import GatherModalitiesd, StackModalitiesd
from scripts.networks.teacher_loading import load_teachers


def _normalisation(key: str, rule: Sequence[float] | str) -> mt.Transform:
    """The normalisation of a modality; ``rule`` as in ``intensity`` of the data sets' configs."""
    if isinstance(rule, str):
        return mt.NormalizeIntensityd(key, nonzero=True)
    low, high = rule
    return mt.ScaleIntensityRanged(key, low, high, 0.0, 1.0, clip=True)


def monai_preprocessing(
    modalities: Sequence[str],
    intensity: Mapping[str, Sequence[float] | str],
    spacing: Sequence[float],
    naming: Sequence[Mapping[str, str]] = (),
    reference: str | None = None,
) -> mt.Compose:
    """Files to network input. Every modality must be present. Arguments as in ``scripts.data.preprocessing``."""
    keys, reference = list(modalities), reference or modalities[0]
    others = [key for key in keys if key != reference]
    return mt.Compose(
        [
            GatherModalitiesd(keys, naming, False, reference),
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.Orientationd(reference, axcodes="RAS", labels=None),
            mt.Spacingd(reference, pixdim=spacing, mode="bilinear"),
            *(_normalisation(key, intensity[key]) for key in keys),
            *([mt.ResampleToMatchd(others, reference, mode="bilinear", padding_mode="zeros")] if others else []),
            StackModalitiesd(keys, False, reference),
            mt.ConcatItemsd(keys, "image"),
            mt.SelectItemsd(["image", "case_id", reference]),
        ]
    )


def monai_postprocessing(preprocessing: mt.Compose, reference: str, output_dir: str) -> mt.Compose:
    """Logits to labels on the grid of the reference image, written as ``<case_id>.nii.gz``."""
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
    """Several networks on the same input, run one after the other.

    Args:
        specs: name -> arguments of ``scripts.networks.teacher.Teacher`` for this network.
        common: arguments of ``Teacher`` for all networks.
    """

    def __init__(self, specs: Mapping[str, Mapping[str, Any]], **common: Any) -> None:
        super().__init__()
        self.members = nn.ModuleDict(load_teachers(specs, **common))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image (B C H W D) to log-probabilities, whose softmax is the mean of the members' probabilities."""
        total = sum(member(image).softmax(dim=1) for member in self.members.values())
        return (total / len(self.members)).clamp_min(1e-12).log()  # type: ignore[operator, no-any-return, union-attr]
