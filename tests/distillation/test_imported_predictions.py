# SPDX-License-Identifier: Apache-2.0
"""Predictions made elsewhere become a cache: on the network's grid, checked before anything is written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from scripts.cli.main import main
from scripts.data import preprocessing
from scripts.distillation.imported_predictions import ImportedAnswers
from scripts.distillation.teacher_origin import PredictionFiles
from scripts.report.curves import read_curves

SHAPE, SPACING, PATCH = (22, 18, 14), (2.0, 2.5, 3.0), [16, 16, 20]
SETTINGS: dict[str, Any] = {"intensity": {"ct": [0, 1]}, "mode": "train", "labels": [[0], [2, 3]], "patch": PATCH}
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 0, 3.0, -8], [0, 2.5, 0, 4], [0, 0, 0, 1]])  # axes flipped and exchanged


@pytest.fixture
def case(tmp_path: Path, write_nifti: Any) -> dict[str, Any]:
    """A case whose label is a ball of the values 2 and 3."""
    x, y, z = np.indices(SHAPE)
    ball = ((x - 9) / 6) ** 2 + ((y - 8) / 5) ** 2 + ((z - 7) / 4) ** 2 < 1
    label = np.where(ball, 2 + (x > 9), 0).astype(np.uint8)
    image = write_nifti(tmp_path / "ct.nii.gz", (x / 30 + y / 90).astype(np.float32), AFFINE)
    mask = write_nifti(tmp_path / "label.nii.gz", label, AFFINE)
    return {"case_id": "A", "patient_id": "A", "ct": str(image), "image": str(image), "label": str(mask)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "predictions").mkdir()
    return tmp_path / "predictions"


def probabilities(case: dict[str, Any]) -> np.ndarray:
    """Smoothed, but every voxel's largest class is that of the label: ``2 x y z``."""
    inside = nib.load(case["label"]).get_fdata() > 0
    p = 0.6 * inside + 0.4 * gaussian_filter(inside.astype(float), 1.5)
    return np.stack([1 - p, p])


def write_npz(path: Path, values: np.ndarray) -> None:
    np.savez_compressed(path, probabilities=values.transpose(0, 3, 2, 1).astype(np.float16))


def answers(
    case: Any, folder: Path, smooth: float = 0.0, spacing: Any = (3.0, 2.5, 2.0), **options: Any
) -> ImportedAnswers:
    """By default the network's grid has the voxels of the image, turned to RAS."""
    pipeline = preprocessing(["ct"], spacing=spacing, **SETTINGS)
    origin = PredictionFiles("a", {"predictions": str(folder), "modalities": ["ct"]})
    return ImportedAnswers(origin, pipeline.files, SETTINGS["labels"], smooth, **options)


def logits(case: Any, folder: Path, **options: Any) -> torch.Tensor:
    made = answers(case, folder, **options)
    made.check([case])
    return made.predict(case, lambda: torch.empty(0))


def prepared_label(case: Any, spacing: Any = (3.0, 2.5, 2.0)) -> torch.Tensor:
    return torch.as_tensor(preprocessing(["ct"], spacing=spacing, **SETTINGS).prepare(case)["label"][0])


BOX = [-28.0, -20.0, 10.0, -4.0, 20.0, 40.0]


@pytest.mark.parametrize("box", [None, BOX])
def test_nnunets_probabilities_on_the_whole_grid_give_the_label_on_the_networks_grid(
    case: Any, folder: Path, box: Any
) -> None:
    case = case if box is None else {**case, "bbox_mm": box}
    write_npz(folder / "A.npz", probabilities(case))
    found = logits(case, folder, spacing=(2.0, 3.0, 2.5))  # RAS: the image's axes x, z, y
    label = prepared_label(case, spacing=(2.0, 3.0, 2.5))
    assert found.shape[1:] == label.shape
    assert label.sum() > 100
    assert (box is None) == (label.shape[0] >= SHAPE[0])
    assert torch.equal(found.argmax(0), label.long())
    torch.testing.assert_close(found.exp().sum(0), torch.ones(label.shape))


