# SPDX-License-Identifier: Apache-2.0
"""Dice, HD95 and ASSD as a metric of MONAI, and as a handler of an ignite engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction

from scripts.metrics.surface import surface_metrics

VALUES = ("dice", "hd95_mm", "assd_mm")


class SurfaceMetrics(CumulativeIterationMetric):
    """`surface_metrics` of every case and channel: ``B x C x 3``, in the order of ``VALUES``.

    A value that is not defined is NaN, since the reductions of MONAI leave NaN out: Dice where both masks are empty,
    the distances where either is. A network that misses cases can so look better; a cohort's numbers belong to
    `aggregate`, which knows failures.

    Args:
        include_background: also score the first channel.
        reduction: of MONAI; ``mean_batch`` keeps a row of three values per channel, ``mean_channel`` one per case;
            ``mean`` would also average over Dice and mm, so it keeps the last axis here: one row of three values.
        spacing: of a voxel in mm, one value per axis; ``None``: as given per call, else from the affine of ``y`` or
            ``y_pred``, one of which must be a MetaTensor then.
        workers: threads for the distances.
    """

    def __init__(
        self,
        include_background: bool = False,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        spacing: Sequence[float] | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self.include_background, self.reduction = include_background, MetricReduction(reduction)
        self.spacing, self.workers = spacing, workers

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Values of a batch of binary or one-hot masks ``B C H W [D]``; ``spacing=...`` as in the constructor."""
        if y_pred.shape != y.shape or y.ndim not in (4, 5):
            raise ValueError(
                f"y_pred and y must be B C H W [D] of one shape, got {tuple(y_pred.shape)} and {tuple(y.shape)}"
            )
        first = 0 if self.include_background else 1
        if y.shape[1] <= first:
            raise ValueError(f"{y.shape[1]} channel(s) leave nothing but background: set include_background")
        given = kwargs.get("spacing")
        spacings = _spacings(self.spacing if given is None else given, y_pred, y)
        predictions, references = (x.detach().cpu().numpy()[:, first:] for x in (y_pred, y))
        rows = [
            [self._values(p, r, spacing) for p, r in zip(prediction, reference, strict=True)]
            for prediction, reference, spacing in zip(predictions, references, spacings, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float32, device=y.device)

    def _values(self, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> list[float]:
        values = surface_metrics(prediction, reference, spacing, self.workers)
        return [math.nan if values[name] is None else values[name] for name in VALUES]

    def aggregate(self, reduction: MetricReduction | str | None = None) -> torch.Tensor:
        """All values so far, reduced by MONAI's ``do_metric_reduction``, the three metrics each on their own."""
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor):
            raise ValueError("There is nothing to aggregate: call the metric first.")
        kind = reduction or self.reduction
        return torch.stack([do_metric_reduction(data[..., i], kind)[0] for i in range(len(VALUES))], dim=-1)


def _spacings(given: Sequence[float] | None, y_pred: torch.Tensor, y: torch.Tensor) -> list[Sequence[float]]:
    """Spacing of every case of a batch."""
    cases, axes = y.shape[0], y.ndim - 2
    if given is not None:
        return [given] * cases
    for tensor in (y, y_pred):
        if isinstance(tensor, MetaTensor):
            affine = torch.as_tensor(tensor.affine)
            affines = list(affine) if affine.ndim == 3 else [affine] * cases
            return [[float(step) for step in affine_to_spacing(one, r=axes)] for one in affines]
    raise ValueError("The voxels have no size in mm: give spacing, or a MetaTensor with an affine.")


class SurfaceMetricsHandler(IgniteMetricHandler):
    """`SurfaceMetrics` on an engine: named by ``_target_`` in a config, attached under a name like MONAI's handlers.

    ``engine.state.metrics[name]`` holds what the reduction leaves, with Dice, HD95 and ASSD on the last axis, and
    ``engine.state.metric_details[name]`` the values per case. As a key metric choose Dice: ``value="dice"`` keeps that
    one alone, a number under ``mean``.

    Args:
        value: one of ``VALUES``, or ``None`` for all three.
        output_transform: from the engine's output to ``(y_pred, y)``; see MONAI's IgniteMetricHandler.
        save_details: keep the values per case.
        include_background: as `SurfaceMetrics`, like the arguments below.
    """

    def __init__(
        self,
        value: str | None = None,
        include_background: bool = False,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        spacing: Sequence[float] | None = None,
        workers: int = 1,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        if value is not None and value not in VALUES:
            raise ValueError(f"unknown value {value!r}, expected one of {VALUES}")
        self.value = value
        metric = SurfaceMetrics(include_background, reduction, spacing, workers)
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=save_details)

    def compute(self) -> Any:
        """What the reduction leaves: of all three, or of ``value`` alone."""
        result = super().compute()
        if self.value is None:
            return result
        chosen = result[..., VALUES.index(self.value)]
        return chosen.item() if chosen.ndim == 0 else chosen
