# SPDX-License-Identifier: Apache-2.0
"""The metric and the handler against `surface_metrics`, MONAI's metrics and arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric

from scripts.metrics import surface_metrics
from scripts.metrics.monai_metric import SurfaceMetrics, SurfaceMetricsHandler

SPACING = (0.7, 1.3, 3.1)


def one_hot(seed: int, shape: tuple[int, ...] = (2, 12, 11, 10)) -> torch.Tensor:
    """Three classes; class 2 is a box of its own place in each case."""
    labels = torch.zeros(shape, dtype=torch.long)
    for case in range(shape[0]):
        labels[case, 1 + seed : 7 + seed, 2:8, 1:6] = 1
        labels[case, 8:11, 1 + seed + case : 5 + case, 2:9] = 2
    return torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()


def test_values_per_case_and_channel_equal_surface_metrics() -> None:
    y_pred, y = one_hot(0), one_hot(1)
    values = SurfaceMetrics(spacing=SPACING)(y_pred, y)
    assert values.shape == (2, 2, 3)
    for case in range(2):
        for channel in (1, 2):
            expected = surface_metrics(y_pred[case, channel], y[case, channel], SPACING)
            case_values = dict(zip(("dice", "hd95_mm", "assd_mm"), values[case, channel - 1].tolist(), strict=True))
            assert case_values == pytest.approx({name: expected[name] for name in case_values})


def test_every_reduction_equals_monais() -> None:
    y_pred, y = one_hot(0), one_hot(1)
    y_pred[1, 2] = 0  # missed: no distance there
    for reduction in ("none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel"):
        ours = SurfaceMetrics(reduction=reduction)
        theirs = [
            DiceMetric(include_background=False, reduction=reduction),
            HausdorffDistanceMetric(percentile=95, reduction=reduction),
            SurfaceDistanceMetric(symmetric=True, reduction=reduction),
        ]
        ours(y_pred, y, spacing=SPACING)
        theirs[0](y_pred, y)
        for metric in theirs[1:]:
            metric(y_pred, y, spacing=SPACING)
        result = ours.aggregate()
        for i, metric in enumerate(theirs):
            expected = torch.as_tensor(metric.aggregate())
            expected = torch.where(torch.isinf(expected), math.nan, expected)  # MONAI: infinity where one is empty
            if torch.isfinite(expected).all():
                torch.testing.assert_close(result[..., i], expected, atol=1e-4, rtol=0)


def test_undefined_values_are_nan_and_left_out_of_the_mean() -> None:
    """Two voxels 4 apart along the first axis; then only a reference; then nothing at all."""
    y_pred, y = torch.zeros(2, 3, 1, 6, 6, 6)
    y_pred[0, 0, 1, 1, 1] = y[0, 0, 5, 1, 1] = y[1, 0, 2, 2, 2] = 1
    metric = SurfaceMetrics(include_background=True, spacing=SPACING)
    expected = torch.tensor([[[0, 2.8, 2.8]], [[0, math.nan, math.nan]], [[math.nan] * 3]])
    torch.testing.assert_close(metric(y_pred, y), expected, equal_nan=True)
    torch.testing.assert_close(metric.aggregate().squeeze(), torch.tensor([0, 2.8, 2.8]))


def test_what_is_undefined_in_every_case_is_nan_and_not_the_best_value() -> None:
    """A network that misses every tumour has no distances."""
    metric = SurfaceMetrics(spacing=(1, 1, 1))
    reference = torch.zeros(2, 2, 8, 8, 8)
    reference[:, 1, 2:5, 2:5, 2:5] = 1
    metric(torch.zeros_like(reference), reference)
    for reduction in ("mean", "mean_batch"):
        dice, hd95, assd = metric.aggregate(reduction).reshape(3).tolist()
        assert dice == 0
        assert math.isnan(hd95)
        assert math.isnan(assd)


def test_the_spacing_comes_from_the_call_then_the_metric_then_the_affine() -> None:
    y_pred, y = torch.zeros(2, 1, 1, 6, 6, 6)
    y_pred[0, 0, 1, 1, 1] = y[0, 0, 5, 1, 1] = 1
    located = MetaTensor(y, affine=torch.diag(torch.tensor([-3.0, 1.0, 1.0, 1.0])))

    def hd95(metric: SurfaceMetrics, *masks: torch.Tensor, **kwargs: Any) -> float:
        return float(metric(*masks, **kwargs)[0, 0, 1])

    assert hd95(SurfaceMetrics(True), y_pred, located) == 12
    assert hd95(SurfaceMetrics(True), MetaTensor(y_pred, affine=located.affine), y) == 12
    assert hd95(SurfaceMetrics(True, spacing=(2, 1, 1)), y_pred, located) == 8
    assert hd95(SurfaceMetrics(True, spacing=(2, 1, 1)), y_pred, located, spacing=(5, 1, 1)) == 20
    with pytest.raises(ValueError, match="voxel size in mm is unknown"):
        SurfaceMetrics(True)(y_pred, y)


def test_every_case_of_a_list_has_the_spacing_of_its_own_affine() -> None:
    y_pred, y = torch.zeros(2, 1, 6, 6, 6)
    y_pred[0, 1, 1, 1] = y[0, 5, 1, 1] = 1
    affines = [torch.diag(torch.tensor([step, 1.0, 1.0, 1.0])) for step in (1.0, 2.0)]
    metric = SurfaceMetrics(include_background=True)
    metric([y_pred, y_pred], [MetaTensor(y, affine=affine) for affine in affines])
    assert metric.get_buffer()[:, 0, 1].tolist() == [4, 8]
    batch = MetaTensor(torch.stack([y, y]))
    batch.is_batch, batch.meta["affine"] = True, torch.stack(affines)
    assert metric(torch.stack([y_pred, y_pred]), batch)[:, 0, 1].tolist() == [4, 8]


def test_two_dimensional_masks_are_scored() -> None:
    y_pred, y = torch.zeros(2, 1, 1, 6, 6)
    y_pred[0, 0, 1, 1] = y[0, 0, 1, 4] = 1
    assert SurfaceMetrics(True, spacing=(1.0, 2.0))(y_pred, y).tolist() == [[[0, 6, 6]]]


def test_invalid_input_is_refused() -> None:
    y = torch.zeros(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="the same shape"):
        SurfaceMetrics(spacing=SPACING)(y, y[..., :3])
    with pytest.raises(ValueError, match="Set include_background"):
        SurfaceMetrics(spacing=SPACING)(y, y)
    with pytest.raises(ValueError, match="holds values other than 0 and 1"):
        SurfaceMetrics(True, spacing=SPACING)(y + 0.5, y)
    with pytest.raises(ValueError, match="no values to aggregate"):
        SurfaceMetrics().aggregate()
    with pytest.raises(ValueError, match="unknown value 'iou'"):
        SurfaceMetricsHandler(value="iou")


def test_a_config_names_the_handler_by_its_target_and_an_engine_runs_it() -> None:
    config = {"_target_": "scripts.metrics.monai_metric.SurfaceMetricsHandler", "spacing": list(SPACING)}
    parser = ConfigParser({"all": config, "dice": {**config, "value": "dice", "reduction": "mean"}})
    batches = [(one_hot(0), one_hot(1)), (one_hot(1), one_hot(1))]
    engine = Engine(lambda _, batch: batch)
    for name in ("all", "dice"):
        parser.get_parsed_content(name).attach(engine, name)
    engine.run(batches)
    rows = [surface_metrics(p[i, c], y[i, c], SPACING) for p, y in batches for i in range(2) for c in (1, 2)]
    means = [sum(row[name] for row in rows) / len(rows) for name in ("dice", "hd95_mm", "assd_mm")]
    assert engine.state.metrics["all"].tolist() == pytest.approx(means)
    assert engine.state.metrics["dice"] == pytest.approx(means[0])
    assert engine.state.metric_details["all"].shape == (4, 2, 3)
