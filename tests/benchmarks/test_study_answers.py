# SPDX-License-Identifier: Apache-2.0
"""The files of the teachers' answers."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import SpatialPad

from benchmarks.study_answers import mean_logit, read_answer, without_padding, write_answers, write_predictions


def test_answers_keep_a_tenth_of_a_logit_and_the_affine(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(0, 8, (4, 5, 6))
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    write_answers(tmp_path / "answers" / "t1.npz", {"P1": (logits, affine)})
    read, matrix = read_answer(tmp_path / "answers" / "t1.npz", "P1")
    inside = np.abs(logits) < 12.7
    assert np.abs(read - logits)[inside].max() <= 0.05 + 1e-5
    np.testing.assert_allclose(read[~inside], 12.7 * np.sign(logits[~inside]), rtol=1e-6)
    np.testing.assert_array_equal(matrix, affine)


def test_predictions_hold_the_mean_probability(tmp_path: Path) -> None:
    low, high = np.log(0.2 / 0.8), np.log(0.6 / 0.4)
    np.testing.assert_allclose(mean_logit([np.full(2, low), np.full(2, high)]), np.log(0.4 / 0.6))
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    affine = np.diag([-4.0, 4.0, 4.0, 1.0])
    for file, value in zip(files, (-2.0, 1.0), strict=True):
        write_answers(file, {"P1": (np.full((2, 3, 4), value), affine)})
    write_predictions(tmp_path / "predictions", {"P1": files})
    image = nib.load(tmp_path / "predictions" / "P1.nii.gz")
    values = np.asarray(image.dataobj)
    assert values.shape == (2, 3, 4, 2)
    mean = (1 / (1 + np.exp(2.0)) + 1 / (1 + np.exp(-1.0))) / 2
    np.testing.assert_allclose(values[..., 1], mean, rtol=1e-5)
    np.testing.assert_allclose(values[..., 0], 1 - mean, rtol=1e-5)
    np.testing.assert_array_equal(image.affine, affine)


@pytest.mark.parametrize("shape", [(3, 8, 5), (8, 8, 8), (10, 7, 1)])
def test_padding_of_the_training_volumes_is_cut_off(shape: tuple[int, int, int]) -> None:
    volume = torch.arange(float(np.prod(shape))).reshape(shape)
    padded = SpatialPad((8, 8, 8))(volume[None])[0].numpy()
    np.testing.assert_array_equal(without_padding(padded, shape), volume.numpy())
