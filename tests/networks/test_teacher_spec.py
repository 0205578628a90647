# SPDX-License-Identifier: Apache-2.0
"""Wrong specifications of teachers, what a cache notes of them, and the Protocol."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from scripts.distillation.distiller import Distiller
from scripts.networks.own_intensity import Rescale
from scripts.networks.teacher import Teacher, TeacherLike
from scripts.networks.teacher_loading import load_teachers
from scripts.networks.teacher_spec import check_spec, teacher_identity

SPEC: dict[str, Any] = {"architecture": "segresnet", "modalities": ["ct", "pet"]}
TASK: dict[str, Any] = {
    "out_channels": 2, "all_modalities": ["ct", "pet"], "patch": [16, 16, 16],
    "intensity": {"ct": [-200, 300], "pet": "zscore"}, "spacing": [3, 3, 3.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clases": [0, 1]}, r"has the unknown key 'clases'\. Did you mean classes\?"),
        (
            {"bundle": "zoo"},
            "exactly one of architecture, network, bundle, label, predictions, nnunet; it has architecture and bundle",
        ),
        ({"modalities": []}, "names no modalities"),
        ({"kind": "rnn"}, "The teacher one is of the kind 'rnn'"),
        ({"layers": {"deeep": "a"}}, r"Write an object such as .*, with keys of deep, middle, fine"),
        ({"layers": ["a"]}, r"The teacher one has the layers \['a'\]\. Write an object"),
        ({"classes": [0, 0]}, r"The teacher one has the classes \[0, 0\]"),
        ({"classes": [0, []]}, r"The teacher one has the classes \[0, \[\]\]"),
        ({"classes": [0, -1]}, "The teacher one has the classes"),
        ({"classes": [0, "1"]}, "The teacher one has the classes"),
        ({"classes": [0, 1, 2]}, "names 3 classes, the task has 2"),
        ({"out_channels": 3}, "Add architecture, and the classes among them"),
        ({"out_channels": 1.5}, "The teacher one has the out_channels 1.5"),
        ({"spacing": [1, 1]}, r"The teacher one has the spacing \[1, 1\]\. Write three sizes in mm"),
        ({"spacing": [1, 1, 0]}, "The teacher one has the spacing"),
        ({"patch": [16, 16, 16.5]}, r"The teacher one has the patch .*three sizes in voxels"),
        ({"intensity": [0, 1]}, "The teacher one has the intensity"),
        ({"intensity": {"ct": [1, 0]}}, r"has the intensity \[1, 0\] of ct"),
        ({"intensity": {"ct": "minmax"}}, "has the intensity 'minmax' of ct"),
        ({"intensity": {"mr": [0, 1]}}, "has an intensity for mr, which it does not read"),
        ({"spacing": [1, 1, 2]}, r"has the spacing \[1, 1, 2\], the task \[3, 3, 3\.0\]\. Only cached predictions"),
        ({"patch": [32, 32, 32]}, r"has the patch \[32, 32, 32\], the task \[16, 16, 16\]\. Only cached"),
        (
            {"intensity": {"ct": [-300, 100]}},
            r"reads ct by \[-300, 100\], which the task's \[-200, 300\] does not hold",
        ),
        ({"intensity": {"ct": "zscore"}}, "reads ct by zscore, which the task's"),
        ({"intensity": {"pet": [0, 5]}}, r"reads pet by \[0, 5\], which the task's zscore does not hold"),
    ],
)
def test_a_wrong_specification_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        load_teachers({"one": {**SPEC, **changes}}, **TASK)
    assert "\n" not in str(error.value)


def test_no_teacher_is_named_as_the_student() -> None:
    with pytest.raises(ValueError, match="--teacher NAME=student=WEIGHTS"):
        check_spec("student", SPEC)


@pytest.mark.parametrize("name", ["v1.2", "my.net", "half", "training", "keys", "", "a/b"])
def test_a_name_that_no_module_can_have_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=f"No teacher can be named '{name}': .*--teacher NAME=ARCHITECTURE=WEIGHTS"):
        check_spec(name, SPEC)


@pytest.mark.parametrize("name", ["v1_2", "CT and PET", "label", "network", "ü"])
def test_other_names_are_those_of_modules(name: str) -> None:
    check_spec(name, SPEC)
    nn.ModuleDict({name: nn.Identity()})


def test_settings_that_are_those_of_the_task_need_no_cache() -> None:
    same = {"spacing": [3.0, 3, 3], "patch": [16, 16, 16], "intensity": {"ct": [-200.0, 300.0], "pet": "zscore"}}
    (teacher,) = load_teachers({"one": {**SPEC, **same}}, **TASK).values()
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher.rescale, nn.Identity)


def test_only_the_modality_with_a_window_of_its_own_is_rescaled() -> None:
    rescale = Rescale(["pet", "ct"], {"ct": [-100, 0]}, {"ct": [-200, 300], "pet": "zscore"})
    values = torch.tensor([-200.0, -150, -100, -50, 0, 300]).add(200).div(500)
    image = torch.stack([torch.linspace(-3, 3, 6), values]).view(1, 2, 6, 1, 1)
    found = rescale(image)
    assert torch.equal(found[:, 0], image[:, 0])
    torch.testing.assert_close(found[0, 1].flatten(), torch.tensor([0, 0, 0, 0.5, 1, 1]))
    assert rescale.state_dict() == {}  # weights files know nothing of it


def test_an_architecture_with_more_outputs_names_those_of_the_task() -> None:
    spec = {**SPEC, "out_channels": 4, "classes": [0, [1, 3]]}
    torch.manual_seed(0)
    (teacher,) = load_teachers({"one": spec}, **TASK).values()
    image = torch.rand(1, 2, 16, 16, 16)
    with torch.no_grad():
        probabilities = teacher.eval().network(image).softmax(1)  # type: ignore[operator, union-attr]
        found = teacher(image).softmax(1)
    named = probabilities[:, [0, 1, 3]].sum(1)
    torch.testing.assert_close(found[:, 1], probabilities[:, [1, 3]].sum(1) / named)


def test_a_cache_notes_what_a_teacher_does_otherwise_than_the_task() -> None:
    assert teacher_identity(SPEC) == {"architecture": "segresnet", "modalities": ["ct", "pet"]}
    own = {"classes": [0, 1], "spacing": [1, 1, 1]}
    bundle = teacher_identity({"bundle": "a/zoo", "modalities": ["ct"], **own})
    assert bundle == {
        "architecture": "zoo", "modalities": ["ct"], "own_classes": [0, 1], "own_spacing": [1, 1, 1]
    }  # fmt: skip
    assert teacher_identity({"network": nn.Conv3d(1, 2, 1), "modalities": ["ct"]})["architecture"] == "Conv3d"


class Plain(nn.Module):
    """A teacher that is no ``Teacher``: what the Protocol asks for, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.kind, self.sha256 = [1], None, None
        self.network = UNet(3, 1, 2, (4, 8), (2,))
        self.layers = {"middle": "model.0"}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image[:, self.channels])


def test_any_module_that_follows_the_protocol_teaches() -> None:
    assert isinstance(Plain(), TeacherLike)
    assert isinstance(Teacher(["ct"], ["ct"], 2, [16, 16, 16], "segresnet"), TeacherLike)
    assert not isinstance(UNet(3, 1, 2, (4, 8), (2,)), TeacherLike)
    taps = {"middle": {"student": "model.0", "mine": "model.0"}}
    distiller = Distiller(UNet(3, 2, 2, (4, 8), (2,)), {"mine": Plain()}, taps).train()
    outputs = distiller(torch.rand(1, 2, 16, 16, 16))
    assert outputs["mine.logits"].shape == (1, 2, 16, 16, 16)
    assert outputs["mine.middle"].shape == (1, 4, 8, 8, 8)
