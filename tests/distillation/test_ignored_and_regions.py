# SPDX-License-Identifier: Apache-2.0
"""Terms of a distillation: nothing of ignored voxels, and every channel of a sigmoid head on its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scripts.distillation.distiller import Distiller
from scripts.distillation.loss import DistillationLoss
from scripts.distillation.teacher_weighting import teacher_weights
from scripts.losses import (
    NO_CLASS,
    ChannelWiseDivergence,
    DISTLoss,
    IntraClassVariationLoss,
    MemoryRelationLoss,
    RegionAffinityLoss,
    SegmentationLoss,
    SoftPredictionLoss,
)
from scripts.runtime.regions import IGNORED

NESTED = [[1, 2, 3], [1, 3], [3]]
SHAPE = (6, 5, 4)
ON_LOGITS = {
    "kl": SoftPredictionLoss,
    "dist": DISTLoss,
    "per sample": lambda: DISTLoss(per_sample=True),
    "cwd": ChannelWiseDivergence,
    "classes": IntraClassVariationLoss,
}


class Net(nn.Conv3d):
    def __init__(self, channels: int, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(1, channels, 1)
        self.channels, self.sha256, self.network = [0], None, nn.Identity()


def logits(channels: int, seed: int) -> Tensor:
    return 2 * torch.randn(2, channels, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(ignored: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    label = torch.randint(4, (2, 1, *SHAPE), generator=generator).float()
    label[torch.rand(label.shape, generator=generator) < 0.3 * ignored] = IGNORED
    return label


def loss_of(name: str, channels: int, regions: Any, **options: Any) -> DistillationLoss:
    distiller = Distiller(Net(channels, 0), {"a": Net(channels, 1), "b": Net(channels, 2)})
    term = {"tap": "logits", "weight": 1.0, "loss": ON_LOGITS[name]()}
    return DistillationLoss(SegmentationLoss(regions), distiller, {name: term}, regions=regions, **options)


def outputs(student: Tensor, available: Any = ((True, True), (True, False))) -> dict[str, Tensor]:
    channels = student.shape[1]
    teachers = {"a.logits": logits(channels, 1), "b.logits": logits(channels, 2)}
    return {"logits": student, **teachers, "available": torch.tensor(available)}


@pytest.mark.parametrize("regions", [None, NESTED])
@pytest.mark.parametrize("weighting", ["mean", "confidence", "entropy"])
@pytest.mark.parametrize(
    ("name", "mixing"),
    [*((name, "loss") for name in ON_LOGITS), *((name, "probability") for name in ("kl", "dist", "per sample"))],
)
def test_the_students_logits_at_ignored_voxels_change_no_loss(
    name: str, weighting: str, mixing: str, regions: Any
) -> None:
    channels, label = 4 if regions is None else 3, labels()
    loss = loss_of(name, channels, regions, weighting=weighting, mixing=mixing)
    student = logits(channels, 0)
    ignored = (label == IGNORED).expand_as(student)
    other = torch.where(ignored, logits(channels, 5), student)
    values = [loss(outputs(each.requires_grad_()), label) for each in (student, other)]
    assert values[0].item() == values[1].item()
    (gradient,) = torch.autograd.grad(values[0], student)
    assert not gradient[ignored].any()
    assert gradient[~ignored].any()


@pytest.mark.parametrize("regions", [None, NESTED])
@pytest.mark.parametrize("name", ["kl", "dist", "per sample", "cwd"])
def test_a_term_on_logits_is_that_of_the_counted_voxels_alone(name: str, regions: Any) -> None:
    """The upper part of both samples is ignored, so that the rest is a smaller grid."""
    channels = 4 if regions is None else 3
    label = labels(ignored=False)
    label[:, :, :2] = IGNORED
    student = logits(channels, 0).requires_grad_()
    data = outputs(student, available=((True, False), (True, False)))
    value = loss_of(name, channels, regions).terms(data, label)[name]
    smaller = {key: each[:, :, 2:].contiguous() for key, each in data.items() if key != "available"}
    expected = loss_of(name, channels, regions).terms({**smaller, "available": data["available"]}, label[:, :, 2:])[
        name
    ]
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    one_sample = label.clone()
    one_sample[1] = IGNORED
    found = loss_of(name, channels, regions).terms(data, one_sample)[name]
    alone = {key: each[:1] for key, each in data.items()}
    torch.testing.assert_close(found, loss_of(name, channels, regions).terms(alone, label[:1])[name])
    nothing = loss_of(name, channels, regions).terms(data, torch.full_like(label, IGNORED))[name]
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, student)[0].any()


def test_a_term_that_takes_the_label_finds_no_class_at_ignored_voxels() -> None:
    seen: list[Tensor] = []

    class Noting(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
            seen.append(label)
            return (student - teacher).square().mean()

    distiller, label = Distiller(Net(4, 0), {"a": Net(4, 1)}), labels()
    data = {"logits": logits(4, 0), "a.logits": logits(4, 1), "available": torch.ones(2, 1, dtype=torch.bool)}
    term = {"tap": "logits", "weight": 1.0, "loss": Noting()}
    DistillationLoss(SegmentationLoss(), distiller, {"noting": term})(data, label)
    assert torch.equal(seen[0], torch.where(label == IGNORED, -torch.ones(()), label))


@pytest.mark.parametrize("kind", [IntraClassVariationLoss, RegionAffinityLoss, MemoryRelationLoss])
def test_voxels_without_a_class_are_of_no_region_of_the_label(kind: Any) -> None:
    """Each cell is a voxel here, so those cells may hold anything."""
    label = labels()
    no_class = label.masked_fill(label == IGNORED, NO_CLASS)
    student, teacher = logits(4, 0)[..., :4, :4, :4], logits(4, 1)[..., :4, :4, :4]
    no_class = no_class[..., :4, :4, :4]
    outside = (no_class < 0).expand_as(student)
    other = torch.where(outside, logits(4, 5)[..., :4, :4, :4], student)
    if kind is MemoryRelationLoss:
        loss = kind(cells=64)
        loss(student, teacher, no_class)
        assert sorted(loss.queues[""]) == [0, 1, 2, 3]
        assert sum(map(len, loss.queues[""].values())) == int((no_class >= 0).sum())
    else:
        assert kind()(student, teacher, no_class).item() == pytest.approx(kind()(other, teacher, no_class).item())
    assert kind()(student, teacher, torch.full_like(no_class, NO_CLASS)).isfinite()


def bernoulli_kl(student: Tensor, teacher: Tensor) -> np.ndarray:
    p, q = (1 / (1 + np.exp(-z.double().numpy())) for z in (teacher, student))
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


@pytest.mark.parametrize("channels", [1, 3])
def test_predictions_of_a_sigmoid_head_are_compared_channel_by_channel(channels: int) -> None:
    regions = NESTED[:channels]
    student, label = logits(channels, 0), labels(ignored=False)
    data = outputs(student, available=((True, False), (True, False)))
    teacher = data["a.logits"]
    terms = loss_of("kl", channels, regions).terms(data, label)
    assert terms["kl"].item() == pytest.approx(bernoulli_kl(student, teacher).mean(), rel=1e-5)
    terms = loss_of("dist", channels, regions).terms(data, label)
    expected = []
    for channel in range(channels):
        s, t = (z[:, channel].sigmoid().double().numpy().ravel() for z in (student, teacher))
        differ = ((s > 0.5) != (t > 0.5)).mean()  # of two answers, the correlation is 1 or -1
        expected.append(1 - np.corrcoef(s, t)[0, 1] + 2 * differ)
    assert terms["dist"].item() == pytest.approx(np.mean(expected), rel=1e-5)
    terms = loss_of("cwd", channels, regions).terms(data, label)
    assert terms["cwd"].item() == pytest.approx(ChannelWiseDivergence()(student, teacher).item(), rel=1e-5)


def test_the_mixture_of_sigmoid_teachers_is_the_mean_probability_of_each_channel() -> None:
    student, label = logits(3, 0), labels(ignored=False)
    data = outputs(student, available=((True, True), (True, True)))
    mean = torch.stack([data["a.logits"].sigmoid(), data["b.logits"].sigmoid()]).mean(0)
    found = loss_of("kl", 3, NESTED, mixing="probability").terms(data, label)["kl"]
    assert found.item() == pytest.approx(bernoulli_kl(student, mean.logit()).mean(), rel=1e-4)


@pytest.mark.parametrize("mode", ["confidence", "entropy"])
def test_teachers_of_regions_are_weighted_by_their_counted_voxels(mode: str) -> None:
    teachers = [logits(3, 1).double(), logits(3, 2).double()]
    label = labels()
    no_class = label.masked_fill(label == IGNORED, -1)
    weights = teacher_weights(mode, teachers, torch.ones(2, 2, dtype=torch.bool), no_class, regions=NESTED)
    measured = np.zeros((2, 2))
    for k, teacher in enumerate(teachers):
        p = teacher.sigmoid().numpy()
        for sample in range(2):
            counted = (label[sample, 0] != IGNORED).numpy()
            inside = np.stack([np.isin(label[sample, 0].numpy(), members) for members in NESTED])
            if mode == "confidence":
                values = -np.log(np.where(inside, p[sample], 1 - p[sample]))[:, counted]
            else:
                values = -(p[sample] * np.log(p[sample]) + (1 - p[sample]) * np.log(1 - p[sample]))
            measured[sample, k] = values.mean()
    e = np.exp(measured if mode == "confidence" else -measured)
    share = e / e.sum(1, keepdims=True)
    np.testing.assert_allclose(weights.numpy(), 1 - share if mode == "confidence" else share, atol=1e-5)


class LabelledDistance(nn.Module):
    """The mean squared difference at the voxels of class 1; the order of the voxels does not matter."""

    def __init__(self, voxels_of: str) -> None:
        super().__init__()
        self.voxels_of = voxels_of

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        inside = label == 1
        return ((student - teacher).square() * inside).sum() / (inside.sum() * student.shape[1])


@pytest.mark.parametrize("voxels_of", ["batch", "sample"])
def test_the_label_of_a_loss_is_reduced_with_its_logits(voxels_of: str) -> None:
    distiller = Distiller(Net(4, 0), {"a": Net(4, 1)})
    term = {"tap": "logits", "weight": 1.0, "loss": LabelledDistance(voxels_of)}
    loss, label = DistillationLoss(SegmentationLoss(), distiller, {"own": term}), labels()
    found = outputs(logits(4, 5), available=((True,), (True,)))
    value = loss.terms(found, label)["own"].numpy()
    error = (found["logits"] - found["a.logits"]).square().mean(dim=1, keepdim=True).numpy()
    inside = (label == 1).numpy()
    means = [error[i : i + 1][inside[i : i + 1]].mean() for i in range(2)]
    expected = error[inside].mean() if voxels_of == "batch" else np.mean(means)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
