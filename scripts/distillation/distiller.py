# SPDX-License-Identifier: Apache-2.0
"""The Distiller: a student and its teachers as one network. It contains no code of any particular method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from scripts.distillation.feature_taps import Layers, Tap, layers_for, record_outputs
from scripts.distillation.teacher_weighting import available_teachers
from scripts.networks.deep_supervision import first_output, output_heads

LOGITS, SEGMENTATION = "logits", "segmentation"


class Distiller(nn.Module):
    """A student and its frozen teachers with a common ``forward``.

    In ``train()``, ``forward`` returns a flat dict: ``logits``, ``logits.1`` and so on for a student with several heads
    (deep supervision), ``student.<tap>`` (``student.<tap>@<teacher>`` after that teacher's adapter),
    ``<teacher>.logits``, ``<teacher>.<tap>`` and ``available`` (B x K). In ``eval()`` it returns the student's logits,
    so that sliding window, evaluators and export need no special case. Features are
    returned by ``forward`` and never stored in globals, so that DDP sees them.

    Args:
        student: network to train.
        teachers: name -> ``scripts.networks.teacher.Teacher``; they stay in eval() and get no gradient.
        taps: tap name -> layer by network, ``student`` or the name of a teacher (``feature_taps.tap_layers``). ``None``
            as a layer excludes that teacher from the tap. A list of layers is for the student only; an adapter fuses
            them.
        adapters: tap name -> modules that are applied to the student's features before they are compared with a
            teacher's: either a callable ``(student channels, teacher channels) -> module``, called once per teacher,
            or the modules by teacher. Trainable alignment layers belong here, where DDP and the optimizer find them.
        window: ``[M, H, W, [D]]``, the shape of an image that all networks accept; required if an adapter is a
            callable.

    Raises:
        ValueError: there is no teacher; a tap names no layer of a network, or applies to no teacher; an adapter is for
            an unknown tap or teacher; a name is reserved; an adapter is a callable and there is no window.
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
        if LOGITS in taps or {"student", LOGITS} & set(teachers):
            raise ValueError(f"No tap can be named {LOGITS!r}, and no teacher 'student' or {LOGITS!r}: rename it.")
        self._student_taps: dict[str, Tap] = {}
        # A tap is None for a cached teacher, which has no network.
        self._teacher_taps: dict[str, dict[str, Tap | None]] = {name: {} for name in teachers}
        for tap, layers in taps.items():
            self._add_tap(tap, layers, has_adapter=tap in adapters)
        for tap, modules in adapters.items():
            unknown = [] if callable(modules) else sorted(set(modules) - set(teachers))
            if tap not in taps or unknown:
                raise ValueError(
                    f"No tap or teacher of this run fits the adapter of tap {tap!r}"
                    f"{' for ' + ', '.join(unknown) if unknown else ''}. Taps are {sorted(taps)}, teachers are "
                    f"{sorted(teachers)}."
                )
        # Configs move the student to its device; the teachers and adapters follow it.
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self.teachers.to(device)
        built = self._build_adapters(adapters, window, device)
        self.adapters = nn.ModuleDict({tap: nn.ModuleDict(modules) for tap, modules in built.items()}).to(device)

    def _add_tap(self, name: str, layers: Mapping[str, Layers], has_adapter: bool) -> None:
        """Find a tap's layers in the student and in every teacher that the tap applies to."""
        student_layers = layers_for("student", name, layers)
        if student_layers is None or not (isinstance(student_layers, str) or has_adapter):
            raise ValueError(
                f"Tap {name!r} uses {student_layers} of the student. Name one layer, or add an adapter that fuses "
                "several."
            )
        self._student_taps[name] = Tap("student", self.student, student_layers)
        for teacher_name, teacher in self.teachers.items():
            if getattr(teacher, "uses_label", False):
                continue  # the label has no layers
            cached = cast("tuple[str, ...] | None", getattr(teacher, "outputs", None))
            if cached is not None:
                self._add_cached_tap(teacher_name, name, cached, has_adapter)
                continue
            network = cast(nn.Module, teacher.network)
            teacher_layers = layers_for(teacher_name, name, layers)
            if teacher_layers is not None:
                self._teacher_taps[teacher_name][name] = Tap(teacher_name, network, teacher_layers)
        if not self.teachers_of(name):
            raise ValueError(
                f"No teacher in this run provides a layer for tap {name!r}. Add a teacher with a network, such as "
                "--teacher dynunet=FILE."
            )

    def _add_cached_tap(self, teacher: str, name: str, cached: Sequence[str], has_adapter: bool) -> None:
        """Add a tap of a cached teacher. The cache must contain it, as an attention map without channels."""
        if name not in cached or has_adapter:
            raise ValueError(
                f"Tap {name!r} needs features of the teacher {teacher!r}, but its cache contains only "
                f"{', '.join(cached)}: train without the cache. For Teach-Former, you can also add its attention maps "
                "to the cache (cache-teachers --maps)."
            )
        self._teacher_taps[teacher][name] = None

    def _build_adapters(
        self, adapters: Mapping[str, Any], window: Sequence[int] | None, device: torch.device
    ) -> dict[str, dict[str, nn.Module]]:
        """Return the adapters as modules. Callables get the numbers of channels, from one run of every network."""
        if not any(callable(modules) for modules in adapters.values()):
            return {tap: dict(modules) for tap, modules in adapters.items()}
        if window is None:
            raise ValueError("An adapter that is a callable needs `window`, the shape of an image for all networks.")
        image = torch.zeros(1, *window, device=device)
        training, built = self.student.training, {}
        with torch.no_grad(), record_outputs(self._student_taps.values()) as recorded:
            self.student.eval()(image)
        self.student.train(training)
        used = {name for tap, modules in adapters.items() if callable(modules) for name in self.teachers_of(tap)}
        teacher_outputs = {name: self._teacher_outputs(name, image, {}) for name in sorted(used)}
        for tap, modules in adapters.items():
            if not callable(modules):
                built[tap] = dict(modules)
                continue
            features = self._student_taps[tap].output(recorded)
            width = features.shape[1] if isinstance(features, torch.Tensor) else [x.shape[1] for x in features]
            built[tap] = {
                name: modules(width, teacher_outputs[name][f"{name}.{tap}"].shape[1]) for name in self.teachers_of(tap)
            }
        return built

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names that a term's ``tap`` may have."""
        return (LOGITS, *self._student_taps)

    @property
    def logit_taps(self) -> tuple[str, ...]:
        """Those taps whose tensors are logits on the grid of the label."""
        return (LOGITS,)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of the teachers, in the order of the columns of ``available``."""
        return tuple(self.teachers)

    def teachers_of(self, tap: str) -> tuple[str, ...]:
        """Return the names of the teachers that a tap applies to."""
        return tuple(name for name in self.teacher_names if tap == LOGITS or tap in self._teacher_taps[name])

    def cached_powers(self, tap: str) -> dict[str, float]:
        """Return the power of the attention maps that teachers have instead of a tap's features, by teacher."""
        maps = [name for name, taps in self._teacher_taps.items() if tap in taps and taps[tap] is None]
        return {name: float(cast(Any, self.teachers[name]).attention_power) for name in maps}

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of the student and the adapters; the teachers stay in eval()."""
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(
        self,
        image: torch.Tensor,
        presence: torch.Tensor | None = None,
        cached: Mapping[str, torch.Tensor] | None = None,
        label: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Run the student and, in train(), the teachers.

        Args:
            image: ``B M H W [D]``, one channel per modality.
            presence: B x M, bool; None means that all modalities are present.
            cached: ``<teacher>.logits`` and ``<teacher>.<tap>`` of teachers. A teacher runs only if one of its outputs
                is missing here.
            label: class indices ``B 1 H W [D]``; needed where the label is a teacher.
        """
        if not self.training:
            return first_output(self.student(image), image)
        if self._student_taps and getattr(self.student, "_compiled_call_impl", None) is not None:
            raise ValueError("Taps do not work on a compiled student: train without compile, or use terms on logits.")
        with record_outputs(self._student_taps.values()) as recorded:
            heads = output_heads(self.student(image), image)
        outputs = {f"{LOGITS}.{i}" if i else LOGITS: logits for i, logits in enumerate(heads)}
        for name, tap in self._student_taps.items():
            features = tap.output(recorded)
            if tap.single:
                outputs[f"student.{name}"] = features
            adapters = cast(nn.ModuleDict, self.adapters[name] if name in self.adapters else nn.ModuleDict())
            for teacher, adapter in adapters.items():
                outputs[f"student.{name}@{teacher}"] = adapter(features)
        for name in self.teacher_names:
            outputs |= self._teacher_outputs(name, image, cached or {}, label)
        if presence is None:
            presence = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        channels = [cast(Sequence[int], teacher.channels) for teacher in self.teachers.values()]
        outputs["available"] = available_teachers(presence, channels)
        return outputs

    def _teacher_outputs(
        self, name: str, image: torch.Tensor, cached: Mapping[str, torch.Tensor], label: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return a teacher's outputs by their flat names; run the teacher unless all of them are cached."""
        if getattr(self.teachers[name], "uses_label", False):
            if label is None:
                raise ValueError(f"The teacher {name} is the label: pass the label to the Distiller.")
            return {f"{name}.{LOGITS}": self.teachers[name](label)}
        keys = [f"{name}.{output}" for output in (LOGITS, *self._teacher_taps[name])]
        if all(key in cached for key in keys):
            return {key: cached[key].detach() for key in keys}
        taps = {key: tap for key, tap in self._teacher_taps[name].items() if tap is not None}
        with torch.no_grad(), record_outputs(taps.values()) as recorded:
            logits = self.teachers[name](image)
        return {f"{name}.{LOGITS}": logits, **{f"{name}.{key}": tap.output(recorded) for key, tap in taps.items()}}
