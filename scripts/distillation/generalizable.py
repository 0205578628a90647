# SPDX-License-Identifier: Apache-2.0
"""Domain-generalisable distillation: training of the alignment headers, and the distiller that compares their codes.

Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995, as far as its abstract, figures and released networks tell;
[ours] the 3D form and the formulas, see docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.distillation.alignment_training import freeze, header_of, intensity_view
from scripts.distillation.distiller import LOGITS, Distiller
from scripts.networks.weights import load_weights

CODES, TO_STUDENT, TO_TEACHER = "codes", "to_student", "to_teacher"


class GeneralizableDistiller(Distiller):
    """A ``Distiller`` that also gives the codes of both networks' deepest features and the crossed predictions.

    Further taps (terms may name them like any other), in train():

    - ``codes``: ``B x (views + 1) x M`` per network, index 0 the image itself, then its intensity views;
    - ``to_student``: the teacher's code through the student's header and the student's decoder, against the teacher's
      logits; it trains the student's decoder only;
    - ``to_teacher``: the student's code through the teacher's header and the teacher's decoder, against the teacher's
      logits; it trains the student's encoder only.

    Teachers, headers and their codes never receive a gradient.

    Args:
        student, teachers, taps, adapters, window: see ``Distiller``; the networks must have ``encode`` and ``decode``.
        headers_dir: folder of ``header_student/model.pt`` and ``header_<teacher>/model.pt``; None: random headers.
        views: intensity views of each image, at least 1; below 3 the complete graph has a single edge per row, and
            nothing to say.

    Raises:
        ValueError: a teacher without ``encode`` and ``decode``; fewer than one view.
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
            raise ValueError("A GeneralizableDistiller needs the window's shape and at least one view.")
        self.views = views
        networks = {"student": student, **teachers}
        self.headers = nn.ModuleDict({name: header_of(network, window) for name, network in networks.items()})
        for name, header in self.headers.items():
            if headers_dir:
                load_weights(header, Path(headers_dir) / f"header_{name}" / "model.pt")
        freeze(self.headers)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names that a term's ``tap`` may have."""
        return (*super().tap_names, CODES, TO_STUDENT, TO_TEACHER)

    def teachers_of(self, tap: str) -> tuple[str, ...]:
        """Names of the teachers that a tap is for."""
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
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """See ``Distiller.forward``; in train() with the outputs of the further taps."""
        outputs = super().forward(image, presence, cached)
        if not isinstance(outputs, dict):
            return outputs
        views = torch.cat([image, *(intensity_view(image) for _ in range(self.views))])
        mine, codes = self._codes("student", self.student, views)
        outputs[f"student.{CODES}"] = codes
        for name, teacher in self.teachers.items():
            with torch.no_grad():
                theirs, outputs[f"{name}.{CODES}"] = self._codes(name, teacher, views)
            outputs |= self._crossed(name, mine, theirs, len(image))
            outputs[f"{name}.{TO_STUDENT}"] = outputs[f"{name}.{TO_TEACHER}"] = outputs[f"{name}.{LOGITS}"]
        return outputs

    def _codes(self, name: str, network: Any, views: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A network's features of all views, and its codes as ``B x (views + 1) x M``."""
        features = list(network.encode(views))
        code = self.headers[name].encode(features[-1]).flatten(1)  # type: ignore[operator]
        return features, code.unflatten(0, (self.views + 1, -1)).transpose(0, 1)

    def _crossed(
        self, name: str, mine: list[torch.Tensor], theirs: list[torch.Tensor], batch: int
    ) -> dict[str, torch.Tensor]:
        """Each network's decoder on the other's code; the first ``batch`` features are those of the image itself."""
        mine, theirs = [x[:batch] for x in mine], [x[:batch] for x in theirs]
        student, teacher = self.headers["student"], self.headers[name]
        to_student = self._translated(theirs[-1], teacher, student, mine[-1])
        to_teacher = self._translated(mine[-1], student, teacher, theirs[-1])
        # The skips are cut off, so that the teacher's code teaches the student's decoder and nothing else.
        skips = [x.detach() for x in mine[:-1]]
        return {
            f"student.{TO_STUDENT}@{name}": self.student.decode([*skips, to_student]),  # type: ignore[operator]
            f"student.{TO_TEACHER}@{name}": self.teachers[name].decode([*theirs[:-1], to_teacher]),  # type: ignore[operator]
        }

    @staticmethod
    def _translated(features: torch.Tensor, source: Any, target: Any, like: torch.Tensor) -> torch.Tensor:
        """Features of one network as another's: through the code that both headers share."""
        translated: torch.Tensor = target.decode(source.encode(features), like.shape[2:])
        return translated
