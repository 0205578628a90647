# SPDX-License-Identifier: Apache-2.0
"""Resampling and restoring, compared with MONAI's transforms and with arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, ResampleToMatch, Spacing
from scipy.spatial.transform import Rotation

from scripts.data.resampling import OntoGridd, RestoreGridd, resample
from scripts.runtime import resampling
from scripts.runtime.grids import axis_moves, network_grid
from scripts.runtime.resampling import vanished_classes

LPS = np.diag([-1.0, -1.0, 1.0])
TURNED = np.array([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]])
OBLIQUE = Rotation.from_rotvec([4, 10, 17], degrees=True).as_matrix()
SHAPE, CENTRE = (26, 24, 14), (5.0, -3.0, 8.0)


def smooth(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A seeded volume of waves."""
    rng = np.random.default_rng(seed)
    points = np.moveaxis(np.indices(shape), 0, -1) @ rng.uniform(0.1, 0.4, (3, 3))
    return torch.from_numpy(np.sin(points).sum(-1).astype(np.float32))


def volume(make_affine: Any, axes: Any, spacing: tuple[float, ...] = (2, 2, 4), shape: Any = SHAPE) -> MetaTensor:
    return MetaTensor(smooth(shape)[None], affine=torch.tensor(make_affine(axes, spacing, shape, CENTRE)))


@pytest.mark.parametrize("axes", [np.eye(3), LPS, TURNED, OBLIQUE @ LPS])
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (1.5, 2.5, 3.5), (2.0, 2.0, 4.0)])
def test_the_grid_and_its_values_are_those_of_monai(make_affine: Any, axes: Any, spacing: Any) -> None:
    source = volume(make_affine, axes)
    wanted = Spacing(spacing, mode="bilinear")(Orientation("RAS", labels=None)(source))
    found = OntoGridd(["ct"], "ct", spacing, {})({"ct": source})["ct"]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-6)
    inside = tuple(slice(1, -1) for _ in range(3))  # beyond the last centres MONAI interpolates within the face
    np.testing.assert_allclose(found[0][inside], wanted[0][inside], atol=2e-5)


def test_another_modality_is_resampled_as_by_monai(make_affine: Any) -> None:
    reference = volume(make_affine, LPS)
    other = volume(make_affine, OBLIQUE, (3.0, 2.5, 2.0), (15, 16, 20))
    target = Spacing((3, 3, 3))(Orientation("RAS", labels=None)(reference))
    wanted = ResampleToMatch(mode="bilinear", padding_mode="zeros")(other, target)[0]
    ones = MetaTensor(torch.ones_like(other), affine=other.affine)
    within = ResampleToMatch(mode="bilinear", padding_mode="zeros")(ones, target)[0]
    found = OntoGridd(["ct", "mr"], "ct", (3, 3, 3), {})({"ct": reference, "mr": other})["mr"][0]
    whole = within > 1 - 1e-4  # MONAI fades to zero over the last voxel, here voxels reach half a voxel
    assert whole.sum() > 300
    np.testing.assert_allclose(found[whole], wanted[whole], atol=1e-4)
    assert (found[within == 0] == 0).all()
    assert (within == 0).sum() > 300


def test_outside_its_field_of_view_a_modality_has_the_requested_value() -> None:
    shifted = np.eye(4)
    shifted[0, 3] = 3
    found = resample(torch.ones(4, 4, 4), shifted @ np.diag([0.4, 1, 1, 1]), (8, 4, 4), outside=-200.0)
    assert found[:2].unique().tolist() == [1.0]  # centres at 3 and 3.4, the voxel ends at 3.5
    assert found[2:].unique().tolist() == [-200.0]
    edge = resample(smooth((4, 4, 4)), shifted, (4, 4, 4), outside=None)
    assert torch.equal(edge[1:], smooth((4, 4, 4))[3:].expand(3, 4, 4))


