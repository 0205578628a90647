# SPDX-License-Identifier: Apache-2.0
"""The network's grid is MONAI's, for any affine; a box keeps the part of an image that it covers."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data.utils import compute_shape_offset, zoom_affine

from scripts.runtime.grids import network_grid, own_grid


def affines(kind: str) -> Any:
    """Seeded affines with spacings from 0.3 to 5 mm."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        if kind == "straight":
            axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        matrix = axes @ np.diag(rng.uniform(0.3, 5, 3))
        if kind == "sheared":
            matrix = matrix @ (np.eye(3) + np.triu(rng.uniform(-0.2, 0.2, (3, 3)), 1))
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = matrix, rng.uniform(-200, 200, 3)
        yield affine, tuple(int(n) for n in rng.integers(1, 200, 3)), rng.uniform(0.5, 5, 3)


@pytest.mark.parametrize("kind", ["straight", "oblique", "sheared"])
def test_the_grid_is_that_of_monais_spacing(kind: str) -> None:
    for affine, shape, spacing in affines(kind):
        axes = nib.orientations.io_orientation(affine)
        ras = affine @ nib.orientations.inv_ornt_aff(axes, shape)
        ras_shape = [shape[int(np.flatnonzero(axes[:, 0] == axis)[0])] for axis in range(3)]
        expected = zoom_affine(ras, spacing, diagonal=False)
        size, offset = compute_shape_offset(ras_shape, ras, expected)
        expected[:3, 3] = offset
        found, found_shape = network_grid(affine, shape, spacing)
        assert found_shape == tuple(size)
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_box_in_lps_is_a_part_of_an_image_in_ras() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])  # voxel (i, j, k) lies at (2i, 2j, 2k) in RAS, (-2i, -2j, 2k) in LPS
    own = own_grid({"bbox_mm": [-10, -8, 4, -6, -4, 8], "image": "a"}, affine, (20, 20, 20))
    assert (own.start, own.part, own.shape) == ((3, 2, 2), (3, 3, 3), (20, 20, 20))
    np.testing.assert_array_equal(own.part_affine[:3, 3], [6, 4, 4])
    with pytest.raises(ValueError, match=r"Case A: its bounding box lies outside a\.nii"):
        own_grid({"case_id": "A", "bbox_mm": [90, 90, 90, 99, 99, 99], "image": "a.nii"}, affine, (20, 20, 20))
