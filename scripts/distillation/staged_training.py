# SPDX-License-Identifier: Apache-2.0
"""What must be trained before domain-generalisable distillation can begin, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISHED = ("model.pt", "manifest.json")  # what a training leaves at its end, the last one last


@dataclass(frozen=True)
class Stage:
    """One training of a schedule.

    Args:
        name: folder of its output.
        configs: overlays after train, data and scale.
        overrides: config id -> value.
    """

    name: str
    configs: tuple[str, ...]
    overrides: dict[str, Any]


def finished(folder: Path) -> bool:
    """Whether a training has come to its end there; the manifest is written last."""
    return all((folder / name).is_file() for name in FINISHED)


def gkd_stages(folder: Path, teachers: Mapping[str, Mapping[str, Any]], epochs: int) -> list[Stage]:
    """The stages before the distillation itself: auto-encoder, the student's first half, one header per network.

    The student's epochs are shared: half of them alone (its header needs features that mean something), the rest
    distilled, so that its budget is that of any other method. The auto-encoder has as many epochs as the student, each
    header half.

    Args:
        folder: each stage writes into ``folder/<name>``.
        teachers: name -> ``architecture``, ``modalities``, ``weights``.
        epochs: of the student in all.

    Raises:
        ValueError: fewer than two epochs, of which neither stage could have one.
    """
    if epochs < 2:
        raise ValueError(f"The student needs at least 2 epochs, one alone and one distilled, got {epochs}.")
    half = epochs // 2
    autoencoder, student = str(folder / "autoencoder" / "model.pt"), str(folder / "student" / "model.pt")
    stages = [
        Stage("autoencoder", ("stages/autoencoder",), {"max_epochs": epochs}),
        Stage("student", (), {"max_epochs": half}),
        Stage(
            "header_student",
            ("stages/header",),
            {"max_epochs": half, "weights": student, "autoencoder": autoencoder},
        ),
    ]
    for name, spec in teachers.items():
        own = {
            "max_epochs": half,
            "architecture": spec["architecture"],
            "teacher_modalities": spec["modalities"],
            "weights": spec["weights"] or "",
            "autoencoder": autoencoder,
        }
        stages.append(Stage(f"header_{name}", ("teacher", "stages/header"), own))
    return stages
