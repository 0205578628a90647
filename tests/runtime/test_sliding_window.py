# SPDX-License-Identifier: Apache-2.0
"""Windows, their weights and their blend are those of MONAI, on numpy arrays and on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers.utils import _get_scan_interval, sliding_window_inference

from scripts.runtime.sliding_window import WindowPlan, predict_volume, window_places, window_weights

SIZES = [(40, 24, 20), (16, 16, 16), (33, 17, 50), (16, 40, 31)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_the_windows_lie_where_monai_puts_them(size: tuple[int, ...], overlap: float) -> None:
    window = (16, 16, 16)
    interval = _get_scan_interval(size, window, 3, (overlap,) * 3)
    assert window_places(size, window, overlap) == dense_patch_slices(size, window, interval)


@pytest.mark.parametrize("window", [(16, 16, 16), (32, 24, 8), (5, 7, 1)])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_the_weights_are_monais(window: tuple[int, ...], mode: str) -> None:
    expected = compute_importance_map(window, mode)
    np.testing.assert_allclose(window_weights(window, mode == "gaussian"), expected.numpy(), rtol=1e-6)


def network(image: Any) -> Any:
    """Two channels that depend on the place in the window, so that the blend counts."""
    ramp = np.linspace(0.5, 1.5, image.shape[-1], dtype=np.float32)
    if isinstance(image, np.ndarray):
        return np.concatenate([image[:, :1] * ramp, image[:, 1:] + ramp], 1)
    factor = torch.from_numpy(ramp)
    return torch.cat([image[:, :1] * factor, image[:, 1:] + factor], 1)


@pytest.mark.parametrize("size", [*SIZES, (12, 16, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_arrays_and_tensors_give_the_same_bits_and_monais_logits(size: tuple[int, ...], batch: int) -> None:
    image = np.random.default_rng(0).random((2, 2, *size), dtype=np.float32)
    plan = WindowPlan((16, 16, 16), 0.5, whole=False, batch=batch)
    found, of_tensor = predict_volume(image, network, plan), predict_volume(torch.from_numpy(image), network, plan)
    np.testing.assert_array_equal(found, of_tensor.numpy())
    expected = sliding_window_inference(torch.from_numpy(image), (16, 16, 16), batch, network, 0.5, "gaussian")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
