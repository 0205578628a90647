# SPDX-License-Identifier: Apache-2.0
"""Teachers that read the images themselves: a ramp in space is exact under linear interpolation, on every grid."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from scripts.cli.main import main
from scripts.data import preprocessing
from scripts.distillation.own_grid import own_grids
from scripts.distillation.teacher_answers import NetworkAnswers
from scripts.networks.teacher import Teacher
from scripts.report.curves import read_curves

SHAPE, STEP = (24, 20, 16), np.array([2.0, 2.5, 3.0])  # voxels, mm
INTENSITY = {"ct": [-200, 300], "pet": [0, 10]}
SPACING, PATCH = [4.0, 4.0, 4.0], [16, 16, 16]


def hounsfield(mm: np.ndarray) -> np.ndarray:
    """A ramp that leaves the task's window on both ends: ``... 3`` in mm -> HU."""
    return mm @ np.array([30.0, 15.0, 10.0]) - 1285


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    affine = np.diag([*STEP, 1])
    ct = hounsfield(np.stack(np.indices(SHAPE), axis=-1) * STEP)
    item = {"case_id": "A", "patient_id": "A"}
    for key, volume in (("image", ct), ("pet", np.zeros(SHAPE)), ("label", np.zeros(SHAPE))):
        item[key] = str(tmp_path / f"{key}.nii.gz")
        nib.save(nib.Nifti1Image(volume.astype(np.float32), affine), item[key])
    return item


class Positive(nn.Module):
    """Logits that are its input and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([-image, image], dim=1)


@pytest.mark.parametrize(
    "own",
    [
        {"spacing": [1.5, 2, 5], "intensity": {"ct": [-1000, 1000]}, "patch": [32, 16, 8]},
        {"intensity": {"ct": [-1000, 1000]}},  # the task's grid, and a window that the task's does not hold
    ],
)
def test_an_own_answer_lies_on_the_tasks_grid_with_the_teachers_own_window(own: dict[str, Any], case: Any) -> None:
    make = partial(preprocessing, mode="infer", modalities=["ct", "pet"])
    specs = {"own": {"modalities": ["ct"], **own}, "plain": {"modalities": ["ct"], "intensity": {"ct": [-100, 100]}}}
    training = preprocessing(["ct", "pet"], INTENSITY, SPACING, "train", labels=[[0], [1]], patch=PATCH)
    grids = own_grids(specs, make, training, INTENSITY, SPACING, overlap=0.5)
    assert list(grids) == ["own"]  # the other window is computed from the task's input
    teacher = Teacher(["ct"], ["ct", "pet"], 2, own.get("patch", PATCH), network=Positive())
    answers = NetworkAnswers("own", [teacher], grids["own"].inferer, 2, own=grids["own"])
    found = answers.predict(case, lambda: pytest.fail("the task's image was read"))
    volume = training.prepare(case)["ct"][0]
    assert found.shape == (2, *volume.shape)  # as the training's volumes, padded to a patch
    inside = np.s_[5:11, 5:11, 5:11]  # away from the padding and the image's border
    voxels = np.stack(np.indices(volume.shape), axis=-1)[inside].reshape(-1, 3)
    from_task = volume[inside].numpy().ravel().astype(float) * 500 - 200
    unclipped = (from_task > -199) & (from_task < 299)
    # The ramp by voxel of the task's grid, from the voxels where the training's own volume is not clipped.
    columns = np.column_stack([voxels, np.ones(len(voxels))])
    ramp = np.linalg.lstsq(columns[unclipped], from_task[unclipped], rcond=None)[0]
    np.testing.assert_allclose(ramp[:3], [120, 60, 40], rtol=1e-3)  # HU per voxel of 4 mm
    hu = found[1][inside].numpy().ravel().astype(float) * 2000 - 1000
    np.testing.assert_allclose(hu, columns @ ramp, atol=0.5)
    assert hu.min() < -250  # what the task's window clips
    assert hu.max() > 350
    assert torch.equal(found[0], -found[1])


TINY = [
    "--data", "phantom", "--threads", "1", "--device", "cpu",
    "--set", "patch=[16,16,16]", "--set", "spacing=[12,12,12]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", "val_interval=100",
]  # fmt: skip


def test_a_bundle_of_another_spacing_and_window_teaches_from_its_cache_only(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "zoo"
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    network = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8],
               "strides": [2]}  # fmt: skip
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": network}))
    torch.manual_seed(0)
    torch.save(UNet(3, 1, 3, (4, 8), (2,)).state_dict(), folder / "models" / "model.pt")
    own = {"spacing": [10, 10, 14], "patch": [24, 24, 8], "intensity": {"ct": [-1000, 400]}}
    spec = {"bundle": str(folder), "modalities": ["ct"], "classes": [[0, 2], 1], **own}
    (tmp_path / "zoo.json").write_text(json.dumps(spec))
    shared = [*TINY, "--dataset-dir", str(cohort), "--teacher", f"zoo={tmp_path / 'zoo.json'}"]
    distill = ["distill", *shared, "--epochs", "1", "--method", "hinton", "--output-dir", str(tmp_path / "out")]
    cache = str(tmp_path / "cache")
    assert main(distill) == 1
    assert "The teacher zoo has the spacing [10, 10, 14], the task [12, 12, 12]. Only cached" in capsys.readouterr().err
    assert main(["cache-teachers", *shared, "--output-dir", cache]) == 0
    manifest = json.loads((tmp_path / "cache" / "zoo" / "manifest.json").read_text())
    expected = {"classes": [[0, 2], 1], **own}
    assert {key: manifest[f"own_{key}"] for key in expected} == expected
    assert main([*distill, "--cache-dir", cache]) == 0
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert row["weight/zoo"] == 1.0
    (tmp_path / "zoo.json").write_text(json.dumps({**spec, "spacing": [10, 10, 12]}))
    assert main([*distill, "--cache-dir", cache, "--set", "overwrite=true"]) == 1
    sentence = "its own spacing is [10, 10, 14], this run's is [10, 10, 12]. Rebuild it with cache-teachers --rebuild."
    assert sentence in capsys.readouterr().err
