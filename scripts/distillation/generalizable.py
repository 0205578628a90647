# SPDX-License-Identifier: Apache-2.0
"""Domain-generalisable distillation (GKD): the distiller that compares the codes of student and teachers.

Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995, as far as its abstract, figures and released networks show;
[ours] the 3D form and the formulas, see docs/methods.md. The headers are trained in ``alignment_training``; the order
of all trainings is in ``staged_training``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.distillation.alignment_training import build_header, intensity_view
from scripts.distillation.distiller import LOGITS, Distiller
from scripts.networks.weights import load_weights

CODES, TO_STUDENT, TO_TEACHER = "codes", "to_student", "to_teacher"


class GeneralizableDistiller(Distiller):
    """A ``Distiller`` that also returns the codes of both networks' deepest features and the crossed predictions.

    It has three further taps, which terms name like any other. In train():

    - ``codes``: ``B x (views + 1) x M`` for each network; index 0 is the image itself, the others its intensity views;
    - ``to_student``: the teacher's code through the student's header and the student's decoder, compared with the
      teacher's logits; it trains the student's decoder only;
    - ``to_teacher``: the student's code through the teacher's header and the teacher's decoder, compared with the
      teacher's logits; it trains the student's encoder only.

    Teachers, headers and their codes never receive a gradient.

    Args:
        student, teachers, taps, adapters, window: see ``Distiller``; the networks need ``encode`` and ``decode``.
        headers_dir: folder with ``header_student/model.pt`` and ``header_<teacher>/model.pt``; None for random headers.
        views: number of intensity views of each image, at least 1. Below 3, each row of the complete graph has a single
            edge and carries no information.

    Raises:
        ValueError: a teacher has no ``encode`` and ``decode``; there are no views or no window.
        FileNotFoundError: a header's weights are missing.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        taps: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | None = None,
        window: Sequence[int] | None = None,
        headers_dir: str | None = None,
        views: int = 3,
    ) -> None:
        super().__init__(student, teachers, taps, adapters, window)
        if window is None or views < 1:
            raise ValueError("A GeneralizableDistiller needs the shape of the window and at least one view.")
        self.views = views
        networks = {"student": student, **teachers}
        self.headers = nn.ModuleDict({name: build_header(network, window) for name, network in networks.items()})
        for name, header in self.headers.items():
            if headers_dir:
                load_weights(header, Path(headers_dir) / f"header_{name}" / "model.pt")
        self.headers.requires_grad_(False).eval()

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names that a term's ``tap`` may have."""
        return (*super().tap_names, CODES, TO_STUDENT, TO_TEACHER)

    @property
    def logit_taps(self) -> tuple[str, ...]:
        """Those taps whose tensors are logits on the grid of the label."""
        return (*super().logit_taps, TO_STUDENT, TO_TEACHER)

    def teachers_of(self, tap: str) -> tuple[str, ...]:
        """Return the names of the teachers that a tap applies to."""
        return self.teacher_names if tap in (CODES, TO_STUDENT, TO_TEACHER) else super().teachers_of(tap)

    def train(self, mode: bool = True) -> GeneralizableDistiller:
        """Set the mode of the student and its adapters; teachers and headers stay in eval()."""
        super().train(mode)
        self.headers.eval()
        return self

    def forward(
        self,
        image: torch.Tensor,
        presence: torch.Tensor | None = None,
        cached: Mapping[str, torch.Tensor] | None = None,
        label: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """See ``Distiller.forward``; in train() the dict also holds the outputs of the further taps."""
        outputs = super().forward(image, presence, cached, label)
        if not isinstance(outputs, dict):
            return outputs
        views = torch.cat([image, *(intensity_view(image) for _ in range(self.views))])
        student_features, codes = self._codes("student", self.student, views)
        outputs[f"student.{CODES}"] = codes
        for name, teacher in self.teachers.items():
            with torch.no_grad():
                teacher_features, outputs[f"{name}.{CODES}"] = self._codes(name, teacher, views)
            outputs |= self._crossed_predictions(name, student_features, teacher_features, len(image))
            outputs[f"{name}.{TO_STUDENT}"] = outputs[f"{name}.{TO_TEACHER}"] = outputs[f"{name}.{LOGITS}"]
        return outputs

    def _codes(self, name: str, network: Any, views: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return a network's features of all views, and its codes as ``B x (views + 1) x M``."""
        features = list(network.encode(views))
        code = self.headers[name].encode(features[-1]).flatten(1)  # type: ignore[operator]
        return features, code.unflatten(0, (self.views + 1, -1)).transpose(0, 1)

    def _crossed_predictions(
        self, name: str, student_features: list[torch.Tensor], teacher_features: list[torch.Tensor], batch: int
    ) -> dict[str, torch.Tensor]:
        """Run each network's decoder on the other's code; the first ``batch`` features are those of the image."""
        student_features = [x[:batch] for x in student_features]
        teacher_features = [x[:batch] for x in teacher_features]
        student, teacher = self.headers["student"], self.headers[name]
        to_student = self._translate(teacher_features[-1], teacher, student, student_features[-1])
        to_teacher = self._translate(student_features[-1], student, teacher, teacher_features[-1])
        # The student's skips are detached, so that the teacher's code trains the student's decoder only.
        skips = [x.detach() for x in student_features[:-1]]
        teacher_skips = teacher_features[:-1]
        return {
            f"student.{TO_STUDENT}@{name}": self.student.decode([*skips, to_student]),  # type: ignore[operator]
            f"student.{TO_TEACHER}@{name}": self.teachers[name].decode([*teacher_skips, to_teacher]),  # type: ignore[operator]
        }

    @staticmethod
    def _translate(features: torch.Tensor, source: Any, target: Any, like: torch.Tensor) -> torch.Tensor:
        """Translate features of one network into features of another, through the code that both headers share."""
        translated: torch.Tensor = target.decode(source.encode(features), like.shape[2:])
        return translated
