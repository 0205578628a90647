# SPDX-License-Identifier: Apache-2.0
"""Choose the weights of a distillation's terms from the size of their gradients, to compare methods fairly."""

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

NEGLIGIBLE = 1e-3  # of the segmentation loss's gradient


def gradient_norms(
    distiller: Distiller,
    loss: DistillationLoss,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]],
) -> dict[str, float]:
    """Measure the mean norm of each term's gradient, before its weight, on the student's weights.

    Args:
        distiller: in the state at which to measure; nothing is trained.
        loss: the distillation's loss.
        batches: image, label and further arguments of the distiller.

    Returns:
        Term name (and ``segmentation``) -> norm.
    """
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    norms: dict[str, list[float]] = {}
    for image, label, arguments in batches:
        values = loss.terms(distiller.train()(image, **arguments), label)
        for name, value in values.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            squares = [g.double().square().sum() for g in gradients if g is not None]
            norms.setdefault(name, []).append(float(torch.stack(squares).sum().sqrt()))
    return {name: sum(each) / len(each) for name, each in norms.items()}


def shared_weights(norms: Mapping[str, float], share: float) -> dict[str, float]:
    """``weight_t = share / number of terms * norm of L_seg's gradient / norm of the term's``, to three digits.

    A term whose gradient is below ``NEGLIGIBLE`` times that of L_seg (a ranking whose teacher is flat, graphs that
    already agree) gets weight 0, and the other terms get its part. A weight large enough to make up for it would
    amplify rounding errors.

    Raises:
        ValueError: all gradients are negligible.
    """
    terms = {name: norm for name, norm in norms.items() if name != SEGMENTATION}
    negligible = sorted(name for name, norm in terms.items() if norm < NEGLIGIBLE * norms[SEGMENTATION])
    if len(negligible) == len(terms):
        raise ValueError(
            f"The terms {', '.join(negligible)} give the student no gradient on these batches: no weight can be chosen."
        )
    if negligible:
        logger.warning("terms with a negligible gradient get weight 0: %s", ", ".join(negligible))
    part = share / (len(terms) - len(negligible)) * norms[SEGMENTATION]
    return {name: 0.0 if name in negligible else float(f"{part / norm:.3g}") for name, norm in terms.items()}


def balanced_weights(
    configs: Sequence[str], overrides: Mapping[str, Any], share: float, weights: str, batches: int = 8
) -> dict[str, float]:
    """Choose weights so that all terms together give the student ``share`` times the gradient of L_seg, in equal parts.

    Args:
        configs: config files of a distillation.
        overrides: config id -> value.
        share: see above.
        weights: weights of a student that has been trained for a short time; the gradients of an untrained student are
            not representative.
        batches: number of training batches to measure on; validation cases are not used.

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
    prepare_batch, device = parser.get_parsed_content("train#prepare_batch"), parser.get_parsed_content("device")
    loader = parser.get_parsed_content("train#dataloader")
    prepared = (prepare_batch(batch, device) for batch in islice(loader, batches))
    norms = gradient_norms(distiller, loss, ((image, label, arguments) for image, label, _, arguments in prepared))
    logger.info("gradient norms: %s", ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items()))
    return shared_weights(norms, share)
