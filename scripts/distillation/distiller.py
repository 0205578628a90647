# SPDX-License-Identifier: Apache-2.0
"""Distiller and DistillationLoss: the whole of the distillation machinery. It knows no method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from scripts.distillation.feature_taps import Layers, Tap, layers_of, listening
from scripts.distillation.teacher_weighting import available_teachers, teacher_weights

LOGITS, SEGMENTATION = "logits", "segmentation"


class Distiller(nn.Module):
    """A student and its frozen teachers behind one ``forward``.

    In ``train()`` it returns a flat dict: ``logits``, ``student.<tap>`` (``student.<tap>@<teacher>`` behind that
    teacher's adapter), ``<teacher>.logits``, ``<teacher>.<tap>`` and ``available`` (B x K). In ``eval()`` it returns
    the student's logits, so that sliding window, evaluators and export need nothing special. Features leave through
    ``forward``, never through globals, so that DDP sees them.

    Args:
        student: network to train.
        teachers: name -> ``scripts.networks.teacher.Teacher``; they stay in eval() and without gradient.
        taps: tap name -> layer per network; a teacher is looked up by its name, then by its network's class name, the
            student under ``student``, then its class name. A layer path is written nowhere else. ``None`` as a layer:
            this tap is not for that teacher. A list of layers (of the student only): its adapter fuses them.
        adapters: tap name -> what is applied to the student's features before they meet a teacher's: a callable
            ``(student channels, teacher channels) -> module``, which is called once per teacher, or the modules
            themselves by teacher. Trainable alignment lives here, where DDP and the optimizer find it.
        window: ``[M, H, W, [D]]``, an image that all networks accept; needed where an adapter is a callable.

    Raises:
        ValueError: no teacher; a tap that names no layer of a network, or no teacher at all; an adapter for an
            unknown tap or teacher; a name that is taken; a callable without a window.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        taps: Mapping[str, Mapping[str, Layers]] | None = None,
        adapters: Mapping[str, Mapping[str, nn.Module] | Callable[..., nn.Module]] | None = None,
        window: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("A Distiller needs at least one teacher.")
        self.student = student
        self.teachers = nn.ModuleDict(dict(teachers)).requires_grad_(False).eval()
        taps, adapters = taps or {}, adapters or {}
        if LOGITS in taps or "student" in teachers:
            raise ValueError(f"A tap named {LOGITS!r} or a teacher named 'student' hides other outputs: rename it.")
        self._student_taps: dict[str, Tap] = {}
        self._teacher_taps: dict[str, dict[str, Tap | None]] = {key: {} for key in teachers}  # None: cached
        for name, layers in taps.items():
            self._connect(name, layers, with_adapter=name in adapters)
        for tap, each in adapters.items():
            unknown = [] if callable(each) else sorted(set(each) - set(teachers))
            if tap not in taps or unknown:
                raise ValueError(
                    f"The adapter of tap {tap!r} for {unknown or 'any teacher'} fits nothing: "
                    f"taps are {sorted(taps)}, teachers {sorted(teachers)}."
                )
        # Configs place the student; whatever it learns from follows it there.
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self.teachers.to(device)
        self.adapters = nn.ModuleDict({k: nn.ModuleDict(v) for k, v in self._fitted(adapters, window, device).items()})
        self.adapters.to(device)

    def _connect(self, name: str, layers: Mapping[str, Layers], with_adapter: bool) -> None:
        """Find a tap's layers in the student and in every teacher that it is for."""
        own = layers_of("student", self.student, name, layers)
        if own is None or not (isinstance(own, str) or with_adapter):
            raise ValueError(f"Tap {name!r} takes {own} of the student: name one layer, or add an adapter that fuses.")
        self._student_taps[name] = Tap("student", self.student, own)
        for key, teacher in self.teachers.items():
            cached = cast("tuple[str, ...] | None", getattr(teacher, "outputs", None))
            if cached is not None:
                self._connect_cached(key, name, cached, with_adapter)
                continue
            network = cast(nn.Module, teacher.network)
            found = layers_of(key, network, name, layers)
            if found is not None:
                self._teacher_taps[key][name] = Tap(key, network, found)
        if not self.teachers_of(name):
            kinds = sorted(kind for kind, layer in layers.items() if layer and kind not in ("student", "Student"))
            raise ValueError(f"Tap {name!r} is for no teacher of this run: add one of {', '.join(kinds)}.")

    def _connect_cached(self, key: str, name: str, cached: Sequence[str], with_adapter: bool) -> None:
        """A tap of a teacher that is not there to be asked: its cache must hold it, as a map without channels."""
        if name not in cached or with_adapter:
            raise ValueError(
                f"Tap {name!r} needs features of the teacher {key!r}, whose cache holds {', '.join(cached)}: train "
                "without the cache, or, for Teach-Former, cache its attention maps too (cache-teachers --maps)."
            )
        self._teacher_taps[key][name] = None

    def _fitted(
        self, adapters: Mapping[str, Any], window: Sequence[int] | None, device: torch.device
    ) -> dict[str, dict[str, nn.Module]]:
        """The adapters as modules; those given as a callable get the channels that one look at the networks shows."""
        if not any(callable(each) for each in adapters.values()):
            return {tap: dict(each) for tap, each in adapters.items()}
        if window is None:
            raise ValueError("An adapter that is built from the networks' channels needs the window's shape.")
        image = torch.zeros(1, *window, device=device)
        training, fitted = self.student.training, {}
        with torch.no_grad(), listening(self._student_taps.values()) as heard:
            self.student.eval()(image)
        self.student.train(training)
        seen = {key: self._ask(key, image, {}) for key in self.teacher_names}
        for tap, each in adapters.items():
            mine = self._student_taps[tap].value(heard)
            width = mine.shape[1] if isinstance(mine, torch.Tensor) else [x.shape[1] for x in mine]
            theirs = {key: seen[key][f"{key}.{tap}"].shape[1] for key in self.teachers_of(tap)}
            fitted[tap] = {k: each(width, w) for k, w in theirs.items()} if callable(each) else dict(each)
        return fitted

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names that a term's ``tap`` may have."""
        return (LOGITS, *self._student_taps)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of the teachers, in the order of the weights' columns."""
        return tuple(self.teachers)

    def teachers_of(self, tap: str) -> tuple[str, ...]:
        """Names of the teachers that a tap is for."""
        return tuple(key for key in self.teacher_names if tap == LOGITS or tap in self._teacher_taps[key])

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
            cached: ``<teacher>.logits`` and ``<teacher>.<tap>`` of teachers that need not run again; one of whose
                outputs any is absent runs.
        """
        if not self.training:
            return self.student(image)  # type: ignore[no-any-return]
        if self._student_taps and getattr(self.student, "_compiled_call_impl", None) is not None:
            raise ValueError("A compiled student cannot be tapped: train it without compile, or with terms on logits.")
        with listening(self._student_taps.values()) as heard:
            outputs: dict[str, torch.Tensor] = {LOGITS: self.student(image)}
        for name, tap in self._student_taps.items():
            feature = tap.value(heard)
            if tap.single:
                outputs[f"student.{name}"] = feature
            adapters = cast(nn.ModuleDict, self.adapters[name] if name in self.adapters else nn.ModuleDict())
            for teacher, adapter in adapters.items():
                outputs[f"student.{name}@{teacher}"] = adapter(feature)
        for name in self.teacher_names:
            outputs |= self._ask(name, image, cached or {})
        if presence is None:
            presence = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        channels = [cast(Sequence[int], teacher.channels) for teacher in self.teachers.values()]
        outputs["available"] = available_teachers(presence, channels)
        return outputs

    def _ask(self, name: str, image: torch.Tensor, cached: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A teacher's outputs by their flat names: the cached ones where all are there, else by running it."""
        wanted = [f"{name}.{output}" for output in (LOGITS, *self._teacher_taps[name])]
        if all(key in cached for key in wanted):
            return {key: cached[key].detach() for key in wanted}
        taps = {key: tap for key, tap in self._teacher_taps[name].items() if tap is not None}
        with torch.no_grad(), listening(taps.values()) as heard:
            logits = self.teachers[name](image)
        return {f"{name}.{LOGITS}": logits, **{f"{name}.{key}": tap.value(heard) for key, tap in taps.items()}}


class DistillationLoss(nn.Module):
    """``segmentation + warmup * sum over terms of weight * sum over teachers of w_k * loss(student, teacher_k)``.

    Source: [ours] in this form; see docs/methods.md for each term's own source.

    Args:
        segmentation: supervised loss of (logits, label).
        distiller: whose taps, teachers and adapters the terms refer to; only read here, and not kept.
        terms: name -> ``{"loss": module, "tap": "logits" or a tap's name, "weight": factor}``.
        weighting: teachers' weights, see ``scripts.distillation.teacher_weighting.teacher_weights``.
        static: the weights of ``weighting="static"``, in the order of the teachers.
        mixing: ``"loss"`` (sum of the teachers' losses) or ``"probability"`` (one loss against the weighted mean of
            the teachers' softened probabilities, for terms on logits only; the same gradient for static weights,
            another value, which is then logged).

    A term on a tap that is not for every teacher shares its weight among those that it is for. ``logged`` holds the
    last values, by name: ``segmentation``, each term (before its weight), ``weight/<teacher>``, and what a term logs
    itself, as ``<term>/<name>``.

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
        self.teachers_of = {tap: distiller.teachers_of(tap) for tap in taps.values()}
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
        values = self.terms(outputs, label)
        total = values.pop(SEGMENTATION)
        for name, value in values.items():
            total = total + self.warmup * self.weights[name] * value
        return total

    def terms(self, outputs: Mapping[str, torch.Tensor], label: torch.Tensor) -> dict[str, torch.Tensor]:
        """The segmentation loss and every term before its weight, by name."""
        values = {SEGMENTATION: self.segmentation(outputs[LOGITS], label)}
        answers = [outputs[f"{k}.{LOGITS}"] for k in self.teacher_names]
        shares = teacher_weights(self.weighting, answers, outputs["available"], label, self.static)
        values |= {name: self._term(name, outputs, shares, label) for name in self.losses}
        self.logged = {name: float(value.detach()) for name, value in values.items()}
        for name, loss in self.losses.items():
            self.logged |= {f"{name}/{key}": value for key, value in getattr(loss, "logged", {}).items()}
        self.logged |= {f"weight/{k}": float(w) for k, w in zip(self.teacher_names, shares.mean(0), strict=True)}
        return values

    def _term(
        self, name: str, outputs: Mapping[str, torch.Tensor], shares: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        tap, extra = self.taps[name], [label] if self.wants_label[name] else []
        if tap == LOGITS and self.mixing == "probability":
            mixed, known = self._mixture(name, outputs, shares)
            return self._per_sample(name, known, [outputs[LOGITS], mixed, *extra])
        keys = self.teachers_of[tap]
        shares = shares[:, [self.teacher_names.index(k) for k in keys]]
        if len(keys) < len(self.teacher_names):
            shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-12)
        values = []
        for share, key in zip(shares.unbind(dim=1), keys, strict=True):
            adapted = f"student.{tap}@{key}"
            mine = outputs[LOGITS if tap == LOGITS else adapted if adapted in outputs else f"student.{tap}"]
            values.append(self._per_sample(name, share, [mine, outputs[f"{key}.{tap}"], *extra]))
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
