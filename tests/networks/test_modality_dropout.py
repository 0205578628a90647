# SPDX-License-Identifier: Apache-2.0
"""ModalityDropout: probabilities, whole channels only, at least one modality is kept, identity in eval()."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from scripts.networks import ModalityDropout, Student


def images(batch: int = 4, channels: int = 3, dims: int = 3) -> Tensor:
    return torch.randn(batch, channels, *(8, 6, 4)[:dims], generator=torch.Generator().manual_seed(1))


def present_channels(image: Tensor) -> Tensor:
    return image.ne(0).flatten(2).any(dim=2)


@pytest.mark.parametrize("dims", [2, 3])
def test_whole_channels_are_dropped_and_the_others_are_unchanged(dims: int) -> None:
    torch.manual_seed(0)
    image = images(64, dims=dims)
    before, out = image.clone(), ModalityDropout(0.5).train()(image)
    assert out.shape == image.shape
    assert 0 < present_channels(out).sum() < 64 * 3
    assert torch.equal(out[present_channels(out)], image[present_channels(out)])
    assert torch.equal(image, before)


@pytest.mark.parametrize("module", [ModalityDropout(0.9).eval(), ModalityDropout(0.0).train()])
def test_in_eval_or_with_probability_0_it_is_the_identity_and_uses_no_random_numbers(module: ModalityDropout) -> None:
    state = torch.get_rng_state()
    image = images()
    assert module(image) is image
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_every_set_of_modalities_is_kept_with_the_documented_probability(p: float, present: tuple[int, ...]) -> None:
    draws, n = 20_000, len(present)
    image = torch.zeros(draws, 3, 1, 1)
    image[:, list(present)] = 1.0
    torch.manual_seed(0)
    kept = present_channels(ModalityDropout(p).train()(image))
    total = 0
    for k in range(1, n + 1):
        for subset in itertools.combinations(present, k):
            expected = (1 - p) ** k * p ** (n - k) + (p**n / n if k == 1 else 0.0)
            row = torch.tensor([channel in subset for channel in range(3)])
            count = int((kept == row).all(dim=1).sum())
            # Five standard deviations of a binomial count: exceeded by chance less than once in a million.
            assert abs(count - draws * expected) <= 5 * math.sqrt(draws * expected * (1 - expected)) + 1e-6, subset
            total += count
    assert total == draws  # at least one modality is always kept, and an absent one never appears


def test_the_samples_of_a_batch_are_independent() -> None:
    draws, p = 20_000, 0.5
    torch.manual_seed(0)
    both = present_channels(ModalityDropout(p).train()(torch.ones(2 * draws, 2, 1, 1)))[:, 0].view(draws, 2)
    each = 1 - p + p**2 / 2
    sigma = math.sqrt(each**2 * (1 - each**2) / draws)
    assert abs(float(both.all(dim=1).float().mean()) - each**2) < 5 * sigma


def test_the_global_seed_determines_the_dropped_modalities() -> None:
    network, image = ModalityDropout(0.5).train(), images(32)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(network(image))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_gradients_reach_the_kept_channels_only() -> None:
    torch.manual_seed(0)
    image = images(16).requires_grad_()
    out = ModalityDropout(0.5).train()(image)
    out.sum().backward()
    expected = present_channels(out.detach())[..., None, None, None].expand_as(image).float()
    assert image.grad is not None
    assert torch.equal(image.grad, expected)


def test_an_image_of_zeros_is_unchanged() -> None:
    assert torch.equal(ModalityDropout(0.9).train()(torch.zeros(2, 3, 4, 4, 4)), torch.zeros(2, 3, 4, 4, 4))


def test_a_dropped_channel_is_zero_even_if_it_contained_infinity() -> None:
    torch.manual_seed(0)
    image = torch.ones(64, 2, 2, 2)
    image[:, 0] = math.inf
    out = ModalityDropout(0.9).train()(image)
    assert set(out[:, 0].unique().tolist()) == {0.0, math.inf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_and_the_memory_format_are_kept(dtype: torch.dtype) -> None:
    image = images().to(dtype, memory_format=torch.channels_last_3d)
    out = ModalityDropout(0.5).train()(image)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("training", [True, False])
def test_torchscript_equals_eager(training: bool) -> None:
    network, outputs = ModalityDropout(0.5).train(training), []
    for module in (network, torch.jit.script(network)):
        torch.manual_seed(0)
        outputs.append(module(images()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("probability", [-0.1, 1.0, math.nan])
def test_an_invalid_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got"):
        ModalityDropout(probability)


def student(probability: float, dims: int = 3) -> Student:
    torch.manual_seed(0)
    return Student(3, 2, (8, 8), modality_dropout=probability, spatial_dims=dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_stem_and_full_resolution_skip_of_the_student_get_the_same_dropped_image(dims: int) -> None:
    network, image = student(0.7, dims).train(), torch.randn(8, 3, *(8, 8, 8)[:dims])
    stem_inputs: list[Tensor] = []
    network.encoder[0].register_forward_pre_hook(lambda _module, inputs: stem_inputs.append(inputs[0]))
    features = network.encode(image)
    assert features[0] is stem_inputs[0]
    dropped = ~present_channels(features[0])
    assert dropped.sum() > 0
    assert not dropped.all(dim=1).any()


def test_in_eval_the_student_has_the_same_weights_and_logits_as_without_dropout() -> None:
    plain, dropping, image = student(0.0).eval(), student(0.5).eval(), torch.randn(1, 3, 8, 8, 8)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(image), dropping(image))
        torch.testing.assert_close(torch.jit.script(dropping)(image), plain(image))
