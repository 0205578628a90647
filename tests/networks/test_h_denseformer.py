# SPDX-License-Identifier: Apache-2.0
"""HDenseFormer: parameter count, shapes, gradients, and the errors for invalid options and inputs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.networks.h_denseformer import HDenseFormer

SIZE = (32, 32, 48)


def build(seed: int = 0, **options: Any) -> HDenseFormer:
    torch.manual_seed(seed)
    return HDenseFormer(2, 3, **{"img_size": SIZE, "features": 4, "depth": 8, **options})


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_default_for_two_modalities_has_the_published_3_65_million_parameters(deep_supervision):
    network = HDenseFormer(2, 2, img_size=96, deep_supervision=deep_supervision)
    count = sum(p.numel() for p in network.parameters())
    assert count == pytest.approx(3.65e6, rel=0.02)
    # The positions, 64 channels per patch and modality, are the only part that depends on the image size.
    positions = sum(p.numel() for name, p in network.named_parameters() if "position_embeddings" in name)
    assert positions == 2 * 6**3 * 64


def test_default_forward_gives_full_resolution_logits_in_train_and_eval(image):
    network = build()
    for mode in (True, False):
        logits = network.train(mode)(image)
        assert isinstance(logits, Tensor)
        assert logits.shape == (2, 3, *SIZE)


def test_features_and_tapped_layers_have_the_documented_shapes(image):
    network = build().eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("encoder1", "encoder2", "encoder3", "encoder4", "decoder3", "decoder2", "decoder1", "paths.1"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: shapes.update({name: out.shape})
        )
    with torch.no_grad():
        features = network.encode(image)
        network.decode(features)
    at = {stride: tuple(s // stride for s in SIZE) for stride in (1, 2, 4, 8, 16)}
    assert [f.shape for f in features] == [(2, 4, *at[1]), (2, 8, *at[2]), (2, 16, *at[4]), (2, 32, *at[8])]
    assert [shapes[f"encoder{i}"] for i in (1, 2, 3, 4)] == [f.shape for f in features]
    assert [shapes[f"decoder{i}"] for i in (1, 2, 3)] == [f.shape for f in features[:3]]
    assert shapes["paths.1"] == (2, 16, *at[16])


def test_decode_of_encode_equals_forward_and_eval_is_deterministic(image):
    network = build().eval()
    with torch.no_grad():
        first = network(image)
        assert torch.equal(first, network(image))
        assert torch.equal(first, network.decode(network.encode(image)))


def test_dropout_is_active_in_training(image):
    network = build().train()
    with torch.no_grad():
        assert not torch.equal(network(image), network(image))


def test_the_deepest_tap_contains_the_transformer_embedding(image):
    network = build().eval()
    with torch.no_grad():
        before = network.encode(image)[3]
        network.embed4[0].adn.N.bias += 1.0  # changes the embedding only
        assert not torch.allclose(before, network.encode(image)[3])


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_every_parameter_receives_a_finite_gradient(image, deep_supervision):
    network = build(deep_supervision=deep_supervision).train()
    logits = network(image)
    outputs = logits if isinstance(logits, list) else [logits]
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_deep_supervision_returns_four_scales_finest_first_in_training_only(image):
    network = build(deep_supervision=True)
    scales = network.train()(image)
    assert [tuple(s.shape) for s in scales] == [(2, 3, *(n // 2**i for n in SIZE)) for i in range(4)]
    assert isinstance(network.eval()(image), Tensor)
    assert not any("auxiliary" in name for name, _ in build().named_parameters())


def test_each_path_reads_its_own_modality_only(image):
    network = build().eval()
    embeddings: dict[int, list[Tensor]] = {0: [], 1: []}
    for i, path in enumerate(network.paths):
        path.register_forward_hook(lambda _m, _i, out, i=i: embeddings[i].append(out))
    with torch.no_grad():
        network(image)
        image[:, 0] = 0.0
        network(image)
    assert not torch.allclose(embeddings[0][0], embeddings[0][1])
    assert torch.equal(embeddings[1][0], embeddings[1][1])


@pytest.mark.parametrize("shape", [(1, 2, 31, 32, 48), (1, 2, 32, 48, 32), (1, 3, 32, 32, 48), (2, 32, 32, 48)])
def test_another_input_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=re.escape(f"[2, 32, 32, 48], got {list(shape)}")):
        build()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (32, 40, 32)}, r"img_size must be divisible by 16 .* got \(32, 40, 32\)"),
        ({"img_size": 0}, r"img_size must be divisible by 16"),
        ({"img_size": 16}, r"at least two patches, got \(16, 16, 16\)"),
        ({"depth": 6}, r"multiple of 4, got 6"),
        ({"depth": 0}, r"multiple of 4, got 0"),
        ({"growth": 12}, r"growth must be divisible by num_heads, got 12 and 8"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bfloat16_autocast_is_finite_and_close_to_float32(image):
    network = build().eval()
    with torch.no_grad():
        exact = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(image).float()
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_gives_the_same_logits(image):
    network = build(depth=4, deep_supervision=True).eval()  # forward then has two return types
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(image), network(image))
