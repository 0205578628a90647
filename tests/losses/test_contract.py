# SPDX-License-Identifier: Apache-2.0
"""The contract of every loss in ``scripts.losses``. The test file of each loss holds only what is specific to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts import losses


def maps(dims: int, seed: int, channels: int = 4) -> Tensor:
    """Random features or logits ``B C H W [D]``."""
    shape = (2, channels, 8, 6, 8)[: dims + 2]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def single_channel_maps(dims: int, seed: int) -> Tensor:
    """Logits of a sigmoid head."""
    return maps(dims, seed, channels=1)


def salient_maps(dims: int, seed: int) -> Tensor:
    """Features with one salient region, so that the importance of the tokens is not flat."""
    x = maps(dims, seed, channels=8)
    x[:, 0, :3] += 9
    return x


def codes(dims: int, seed: int) -> Tensor:
    """Codes ``B K+1 M`` of an image and two views."""
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def two_class_label(dims: int) -> Tensor:
    """Label ``B 1 H W [D]`` that contains both classes."""
    mask = torch.zeros((2, 1, 8, 6, 8)[: dims + 2])
    mask[:, :, 2:6, 1:4] = 1
    return mask


@dataclass(frozen=True)
class Case:
    """A loss with its options, and the function that creates its inputs from the dimension and a seed."""

    name: str
    inputs: Callable[[int, int], Tensor] = maps
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self) -> nn.Module:
        return getattr(losses, self.name)(**self.options)

    def pair(self, dims: int = 3) -> tuple[Tensor, Tensor]:
        return self.inputs(dims, 0), self.inputs(dims, 1)

    def value(self, student: Tensor, teacher: Tensor, dims: int = 3) -> Tensor:
        return self.loss()(student, teacher, *self.label(dims))

    def label(self, dims: int) -> list[Tensor]:
        """The label, if the loss takes one."""
        return [two_class_label(dims)] if "label" in inspect.signature(self.loss().forward).parameters else []


# Every public class of the package; the first test fails if one is missing.
CASES = [
    Case("AttentionMapLoss"),
    Case("ChannelRelationLoss"),
    Case("ChannelWiseDivergence"),
    Case("ContourletTextureLoss"),
    Case("ContrastiveGraphLoss", inputs=codes),
    Case("CrossImageRelationLoss"),
    Case("DISTLoss"),
    Case("FeatureHintLoss"),
    Case("HierarchicalContextLoss"),
    Case("IntraClassVariationLoss"),
    Case("MemoryRelationLoss", options={"cells": 64}),  # no cell is left out at random
    Case("MultiScalePriorLoss"),
    Case("PixelRelationLoss"),
    Case("RegionAffinityLoss"),
    Case("SoftPredictionLoss"),
    Case("TokenRankingLoss", inputs=salient_maps),
]
# Options and inputs that take another path through the code.
VARIANTS = [
    Case("AttentionMapLoss", options={"norm": "l1"}),
    Case("ContourletTextureLoss", options={"statistic": "subband_mse"}),
    Case("DISTLoss", inputs=single_channel_maps),
    Case("DISTLoss", options={"per_sample": True}),
    Case("MemoryRelationLoss", options={"kind": "region"}),
    Case("SoftPredictionLoss", inputs=single_channel_maps),
]
NAMES = [case.name for case in CASES]
NEED_EQUAL_CHANNELS = {
    "ChannelRelationLoss", "ChannelWiseDivergence", "FeatureHintLoss", "HierarchicalContextLoss", "MemoryRelationLoss",
    "MultiScalePriorLoss",
}  # fmt: skip
NEED_EQUAL_SHAPES = {"SoftPredictionLoss", "DISTLoss"}
# They compare the samples of a batch with each other.
OVER_THE_BATCH = {"CrossImageRelationLoss", "DISTLoss", "MemoryRelationLoss"}


def case_id(case: Case) -> str:
    variant = [*map(str, case.options.values()), *(["sigmoid"] if case.inputs is single_channel_maps else [])]
    return "-".join([case.name, *variant])


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=case_id)


def test_every_loss_of_the_package_has_a_case() -> None:
    public = {name for name, value in vars(losses).items() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert public - {"SegmentationLoss"} == set(NAMES)  # which is the supervised loss


@pytest.mark.parametrize("name", NAMES)
def test_it_has_no_parameters(name: str) -> None:
    assert not list(getattr(losses, name)().parameters())


@pytest.mark.parametrize("dims", [2, 3])
@each(CASES + VARIANTS)
def test_it_returns_a_positive_float32_scalar_in_2d_and_3d(case: Case, dims: int) -> None:
    value = case.value(*case.pair(dims), dims=dims)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value > 0


@pytest.mark.parametrize("dims", [2, 3])
@each([case for case in CASES + VARIANTS if case.name != "TokenRankingLoss"])  # its minimum is not 0
def test_value_and_gradient_are_zero_if_student_and_teacher_agree(case: Case, dims: int) -> None:
    student, _ = case.pair(dims)
    value = case.value(student.requires_grad_(), student.detach().clone(), dims=dims)
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


@each(CASES)
def test_only_the_student_receives_a_gradient(case: Case) -> None:
    student, teacher = (x.requires_grad_() for x in case.pair())
    case.value(student, teacher).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@each(CASES)
def test_a_step_against_the_gradient_lowers_the_value(case: Case) -> None:
    student, teacher = case.pair()
    student.requires_grad_()
    before = case.value(student, teacher)
    (gradient,) = torch.autograd.grad(before, student)
    step = 1e-2 * gradient.norm().reciprocal()
    assert case.value((student - step * gradient).detach(), teacher) < before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each(CASES + VARIANTS)
def test_half_precision_inputs_are_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    # The inputs are rounded first, so that both calls get the same numbers. 1000 squared exceeds the float16 range.
    student, teacher = ((300 * x).to(dtype) for x in case.pair())
    value = case.value(student.requires_grad_(), teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(case.value(student.float(), teacher.float()).item(), rel=1e-5)
    assert torch.isfinite(student.grad).all()


@each(CASES)
def test_autocast_does_not_change_the_value(case: Case) -> None:
    student, teacher = case.pair()
    expected = case.value(student, teacher).item()
    with torch.autocast("cpu", torch.bfloat16):
        value = case.value(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-6)


@each([case for case in CASES + VARIANTS if case.options.get("per_sample") or case.name not in OVER_THE_BATCH])
def test_the_value_of_a_batch_is_the_mean_over_its_samples(case: Case) -> None:
    inputs, loss = [*case.pair(), *case.label(3)], case.loss()
    single = [loss(*(x[i : i + 1] for x in inputs)) for i in (0, 1)]
    assert loss(*inputs).item() == pytest.approx(torch.stack(single).mean().item(), rel=1e-5)


@each(CASES)
def test_different_batch_sizes_are_refused_with_both_shapes(case: Case) -> None:
    student, teacher = case.pair()
    with pytest.raises(ValueError, match=r"Student \(2, .* and teacher \(3, "):
        case.value(student, torch.cat([teacher, teacher[:1]]))


@pytest.mark.parametrize("name", NAMES)
def test_different_numbers_of_dimensions_are_refused_with_both_shapes(name: str) -> None:
    for shape, text in [((2, 4, 8, 6), r"\(2, 4, 8, 6\)"), ((2, 4, 8), r"\(2, 4, 8\)")]:
        with pytest.raises(ValueError, match=rf"Student \(2, 4, 8, 6, 8\) and teacher {text}"):
            Case(name).value(maps(3, 0), torch.zeros(shape))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ContrastiveGraphLoss"}))
def test_different_numbers_of_channels_work_or_are_refused_with_both_shapes(name: str) -> None:
    student, teacher = maps(3, 0), maps(3, 1, channels=5)
    if name not in NEED_EQUAL_CHANNELS | NEED_EQUAL_SHAPES:
        assert torch.isfinite(Case(name).value(student, teacher))
        return
    shapes = r"Student \(2, 4, 8, 6, 8\) and teacher \(2, 5, 8, 6, 8\)"
    remedy = "number of channels: add a ChannelAdapter for this tap" if name in NEED_EQUAL_CHANNELS else "shape"
    with pytest.raises(ValueError, match=f"{shapes} must have the same {remedy}"):
        Case(name).value(student, teacher)


@pytest.mark.parametrize("name", [case.name for case in CASES if hasattr(case.loss(), "temperature")])
def test_a_temperature_that_is_not_positive_is_refused(name: str) -> None:
    for temperature in (0, -1.0):
        with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
            getattr(losses, name)(temperature=temperature)


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_contains_the_source_and_a_config(name: str) -> None:
    text = getattr(losses, name).__doc__
    assert "Source:" in text
    assert "[ours]" in text or "[paper]" in text
    assert f'"_target_": "scripts.losses.{name}"' in text
