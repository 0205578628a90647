# SPDX-License-Identifier: Apache-2.0
"""Normalisation in place, compared with MONAI's transforms."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms import NormalizeIntensity, ScaleIntensityRange

from scripts.runtime.intensity import normalise, value_outside

VOLUME = np.random.default_rng(0).normal(50, 200, (9, 8, 7)).astype(np.float32)


def test_a_range_becomes_0_to_1_and_is_clipped() -> None:
    found = normalise(VOLUME.copy(), [-200, 300])
    expected = ScaleIntensityRange(-200, 300, 0, 1, clip=True)(torch.from_numpy(VOLUME.copy()))
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-7)
    assert (found.min(), found.max()) == (0, 1)
    assert value_outside([-200, 300]) == -200


def test_zscore_leaves_zeros_and_standardises_the_other_voxels() -> None:
    volume = np.where(VOLUME < 0, 0, VOLUME)
    found = normalise(volume.copy(), "zscore")
    expected = NormalizeIntensity(nonzero=True)(torch.from_numpy(volume.copy()))
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)
    assert not found[volume == 0].any()
    assert value_outside("zscore") == 0
    constant = np.where(VOLUME < 0, 0, np.float32(7))
    np.testing.assert_array_equal(normalise(constant, "zscore"), 0)
    np.testing.assert_array_equal(normalise(np.zeros_like(VOLUME), "zscore"), 0)
