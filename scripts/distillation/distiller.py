# SPDX-License-Identifier: Apache-2.0
"""Distiller and DistillationLoss: the whole of the distillation machinery. It knows no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from scripts.distillation.feature_taps import Layers, Tap, layers_of, listening
from scripts.distillation.teacher_weighting import available_teachers

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
