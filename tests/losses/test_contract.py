# SPDX-License-Identifier: Apache-2.0
"""What every loss of scripts.losses has to fulfil, whatever it computes; what is particular stands in its own test."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts import losses

Make = Callable[..., Tensor]


def maps(dims: int, seed: int, channels: int = 4) -> Tensor:
    """Features or logits ``B C H W [D]`` from a seed."""
    shape = (2, channels, 8, 6, 8)[: dims + 2]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def landmarks(dims: int, seed: int) -> Tensor:
    """Features with a region that stands out, so that the tokens' importance is not flat."""
    x = maps(dims, seed, channels=8)
    x[:, 0, :3] += 9
    return x


def codes(dims: int, seed: int, channels: int = 4) -> Tensor:
    """Codes ``B K+1 M``, of an image and two views."""
    return torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(seed))


def label(dims: int) -> Tensor:
    """Two classes, both present, ``B 1 H W [D]``."""
    mask = torch.zeros((2, 1, 8, 6, 8)[: dims + 2])
    mask[:, :, 2:6, 1:4] = 1
    return mask


# Every public class of the package, and what it compares; a class that is missing here fails a test below.
LOSSES: dict[str, tuple[Make, bool]] = {
    "AttentionMapLoss": (maps, True),
    "ChannelRelationLoss": (maps, True),
    "ChannelWiseDivergence": (maps, True),
    "ContourletTextureLoss": (maps, True),
    "ContrastiveGraphLoss": (codes, True),
    "CrossImageRelationLoss": (maps, True),
    "DISTLoss": (maps, True),
    "FeatureHintLoss": (maps, True),
    "HierarchicalContextLoss": (maps, True),
    "IntraClassVariationLoss": (maps, True),
    "MultiScalePriorLoss": (maps, True),
    "PixelRelationLoss": (maps, True),
    "RegionAffinityLoss": (maps, True),
    "SoftPredictionLoss": (maps, True),
    "TokenRankingLoss": (landmarks, False),  # its minimum is not 0
}
NAMES = sorted(LOSSES)


def call(name: str, student: Tensor, teacher: Tensor, dims: int = 3, **options: Any) -> Tensor:
    loss = getattr(losses, name)(**options)
    further = [label(dims)] if len(inspect.signature(loss.forward).parameters) == 3 else []
    return loss(student, teacher, *further)


def pair(name: str, dims: int = 3) -> tuple[Tensor, Tensor]:
    make, _ = LOSSES[name]
    return make(dims, 0), make(dims, 1)


def test_every_loss_of_the_package_is_listed_here() -> None:
    public = {name for name, value in vars(losses).items() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert public == set(LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_no_parameters(name: str) -> None:
    assert not list(getattr(losses, name)().parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_it_gives_a_positive_scalar_in_2d_and_3d(name: str, dims: int) -> None:
    value = call(name, *pair(name, dims), dims=dims)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value > 0


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", [name for name in NAMES if LOSSES[name][1]])
def test_it_is_zero_where_student_and_teacher_agree(name: str, dims: int) -> None:
    student, _ = pair(name, dims)
    assert call(name, student, student.clone(), dims=dims).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_receives_a_gradient(name: str) -> None:
    student, teacher = (x.requires_grad_() for x in pair(name))
    call(name, student, teacher).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_following_the_gradient_lowers_it(name: str) -> None:
    student, teacher = pair(name)
    student.requires_grad_()
    before = call(name, student, teacher)
    (slope,) = torch.autograd.grad(before, student)
    step = 1e-2 * slope.norm().reciprocal()
    assert call(name, (student - step * slope).detach(), teacher) < before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    # Rounded first, so that the same numbers enter both sides; 1000 squared is beyond the range of float16.
    student, teacher = ((300 * x).to(dtype) for x in pair(name))
    value = call(name, student.requires_grad_(), teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(call(name, student.float(), teacher.float()).item(), rel=1e-5)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_change_the_value(name: str) -> None:
    student, teacher = pair(name)
    expected = call(name, student, teacher).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert call(name, student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_mean_of_its_samples(name: str) -> None:
    if name == "CrossImageRelationLoss":
        pytest.skip("it relates the images of a batch to each other")
    student, teacher = pair(name)
    loss = getattr(losses, name)()
    further = [label(3)] if len(inspect.signature(loss.forward).parameters) == 3 else []
    each = [loss(*(x[i : i + 1] for x in (student, teacher, *further))) for i in (0, 1)]
    assert loss(student, teacher, *further).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_different_size_are_refused_by_naming_both_shapes(name: str) -> None:
    student, teacher = pair(name)
    teacher = torch.cat([teacher, teacher[:1]])
    with pytest.raises(ValueError, match=r"\(2, .*\(3, |\[2, .*\[3, "):
        call(name, student, teacher)


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_tells_the_source_and_a_config(name: str) -> None:
    text = getattr(losses, name).__doc__
    assert "Source:" in text
    assert "[ours]" in text or "[paper]" in text
    assert f'"_target_": "scripts.losses.{name}"' in text
