# SPDX-License-Identifier: Apache-2.0
"""Student: shapes, layers that can be tapped, gradients, normalisation, attention and TorchScript."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.networks import Student
from scripts.networks.student import GridAttention

SIZES = {2: (32, 48), 3: (32, 32, 48)}


def build(dims: int = 3, **options: Any) -> Student:
    torch.manual_seed(0)
    return Student(3, 2, **{"features": (8, 8, 16, 16), "spatial_dims": dims, **options})


def images(dims: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, *SIZES[dims], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_logits_have_the_size_of_the_image(dims):
    assert build(dims)(images(dims)).shape == (2, 2, *SIZES[dims])


@pytest.mark.parametrize("dims", [2, 3])
def test_decode_of_encode_equals_forward(dims):
    network, image = build(dims).eval(), images(dims)
    with torch.no_grad():
        features = network.encode(image)
        assert torch.equal(network.decode(features), network(image))
    assert features[0] is image
    grids = [tuple(s // stride for s in SIZES[dims]) for stride in (1, 2, 4, 8, 16)]
    assert [tuple(f.shape) for f in features] == [(2, c, *g) for c, g in zip((3, 8, 8, 16, 16), grids, strict=True)]


def test_the_documented_layers_can_be_tapped():
    network, shapes = build().eval(), {}
    strides = {"encoder.0": 2, "encoder.3": 16, "decoder.0": 8, "decoder.2": 2, "full": 1}
    for name in strides:
        layer = network.get_submodule(name)
        layer.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: out.shape}))
    with torch.no_grad():
        network(images())
    assert {name: tuple(shape[2:]) for name, shape in shapes.items()} == {
        name: tuple(s // stride for s in SIZES[3]) for name, stride in strides.items()
    }


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_reach_every_parameter(dims):
    network = build(dims)
    logits = network(images(dims))
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    without_gradient = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without_gradient == []


@pytest.mark.parametrize("size", [(32, 32, 31), (24, 32, 32), (8, 8, 8)])
def test_a_size_that_is_not_divisible_is_refused(size):
    with pytest.raises(ValueError, match=r"divisible by \[16, 16, 16\]") as error:
        build()(torch.zeros(1, 3, *size))
    assert str(list(size)) in str(error.value)


def test_with_three_stages_sizes_divisible_by_8_are_accepted():
    network = build(features=(8, 8, 8)).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 8, 24, 8)).shape == (1, 2, 8, 24, 8)


THICK = [[2, 2, 1], [2, 2, 1], 2, 1]


def test_thick_slices_are_halved_later() -> None:
    network, image = build(strides=THICK).eval(), torch.zeros(1, 3, 16, 24, 6)
    with torch.no_grad():
        features = network.encode(image)
        assert network(image).shape == (1, 2, 16, 24, 6)
    grids = [(16, 24, 6), (8, 12, 6), (4, 6, 6), (2, 3, 3), (2, 3, 3)]
    assert [tuple(each.shape[2:]) for each in features] == grids
    assert network.divisor == [8, 8, 2]
    with pytest.raises(ValueError, match=r"divisible by \[8, 8, 2\], got \[16, 24, 5\]"):
        network(torch.zeros(1, 3, 16, 24, 5))
    with pytest.raises(ValueError, match=r"strides \(\[2, 2\]\) must name .* for each of the 4 stages"):
        build(strides=[2, 2])


def test_strides_of_2_are_the_default() -> None:
    assert build(strides=[2, 2, [2, 2, 2], 2]).divisor == build().divisor
    default, named = build().state_dict(), build(strides=[2, [2, 2, 2], 2, 2]).state_dict()
    assert list(default) == list(named)
    assert all(torch.equal(default[name], named[name]) for name in default)


@pytest.mark.parametrize(("dims", "options"), [(2, {"norm": "batch"}), (3, {}), (3, {"strides": THICK})])
def test_torchscript_equals_eager(dims, options):
    network = build(dims, **options).eval()
    scripted = torch.jit.script(network)
    with torch.no_grad():
        assert torch.equal(scripted(images(dims)), network(images(dims)))


def test_batch_normalisation_in_eval_is_deterministic_and_treats_samples_separately():
    network = build(norm="batch")
    network(images())  # changes the running statistics
    network.eval()
    with torch.no_grad():
        together, again, alone = network(images()), network(images()), network(images()[:1])
    assert torch.equal(together, again)
    np.testing.assert_allclose(together[:1].numpy(), alone.numpy(), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"norm": ["group", {"num_groups": 2}]}, {"norm": "instance"}])
def test_other_normalisations_treat_samples_separately_and_give_the_same_logits_in_training(options):
    network = build(**options).train()
    with torch.no_grad():
        trained = network(images())
        np.testing.assert_allclose(trained[:1].numpy(), network(images()[:1]).numpy(), atol=1e-5)
        np.testing.assert_allclose(trained.numpy(), network.eval()(images()).numpy(), atol=1e-5)


def test_the_default_has_fewer_than_four_million_parameters():
    with torch.device("meta"):
        network = Student(3, 2)
    assert 2e6 < sum(p.numel() for p in network.parameters()) < 4e6


@pytest.mark.parametrize("grid", [(2, 3), (2, 3, 2)])
def test_each_row_of_the_attention_map_sums_to_1(grid):
    torch.manual_seed(0)
    x = torch.randn(2, 8, *grid)
    features, weights = GridAttention(8, heads=4)(x)
    cells = math.prod(grid)
    assert features.shape == x.shape
    assert weights.shape == (2, 4, cells, cells)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(dim=-1).detach().numpy(), np.ones((2, 4, cells)), atol=1e-6)


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_attention_agrees_with_numpy():
    torch.manual_seed(0)
    block, x = GridAttention(4, heads=2), torch.randn(1, 4, 2, 3)
    w = {name: p.detach().double().numpy() for name, p in block.named_parameters()}  # the norms start as the identity
    tokens = x.double().numpy().reshape(4, 6).T
    q, k, v = np.split(layer_norm(tokens) @ w["qkv.weight"].T + w["qkv.bias"], 3, axis=1)
    maps, mixed = [], []
    for head in (slice(0, 2), slice(2, 4)):
        e = np.exp(q[:, head] @ k[:, head].T / math.sqrt(2))
        maps.append(e / e.sum(axis=1, keepdims=True))
        mixed.append(maps[-1] @ v[:, head])
    tokens = tokens + np.concatenate(mixed, axis=1) @ w["project.weight"].T + w["project.bias"]
    hidden = layer_norm(tokens) @ w["mlp.0.weight"].T + w["mlp.0.bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    tokens = tokens + hidden @ w["mlp.2.weight"].T + w["mlp.2.bias"]
    features, weights = block(x)
    np.testing.assert_allclose(weights[0].detach().numpy(), np.stack(maps), atol=1e-6)
    np.testing.assert_allclose(features.detach().numpy(), tokens.T.reshape(1, 4, 2, 3), atol=1e-6)


def test_channels_that_are_not_divisible_by_the_heads_are_refused():
    with pytest.raises(ValueError, match=r"channels \(6\) must be divisible by heads \(4\)"):
        build(features=(8, 8, 8, 6), norm="batch")


@pytest.mark.parametrize("dims", [2, 3])
def test_selective_fusion_is_at_stride_4_and_its_layers_can_be_tapped(dims):
    network, shapes = build(dims, selective_fusion=True).eval(), {}
    for name in ("fusion.local", "fusion.context"):
        layer = network.get_submodule(name)
        layer.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: out.shape}))
    with torch.no_grad():
        assert network(images(dims)).shape == (2, 2, *SIZES[dims])
    expected = (2, 8, *(s // 4 for s in SIZES[dims]))
    assert {name: tuple(shape) for name, shape in shapes.items()} == {
        "fusion.local": expected,
        "fusion.context": expected,
    }


def test_selective_fusion_only_adds_weights_of_its_own():
    plain, fused = build(), build(selective_fusion=True)
    extra = {name for name in fused.state_dict() if name not in plain.state_dict()}
    assert extra
    assert all(name.startswith("fusion.") for name in extra)
    assert set(plain.state_dict()) <= set(fused.state_dict())


def test_the_student_with_selective_fusion_can_be_scripted():
    network = build(selective_fusion=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(images()), network(images()))
