# SPDX-License-Identifier: Apache-2.0
"""The physical mask does not depend on the files' grids: axes, flips, spacing, rotation and position are random.

Each modality contains its own ellipsoid as the function ``1 - |A (x - c)|^2`` of world coordinates, positive inside.
Interpolating a quadratic function linearly in a cell with sides h lowers it by at most the sum of h_i^2 |A e_i|^2 / 4,
so by D^2 / (4 r_min^2), where D is the cell's diagonal. What becomes the mask is interpolated twice, onto the network's
grid and back, each time lowered by at most that of the larger cell. A voxel inside whose ray from the centre leaves the
ellipsoid D / 2 behind it has a value of at least D / r_max - D^2 / (4 r_max^2), which is more for these sizes: it must
be in the mask. A value below 0 stays below it, so no voxel outside may be.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from scripts.data import postprocessing, preprocessing

Array = NDArray[Any]

SCENE = np.array([20.0, -35.0, 60.0])
# Three lengths and a centre off the scene's: no turn or flip of the grid maps one onto itself.
ELLIPSOIDS: dict[str, tuple[Array, Array]] = {
    "ct": (SCENE + np.array([3.0, -2.0, 1.0]), np.array([12.0, 16.0, 20.0])),
    "pet": (SCENE + np.array([-2.0, 3.0, -1.5]), np.array([20.0, 13.0, 16.0])),
    "mr": (SCENE + np.array([1.0, 2.0, 3.0]), np.array([15.0, 20.0, 12.0])),
}
MIN_SPACING, MAX_SPACING = 2.0, 5.0  # mm
REACH = 4.0 + 20.0 + math.sqrt(3) * MAX_SPACING  # every file contains all ellipsoids and a cell around them
DEPTH = 80.0  # no voxel has a lower value
LPS = np.diag([-1.0, -1.0, 1.0])
PIPELINE = settings(derandomize=True, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))


class Grid(NamedTuple):
    affine: Array
    shape: tuple[int, int, int]


def _draw_grid(draw: Callable[..., Any], largest_turn: float) -> Grid:
    triple = lambda each: np.array(draw(st.tuples(each, each, each)))  # noqa: E731
    order = draw(st.permutations(range(3)))
    axes = np.eye(3)[:, order] * triple(st.sampled_from([1, -1]))
    about = triple(st.sampled_from([-1.0, -0.3, 0.2, 1.0]))
    angle = draw(st.floats(-largest_turn, largest_turn))
    axes = Rotation.from_rotvec(about / np.linalg.norm(about) * np.radians(angle)).as_matrix() @ axes
    spacing = triple(st.floats(MIN_SPACING, MAX_SPACING))
    more = triple(st.integers(0, 3))
    shape = np.ceil(2 * REACH / spacing).astype(int) + 1 + more
    centre = SCENE + axes @ (triple(st.floats(-0.5, 0.5)) * more * spacing)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = centre - affine[:3, :3] @ (shape - 1) / 2
    return Grid(affine, tuple(shape.tolist()))


@st.composite
def grids(draw: Callable[..., Any], largest_turn: float = 180.0) -> Grid:
    return _draw_grid(draw, largest_turn)


# The proof's last step, for the largest cells, shortest and longest radii above.
assert 1 / 20 - math.sqrt(3) * MAX_SPACING / (4 * 20**2) > math.sqrt(3) * MAX_SPACING / (2 * 12**2)
spacings = st.tuples(*[st.floats(MIN_SPACING, MAX_SPACING)] * 3)


def scaled_distance(key: str, points: Array) -> Array:
    """From the ellipsoid's centre; 1 on its surface."""
    centre, radii = ELLIPSOIDS[key]
    return np.linalg.norm((points - centre) / radii, axis=-1)


def write(path: Path, voxels: Array, grid: Grid, stored: str, places: str) -> str:
    """By nibabel, or by ITK as a MetaImage; ``places``: which of sform and qform are set."""
    if path.suffix == ".mha":
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.astype(np.float32).T))
        sizes = np.linalg.norm(grid.affine[:3, :3], axis=0)
        image.SetSpacing(sizes.tolist())
        image.SetOrigin((LPS @ grid.affine[:3, 3]).tolist())
        image.SetDirection((LPS @ grid.affine[:3, :3] / sizes).ravel().tolist())
        sitk.WriteImage(image, str(path), useCompression=True)
        return str(path)
    file = (nib.Nifti2Image if places == "sform" else nib.Nifti1Image)(voxels, None)
    file.set_sform(grid.affine, code=1 if "sform" in places else 0)
    file.set_qform(grid.affine, code=1 if "qform" in places else 0)
    file.set_data_dtype(stored)  # integers get a slope and an intercept
    nib.save(file, path)
    return str(path)


