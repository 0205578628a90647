# SPDX-License-Identifier: Apache-2.0
"""Dice, HD95 and ASSD as a MONAI metric and as a handler of an ignite engine."""

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

from scripts.metrics.case_rows import METRICS
from scripts.metrics.surface import surface_metrics


class SurfaceMetrics(CumulativeIterationMetric):
    """`surface_metrics` of every case and channel: ``B x C x 3``, in the order of ``METRICS``.

    An undefined value is NaN, which MONAI's reductions leave out: Dice where both masks are empty, the distances where
    either mask is empty. A network that misses cases can therefore look better. For the results of a cohort use
    `aggregate`, which counts failures.

    Args:
        include_background: also score the first channel.
        reduction: as in MONAI. ``mean_batch`` gives a row of three values per channel, ``mean_channel`` one per case.
            ``mean`` gives one row of three values: averaging Dice with mm would be meaningless.
        spacing: voxel size in mm, one value per axis. ``None`` takes the ``spacing`` of the call, or else the affine of
            ``y`` or ``y_pred``, one of which must then be a MetaTensor.
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
                f"y_pred and y must be B C H W [D] of the same shape, got {tuple(y_pred.shape)} and {tuple(y.shape)}."
            )
        first = 0 if self.include_background else 1
        if y.shape[1] <= first:
            raise ValueError(f"There are only background channels ({y.shape[1]}). Set include_background.")
        spacing = kwargs.get("spacing")
        spacings = _spacings(self.spacing if spacing is None else spacing, y_pred, y)
        predictions, references = (x.detach().cpu().numpy()[:, first:] for x in (y_pred, y))
        rows = [
            [self._values(p, r, case_spacing) for p, r in zip(prediction, reference, strict=True)]
            for prediction, reference, case_spacing in zip(predictions, references, spacings, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float32, device=y.device)

    def _values(self, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> list[float]:
        values = surface_metrics(prediction, reference, spacing, self.workers)
        return [math.nan if values[name] is None else values[name] for name in METRICS]

    def aggregate(self, reduction: MetricReduction | str | None = None) -> torch.Tensor:
        """All values so far, reduced by MONAI's ``do_metric_reduction``, each of the three metrics separately.

        What is undefined in every case is NaN; MONAI would give 0, which is the best distance.
        """
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor):
            raise ValueError("There are no values to aggregate. Call the metric first.")
        kind = reduction or self.reduction
        return torch.stack([_reduced(data[..., i], kind) for i in range(len(METRICS))], dim=-1)


def _reduced(values: torch.Tensor, kind: MetricReduction | str) -> torch.Tensor:
    reduced, defined = do_metric_reduction(values, kind)
    return reduced.masked_fill(defined == 0, math.nan)


def _spacings(spacing: Sequence[float] | None, y_pred: torch.Tensor, y: torch.Tensor) -> list[Sequence[float]]:
    """Spacing of every case of a batch; ``spacing`` is the one for all, if known."""
    cases, axes = y.shape[0], y.ndim - 2
    if spacing is not None:
        return [spacing] * cases
    for tensor in (y, y_pred):
        if isinstance(tensor, MetaTensor):
            affine = torch.as_tensor(tensor.affine)
            affines = list(affine) if affine.ndim == 3 else [affine] * cases
            return [[float(step) for step in affine_to_spacing(one, r=axes)] for one in affines]
    raise ValueError("The voxel size in mm is unknown. Pass spacing, or a MetaTensor with an affine.")


class SurfaceMetricsHandler(IgniteMetricHandler):
    """`SurfaceMetrics` on an engine: a ``_target_`` for a config, attached under a name like MONAI's handlers.

    ``engine.state.metrics[name]`` holds the reduced values, with Dice, HD95 and ASSD on the last axis, and
    ``engine.state.metric_details[name]`` the values per case. For a key metric take ``value="dice"``, which gives a
    single number with the reduction ``mean``.

    Args:
        value: one of ``METRICS``, or ``None`` for all three.
        include_background: see `SurfaceMetrics`.
        reduction: see `SurfaceMetrics`.
        spacing: see `SurfaceMetrics`.
        workers: see `SurfaceMetrics`.
        output_transform: from the engine's output to ``(y_pred, y)``; see MONAI's IgniteMetricHandler.
        save_details: keep the values per case.
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
        if value is not None and value not in METRICS:
            raise ValueError(f"unknown value {value!r}, expected one of {METRICS}.")
        self.value = value
        metric = SurfaceMetrics(include_background, reduction, spacing, workers)
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=save_details)

    def compute(self) -> Any:
        """The reduced values: all three, or ``value`` alone."""
        result = super().compute()
        if self.value is None:
            return result
        chosen = result[..., METRICS.index(self.value)]
        return chosen.item() if chosen.ndim == 0 else chosen
