# SPDX-License-Identifier: Apache-2.0
"""The trainings that must precede domain-generalisable distillation (GKD), in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.networks.teacher_loading import trained_patch
from scripts.networks.teacher_spec import check_spec, own_settings, teacher_head

FINAL_FILES = ("model.pt", "manifest.json")  # written at the end of a training; the manifest last


@dataclass(frozen=True)
class Stage:
    """One training of a schedule.

    Args:
        name: folder of its output.
        configs: config overlays, in addition to train, data and scale.
        overrides: config id -> value.
        of_student: the network of the stage is the student's.
    """

    name: str
    configs: tuple[str, ...]
    overrides: dict[str, Any]
    of_student: bool = False


def is_finished(folder: Path) -> bool:
    """Return whether the training with this output folder has finished."""
    return all((folder / name).is_file() for name in FINAL_FILES)


def gkd_stages(
    folder: Path, teachers: Mapping[str, Mapping[str, Any]], epochs: int, head: str = "softmax"
) -> list[Stage]:
    """Return the stages before the distillation: autoencoder, first half of the student, one header per network.

    The student trains alone for half of its epochs, because its header needs meaningful features, and is distilled for
    the rest. So its total number of epochs is that of any other method. The autoencoder trains for as many epochs as
    the student, each header for half of them.

    Args:
        folder: each stage writes to ``folder/<name>``.
        teachers: name -> ``architecture``, ``modalities``, ``weights``.
        epochs: total number of epochs of the student.
        head: of the task.

    Raises:
        ValueError: a teacher cannot be used; fewer than two epochs, so that one half would have none.
    """
    if epochs < 2:
        raise ValueError(f"The student needs at least 2 epochs, one alone and one distilled, got {epochs}.")
    half = epochs // 2
    autoencoder, student = str(folder / "autoencoder" / "model.pt"), str(folder / "student" / "model.pt")
    stages = [
        Stage("autoencoder", ("stages/autoencoder",), {"max_epochs": epochs}),
        Stage("student", (), {"max_epochs": half}, of_student=True),
        Stage(
            "header_student",
            ("stages/header",),
            {"max_epochs": half, "weights": student, "autoencoder": autoencoder},
            of_student=True,
        ),
    ]
    for name, spec in teachers.items():
        check_spec(name, spec)
        if not spec.get("architecture") or own_settings(spec) or not isinstance(spec.get("weights") or "", str):
            raise ValueError(
                f"gkd needs for each teacher an architecture, one weights file and no settings of its own; {name} has "
                "others."
            )
        if not spec.get("weights"):
            raise ValueError(
                f"The teacher {name} has random weights, others in each stage of gkd: its header would belong to "
                "another network. Give it weights."
            )
        overrides = {
            "max_epochs": half,
            "architecture": spec["architecture"],
            "teacher_modalities": spec["modalities"],
            "teacher_head": teacher_head(name, spec, head),
            "weights": spec["weights"],
            "autoencoder": autoencoder,
        }
        if (patch := trained_patch(spec)) is not None:
            overrides["network_def#patch"] = list(patch)
        stages.append(Stage(f"header_{name}", ("teacher", "stages/header"), overrides))
    return stages
