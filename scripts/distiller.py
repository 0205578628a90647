# SPDX-License-Identifier: Apache-2.0
"""Tap, Distiller and DistillationLoss: the whole of the distillation machinery. It knows no method."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from scripts.fusion import available_teachers, teacher_weights

LOGITS = "logits"


class Tap:
    """One layer of one network, whose output is wanted.

    Args:
        owner: how to call the network in messages.
        network: the network.
        layer: dotted path of the layer, as ``named_modules`` gives it.

    Raises:
        ValueError: the network has no such layer; the valid names are listed.
    """

    def __init__(self, owner: str, network: nn.Module, layer: str) -> None:
        # Lists and dicts of modules are never called, so that a hook on them would hear nothing.
        silent = (nn.ModuleList, nn.ModuleDict)
        valid = [name for name, module in network.named_modules() if name and not isinstance(module, silent)]
        if layer not in valid:
            kind = type(network).__name__
            raise ValueError(f"{owner} ({kind}) has no layer {layer!r} to tap; it has: {', '.join(valid)}.")
        self.module = network.get_submodule(layer)


@contextmanager
def _listening(taps: Mapping[str, Tap]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the taps' outputs while the body runs; a layer that returns a tuple gives its first item."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [tap.module.register_forward_hook(keep(name)) for name, tap in taps.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Distiller(nn.Module):
    """A student and its frozen teachers behind one ``forward``.

    In ``train()`` it returns a flat dict: ``logits``, ``student.<tap>`` (``student.<tap>@<teacher>`` behind that
    teacher's adapter), ``<teacher>.logits``, ``<teacher>.<tap>`` and ``available`` (B x K). In ``eval()`` it returns
    the student's logits, so that sliding window, evaluators and export need nothing special. Features leave through
    ``forward``, never through globals, so that DDP sees them.

    Args:
        student: network to train.
        teachers: name -> ``scripts.teachers.Teacher``; they stay in eval() and without gradient whatever happens.
        taps: tap name -> layer per network; a teacher is looked up by its name, then by its network's class name, the
            student under ``student``, then its class name. A layer path is written nowhere else.
        adapters: tap name -> teacher name -> module applied to the student's features for that teacher. Trainable
            alignment lives here, where DDP and the optimizer find it.

    Raises:
        ValueError: no teacher; a tap that names no layer of a network; an adapter for an unknown tap or teacher; a
            name that is taken.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        taps: Mapping[str, Mapping[str, str]] | None = None,
        adapters: Mapping[str, Mapping[str, nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("A Distiller needs at least one teacher.")
        self.student = student
        self.teachers = nn.ModuleDict(dict(teachers)).requires_grad_(False).eval()
        taps = taps or {}
        if LOGITS in taps or "student" in teachers:
            raise ValueError(f"A tap named {LOGITS!r} or a teacher named 'student' hides other outputs: rename it.")
        self._student_taps = {name: self._tap("student", student, name, layers) for name, layers in taps.items()}
        self._teacher_taps = {
            key: {name: self._tap(key, cast(nn.Module, teacher.network), name, layers) for name, layers in taps.items()}
            for key, teacher in teachers.items()
        }
        self.adapters = nn.ModuleDict({tap: nn.ModuleDict(dict(each)) for tap, each in (adapters or {}).items()})
        for tap, each in (adapters or {}).items():
            unknown = sorted(set(each) - set(teachers))
            if tap not in taps or unknown:
                raise ValueError(
                    f"The adapter of tap {tap!r} for {unknown or sorted(each)} fits nothing: "
                    f"taps are {sorted(taps)}, teachers {sorted(teachers)}."
                )

        # Configs place the student; whatever it learns from follows it there.
        parameter = next(student.parameters(), None)
        if parameter is not None:
            self.to(parameter.device)

    @staticmethod
    def _tap(owner: str, network: nn.Module, name: str, layers: Mapping[str, str]) -> Tap:
        kind = type(network).__name__
        layer = layers.get(owner, layers.get(kind))
        if layer is None:
            raise ValueError(f"Tap {name!r} names no layer for {owner} ({kind}); it knows {sorted(layers)}.")
        return Tap(owner, network, layer)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names that a term's ``tap`` may have."""
        return (LOGITS, *self._student_taps)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of the teachers, in the order of the weights' columns."""
        return tuple(self.teachers)

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of the student and its adapters; the teachers stay in eval()."""
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(
        self,
        image: torch.Tensor,
        presence: torch.Tensor | None = None,
        cached: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Run the student, and in train() the teachers.

        Args:
            image: ``B M H W [D]``, one channel per modality.
            presence: B x M, bool; None means that all are present.
            cached: teacher name -> its logits, for teachers that need not run again. They still run if a tap is asked.
        """
        if not self.training:
            return self.student(image)  # type: ignore[no-any-return]
        with _listening(self._student_taps) as features:
            outputs: dict[str, torch.Tensor] = {LOGITS: self.student(image)}
        for tap, feature in features.items():
            outputs[f"student.{tap}"] = feature
            adapters = cast(nn.ModuleDict, self.adapters[tap] if tap in self.adapters else nn.ModuleDict())
            for teacher, adapter in adapters.items():
                outputs[f"student.{tap}@{teacher}"] = adapter(feature)
        for name in self.teacher_names:
            outputs |= self._ask(name, image, (cached or {}).get(name))
        if presence is None:
            presence = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        channels = [cast(Sequence[int], teacher.channels) for teacher in self.teachers.values()]
        outputs["available"] = available_teachers(presence, channels)
        return outputs

    def _ask(self, name: str, image: torch.Tensor, cached: torch.Tensor | None) -> dict[str, torch.Tensor]:
        taps = self._teacher_taps[name]
        if cached is not None and not taps:
            return {f"{name}.{LOGITS}": cached.detach()}
        with torch.no_grad(), _listening(taps) as features:
            logits = self.teachers[name](image)
        return {f"{name}.{LOGITS}": logits, **{f"{name}.{tap}": feature for tap, feature in features.items()}}


class DistillationLoss(nn.Module):
    """``segmentation + warmup * sum over terms of weight * sum over teachers of w_k * loss(student, teacher_k)``.

    Source: [ours] in this form; see docs/methods.md for each term's own source.

    Args:
        segmentation: supervised loss of (logits, label).
        distiller: whose taps, teachers and adapters the terms refer to; only read here, and not kept.
        terms: name -> ``{"loss": module, "tap": "logits" or a tap's name, "weight": factor}``.
        weighting: teachers' weights, see ``scripts.fusion.teacher_weights``.
        static: the weights of ``weighting="static"``, in the order of the teachers.
        mixing: ``"loss"`` (sum of the teachers' losses) or ``"probability"`` (one loss against the weighted mean of
            the teachers' softened probabilities, for terms on logits only; the same gradient for static weights,
            another value, which is then logged).

    ``logged`` holds the last values, by name: ``segmentation``, each term (before its weight), ``weight/<teacher>``.

    Raises:
        ValueError: a term on an unknown tap; an adapter that no term uses; an unknown mixing.
    """

    def __init__(
        self,
        segmentation: nn.Module,
        distiller: Distiller,
        terms: Mapping[str, Mapping[str, Any]],
        weighting: str = "mean",
        static: Sequence[float] | None = None,
        mixing: str = "loss",
    ) -> None:
        super().__init__()
        if mixing not in ("loss", "probability"):
            raise ValueError(f"Unknown mixing {mixing!r}: choose loss or probability.")
        taps = {name: term["tap"] for name, term in terms.items()}
        for name, tap in taps.items():
            if tap not in distiller.tap_names:
                raise ValueError(f"Term {name!r} wants the tap {tap!r}; there are {', '.join(distiller.tap_names)}.")
        unused = sorted(set(distiller.adapters) - set(taps.values()))
        if unused:
            raise ValueError(f"No term uses the adapters of {unused}: remove them or add a term on that tap.")
        self.segmentation = segmentation
        self.losses = nn.ModuleDict({name: term["loss"] for name, term in terms.items()})
        self.taps, self.weights = taps, {name: float(term["weight"]) for name, term in terms.items()}
        self.wants_label = {n: len(inspect.signature(t["loss"].forward).parameters) > 2 for n, t in terms.items()}
        self.teacher_names = distiller.teacher_names
        self.weighting, self.static, self.mixing = weighting, static, mixing
        self.warmup = 1.0
        self.logged: dict[str, float] = {}

    def set_warmup(self, factor: float) -> None:
        """Set the common factor of all terms, 0 to 1 (``ParamSchedulerHandler`` calls it)."""
        self.warmup = float(factor)

    def forward(self, outputs: dict[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Total loss, a scalar.

        Args:
            outputs: what ``Distiller.forward`` returned in train().
            label: class indices, ``B 1 H W [D]``.
        """
        total = self.segmentation(outputs[LOGITS], label)
        self.logged = {"segmentation": float(total.detach())}
        answers = [outputs[f"{k}.{LOGITS}"] for k in self.teacher_names]
        shares = teacher_weights(self.weighting, answers, outputs["available"], label, self.static)
        for name in self.losses:
            value = self._term(name, outputs, shares, label)
            self.logged[name] = float(value.detach())
            total = total + self.warmup * self.weights[name] * value
        self.logged |= {f"weight/{k}": float(w) for k, w in zip(self.teacher_names, shares.mean(0), strict=True)}
        return total

    def _term(
        self, name: str, outputs: Mapping[str, torch.Tensor], shares: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        tap, extra = self.taps[name], [label] if self.wants_label[name] else []
        if tap == LOGITS:
            if self.mixing == "probability":
                mixed, known = self._mixture(name, outputs, shares)
                return self._per_sample(name, known, [outputs[LOGITS], mixed, *extra])
            pairs = {k: (outputs[LOGITS], outputs[f"{k}.{LOGITS}"]) for k in self.teacher_names}
        else:
            plain = outputs[f"student.{tap}"]
            pairs = {k: (outputs.get(f"student.{tap}@{k}", plain), outputs[f"{k}.{tap}"]) for k in self.teacher_names}
        values = [self._per_sample(name, shares[:, i], [*pairs[k], *extra]) for i, k in enumerate(self.teacher_names)]
        return torch.stack(values).sum()

    def _per_sample(self, name: str, share: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean over the batch of share * loss; one call where the samples share their weight."""
        loss = self.losses[name]
        if bool((share == share[0]).all()):
            # A teacher that is nowhere available is not asked: 0 * its loss would still carry a NaN on.
            return share[0] * loss(*tensors) if bool(share[0] > 0) else (tensors[0] * 0.0).sum()
        values = [w * loss(*(x[i : i + 1] for x in tensors)) for i, w in enumerate(share) if bool(w > 0)]
        return torch.stack(values).sum() / len(share)

    def _mixture(
        self, name: str, outputs: Mapping[str, torch.Tensor], shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits whose softened probabilities are the teachers' weighted mean, and where there is any teacher."""
        temperature = getattr(self.losses[name], "temperature", 1.0)
        stacked = torch.stack([outputs[f"{k}.{LOGITS}"].float() for k in self.teacher_names], dim=1) / temperature
        weights = shares.view(*shares.shape, *[1] * (stacked.dim() - 2))
        # An absent teacher must not even pass on a NaN: 0 * NaN is NaN.
        stacked = stacked.masked_fill(weights == 0, 0.0)
        if stacked.shape[2] == 1:
            p = (stacked.sigmoid() * weights).sum(1)
            return temperature * torch.logit(p, eps=1e-7), shares.sum(1)
        p = (stacked.softmax(2) * weights).sum(1)
        return temperature * p.clamp_min(1e-12).log(), shares.sum(1)
