# SPDX-License-Identifier: Apache-2.0
"""UXNet: parameter counts, shapes, gradients, its blocks, and the errors for invalid options and inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.networks.uxnet import ChannelLayerNorm, UXBlock, UXNet

SIZE = (32, 32, 48)


def build(seed: int = 0, **options: Any) -> UXNet:
    torch.manual_seed(seed)
    return UXNet(2, 3, **{"features": 4, "depths": (1, 1, 1, 1), **options})


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("features", "millions"), [(48, 53.0), (24, 13.4), (16, 6.0)])
def test_the_parameter_counts_are_the_documented_ones(features, millions):
    with torch.device("meta"):
        network = UXNet(1, 2, features=features)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def test_features_and_tapped_layers_have_the_documented_shapes(image):
    network = build().eval()
    shapes: dict[str, tuple[int, ...]] = {}
    names = [f"{part}{i}" for part in ("encoder", "decoder") for i in range(1, 6)] + ["stages.0", "stages.3"]
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: shapes.update({name: out.shape})
        )
    with torch.no_grad():
        features = network.encode(image)
        logits = network.decode(features)
    at = {stride: tuple(s // stride for s in SIZE) for stride in (1, 2, 4, 8, 16)}
    assert logits.shape == (2, 3, *SIZE)
    assert [f.shape for f in features] == [(2, 4 * stride, *at[stride]) for stride in (1, 2, 4, 8, 16)]
    assert [shapes[f"encoder{i}"] for i in range(1, 6)] == [f.shape for f in features]
    assert [shapes[f"decoder{i}"] for i in range(2, 6)] == [f.shape for f in features[:4]]
    assert shapes["decoder1"] == (2, 4, *SIZE)
    assert shapes["stages.0"] == (2, 4, *at[2])
    assert shapes["stages.3"] == (2, 32, *at[16])


def test_decode_of_encode_equals_forward_and_eval_is_deterministic(image):
    network = build().eval()
    with torch.no_grad():
        first = network(image)
        assert torch.equal(first, network(image))
        assert torch.equal(first, network.decode(network.encode(image)))


def test_every_parameter_receives_a_finite_gradient(image):
    network = build(depths=(2, 2, 2, 2)).train()
    network(image).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_new_block_is_nearly_the_identity():
    torch.manual_seed(0)
    block = UXBlock(8)
    x = torch.randn(1, 8, 6, 6, 6)
    assert 0 < (block(x) - x).abs().max() < 1e-5


def test_only_the_normalisation_of_a_block_mixes_channels():
    torch.manual_seed(0)
    block = UXBlock(4)
    block.norm = torch.nn.Identity()  # type: ignore[assignment]
    x = torch.randn(1, 4, 5, 5, 5)
    changed = x.clone()
    changed[:, 0] += 1.0
    with torch.no_grad():
        block.scale.fill_(1.0)
        torch.testing.assert_close(block(x)[:, 1:], block(changed)[:, 1:])


def test_the_channel_norm_standardises_each_voxel_over_its_channels():
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1).expand(1, 2, 2, 3, 4)
    expected = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(ChannelLayerNorm(2)(x), expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 33, 32, 32), r"divisible by 16, got \[33, 32, 32\]"),
        ((1, 2, 32, 32, 24), r"divisible by 16, got \[32, 32, 24\]"),
        ((1, 2, 16, 16, 16), r"an axis of at least 32 voxels, got \[16, 16, 16\]"),
        ((2, 32, 32, 32), r"needs \(B, C, H, W, D\), got shape \[2, 32, 32, 32\]"),
    ],
)
def test_unsuitable_sizes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(shape))


def test_sizes_divisible_by_16_but_not_by_32_are_accepted():
    with torch.no_grad():
        assert build().eval()(torch.zeros(1, 2, 16, 32, 48)).shape == (1, 3, 16, 32, 48)


@pytest.mark.parametrize("depths", [(2, 2, 2), (2, 0, 2, 2)])
def test_invalid_depths_are_refused(depths):
    with pytest.raises(ValueError, match="depths must be four positive numbers"):
        UXNet(1, 2, features=4, depths=depths)


def test_bfloat16_autocast_is_finite_and_close_to_float32(image):
    network = build().eval()
    with torch.no_grad():
        exact = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(image).float()
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_gives_the_same_logits(image):
    network = build().eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(image), network(image))