def test_a_cropped_prediction_lies_where_the_mask_beside_it_says(case: Any, folder: Path, write_nifti: Any) -> None:
    cropped = probabilities(case)[:, 2:17, 1:16, 2:13]
    moved = AFFINE.copy()
    moved[:3, 3] += AFFINE[:3, :3] @ [2, 1, 2]
    write_npz(folder / "A.npz", cropped)
    with pytest.raises(ValueError, match=r"A.npz holds 15 x 15 x 11 voxels, but .*ct.nii.gz 22 x 18 x 14\. Export"):
        answers(case, folder).check([case])
    mask = write_nifti(folder / "A.nii.gz", cropped.argmax(0).astype(np.uint8), moved)
    found = logits(case, folder, spacing=(2.0, 3.0, 2.5))
    assert torch.equal(found.argmax(0), prepared_label(case, spacing=(2.0, 3.0, 2.5)).long())
    write_nifti(mask, np.roll(cropped.argmax(0), 8, 0).astype(np.uint8), moved)
    with pytest.raises(ValueError, match=r"do not belong together: the Dice of their foregrounds is 0\.\d\d\. Export"):
        logits(case, folder)


def test_a_mask_of_the_images_shape_at_another_place_is_refused(case: Any, folder: Path, write_nifti: Any) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += AFFINE[:3, :3] @ [2, 0, 0]
    write_nifti(folder / "A.nii.gz", probabilities(case).argmax(0).astype(np.uint8), moved)
    with pytest.raises(ValueError, match=r"A\.nii\.gz has the shape of .*, but another affine: its voxels lie up to"):
        answers(case, folder).check([case])


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_4d_images_of_probabilities_or_logits_are_resampled_by_their_own_affine(
    case: Any, folder: Path, write_nifti: Any, kind: str
) -> None:
    values = probabilities(case)
    if kind == "logits":
        values = np.log(np.clip(values, 1e-4, 1)) + 3
    write_nifti(folder / "A.nii.gz", np.moveaxis(values, 0, -1).astype(np.float32), AFFINE)
    found = logits(case, folder, spacing=(2.0, 3.0, 2.5))
    assert torch.equal(found.argmax(0), prepared_label(case, spacing=(2.0, 3.0, 2.5)).long())
    # At half of each spacing the values lie between their neighbours': compare one line with np.interp.
    fine = logits(case, folder, spacing=(1.0, 3.0, 2.5)).softmax(0)[1]
    coarse = found.softmax(0)[1]
    line = fine[:, fine.shape[1] // 2, fine.shape[2] // 2].numpy()
    own = coarse[:, fine.shape[1] // 2, fine.shape[2] // 2].numpy()
    expected = np.interp(np.arange(2 * SHAPE[0] - 1) / 2, np.arange(SHAPE[0]), own)
    np.testing.assert_allclose(line[: len(expected)], expected, atol=2e-3)


def test_masks_are_smoothed_in_mm(case: Any, folder: Path, write_nifti: Any) -> None:
    mask = nib.load(case["label"]).get_fdata()
    write_nifti(folder / "A.nii.gz", mask.astype(np.uint8), AFFINE)
    spacing = (2.0, 3.0, 2.5)
    hard = logits(case, folder, spacing=spacing)
    assert torch.equal(hard.argmax(0), prepared_label(case, spacing).long())
    soft = logits(case, folder, spacing=spacing, smooth=3.0).softmax(0)[1]
    expected = gaussian_filter((mask > 0).astype(np.float32), [3.0 / 2.0, 3.0 / 2.5, 3.0 / 3.0])
    # Voxels of the image to the network's RAS grid: x is flipped, y and z are exchanged; padded at the end of z, y.
    turned = expected[::-1].transpose(0, 2, 1)
    before = [(n - m) // 2 for n, m in zip(soft.shape, turned.shape, strict=True)]
    part = tuple(slice(b, b + m) for b, m in zip(before, turned.shape, strict=True))
    np.testing.assert_allclose(soft[part].numpy(), turned, atol=1e-5)


def test_predictions_of_classes_or_of_regions_answer_a_task_of_regions(
    case: Any, folder: Path, write_nifti: Any
) -> None:
    p = probabilities(case)
    write_npz(folder / "A.npz", p)
    classes = logits(case, folder)
    found = logits(case, folder, regions=[[1]])
    torch.testing.assert_close(found[0].sigmoid(), classes.softmax(0)[1], atol=1e-5, rtol=0)
    write_npz(folder / "A.npz", p[1:])  # one channel: the region itself
    inside = logits(case, folder, regions=[[1]])
    assert inside.shape == found.shape
    torch.testing.assert_close(inside.sigmoid(), found.sigmoid(), atol=1e-3, rtol=0)
    (folder / "A.npz").unlink()
    thrice = np.repeat(4 * p[1:] - 2, 3, axis=0)  # logits of three regions that are the same
    write_nifti(folder / "A.nii.gz", np.moveaxis(thrice, 0, -1).astype(np.float32), AFFINE)
    for channel in logits(case, folder, regions=[[1]] * 3):
        assert torch.equal(channel > 0, classes.argmax(0) == 1)
    with pytest.raises(ValueError, match=r"A\.nii\.gz has 3 classes, this task has 2 and 3 regions"):
        answers(case, folder, regions=[[1]] * 3, head="softmax").check([case])
    write_npz(folder / "A.npz", p)
    with pytest.raises(
        ValueError, match=r"The 2 channels of .*A\.npz may be classes or regions\. Name the teacher by a"
    ):
        answers(case, folder, regions=[[1], [1]]).check([case])


def refusals(case: Any, folder: Path, write_nifti: Any) -> dict[str, tuple[Callable[[], Any], str]]:
    p = probabilities(case)
    moved = AFFINE.copy()
    moved[:3, 3] += 500
    four = np.moveaxis(p, 0, -1).astype(np.float32)
    return {
        "classes": (lambda: write_npz(folder / "A.npz", np.concatenate([p, p]) / 2), "has 4 classes, this task has 2"),
        "array": (lambda: np.savez(folder / "A.npz", softmax=p), "needs an array 'probabilities', class z y x"),
        "integers": (lambda: np.savez(folder / "A.npz", probabilities=np.zeros((2, 14, 18, 22), int)), "is damaged"),
        "no zip": (lambda: (folder / "A.npz").write_bytes(b"PK"), "is damaged, or not nnU-Net's file"),
        "sum": (lambda: write_npz(folder / "A.npz", p / 2), "does not hold probabilities that add up to 1"),
        "regions": (
            lambda: write_nifti(folder / "A.nii.gz", four * 0.7, AFFINE),
            "values from 0 to 1 that do not add up to 1: neither probabilities of disjoint classes nor logits",
        ),
        "elsewhere": (
            lambda: write_nifti(folder / "A.nii.gz", four, moved),
            "do not overlap in space. Check that these files belong together",
        ),
        "values": (
            lambda: write_nifti(folder / "A.nii.gz", np.full(SHAPE, 7, np.uint8), AFFINE),
            "contains the value 7, which the task's labels",
        ),
    }


@pytest.mark.parametrize("how", ["classes", "array", "integers", "no zip", "sum", "regions", "elsewhere", "values"])
def test_a_prediction_that_does_not_fit_is_refused_in_one_sentence(
    how: str, case: Any, folder: Path, write_nifti: Any
) -> None:
    write, words = refusals(case, folder, write_nifti)[how]
    write()
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        logits(case, folder)


def test_pickled_arrays_are_not_loaded(case: Any, folder: Path) -> None:
    trap = np.empty((2, 14, 18, 22), dtype=object)
    with zipfile.ZipFile(folder / "A.npz", "w") as archive, archive.open("probabilities.npy", "w") as file:
        np.lib.format.write_array(file, trap, allow_pickle=bool(1))
    with pytest.raises(ValueError, match="is damaged, or not nnU-Net's file of probabilities"):
        logits(case, folder)


def test_smoothing_probabilities_is_refused(case: Any, folder: Path) -> None:
    write_npz(folder / "A.npz", probabilities(case))
    with pytest.raises(ValueError, match=r"A\.npz holds probabilities, and --smooth is for masks\. Remove it"):
        logits(case, folder, smooth=2.0)
    with pytest.raises(ValueError, match=r"--smooth is -1\. Give the width of a Gaussian in mm, at least 0"):
        answers(case, folder, smooth=-1.0)


TINY = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[16,16,16]", "--set", "spacing=[12,12,12]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", "val_interval=100",
]  # fmt: skip


def test_a_student_learns_from_predictions_alone_by_the_command_line(
    phantoms: list[dict[str, Any]], cohort: Path, folder: Path, tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    common = [*TINY, "--dataset-dir", str(cohort), "--set", f"splits_file={tmp_path / 'splits.json'}"]
    cache = ["cache-teachers", *common, "--output-dir", str(tmp_path / "cache"), "--predictions", str(folder)]
    cache += ["--name", "outside", "--cases", "all"]
    for case in phantoms[:4]:
        write_npz(folder / f"{case['case_id']}.npz", probabilities_on_reference(case))
    assert main(cache) == 1
    error = capsys.readouterr().err
    assert "lacks the predictions of 2 of 6 cases: PHANTOM_005, PHANTOM_006. Name the files such as PHANT" in error
    assert not (tmp_path / "cache" / "outside").exists()
    for case in phantoms[4:]:
        write_npz(folder / f"{case['case_id']}.npz", probabilities_on_reference(case))
    assert main(cache) == 0
    assert "those of a model on its own training cases are over-confident." in caplog.text
    manifest = json.loads((tmp_path / "cache" / "outside" / "manifest.json").read_text())
    assert (manifest["architecture"], manifest["weights_sha256"]) == ("predictions", None)
    distill = ["distill", *common, "--teacher", f"outside=predictions={folder}", "--method", "hinton", "--epochs", "1"]
    assert main([*distill, "--output-dir", str(tmp_path / "online")]) == 1
    assert "The teacher outside answers from a cache only: store its predictions with" in capsys.readouterr().err
    distill += ["--cache-dir", str(tmp_path / "cache")]
    assert main([*distill, "--output-dir", str(tmp_path / "out")]) == 0
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert row["weight/outside"] == 1
    assert row["loss/hinton"] is not None
    assert row["loss/hinton"] > 0
    write_npz(folder / "PHANTOM_002.npz", probabilities_on_reference(phantoms[1])[::-1])
    write_npz(folder / "PHANTOM_003.npz", probabilities_on_reference(phantoms[2])[::-1])
    assert main([*distill, "--output-dir", str(tmp_path / "changed")]) == 1
    assert "The image files or the prediction of case PHANTOM_00" in capsys.readouterr().err
    # A checkpoint of the first answers does not go on with the second ones, though all files have the same size.
    assert main(cache) == 0
    assert main([*distill, "--output-dir", str(tmp_path / "out"), "--resume", "--epochs", "1"]) == 1
    error = capsys.readouterr().err
    assert "is from a different run: its cache#outside#sources_sha256 is " in error
    assert ";" not in error  # nothing else


def probabilities_on_reference(case: dict[str, Any]) -> np.ndarray:
    """Any probabilities on the grid of the CT."""
    shape = nib.load(case["ct"]).shape
    p = np.broadcast_to(np.linspace(0.1, 0.9, shape[0])[:, None, None], shape)
    return np.stack([1 - p, p])
