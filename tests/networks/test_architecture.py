# SPDX-License-Identifier: Apache-2.0
"""The files of configs/teachers: their networks against independent constructions, and the errors for wrong files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks import nets

from scripts.networks import HDenseFormer, Student, UXNet
from scripts.networks.architecture import KINDS, architecture_names, read_architecture
from scripts.networks.teacher import Teacher

PATCH = (64, 32, 32)
LAYERS = {"deep", "middle", "fine"}


def monai_dynunet(channels: int, filters: list[int]) -> nets.DynUNet:
    strides = [1] + [2] * (len(filters) - 1)
    return nets.DynUNet(3, channels, 2, [3] * len(filters), strides, strides[1:], filters=filters)


# The sizes of release 0.8, which kept them in configs/scale; trained weights depend on them.
BEFORE: dict[str, Callable[[], torch.nn.Module]] = {
    "unetr demo": lambda: nets.UNETR(2, 2, PATCH, feature_size=4, hidden_size=96, mlp_dim=192, num_heads=4),
    "unetr small": lambda: nets.UNETR(2, 2, PATCH, feature_size=8, hidden_size=192, mlp_dim=768, num_heads=6),
    "swinunetr small": lambda: nets.SwinUNETR(2, 2, feature_size=12, window_size=4, depths=(1, 1, 1, 1)),
    "hdenseformer demo": lambda: HDenseFormer(2, 2, PATCH, features=8, depth=4),
    "hdenseformer small": lambda: HDenseFormer(2, 2, PATCH, features=8, depth=12),
    "uxnet small": lambda: UXNet(2, 2),
    "dynunet compare": lambda: monai_dynunet(2, [8, 16, 32, 64, 128]),
    "segresnet small": lambda: nets.SegResNet(in_channels=2, out_channels=2),
}


@pytest.mark.parametrize("case", BEFORE)
def test_the_initial_weights_of_a_seed_are_those_of_release_0_8(case: str) -> None:
    architecture, scale = case.split()
    torch.manual_seed(7)
    expected = BEFORE[case]().state_dict()
    torch.manual_seed(7)
    found = Teacher(["pet", "ct"], ["ct", "pet", "mr"], 2, PATCH, architecture, scale=scale).network.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_each_scale_of_each_architecture_has_the_sizes_of_release_0_8_at_full_scale() -> None:
    full = {name: dict(read_architecture(name).scales["full"]) for name in ("unetr", "hdenseformer", "uxnet")}
    assert full == {
        "unetr": {"feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12},
        "hdenseformer": {"features": 16, "depth": 24},
        "uxnet": {"features": 24},
    }


def test_the_norms_that_unetr_never_calls_get_no_gradient() -> None:
    network = Teacher(["ct"], ["ct"], 2, PATCH, "unetr", scale="demo").network
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if "norm_cross_attn" in name} != set()


@pytest.mark.parametrize("name", architecture_names())
def test_every_file_is_complete(name: str) -> None:
    architecture = read_architecture(name)
    assert set(architecture.layers) == LAYERS
    assert architecture.kind in KINDS
    scales = {path.stem for path in (Path(__file__).parents[2] / "configs" / "scale").glob("*.json")}
    assert set(architecture.scales) == scales
    assert architecture.fixed_patch == (name in ("unetr", "hdenseformer"))


def test_a_larger_student_teaches() -> None:
    teacher = Teacher(["ct"], ["ct"], 2, [16, 16, 16], "student", scale="small")
    assert isinstance(teacher.network, Student)
    image = torch.zeros(1, 1, 16, 16, 16)
    assert torch.equal(teacher.eval().decode(teacher.encode(image)), teacher(image))
    widths = [stage[0].conv.out_channels for stage in teacher.network.encoder]
    assert widths == [48, 96, 192, 384]  # twice those of the student at this scale


def test_a_users_own_file_is_an_architecture(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    network: dict[str, Any] = {
        "_target_": "monai.networks.nets.UNet", "spatial_dims": 3, "in_channels": "@in_channels",
        "out_channels": "@out_channels", "channels": "$[@patch[0] // 4, 8]", "strides": [2],
    }  # fmt: skip
    path.write_text(json.dumps({"network": network, "layers": {"middle": "model.1"}, "kind": "cnn"}))
    teacher = Teacher(["pet"], ["ct", "pet"], 3, [16, 16, 16], str(path), layers={"deep": "model.0"})
    assert (teacher.kind, teacher.layers) == ("cnn", {"middle": "model.1", "deep": "model.0"})
    assert teacher(torch.zeros(1, 2, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    assert teacher.network.channels == [4, 8]
    assert read_architecture(str(path)).fixed_patch


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "describes no architecture"),
        ('{"kind": "cnn"}', "describes no architecture"),
        ('{"network": {"_target_": "x.Y"}, "layer": {}}', r"unknown key 'layer'\. Did you mean layers\?"),
        ('{"network": {"_target_": "x.Y"}, "kind": "rnn"}', "is of the kind 'rnn'. Choose cnn or transformer"),
        ('{"network": {"_target_": "x.Y"}}', r"names x\.Y, which cannot be imported"),
        ('{"network": {"_target_": "SegResNet", "filters": 8}}', "has no argument 'filters'"),
        ('{"network": {"_target_": "scripts.networks.HDenseFormer", "in_channels": 1, "out_channels": 2, '
         '"img_size": 20}}', "cannot be built: img_size must be divisible by 16"),
    ],
)  # fmt: skip
def test_a_file_that_describes_no_architecture_is_refused(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        Teacher(["ct"], ["ct"], 2, PATCH, str(path))


@pytest.mark.parametrize("change", [{"depth": "$exit()"}, {"depth": ["%evil.json"]}, {"_target_": "os.system"}])
def test_nothing_in_changes_is_evaluated(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="The changes of the architecture hdenseformer hold"):
        Teacher(["ct"], ["ct"], 2, PATCH, "hdenseformer", options={"hdenseformer": change})


def test_a_file_that_does_not_exist_and_changes_of_no_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match=r"There is no architecture at nowhere\.json"):
        read_architecture("nowhere.json")
    with pytest.raises(ValueError, match=r"architectures names 'untr', which is none\. Did you mean unetr\?"):
        Teacher(["ct"], ["ct"], 2, PATCH, "uxnet", options={"untr": {"feature_size": 8}})
