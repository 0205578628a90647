# SPDX-License-Identifier: Apache-2.0
"""check_network: a network that fits passes and stays as it is, one that does not is refused in a sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNetDS, SegResNetVAE, UNet
from torch import nn

from scripts.networks import Student
from scripts.networks.network_check import check_network

PATCH = [16, 16, 16]


class Returns(nn.Module):
    """Returns what it was made with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, image: torch.Tensor) -> Any:
        return self.output


def test_a_network_that_fits_passes_and_neither_it_nor_the_random_numbers_change() -> None:
    torch.manual_seed(0)
    networks = [
        UNet(3, 3, 2, (4, 8), (2,), norm="batch", dropout=0.5),
        SegResNetDS(3, 8, 3, 2, norm="batch", blocks_down=(1, 1, 1), dsdepth=2),
        DynUNet(3, 3, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8], deep_supervision=True, deep_supr_num=1),
    ]
    for network in networks:
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network.eval()
        state = torch.get_rng_state()
        for training in (True, False):
            check_network(network, 3, 2, PATCH, batch_size=2, training=training)
        assert torch.equal(torch.get_rng_state(), state)
        assert not network.training
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


LOGITS = torch.zeros(1, 2, *PATCH)
REFUSED: dict[str, tuple[nn.Module, str]] = {
    "input channels": (
        UNet(3, 2, 2, (4, 8), (2,)),
        "UNet cannot segment an image of 3 channels, one per modality, and [16, 16, 16] voxels: Given groups",
    ),
    "output channels": (
        UNet(3, 3, 4, (4, 8), (2,)),
        "UNet returns [4, 16, 16, 16] for a patch, not [2, 16, 16, 16]: one channel per class on the patch's grid. "
        "Correct the network's definition (out_channels: 2).",
    ),
    "patch": (Student(3, 2, (8, 8, 8, 8, 8)), "Student needs spatial sizes divisible by [32, 32, 32], got [16, 16"),
    "half the size": (Returns(LOGITS[..., ::2]), "Returns returns [2, 16, 16, 8] for a patch, not [2, 16, 16, 16]"),
    "another head": (Returns([LOGITS, LOGITS[:, :1]]), "Returns returns [1, 16, 16, 16] for a patch, not 2 channels"),
    "a loss beside it": (Returns((LOGITS, 0.5)), "Returns returns a tuple of Tensor, float. A network must return"),
    "a loss as a tensor": (
        SegResNetVAE(PATCH, 0, 3, init_filters=8, in_channels=3, out_channels=2, blocks_down=[1, 1], blocks_up=[1]),
        "SegResNetVAE returns [] for a patch",
    ),
    "nothing": (Returns([]), "Returns returns a list of nothing."),
    "a dict": (Returns({"out": LOGITS}), "Returns returns a dict."),
    "one voxel": (
        UNet(3, 3, 2, (4, 4, 4, 4, 4), (2, 2, 2, 2), norm="instance"),
        "Expected more than 1 spatial element when training",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_network_that_does_not_fit_is_refused_in_a_sentence(kind: str) -> None:
    network, words = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(words)):
        check_network(network, 3, 2, PATCH, training=True)
