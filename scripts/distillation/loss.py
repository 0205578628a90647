# SPDX-License-Identifier: Apache-2.0
"""The loss of a distillation: the segmentation loss plus weighted terms between student and teachers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.losses import DeepSupervisionLoss
from torch import nn

from scripts.data.modalities import UNLABELLED
from scripts.distillation.distiller import LOGITS, SEGMENTATION, Distiller
from scripts.distillation.teacher_weighting import check_weighting, teacher_weights
from scripts.losses import NO_CLASS
from scripts.losses.soft_prediction import softening
from scripts.runtime.regions import IGNORED


class DistillationLoss(nn.Module):
    """``segmentation + warmup * sum over terms of weight * sum over teachers of w_k * loss(student, teacher_k)``.

    Source: [ours] in this form; docs/methods.md names each term's own source.

    A term on a tap that does not apply to every teacher shares its weight among the teachers that it applies to.
    Voxels whose label is ``IGNORED`` count in no term on logits: a loss with the attribute ``voxels_of`` gets the
    others only, see ``_counted``; for any other loss the student's logits are replaced there by the teacher's. For
    terms that take the label they have no class (``scripts.losses.NO_CLASS``). Each channel of a sigmoid
    head is a prediction of its own: a term on logits is the mean over the channels of its loss on one channel.

    ``logged`` holds the last values by name: ``segmentation``, each term (before its weight), ``weight/<teacher>``,
    and a term's own ``logged`` values as ``<term>/<name>``.

    Args:
        segmentation: supervised loss of (logits, label), applied to every head of the student by MONAI's
            ``DeepSupervisionLoss``.
        distiller: provides the taps, teachers and adapters that the terms refer to; it is not stored.
        terms: name -> ``{"loss": module, "tap": "logits" or a tap's name, "weight": factor}``. The module gets the
            tensors of the student and of one teacher, and the label if its ``forward`` has a third parameter. A module
            that remembers something of each teacher has a parameter ``source``, the teacher's name.
        weighting: how to weight the teachers, see ``scripts.distillation.teacher_weighting.teacher_weights``.
        static: the weights for ``weighting="static"``, in the order of the teachers.
        mixing: ``"loss"`` (sum of the teachers' losses) or ``"probability"`` (one loss against the weighted mean of
            the teachers' softened probabilities, for terms on logits). With static weights both have the same gradient,
            but the loss has another value, which is then logged. A loss on logits then needs the attribute
            ``of_probabilities``: it compares only the softmax over the channels (at its ``temperature``, if it has
            one), because the logits of a mixture are known up to one number per voxel.
        regions: the classes of each channel of a sigmoid head; None for a softmax over the classes.
        unlabelled: there are cases without a label (``scripts.data.modalities.UNLABELLED``). The segmentation loss, and
            terms that need the label, are computed on the samples that have one.

    Raises:
        ValueError: a term is named ``segmentation`` or on an unknown tap; no term uses an adapter; the mixing or the
            weighting is unknown, or no loss can use it; the static weights do not fit; a cached attention map has
            another power than its loss.
    """

    def __init__(
        self,
        segmentation: nn.Module,
        distiller: Distiller,
        terms: Mapping[str, Mapping[str, Any]],
        weighting: str = "mean",
        static: Sequence[float] | None = None,
        mixing: str = "loss",
        unlabelled: bool = False,
        regions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if mixing not in ("loss", "probability"):
            raise ValueError(f"Unknown mixing {mixing!r}: choose loss or probability.")
        check_weighting(weighting, len(distiller.teacher_names), static)
        if static is not None and weighting != "static":
            raise ValueError(
                f"The weighting {weighting} does not use static weights, got {static}: choose the weighting static, or "
                "remove them."
            )
        if unlabelled:
            _require_no_label(weighting, distiller)
        if SEGMENTATION in terms:
            raise ValueError(f"No term can be named {SEGMENTATION}, as the segmentation loss is: rename it.")
        taps = {name: term["tap"] for name, term in terms.items()}
        for name, tap in taps.items():
            if tap not in distiller.tap_names:
                raise ValueError(
                    f"Term {name!r} uses the unknown tap {tap!r}. Known taps are: {', '.join(distiller.tap_names)}."
                )
            _require_powers(name, terms[name]["loss"], distiller.cached_powers(tap))
        if mixing == "probability":
            _require_mixable({name: term["loss"] for name, term in terms.items() if term["tap"] == LOGITS})
        unused = sorted(set(distiller.adapters) - set(taps.values()))
        if unused:
            raise ValueError(f"No term uses the adapters of {unused}: remove them, or add a term on that tap.")
        self.segmentation = DeepSupervisionLoss(segmentation)  # type: ignore[arg-type]
        self.losses = nn.ModuleDict({name: term["loss"] for name, term in terms.items()})
        self.taps, self.weights = taps, {name: float(term["weight"]) for name, term in terms.items()}
        parameters = {name: [*inspect.signature(term["loss"].forward).parameters] for name, term in terms.items()}
        self.needs_label = {name: len(set(names) - {"source"}) > 2 for name, names in parameters.items()}
        self.needs_source = {name: "source" in names for name, names in parameters.items()}
        self.teacher_names = distiller.teacher_names
        self.teachers_of = {tap: distiller.teachers_of(tap) for tap in taps.values()}
        self.on_logits = {name: tap in distiller.logit_taps for name, tap in taps.items()}
        self.weighting, self.static, self.mixing, self.regions = weighting, static, mixing, regions
        self.warmup = 1.0
        self.logged: dict[str, float] = {}

    def set_warmup(self, factor: float) -> None:
        """Set the common factor of all terms, 0 to 1. ``ParamSchedulerHandler`` calls it."""
        self.warmup = float(factor)

    def forward(self, outputs: dict[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Return the total loss, a scalar.

        Args:
            outputs: what ``Distiller.forward`` returned in train().
            label: class indices, ``B 1 H W [D]``.
        """
        values = self.terms(outputs, label)
        total = values.pop(SEGMENTATION)
        for name, value in values.items():
            total = total + self.warmup * self.weights[name] * value
        return total

    def terms(self, outputs: Mapping[str, torch.Tensor], label: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the segmentation loss and every term before its weight, by name; arguments as for ``forward``.

        What no sample of the batch has a label for is 0, and is not logged.
        """
        shares = self._shares(outputs, label)
        has_label = label.flatten(1)[:, 0] != UNLABELLED
        labelled = (outputs, shares, label)
        if not has_label.all():
            labelled = ({key: value[has_label] for key, value in outputs.items()}, shares[has_label], label[has_label])
        values = {}
        if has_label.any():
            heads = [value for name, value in labelled[0].items() if name == LOGITS or name.startswith(f"{LOGITS}.")]
            values[SEGMENTATION] = self.segmentation(heads if len(heads) > 1 else heads[0], labelled[2])
        for name in self.losses:
            if not self.needs_label[name]:
                values[name] = self._term(name, outputs, shares, label)
            elif has_label.any():
                values[name] = self._term(name, *labelled)
        self.logged = {name: float(value.detach()) for name, value in values.items()}
        for name, loss in self.losses.items():
            self.logged |= {f"{name}/{key}": value for key, value in getattr(loss, "logged", {}).items()}
        self.logged |= {f"weight/{k}": float(w) for k, w in zip(self.teacher_names, shares.mean(0), strict=True)}
        # In DistributedDataParallel each parameter must take part in the loss of every step.
        graph = [value for value in outputs.values() if value.requires_grad] or [outputs[LOGITS]]
        nothing = sum((value * 0.0).sum() for value in graph)
        return {name: values.get(name, nothing) for name in (SEGMENTATION, *self.losses)}

    def _shares(self, outputs: Mapping[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Return the teachers' weights, B x K."""
        teacher_logits = [outputs[f"{name}.{LOGITS}"] for name in self.teacher_names]
        known, regions = _of_known_class(label), self.regions
        return teacher_weights(self.weighting, teacher_logits, outputs["available"], known, self.static, regions)

    def _term(
        self, name: str, outputs: Mapping[str, torch.Tensor], shares: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        """Return one term before its weight; ``shares`` are the teachers' weights, B x K."""
        tap = self.taps[name]
        if tap == LOGITS and self.mixing == "probability":
            mixed, total_share = self._mix_teachers(name, outputs, shares)
            return self._weighted_mean(self._loss(name, "mixture"), total_share, [outputs[LOGITS], mixed, label])
        teachers = self.teachers_of[tap]
        shares = shares[:, [self.teacher_names.index(k) for k in teachers]]
        if len(teachers) < len(self.teacher_names):
            shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-12)
        values = []
        for share, teacher in zip(shares.unbind(dim=1), teachers, strict=True):
            adapted = f"student.{tap}@{teacher}"
            student = outputs[LOGITS if tap == LOGITS else adapted if adapted in outputs else f"student.{tap}"]
            tensors = [student, outputs[f"{teacher}.{tap}"], label]
            values.append(self._weighted_mean(self._loss(name, teacher), share, tensors))
        return torch.stack(values).sum()

    def _loss(self, name: str, teacher: str) -> Callable[..., torch.Tensor]:
        """Return a term's loss as a function of the student's and the teacher's tensors and the label."""
        source = {"source": teacher} if self.needs_source[name] else {}
        loss = partial(self.losses[name], **source)
        on_logits, needs_label = self.on_logits[name], self.needs_label[name]

        def compare(student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            extra = [_of_known_class(label)] if needs_label else []
            if not on_logits:
                return loss(student, teacher, *extra)
            if self.regions is not None:
                parts = zip(student.split(1, dim=1), teacher.split(1, dim=1), strict=True)
            else:
                parts = zip([student], [teacher], strict=True)
            voxels_of = getattr(self.losses[name], "voxels_of", "")
            values = [loss(*pair) for one, other in parts for pair in _counted([one, other, *extra], label, voxels_of)]
            return torch.stack(values).mean() if values else (student * 0.0).sum()

        return compare

    def _weighted_mean(
        self, loss: Callable[..., torch.Tensor], share: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean over the batch of share * loss. One call is enough if all samples have the same share."""
        if bool((share == share[0]).all()):
            # The loss of an unavailable teacher is not computed, because 0 * NaN is NaN.
            return share[0] * loss(*tensors) if bool(share[0] > 0) else (tensors[0] * 0.0).sum()
        values = [w * loss(*(x[i : i + 1] for x in tensors)) for i, w in enumerate(share) if bool(w > 0)]
        return torch.stack(values).sum() / len(share)

    def _mix_teachers(
        self, name: str, outputs: Mapping[str, torch.Tensor], shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits whose softened probabilities are the weighted mean of the teachers', and the weight of each
        sample: 1, or 0 if it has no available teacher."""
        channels = 1 if self.regions is not None else outputs[LOGITS].shape[1]
        temperature = softening(getattr(self.losses[name], "temperature", 1.0), channels)
        stacked = torch.stack([outputs[f"{k}.{LOGITS}"].float() for k in self.teacher_names], dim=1) / temperature
        weights = shares.view(*shares.shape, *[1] * (stacked.dim() - 2))
        available = (shares.sum(1) > 0).to(shares.dtype)  # the sum itself may be 1 but for rounding
        # Logits of an unavailable teacher are replaced, because 0 * NaN is NaN.
        stacked = stacked.masked_fill(weights == 0, 0.0)
        if channels == 1:
            p = (stacked.sigmoid() * weights).sum(1)
            return temperature * torch.logit(p, eps=1e-7), available
        p = (stacked.softmax(2) * weights).sum(1)
        return temperature * p.clamp_min(1e-12).log(), available


def _counted(tensors: Sequence[torch.Tensor], label: torch.Tensor, voxels_of: str) -> list[tuple[torch.Tensor, ...]]:
    """The input of a loss without what the label ignores, as the parts whose losses are averaged.

    Args:
        tensors: the student's logits ``B C H W [D]``, the teacher's of the same shape and, if the loss needs it, the
            label.
        label: class indices, ``B 1 H W [D]``.
        voxels_of: ``batch`` or ``sample``, if the order of the voxels in a batch or sample does not matter to the loss.
            It then gets the counted voxels only, as ``1 C N 1``; a sample without any is left out. Empty: the loss
            needs the grid. It then gets the teacher's logits in the place of the student's at ignored voxels.
    """
    counted = (label != IGNORED)[:, 0]
    if bool(counted.all()):
        return [tuple(tensors)]
    if not voxels_of:
        student, teacher, *extra = tensors
        return [(torch.where(counted[:, None], student, teacher.detach()), teacher, *extra)]
    size = len(counted) if voxels_of == "batch" else 1
    groups = zip(counted.split(size), *(each.split(size) for each in tensors), strict=True)
    return [
        tuple(each.movedim(1, -1)[where].T[None, ..., None] for each in group)
        for where, *group in groups
        if bool(where.any())
    ]


def _of_known_class(label: torch.Tensor) -> torch.Tensor:
    """A label whose ignored voxels have no class."""
    return label.masked_fill(label == IGNORED, NO_CLASS)


def _require_mixable(losses: Mapping[str, nn.Module]) -> None:
    """Refuse losses on logits, by term, that cannot use a mixture of the teachers' probabilities, and no such term."""
    if not losses:
        raise ValueError("The mixing probability needs a term on the tap logits. Use the mixing loss, or add a term.")
    for term, loss in losses.items():
        if not getattr(loss, "of_probabilities", False):
            raise ValueError(
                f"Term {term!r} cannot use the mixing probability, because {type(loss).__name__} does not compare the "
                "probabilities of a voxel. Use the mixing loss, or remove the term."
            )


def _require_powers(term: str, loss: nn.Module, powers: Mapping[str, float]) -> None:
    """Refuse a loss that cannot use the cached attention maps of its teachers, given by their powers."""
    power = getattr(loss, "attention_power", None)
    for teacher, cached in powers.items():
        if power is None:
            raise ValueError(
                f"Term {term!r} needs features of the teacher {teacher!r}, but its cache contains only attention maps: "
                "train without the cache."
            )
        if power != cached:
            raise ValueError(
                f"Term {term!r} has the power p = {power:g}, but the cached attention maps of the teacher {teacher!r} "
                f"have {cached:g}. Set its p, or run cache-teachers --maps --set attention_power={power:g} --rebuild."
            )


def _require_no_label(weighting: str, distiller: Distiller) -> None:
    """Refuse what needs the label of every case."""
    if weighting == "confidence":
        raise ValueError("The weighting confidence needs the label of every case. Use mean or entropy, or label them.")
    for name, teacher in distiller.teachers.items():
        if getattr(teacher, "uses_label", False):
            raise ValueError(f"The teacher {name} is the label, and there are cases without one. Remove --unlabelled.")