@pytest.mark.parametrize("axes", [np.eye(3), LPS, TURNED, -TURNED])
def test_grids_with_flipped_or_exchanged_axes_only_move_voxels(
    make_affine: Any, axes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = volume(make_affine, axes)
    monkeypatch.setattr(sitk, "ResampleImageFilter", None)  # not callable
    affine, shape = network_grid(np.asarray(source.affine), SHAPE, np.abs(axes) @ (2, 2, 4))
    found = resample(source[0].as_tensor(), np.linalg.solve(np.asarray(source.affine), affine), shape)
    assert torch.equal(found, Orientation("RAS", labels=None)(source)[0].as_tensor())


@pytest.mark.parametrize("change", ["half a voxel", "another size", "two degrees"])
def test_different_grids_are_interpolated(change: str) -> None:
    matrix, shape = np.eye(4), (6, 6, 6)
    if change == "half a voxel":
        matrix[1, 3] = 0.5
    elif change == "another size":
        shape = (6, 6, 5)
    else:
        matrix[:3, :3] = Rotation.from_euler("z", 2, degrees=True).as_matrix()
    assert axis_moves(matrix, (6, 6, 6), shape) is None


def test_labels_keep_their_values() -> None:
    labels = (smooth((12, 12, 12)) > 0.3).to(torch.uint8) * 2
    found = resample(labels, np.diag([0.7, 0.7, 0.7, 1]), (16, 16, 16), nearest=True)
    assert set(found.unique().tolist()) == {0.0, 2.0}


def restored(
    make_affine: Any, axes: Any, classes: int, spacing: Any, meta: Any = None
) -> tuple[MetaTensor, MetaTensor, Any]:
    """Logits of smooth regions on the network's grid, the reference, and the labels on the reference's grid."""
    source = volume(make_affine, axes)
    source.meta |= {"original_affine": np.asarray(source.affine), "spatial_shape": np.array(SHAPE), **(meta or {})}
    image = OntoGridd(["ct"], "ct", spacing, {})({"ct": source})["ct"]
    logits = torch.stack([3 * smooth(tuple(image.shape[1:]), seed) for seed in range(classes)])
    return logits, source, RestoreGridd("pred", "image")({"image": image, "pred": logits})["pred"]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("axes", [LPS, TURNED, OBLIQUE @ LPS])
def test_a_prediction_is_restored_as_by_monai(make_affine: Any, axes: Any, classes: int) -> None:
    logits, source, found = restored(make_affine, axes, classes, (3, 3, 3))
    image = OntoGridd(["ct"], "ct", (3, 3, 3), {})({"ct": source})["ct"]
    probabilities = MetaTensor(logits.softmax(0), affine=image.affine)
    back = ResampleToMatch(mode="bilinear", padding_mode="border")(probabilities, source)
    top = back.topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-3).as_tensor()
    clear[0], clear[-1], clear[:, 0], clear[:, -1], clear[..., 0], clear[..., -1] = (False,) * 6
    assert clear.float().mean() > 0.5
    assert torch.equal(found[0].as_tensor()[clear].long(), back.argmax(0).as_tensor()[clear])
    np.testing.assert_allclose(found.affine, source.affine)
    assert found.dtype == torch.uint8
    assert set(found.unique().tolist()) == set(range(classes))


@pytest.mark.parametrize("classes", [2, 3])
def test_without_interpolation_the_largest_logit_decides(make_affine: Any, classes: int) -> None:
    logits, _, found = restored(make_affine, LPS, classes, (2, 2, 4))
    assert torch.equal(found[0].as_tensor().long(), logits.argmax(0).flip(0, 1))


def test_the_slab_size_does_not_change_the_result(make_affine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = restored(make_affine, OBLIQUE, 2, (3, 3, 3))[2]
    monkeypatch.setattr(resampling, "SLAB", 5)
    assert torch.equal(restored(make_affine, OBLIQUE, 2, (3, 3, 3))[2], whole)


def test_the_mask_of_a_cropped_reference_has_the_whole_grid(make_affine: Any) -> None:
    full = {"spatial_shape": np.array([40, 30, 20]), "crop_start": np.array([10, 2, 3])}
    logits, _, found = restored(make_affine, LPS, 2, (2, 2, 4), full)
    inside = logits.argmax(0).flip(0, 1).to(torch.uint8)
    assert found.shape == (1, 40, 30, 20)
    assert torch.equal(found[0, 10:36, 2:26, 3:17].as_tensor(), inside)
    assert found.sum() == inside.sum()


def test_only_classes_that_a_label_had_can_vanish() -> None:
    label = np.zeros((4, 4, 4))
    label[0, 0, :3], label[1, 1, 1] = 1, 3
    assert vanished_classes(label, label) == {}
    assert vanished_classes(label, np.zeros((2, 2, 2))) == {1: 3, 3: 1}
    assert vanished_classes(label, np.full((2, 2, 2), 3.0)) == {1: 3}
    assert vanished_classes(label * 0, np.zeros((2, 2, 2))) == {}


@pytest.mark.parametrize("value", [254, 255])  # ignored, unlabelled
def test_voxels_of_no_class_cannot_vanish(value: int) -> None:
    label = np.zeros((4, 4, 4))
    label[0], label[1, 0, 0] = value, 2
    assert vanished_classes(label, np.zeros((2, 2, 2))) == {2: 1}
    assert vanished_classes(np.full((4, 4, 4), float(value)), np.zeros((2, 2, 2))) == {}
