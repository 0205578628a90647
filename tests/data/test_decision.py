# SPDX-License-Identifier: Apache-2.0
"""The class of every voxel: the largest logit, or the innermost of nested regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data import postprocessing
from scripts.data.decision import DecideClassesd
from scripts.runtime.decision import classes_from_logits, classes_from_probabilities
from scripts.runtime.regions import mask_values

NESTED = [[1, 2, 3], [1, 3], [3]]  # whole tumour, core, enhancing part: a voxel gets class 2, 1 or 3


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("classes", [2, 4])
def test_of_a_softmax_the_largest_logit_decides(classes: int) -> None:
    z = logits(classes, 3, 4, 5)
    expected = np.argmax(z.numpy(), axis=0)
    for found in (classes_from_logits(z.numpy()), classes_from_probabilities(list(z.softmax(0).numpy()))):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_the_classes_lie_on_the_device_of_the_logits() -> None:
    """A validation compares them with a label on the GPU. Here ``meta`` stands for it, which holds no values."""

    class OnGpu:
        device = torch.device("meta")

        def float(self) -> OnGpu:
            return self

        def cpu(self) -> torch.Tensor:
            return logits(2, 3, 4, 5)

    found = DecideClassesd("pred")({"pred": OnGpu()})["pred"]
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.uint8, (1, 3, 4, 5))


def test_of_a_sigmoid_head_the_last_region_that_contains_a_voxel_decides() -> None:
    z = logits(3, 3, 4, 5)
    inside = z.numpy() > 0
    expected = np.where(inside[2], 3, np.where(inside[1], 1, np.where(inside[0], 2, 0)))
    assert set(expected.ravel().tolist()) == {0, 1, 2, 3}
    probabilities = list(z.sigmoid().numpy())
    for found in (classes_from_logits(z.numpy(), NESTED), classes_from_probabilities(probabilities, NESTED)):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_a_head_of_one_channel_is_neither_empty_nor_full() -> None:
    z = logits(1, 3, 4, 5)
    np.testing.assert_array_equal(classes_from_logits(z.numpy(), [[1]]), z[0].numpy() > 0)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="has 4 output channels, the task has 3 regions"):
        classes_from_logits(logits(4, 2, 2, 2).numpy(), NESTED)


def test_a_validation_gets_one_channel_of_classes() -> None:
    z = MetaTensor(logits(3, 2, 3, 4))
    found = DecideClassesd("pred", NESTED)({"pred": z, "label": 7})
    assert found["label"] == 7
    np.testing.assert_array_equal(found["pred"][0], classes_from_logits(z.as_tensor().numpy(), NESTED))


def item(z: torch.Tensor) -> dict[str, Any]:
    """A prediction on the grid of its image."""
    shape = np.array(z.shape[1:])
    meta = {"source_affine": np.eye(4), "source_shape": shape, "spatial_shape": shape, "original_affine": np.eye(4)}
    return {"pred": z, "image": MetaTensor(z[:1], affine=torch.eye(4), meta={**meta, "case_id": "A"})}


def test_a_finer_grid_interpolates_the_probability_of_each_region() -> None:
    ramp = torch.linspace(-4, 4, 5).view(-1, 1, 1).expand(5, 3, 3)  # of the logits along the first axis
    z = torch.stack([ramp + 1, ramp - 1, ramp - 3])
    data = item(z)
    data["image"].meta |= {"source_affine": np.diag([0.5, 1, 1, 1]), "source_shape": np.array([9, 3, 3])}
    data["image"].meta["spatial_shape"] = np.array([9, 3, 3])
    found = postprocessing("", save=False, regions=NESTED)(data)["pred"]
    p = 1 / (1 + np.exp(-z[:, :, 1, 1].numpy().astype(float)))
    fine = np.stack([np.interp(np.arange(9) / 2, np.arange(5), each) for each in p]) > 0.5
    expected = np.where(fine[2], 3, np.where(fine[1], 1, np.where(fine[0], 2, 0)))
    assert set(expected.tolist()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(found[0, :, 1, 1].numpy(), expected)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [([[0], [1, 5], [4], [7]], np.uint8), ([[0], [300], [4], [7]], np.int16), ([[-9], [40000], [4], [7]], np.int32)],
)
def test_a_written_mask_holds_the_values_of_the_label_files(tmp_path: Path, labels: Any, kind: Any) -> None:
    data = item(logits(4, 3, 4, 5))
    found = postprocessing(str(tmp_path), values=mask_values(labels))(data)["pred"][0].numpy()
    assert set(np.unique(found).tolist()) == {0, 1, 2, 3}  # in memory a mask holds indices
    written = nib.load(tmp_path / "A.nii.gz")  # type: ignore[attr-defined]
    assert written.get_data_dtype() == kind
    expected = np.array([values[0] for values in labels])[found]
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected)


def test_values_that_no_mask_can_hold_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r'the value 0\.5, which a mask of integers cannot hold\. Set mask_values to "i'
    ):
        postprocessing("", values=mask_values([[0], [0.5]]))
    postprocessing("", values=mask_values([[0], [0.5]], "index"))
