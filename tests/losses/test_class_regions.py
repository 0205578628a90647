# SPDX-License-Identifier: Apache-2.0
"""Class shares and class means of a label against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses._class_regions import class_means, class_shares


def features_of(*grid: int, batch: int = 1) -> Tensor:
    return torch.zeros(batch, 3, *grid)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_on_the_grid_of_the_label_the_shares_are_the_one_hot_masks(dtype):
    label = torch.tensor([[0, 2], [2, 5]]).view(1, 1, 2, 2).to(dtype)
    expected = [[[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]]  # classes 0, 2 and 5
    assert class_shares(label, features_of(2, 2)).tolist() == expected


def test_a_coarse_cell_contains_each_class_by_its_share_of_the_voxels():
    label = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 2, 2], [1, 2, 2, 2]]).view(1, 1, 4, 4)
    shares = class_shares(label, features_of(2, 2))[0]
    assert shares.tolist() == [[1, 0.75, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0.25, 1]]


@pytest.mark.parametrize("grid", [(4, 5, 6), (3, 2, 4), (1, 1, 1)])
def test_the_shares_of_a_cell_sum_to_one_on_any_grid(random_label, grid):
    shares = class_shares(random_label((2, 1, 4, 5, 6), 4, seed=0), features_of(*grid, batch=2))
    assert shares.shape == (2, 4, int(np.prod(grid)))
    np.testing.assert_allclose(shares.sum(dim=1).numpy(), 1.0, atol=1e-6)


@pytest.mark.parametrize("voxel", [(0, 0, 0), (7, 3, 5), (15, 15, 15)])
def test_a_lesion_of_one_voxel_has_a_region_on_a_coarse_grid(voxel):
    label = torch.zeros(1, 1, 16, 16, 16)
    label[(0, 0, *voxel)] = 1
    shares = class_shares(label, features_of(2, 2, 2))[0, 1].view(2, 2, 2)
    cell = tuple(i // 8 for i in voxel)
    assert shares[cell].item() == 1 / 512
    assert (shares > 0).sum() == 1


def test_the_mean_of_a_tiny_region_is_the_feature_of_its_cell():
    label = torch.zeros(1, 1, 8, 8, 8)
    label[0, 0, 1, 6, 2] = 1
    features = torch.randn(1, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    mean = class_means(features.flatten(2), class_shares(label, features))[0, 1]
    np.testing.assert_allclose(mean.numpy(), features[0, :, 0, 1, 0].numpy(), rtol=1e-6)


def test_a_class_of_another_sample_only_has_share_0_and_mean_0():
    label = torch.zeros(2, 1, 4, 4)
    label[1, 0, 0, 0] = 3
    features = 1 + features_of(2, 2, batch=2)
    shares = class_shares(label, features)
    assert shares[0, 1].tolist() == [0, 0, 0, 0]
    assert class_means(features.flatten(2), shares)[:, 1].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_class_means_are_the_masked_means_of_numpy(random_label):
    label = random_label((2, 1, 3, 4, 2), 3, seed=0)
    features = torch.randn(2, 5, 3, 4, 2, generator=torch.Generator().manual_seed(1))
    means = class_means(features.flatten(2), class_shares(label, features)).numpy()
    for b in range(2):
        for k in range(3):
            inside = features[b].double().numpy()[:, label[b, 0].numpy() == k]
            np.testing.assert_allclose(means[b, k], inside.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4, 4), (2, 2, 4, 4, 4), (2, 1, 4, 4), (2, 1, 4, 4, 3)])
def test_a_label_of_another_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match="no coarser than features") as error:
        class_shares(torch.zeros(shape), torch.zeros(2, 3, 4, 4, 4))
    assert str(shape) in str(error.value)
    assert "(2, 3, 4, 4, 4)" in str(error.value)
