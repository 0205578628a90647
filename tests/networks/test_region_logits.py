# SPDX-License-Identifier: Apache-2.0
"""A softmax over classes answers for regions: the probability of a region is the sum of those of its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scripts.networks.ensemble import Ensemble
from scripts.networks.label_teacher import LabelTeacher
from scripts.networks.region_logits import region_logits
from scripts.networks.teacher import Teacher
from scripts.networks.teacher_loading import load_teachers
from scripts.networks.teacher_spec import teacher_head

NESTED = [[1, 2, 3], [1, 3], [3]]
IMAGE = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def network(outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv3d(1, outputs, 1)


def sums(logits: torch.Tensor) -> torch.Tensor:
    """The probabilities of the nested regions, added up from the softmax in float64."""
    p = logits.double().softmax(1)
    return torch.stack([p[:, members].sum(1) for members in NESTED], dim=1).float()


def test_the_sigmoid_of_a_region_is_the_sum_of_its_probabilities() -> None:
    logits = 3 * torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(region_logits(logits, NESTED).sigmoid(), sums(logits))
    sure = torch.tensor([0.0, 60.0, -60.0, 0.0]).view(1, 4, 1, 1)
    assert region_logits(sure, NESTED).isfinite().all()


def test_a_teacher_with_a_softmax_answers_a_task_of_regions() -> None:
    teacher = Teacher(["ct"], ["ct"], 4, (4, 4, 4), network=network(4), regions=NESTED)
    torch.testing.assert_close(teacher(IMAGE).sigmoid(), sums(teacher.network(IMAGE)))
    other = Teacher(["ct"], ["ct"], 3, (4, 4, 4), network=network(3), head="sigmoid", regions=NESTED)
    assert torch.equal(other(IMAGE), other.network(IMAGE))


def test_an_ensemble_of_sigmoid_heads_has_the_mean_probability_of_each_channel() -> None:
    members = [network(3, seed) for seed in (0, 1)]
    expected = torch.stack([member(IMAGE).sigmoid() for member in members]).mean(0)
    torch.testing.assert_close(Ensemble(members, sigmoid=True)(IMAGE).sigmoid(), expected)


def test_the_label_answers_with_its_regions() -> None:
    label = torch.tensor([0.0, 1, 2, 3]).view(1, 1, 1, 4)
    found = LabelTeacher(4, NESTED)(label).sigmoid()[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([[0.0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]), atol=1e-6, rtol=0)


def test_the_specification_or_the_record_beside_the_weights_names_the_head(tmp_path: Path) -> None:
    weights = [str(tmp_path / f"{name}.pt") for name in ("a", "b", "old", "bare")]
    for name, record in (("a", {"head": "sigmoid"}), ("b", {"head": "softmax"}), ("old", {"labels": [[0], [1]]})):
        (tmp_path / f"{name}.task.json").write_text(json.dumps(record))

    def head(files: Any, task: str = "sigmoid", **spec: Any) -> str:
        return teacher_head("t", {"architecture": "dynunet", "modalities": ["ct"], "weights": files, **spec}, task)

    assert [head(file) for file in weights] == ["sigmoid", "softmax", "softmax", "sigmoid"]
    assert head(None) == "sigmoid"
    assert head(weights[0], head="softmax") == "softmax"  # the specification wins
    assert [head(file, "softmax") for file in weights[1:]] == ["softmax"] * 3
    with pytest.raises(ValueError, match="The teacher t has a sigmoid head, whose regions do not tell the classes of"):
        head(weights[0], "softmax")
    with pytest.raises(
        ValueError, match=r"The networks of the teacher t have different heads \(.*a\.task\.json, .*b\."
    ):
        head(weights[:2])


def test_teachers_of_both_heads_teach_one_task() -> None:
    small = {"dynunet": {"filters": [2, 4, 4, 4]}}
    spec = {"architecture": "dynunet", "modalities": ["ct"]}
    specs = {"classes": {**spec, "head": "softmax"}, "regions": spec, "control": {"label": True}}
    patch = (32, 32, 16)
    teachers = load_teachers(specs, 3, ["ct"], patch, options=small, regions=NESTED, classes=4)
    image = torch.zeros(1, 1, *patch)
    for name, outputs in (("classes", 4), ("regions", 3)):
        assert teachers[name].network(image).shape[1] == outputs
        assert teachers[name](image).shape == (1, 3, *patch)
    assert teachers["control"](image).shape == (1, 3, *patch)
    with pytest.raises(ValueError, match="The teacher t has the head 'both'"):
        load_teachers({"t": {**spec, "head": "both"}}, 3, ["ct"], patch, regions=NESTED, classes=4)
