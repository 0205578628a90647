# SPDX-License-Identifier: Apache-2.0
"""Choose what answers in the place of each teacher of a cache: networks, files, or nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from scripts.distillation.imported_predictions import ImportedAnswers
from scripts.distillation.nnunet_teacher import NNUNetAnswers
from scripts.distillation.own_grid import OwnGrid
from scripts.distillation.teacher_answers import ALL_AXES, Inferer, NetworkAnswers
from scripts.distillation.teacher_cache_writer import Answers
from scripts.distillation.teacher_origin import NNUNetFolder, PredictionFiles, origin_of
from scripts.networks.teacher_loading import load_teachers
from scripts.networks.teacher_spec import check_spec, spec_channels, spec_files


def load_answers(
    specs: Mapping[str, Mapping[str, Any]],
    preprocessing: Any,
    labels: Sequence[Sequence[float]],
    inferer: Inferer,
    device: str | torch.device = "cpu",
    taps: Mapping[str, Mapping[str, Any]] | None = None,
    attention_power: float = 2.0,
    tta: str = "none",
    out_of_fold: bool = False,
    smooth: float = 0.0,
    own: Mapping[str, OwnGrid] | None = None,
    regions: Sequence[Sequence[int]] | None = None,
    flips: Sequence[int] = ALL_AXES,
    *,
    all_modalities: Sequence[str],
    **common: Any,
) -> dict[str, Answers]:
    """Build what answers in the place of each teacher of a cache.

    Args:
        specs: name of a teacher -> its specification, see ``scripts.networks.teacher_loading.load_teachers``.
        preprocessing: the training pipeline.
        labels: per class the values of a label file.
        inferer, taps, attention_power, tta, flips: see ``NetworkAnswers``.
        device: device of the networks.
        out_of_fold: each of a teacher's weights files answers only the cases that did not train it.
        smooth: see ``ImportedAnswers``.
        own: name of a teacher -> its own input, where it has one.
        regions: the classes of each channel of a task with a sigmoid head.
        all_modalities: the modalities of the image, in the order of its channels.
        common: further arguments of ``scripts.networks.teacher_loading.load_teachers``.
    """
    answers: dict[str, Answers] = {}
    channels = len(regions or labels)
    for name, spec in specs.items():
        check_spec(name, spec)
        by_fold = out_of_fold and not spec.get("label")
        origin = origin_of(name, spec, by_fold)
        if not spec.get("label"):
            spec_channels(name, spec, all_modalities)
        if isinstance(origin, PredictionFiles):
            answers[name] = ImportedAnswers(origin, preprocessing.files, labels, smooth, regions, spec.get("head"))
            continue
        if isinstance(origin, NNUNetFolder):
            answers[name] = NNUNetAnswers(origin, preprocessing.files, labels, device, regions)
            continue
        # Out of fold, every weights file is a network of its own; else several are one network, an ensemble.
        parts = [{**spec, "weights": file} for file in spec_files(spec)] if by_fold else [spec]
        load = partial(
            load_teachers,
            out_channels=channels,
            all_modalities=all_modalities,
            regions=regions,
            classes=len(labels),
            cached=True,
            **common,
        )
        answers[name] = NetworkAnswers(
            name,
            [load(specs={name: part})[name].to(device) for part in parts],
            inferer,
            channels,
            taps,
            attention_power,
            tta,
            origin,
            (own or {}).get(name),
            sigmoid=regions is not None,
            flips=flips,
        )
    return answers
