# SPDX-License-Identifier: Apache-2.0
"""A bundle of the model zoo as a teacher, laid out as the zoo does, and the errors for incomplete ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet

from scripts.networks.teacher_loading import load_teachers
from scripts.networks.zoo_bundle import bundle_network, bundle_weights
from scripts.utils.checksums import sha256

TASK: dict[str, Any] = {
    "out_channels": 2, "all_modalities": ["ct", "pet"], "patch": [16, 16, 16],
    "intensity": {"ct": [-200, 300], "pet": [0, 10]}, "spacing": [3, 3, 3],
}  # fmt: skip


def unet(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(3, in_channels=1, out_channels=4, channels=(4, 8), strides=(2,))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose network has four outputs: background, a tumour, and two organs."""
    folder = tmp_path / "zoo_bundle"
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    config = {
        "imports": ["$import math"],
        "widths": [4, 8],
        "network_def": {
            "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "$math.floor(4.5)",
            "channels": "@widths", "strides": [2],
        },
        "network": "$@network_def.to('cpu')",
        "dataset": {"_target_": "scripts.of.this.bundle.DoesNotExist"},
    }  # fmt: skip
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    torch.save(unet(3).state_dict(), folder / "models" / "model.pt")
    return folder


def test_a_bundle_answers_for_the_classes_of_the_task_with_its_own_window(bundle: Path) -> None:
    spec = {"bundle": str(bundle), "modalities": ["ct"], "classes": [[0, 2, 3], 1], "intensity": {"ct": [-57, 164]}}
    teacher = load_teachers({"zoo": spec}, **TASK)["zoo"].eval()
    hounsfield = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 700 - 300
    image = torch.cat([((hounsfield + 200) / 500).clamp(0, 1), torch.zeros_like(hounsfield)], dim=1)
    with torch.no_grad():
        probabilities = unet(3).eval()(((hounsfield + 57) / 221).clamp(0, 1)).softmax(1)
        found = teacher(image).softmax(1)
    torch.testing.assert_close(found[:, 1], probabilities[:, 1])
    torch.testing.assert_close(found[:, 0], probabilities[:, [0, 2, 3]].sum(1))
    assert teacher.sha256 == sha256(bundle / "models" / "model.pt")


def test_outputs_that_are_not_named_are_left_out(bundle: Path) -> None:
    spec = {"bundle": str(bundle), "modalities": ["ct"], "classes": [0, 1]}
    teacher = load_teachers({"zoo": spec}, **TASK)["zoo"].eval()
    image = torch.rand(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probabilities = unet(3).eval()(image[:, :1]).softmax(1)[:, :2]
        torch.testing.assert_close(teacher(image).softmax(1), probabilities / probabilities.sum(1, keepdim=True))


def test_a_yaml_config_and_that_of_the_training_are_read(bundle: Path) -> None:
    (bundle / "configs" / "inference.json").unlink()
    lines = ["network_def:", "  _target_: UNet", "  spatial_dims: 3", "  in_channels: 1", "  out_channels: 4",
             "  channels: [4, 8]", "  strides: [2]"]  # fmt: skip
    (bundle / "configs" / "train.yaml").write_text("\n".join(lines))
    bundle_network(str(bundle)).load_state_dict(unet(3).state_dict(), strict=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("folder", "There is no bundle at"),
        ("configs", r"has no network_def in configs/inference or configs/train \(\.json, \.yaml\)"),
        ("network_def", r"has no network_def in configs/inference or configs/train \(\.json, \.yaml\)"),
        ("class", "The network_def of .*inference.json cannot be built"),
        ("json", r"inference\.json cannot be read"),
        ("number", "is a int, not a network"),
        ("weights", "has no weights at models/model.pt. Download the whole bundle."),
        ("other weights", "do not fit Teacher"),
        ("classes", "names 3 classes, the task has 2"),
        ("outputs", "its classes name the output 4, but its network has outputs 0 to 3"),
        ("no classes", r"returns \[4, 16, 16, 16\] for a patch, not \[2, 16, 16, 16\].* and 2 outputs or the key"),
    ],
)
def test_an_incomplete_bundle_is_refused_in_one_sentence(change: str, sentence: str, bundle: Path) -> None:
    config = bundle / "configs" / "inference.json"
    spec: dict[str, Any] = {"bundle": str(bundle), "modalities": ["ct"], "classes": [0, 1]}
    content = json.loads(config.read_text())
    if change == "folder":
        spec["bundle"] += "_nowhere"
    elif change == "configs":
        config.unlink()
    elif change == "json":
        config.write_text("{")
    elif change in ("network_def", "class", "number"):
        content["network_def"] = {"class": {"_target_": "scripts.of.this.bundle.Net"}, "number": 3}.get(change)
        content = {key: value for key, value in content.items() if value is not None}
        config.write_text(json.dumps(content))
    elif change == "weights":
        Path(bundle_weights(str(bundle))).unlink()
    elif change == "other weights":
        torch.save(UNet(3, 1, 4, (4, 4), (2,)).state_dict(), bundle / "models" / "model.pt")
    else:
        spec["classes"] = {"classes": [0, 1, 2], "outputs": [0, 4], "no classes": None}[change]
    with pytest.raises(ValueError, match=sentence) as error:
        load_teachers({"zoo": spec}, **TASK)
    assert "zoo" in str(error.value)
    assert "\n" not in str(error.value)
