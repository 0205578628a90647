# SPDX-License-Identifier: Apache-2.0
"""Segmenting without MONAI gives the masks of the bundle's transforms and inferer, voxel for voxel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from scripts.data import postprocessing, preprocessing
from scripts.inference.engines import ExportedEngine
from scripts.inference.sliding_window import WholeVolumeInferer
from scripts.runtime.regions import mask_values, sigmoid_regions
from scripts.runtime.segmenter import Settings, segment_item

OBLIQUE = Rotation.from_rotvec([4, 10, 17], degrees=True).as_matrix() @ np.diag([-1.0, -1, 1])
LPS = np.diag([-1.0, -1.0, 1.0])
SHAPES = {"ct": (34, 30, 20), "pet": (20, 18, 16), "mr": (28, 33, 17)}
SPACINGS = {"ct": (2.0, 2.0, 3.0), "pet": (4.0, 4.0, 4.0), "mr": (2.5, 2.0, 3.5)}
INTENSITY: dict[str, Any] = {"ct": [-200, 300], "pet": [0, 10], "mr": "zscore"}
BRATS = {"labels": [[0], [1], [2], [4]], "regions": {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}, "head": "sigmoid"}


class Network:
    """An engine whose logits depend on the neighbourhood of each voxel; half of them are below 0."""

    window: tuple[int, ...] | None = None
    description, bytes_per_voxel = "openvino fp32", 110

    def __init__(self, channels: int) -> None:
        torch.manual_seed(1)
        self.layer = torch.nn.Conv3d(3, channels, 3, padding=1)

    def __call__(self, image: NDArray) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = (8 * self.layer(torch.from_numpy(image))).numpy()
        return logits


@pytest.fixture(scope="module")
def images(make_affine: Any, write_nifti: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = {}
    for key, axes in {"ct": LPS, "pet": np.eye(3), "mr": OBLIQUE}.items():
        low, high = (0, 900) if key == "mr" else INTENSITY[key]
        voxels = rng.uniform(low - 50, high * 1.2, SHAPES[key]).astype(np.int16 if key == "ct" else np.float32)
        affine = make_affine(axes, SPACINGS[key], SHAPES[key], (3, -2, 5))
        files[key] = str(write_nifti(folder / f"{key}.nii.gz", voxels, affine))
    stacked = np.stack([rng.uniform(0, 300, SHAPES["ct"]) for _ in range(3)], -1).astype(np.float32)
    files["stacked"] = str(write_nifti(folder / "stacked.nii.gz", stacked, make_affine(LPS, (2, 2, 3), SHAPES["ct"])))
    return files


SETTINGS: dict[str, dict[str, Any]] = {
    "windows": {},
    "one pass": {"whole_volume": True},
    "parts": {"whole_volume": True, "memory_gib": 32 * 32 * 16 * 110 / 2**30},
    "the image's own grid": {"spacing": (2.0, 2.0, 3.0)},
    "three classes": {"labels": [[0], [3], [7]]},
    "nested regions": BRATS,
    "indices": {**BRATS, "mask_values": "index"},
    "without MR": {"present": ["ct", "pet"], "allow_missing": True},
    "on the grid of the MR": {"reference": "mr"},
    "divisor": {"whole_volume": True, "divisor": (8, 8, 4)},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_mask_is_that_of_the_bundle(changes: dict[str, Any], images: dict[str, str], tmp_path: Path) -> None:
    item = {"image": images[changes.get("reference", "ct")], **{key: images[key] for key in SHAPES}}
    _compare(item, changes, tmp_path)


def test_a_box_is_segmented_and_the_rest_is_background(images: dict[str, str], tmp_path: Path) -> None:
    item = {"image": images["ct"], **{key: images[key] for key in SHAPES}, "bbox_mm": [-20, -20, -12, 15, 10, 18]}
    mask = _compare(item, {}, tmp_path)
    inside = np.argwhere(mask)
    assert ((inside.max(0) - inside.min(0) + 1) * (2, 2, 3) < (44, 40, 39)).all()


def test_a_stacked_file_and_an_absent_modality(images: dict[str, str], tmp_path: Path) -> None:
    _compare({"image": images["stacked"]}, {"stacked": True}, tmp_path)
    _compare({"ct": images["ct"], "mr": images["mr"]}, {"allow_missing": True}, tmp_path)


def _compare(item: dict[str, Any], changes: dict[str, Any], folder: Path) -> NDArray:
    """Segment in both ways; the mask, which is neither empty nor full."""
    settings = Settings(
        **{
            "modalities": ["ct", "pet", "mr"],
            "intensity": INTENSITY,
            "spacing": (3.0, 3.0, 3.0),
            "labels": [[0], [1]],
            "patch": (16, 16, 16),
            "threads": 1,
            **changes,
        }
    )
    regions = sigmoid_regions(settings.labels, settings.head, settings.classes, settings.regions)
    engine = Network(len(regions or settings.labels))
    item = {**item, "case_id": "A"}
    segment_item(item, settings, lambda: engine, folder / "lean.nii.gz")  # type: ignore[arg-type]
    prepare = preprocessing(
        settings.modalities,
        settings.intensity,
        settings.spacing,
        "infer",
        allow_missing=settings.allow_missing,
        reference=settings.reference,
        present=settings.present,
        stacked=settings.stacked,
        memory_gib=settings.memory_gib,
    )
    inferer = WholeVolumeInferer(
        settings.patch, settings.overlap, settings.whole_volume, settings.memory_gib, list(settings.divisor)
    )
    data: Any = prepare(item)
    logits = inferer(data["image"][None], ExportedEngine(engine))[0]  # type: ignore[arg-type]
    values = mask_values(settings.labels, settings.mask_values)
    postprocessing(str(folder), True, regions, values)({**data, "pred": logits})
    lean, bundle = (nib.Nifti1Image.from_filename(folder / f"{name}.nii.gz") for name in ("lean", "A"))
    assert lean.to_bytes() == bundle.to_bytes()
    mask = np.asarray(lean.dataobj)
    assert set(np.unique(mask).tolist()) == set(values)
    return mask
