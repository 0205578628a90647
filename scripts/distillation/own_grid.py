# SPDX-License-Identifier: Apache-2.0
"""Teachers with an input of their own: they read the images by their own spacing, intensity and patch.

Only cached predictions can have that: the teacher answers for a whole case on its own grid, and the answer is
resampled onto the grid of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from monai.transforms import SpatialPad
from monai.utils import convert_to_tensor

from scripts.data.resampling import resample
from scripts.data.training_set import Pipeline
from scripts.networks.own_intensity import Rule
from scripts.networks.teacher_loading import own_input

Case = Mapping[str, Any]


class OwnGrid:
    """The input of one teacher, and the way back to the task's grid.

    Args:
        preprocessing: the teacher's own, in the mode ``infer``, with all modalities of the task.
        inferer: sliding window with the teacher's own patch.
        task: the training pipeline of the task.
    """

    def __init__(self, preprocessing: Pipeline, inferer: Inferer, task: Pipeline) -> None:
        self.preprocessing, self.inferer, self.task = preprocessing, inferer, task

    def image(self, case: Case) -> MetaTensor:
        """The image of a case as the teacher reads it: ``M H W D`` on its own grid, with its affine."""
        return self.preprocessing(dict(case))["image"]  # type: ignore[no-any-return]

    def onto_task_grid(self, answer: torch.Tensor, image: MetaTensor, case: Case) -> torch.Tensor:
        """Resample an answer, linearly: ``C H W D`` on the grid of ``image`` -> ``C h w d`` as a training's volumes.

        The space beyond the image, which those have where a case is smaller than a patch, repeats the border.
        """
        affine, shape = self.task.files.grid(dict(case))
        matrix = np.linalg.solve(np.asarray(image.affine, dtype=np.float64), affine)
        channels = [resample(channel, matrix, shape, outside=None) for channel in answer.float().cpu()]
        padded = SpatialPad(self.task.files.patch, mode="edge")(torch.stack(channels))
        return convert_to_tensor(padded, track_meta=False)  # type: ignore[no-any-return]


def own_grids(
    specs: Mapping[str, Mapping[str, Any]],
    preprocessing: Callable[..., Pipeline],
    task: Pipeline,
    intensity: Mapping[str, Rule],
    spacing: Sequence[float],
    overlap: float,
) -> dict[str, OwnGrid]:
    """The teachers that cannot use the task's input: name -> their own.

    Args:
        specs: name of a teacher -> its specification.
        preprocessing: makes a pipeline from ``intensity`` and ``spacing``.
        task: the training pipeline.
        intensity: of the task.
        spacing: of the task in mm.
        overlap: of the windows.
    """
    patch = task.files.patch
    found = {}
    for name, spec in specs.items():
        if own_input(spec, patch, intensity, spacing):
            pipeline = preprocessing(
                intensity={**intensity, **(spec.get("intensity") or {})}, spacing=spec.get("spacing") or spacing
            )
            inferer = SlidingWindowInferer(spec.get("patch") or patch, overlap=overlap, mode="gaussian")
            found[name] = OwnGrid(pipeline, inferer, task)
    return found
