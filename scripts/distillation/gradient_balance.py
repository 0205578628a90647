# SPDX-License-Identifier: Apache-2.0
"""Weights of a distillation's terms from the size of their gradients, so that methods are compared on equal terms."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from scripts.distillation.distiller import SEGMENTATION, Distiller
from scripts.distillation.loss import DistillationLoss
from scripts.networks.weights import load_weights

logger = logging.getLogger(__name__)

SILENT = 1e-3


def gradient_norms(
    distiller: Distiller,
    loss: DistillationLoss,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]],
) -> dict[str, float]:
    """Mean norm of the gradient that each term, before its weight, gives the student's weights.

    Args:
        distiller: in the state in which the terms are to be weighed; nothing is trained.
        loss: the distillation's loss.
        batches: image, label and further arguments of the distiller.

    Returns:
        Term name (and ``segmentation``) -> norm.
    """
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    found: dict[str, list[float]] = {}
    for image, label, further in batches:
        values = loss.terms(distiller.train()(image, **further), label)
        for name, value in values.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            squares = [g.double().square().sum() for g in gradients if g is not None]
            found.setdefault(name, []).append(float(torch.stack(squares).sum().sqrt()))
    return {name: sum(norms) / len(norms) for name, norms in found.items()}


def shared_weights(norms: Mapping[str, float], share: float) -> dict[str, float]:
    """``weight_t = share / number of terms * norm of L_seg's gradient / norm of the term's``, three digits.

    A term whose gradient is not ``SILENT`` of L_seg's (a ranking whose teacher is flat, graphs that agree already) gets
    weight 0, and the others its part: a weight large enough to make it heard would amplify rounding.

    Raises:
        ValueError: all terms are silent.
    """
    terms = {name: norm for name, norm in norms.items() if name != SEGMENTATION}
    silent = sorted(name for name, norm in terms.items() if norm < SILENT * norms[SEGMENTATION])
    if len(silent) == len(terms):
        raise ValueError(f"The terms {', '.join(silent)} give the student no gradient here: there is nothing to weigh.")
    if silent:
        logger.warning("with hardly any gradient, and therefore left out: %s", ", ".join(silent))
    part = share / (len(terms) - len(silent)) * norms[SEGMENTATION]
    return {name: 0.0 if name in silent else float(f"{part / norm:.3g}") for name, norm in terms.items()}


def balanced_weights(
    configs: Sequence[str], overrides: Mapping[str, Any], share: float, weights: str, batches: int = 8
) -> dict[str, float]:
    """Weights with which all terms together give the student ``share`` times the gradient of L_seg, each the same part.

    Args:
        configs: config files of a distillation.
        overrides: config id -> value.
        share: see above.
        weights: of a student that has been trained for a little while: an untrained one says nothing of the balance.
        batches: number of training batches that are looked at; no validation case is.

    Returns:
        Term name -> weight.
    """
    parser = ConfigParser()
    parser.read_config(list(configs))
    parser.update(dict(overrides))
    set_determinism(seed=parser["seed"])
    if parser["threads"]:
        torch.set_num_threads(parser["threads"])
    load_weights(parser.get_parsed_content("network"), weights)
    distiller, loss = parser.get_parsed_content("trained"), parser.get_parsed_content("loss")
    prepare, device = parser.get_parsed_content("train#prepare_batch"), parser.get_parsed_content("device")
    prepared = (prepare(batch, device) for batch in islice(parser.get_parsed_content("train#dataloader"), batches))
    norms = gradient_norms(distiller, loss, ((image, label, further) for image, label, _, further in prepared))
    logger.info("gradient norms: %s", ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items()))
    return shared_weights(norms, share)
