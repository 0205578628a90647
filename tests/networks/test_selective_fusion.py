# SPDX-License-Identifier: Apache-2.0
"""SelectiveFusion against a float64 NumPy computation from its weights."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scripts.networks.selective_fusion import SelectiveFusion

SIZES = {2: (6, 5), 3: (4, 5, 6)}


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(channels: int, dims: int) -> SelectiveFusion:
    """Replace every parameter by random numbers."""
    block = SelectiveFusion(channels, dims)
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.copy_(0.5 * normal(tuple(p.shape), 100 + i))
    return block


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def depthwise(x: np.ndarray, conv: nn.Conv2d | nn.Conv3d, dilation: int) -> np.ndarray:
    """Depthwise 3^n convolution with zero padding."""
    weight, out = array(conv.weight), np.zeros_like(x)
    padded = np.pad(x, [(0, 0), (0, 0), *[(dilation, dilation)] * (x.ndim - 2)])
    for c, *offset in product(range(x.shape[1]), *[range(3)] * (x.ndim - 2)):
        window = tuple(slice(a * dilation, a * dilation + n) for a, n in zip(offset, x.shape[2:], strict=True))
        out[:, c] += weight[(c, 0, *offset)] * padded[(slice(None), c, *window)]
    return out + array(conv.bias).reshape(1, -1, *[1] * (x.ndim - 2))


def selection_weights(block: SelectiveFusion, both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    linear, norm = block.squeeze[0], block.squeeze[1]
    z = both.reshape(*both.shape[:2], -1).mean(2) @ array(linear.weight).T
    z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
    z = np.maximum(z * array(norm.weight) + array(norm.bias), 0)
    a, b = (np.exp(z @ array(h.weight).T + array(h.bias)) for h in (block.prefer_local, block.prefer_context))
    return a / (a + b), b / (a + b)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [3, 8])
def test_it_agrees_with_numpy(dims, channels):
    block, x = build(channels, dims), normal((2, channels, *SIZES[dims]))
    local, context = depthwise(array(x), block.local, 1), depthwise(array(x), block.context, 3)
    a, b = (w.reshape(2, channels, *[1] * dims) for w in selection_weights(block, local + context))
    mixed = np.moveaxis(a * local + b * context, 1, -1) @ array(block.project.weight).reshape(channels, channels).T
    expected = array(x) + np.moveaxis(mixed + array(block.project.bias), -1, 1)
    np.testing.assert_allclose(array(block(x)), expected, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_local_and_context_can_be_tapped_by_name(dims):
    block, x, outputs = build(4, dims), normal((2, 4, *SIZES[dims])), {}
    for name in ("local", "context"):
        block.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
    out = block(x)
    assert out.shape == x.shape
    for name, dilation in (("local", 1), ("context", 3)):
        np.testing.assert_allclose(array(outputs[name]), depthwise(array(x), getattr(block, name), dilation), atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_weights_of_local_and_context_sum_to_1_in_every_channel(dims):
    block, local, context = build(5, dims), normal((3, 5, *SIZES[dims]), 1), normal((3, 5, *SIZES[dims]), 2)
    a, b = block.select(local, context)
    assert a.shape == b.shape == (3, 5)
    np.testing.assert_allclose(array(a + b), 1.0, atol=1e-6)
    # The weights differ between channels and samples: this is a selection, not a constant.
    assert a.std(0).min() > 0.001
    assert a.std(1).min() > 0.001
    for actual, expected in zip((a, b), selection_weights(block, array(local + context)), strict=True):
        np.testing.assert_allclose(array(actual), expected, atol=1e-6)


@pytest.mark.parametrize(("preferred", "other"), [("local", "context"), ("context", "local")])
def test_a_strong_preference_selects_one_of_them(preferred, other):
    block, x = build(4, 3), normal((2, 4, *SIZES[3]))
    nn.init.constant_(block.get_submodule(f"prefer_{preferred}").bias, 100.0)
    nn.init.constant_(block.get_submodule(f"prefer_{other}").bias, -100.0)
    expected = x + block.project(block.get_submodule(preferred)(x))
    np.testing.assert_allclose(array(block(x)), array(expected), atol=1e-5)


@pytest.mark.parametrize(("layer", "step"), [("local", 1), ("context", 3)])
def test_local_and_context_read_their_own_channel_at_their_own_distance(layer, step):
    convolution, x = build(2, 2).get_submodule(layer), torch.zeros(1, 2, 9, 9)
    x[0, 0, 4, 4] = 1.0
    reached = (convolution(x) - convolution(torch.zeros_like(x))).abs() > 0
    around = {4 - step, 4, 4 + step}
    assert {tuple(i) for i in reached[0, 0].nonzero().tolist()} == set(product(around, around))
    assert not reached[0, 1].any()


@pytest.mark.parametrize(("channels", "width"), [(4, 32), (512, 32), (528, 33), (640, 40)])
def test_the_bottleneck_has_a_sixteenth_of_the_channels_but_at_least_32(channels, width):
    assert SelectiveFusion(channels, 2).squeeze[0].out_features == width


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_reach_every_parameter(dims):
    block = SelectiveFusion(6, dims)
    out = block(normal((2, 6, *SIZES[dims])))
    (out * normal(tuple(out.shape), 1)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("dims", [2, 3])
def test_torchscript_gives_the_same_values(dims):
    block = build(4, dims).eval()
    scripted = torch.jit.script(block)
    for batch, extra in ((1, 0), (3, 2)):
        x = normal((batch, 4, *(n + extra for n in SIZES[dims])))
        torch.testing.assert_close(scripted(x), block(x), rtol=0, atol=1e-6)
