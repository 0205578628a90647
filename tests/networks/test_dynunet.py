# SPDX-License-Identifier: Apache-2.0
"""DynUNet against MONAI's DynUNet, and the structure of nnU-Net."""

from __future__ import annotations

import pytest
import torch
from monai.networks import nets

from scripts.networks import DynUNet


@pytest.fixture(scope="module")
def network() -> DynUNet:
    torch.manual_seed(0)
    return DynUNet(3, 2, filters=(4, 8, 16, 16)).eval()


def test_decode_of_encode_equals_forward(network: DynUNet) -> None:
    image = torch.rand(1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = network.encode(image)
        assert torch.equal(network.decode(features), network(image))
    assert [tuple(x.shape[1:3]) for x in features] == [(4, 16), (8, 8), (16, 4), (16, 2)]


def test_it_has_the_structure_of_nnunet(network: DynUNet) -> None:
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
    strided = [m for m in convolutions if m.stride == (2, 2, 2)]
    assert len(strided) == 3  # every stage except the first halves the grid
    assert {m.kernel_size for m in convolutions} == {(3, 3, 3), (1, 1, 1)}
    assert any(isinstance(m, torch.nn.InstanceNorm3d) for m in network.modules())
    assert {m.negative_slope for m in network.modules() if isinstance(m, torch.nn.LeakyReLU)} == {0.01}
    # nnU-Net's default widths give its 3D network about 31 million parameters.
    assert sum(p.numel() for p in DynUNet(1, 2).parameters()) == pytest.approx(31e6, rel=0.02)


def test_its_weights_load_into_monais_network(network: DynUNet) -> None:
    plain = nets.DynUNet(3, 3, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[4, 8, 16, 16])
    plain.load_state_dict(network.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("layer", "stride", "channels"),
    [("skip_layers", 1, 4), ("skip_layers.next_layer.next_layer", 4, 16), ("bottleneck", 8, 16)],
)
def test_the_tapped_layers_have_the_documented_stride_and_channels(
    network: DynUNet, layer: str, stride: int, channels: int
) -> None:
    outputs = []
    handle = network.get_submodule(layer).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        network(torch.zeros(1, 3, 16, 16, 16))
    handle.remove()
    assert outputs[0].shape == (1, channels, *[16 // stride] * 3)


@pytest.mark.parametrize(
    ("patch", "stages"), [([64, 64, 64], 6), ([64, 32, 32], 6), ([32, 32, 32], 5), ([80, 80, 48], 5), ([16, 16, 8], 4)]
)
def test_it_has_as_many_stages_as_a_patch_allows(patch: list[int], stages: int) -> None:
    network = DynUNet(1, 2, [2, 2, 4, 4, 8, 8], patch)
    assert 2 + len(network.downsamples) == stages
    image = torch.zeros(1, 1, *patch)
    assert network.train()(image).shape == (1, 2, *patch)  # instance normalisation needs more than one cell