def segment(files: dict[str, str], spacing: tuple[float, ...]) -> tuple[Any, dict[str, Any]]:
    """The network's input, and per modality the mask by a network whose probability is that modality alone."""
    before = preprocessing(list(files), {key: [-DEPTH, DEPTH] for key in files}, spacing, "infer")
    item = before({"case_id": "P_1", "image": next(iter(files.values())), **files})
    found = {}
    for channel, key in enumerate(files):
        inside = item["image"][channel].as_tensor().clamp(1e-6, 1 - 1e-6)
        logits = torch.stack([(1 - inside).log(), inside.log()])
        found[key] = postprocessing("", save=False)({**item, "pred": logits})["pred"]
    return item["image"], found


files = st.fixed_dictionaries(
    {
        key: st.tuples(
            grids(),
            st.sampled_from(["nii.gz", "nii", "mha"]),
            st.sampled_from(["float32", "float64", "int16"]),
            st.sampled_from(["sform", "qform", "sform and qform"]),
        )
        for key in ELLIPSOIDS
    }
)


@PIPELINE
@given(drawn=files, spacing=spacings)
def test_every_mask_is_its_ellipsoid_within_half_a_voxel_on_any_grids(
    drawn: dict[str, Any], spacing: tuple[float, ...], world: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for key in ELLIPSOIDS:  # the reference first
            grid, suffix, stored, places = drawn[key]
            values = 1 - scaled_distance(key, world(*grid)) ** 2
            assert values.min() > -DEPTH
            paths[key] = write(Path(folder) / f"{key}.{suffix}", values, grid, stored, places)
        image, masks = segment(paths, spacing)
    reference = drawn["ct"][0]
    points = world(*reference)
    network = np.linalg.norm(np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0))
    np.testing.assert_allclose(network, np.linalg.norm(spacing), rtol=1e-6)
    for key, mask in masks.items():
        assert mask.shape == (1, *reference.shape)
        np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
        coarser = max(network, np.linalg.norm(drawn[key][0].affine[:3, :3]))
        away = scaled_distance(key, points)
        along = np.linalg.norm(points - ELLIPSOIDS[key][0], axis=-1) * np.abs(1 / np.maximum(away, 1e-9) - 1)
        compared = along > coarser / 2
        assert (compared & (away < 1)).sum() > 50
        wrong = compared & (mask[0].numpy() != (away < 1))
        assert wrong.sum() == 0, (key, along[wrong].max(), coarser)


@PIPELINE
@given(
    grid=grids(largest_turn=30.0),
    order=st.permutations(range(3)),
    flips=st.lists(st.sampled_from(range(3)), unique=True),
    spacing=spacings,
    seed=st.integers(0, 2**32 - 1),
)
def test_the_same_voxels_with_exchanged_and_flipped_axes_give_the_same_physical_set(
    grid: Grid, order: list[int], flips: list[int], spacing: tuple[float, ...], seed: int
) -> None:
    """Noise, so that every voxel counts: ``new[i, j, k]`` is ``old`` at the axes' places, and the mask's is too."""
    voxels = np.random.default_rng(seed).uniform(-DEPTH, DEPTH, grid.shape).astype(np.float32)
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for new, old in enumerate(order):
        turn[old, new] = -1 if new in flips else 1
        turn[old, 3] = grid.shape[old] - 1 if new in flips else 0
    other = Grid(grid.affine @ turn, tuple(grid.shape[old] for old in order))
    moved = np.flip(voxels.transpose(order), flips)
    with tempfile.TemporaryDirectory() as folder:
        first = segment({"ct": write(Path(folder) / "a.nii", voxels, grid, "float32", "sform")}, spacing)[1]["ct"]
        second = segment({"ct": write(Path(folder) / "b.nii", moved, other, "float32", "sform")}, spacing)[1]["ct"]
    np.testing.assert_allclose(second.affine, other.affine, atol=1e-4)
    mask = first[0].numpy()
    assert 0.1 < mask.mean() < 0.9
    np.testing.assert_array_equal(second[0].numpy(), np.flip(mask.transpose(order), flips))
