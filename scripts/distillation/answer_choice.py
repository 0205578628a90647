# SPDX-License-Identifier: Apache-2.0
"""Choose what answers in the place of each teacher of a cache: networks, files, or nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from scripts.distillation.imported_predictions import ImportedAnswers
from scripts.distillation.nnunet_teacher import NNUNetAnswers
from scripts.distillation.own_grid import OwnGrid
from scripts.distillation.teacher_answers import Inferer, NetworkAnswers
from scripts.distillation.teacher_cache_writer import Answers
from scripts.distillation.teacher_origin import NNUNetFolder, PredictionFiles, origin_of
from scripts.networks.teacher import load_teachers
from scripts.networks.teacher_spec import check_spec, spec_files


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
    **common: Any,
) -> dict[str, Answers]:
    """Build what answers in the place of each teacher of a cache.

    Args:
        specs: name of a teacher -> its specification, see ``scripts.networks.teacher.load_teachers``.
        preprocessing: the training pipeline.
        labels: per class the values of a label file.
        inferer, taps, attention_power, tta: see ``NetworkAnswers``.
        device: device of the networks.
        out_of_fold: each of a teacher's weights files answers only the cases that did not train it.
        smooth: see ``ImportedAnswers``.
        own: name of a teacher -> its own input, where it has one.
        common: further arguments of ``scripts.networks.teacher.load_teachers``.
    """
    answers: dict[str, Answers] = {}
    for name, spec in specs.items():
        check_spec(name, spec)
        origin = origin_of(name, spec, out_of_fold and not spec.get("label"))
        if isinstance(origin, PredictionFiles):
            answers[name] = ImportedAnswers(origin, preprocessing.files, labels, smooth)
            continue
        if isinstance(origin, NNUNetFolder):
            answers[name] = NNUNetAnswers(origin, preprocessing.files, len(labels), device)
            continue
        # Out of fold, every weights file is a network of its own; else several are one network, an ensemble.
        parts = [{**spec, "weights": file} for file in spec_files(spec)] if out_of_fold else [spec]
        teachers = [load_teachers({name: part}, len(labels), cached=True, **common)[name].to(device) for part in parts]
        answers[name] = NetworkAnswers(
            name, teachers, inferer, len(labels), taps, attention_power, tta, origin, (own or {}).get(name)
        )
    return answers
