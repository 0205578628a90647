# SPDX-License-Identifier: Apache-2.0
"""Networks with several outputs: the first counts, and in training each gets the segmentation loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.nets import BasicUNetPlusPlus, DynUNet, SegResNetDS, UNet
from torch import nn

from scripts.distillation.distiller import Distiller
from scripts.distillation.loss import DistillationLoss
from scripts.losses import SoftPredictionLoss
from scripts.networks import HDenseFormer
from scripts.networks.deep_supervision import first_output, output_heads, segmentation_network
from scripts.networks.teacher import Teacher

SIZE = (32, 16, 16)
IMAGE = torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(1))
LABEL = (torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(2)) > 0.7).float()
WIDTHS = (4, 4, 8, 8, 8, 4)


class Pair(nn.Module):
    """Returns a tuple, also in eval(), the second output at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1, stride=2)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fine(image), self.coarse(image)


# Network, its number of heads, and the raw output in train() as a list.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[Any], list[torch.Tensor]]]] = {
    "one": (lambda: UNet(3, 2, 2, (4, 8), (2,), norm="instance"), 1, lambda output: [output]),
    "list": (lambda: SegResNetDS(3, 8, 2, 2, norm="instance", blocks_down=(1, 1, 1), dsdepth=2), 2, list),
    "own list": (lambda: HDenseFormer(2, 2, SIZE, 4, 4, 8, 2, dropout=0.0, deep_supervision=True), 4, list),
    "stacked": (
        lambda: DynUNet(3, 2, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8], deep_supervision=True, deep_supr_num=1),
        2,
        lambda output: [output[:, 0], output[:, 1]],
    ),
    "list in eval() too": (lambda: BasicUNetPlusPlus(3, 2, 2, WIDTHS, True, norm="batch"), 4, list),
    "tuple": (Pair, 2, list),
}  # fmt: skip


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[kind][0]()


def expected_loss(heads: list[torch.Tensor]) -> torch.Tensor:
    """1, 1/2, 1/4, 1/8 of Dice + cross-entropy; a label's voxel is the one at the centre of a smaller head's."""
    loss, total = DiceCELoss(to_onehot_y=True, softmax=True), torch.zeros(())
    for level, logits in enumerate(heads):
        step = SIZE[0] // logits.shape[2]
        label = LABEL[..., step // 2 :: step, step // 2 :: step, step // 2 :: step]
        total = total + 0.5**level * loss(logits, label)
    return total


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_head_gets_the_loss_and_inference_the_first_output(kind: str) -> None:
    _, count, as_list = NETWORKS[kind]
    plain, network = make(kind).train(), segmentation_network(make(kind)).train()
    heads = as_list(plain(IMAGE))
    assert len(heads) == count
    output = network(IMAGE)
    assert isinstance(output, list) == (count > 1)
    criterion = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    loss = criterion(output, LABEL)
    torch.testing.assert_close(loss, expected_loss(heads))
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    raw = plain.eval()(IMAGE)
    logits = network.eval()(IMAGE)
    assert logits.shape == (1, 2, *SIZE)
    torch.testing.assert_close(logits, raw if isinstance(raw, torch.Tensor) else raw[0])  # another memory format
    assert list(network.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", ["one", "list", "stacked", "tuple"])
def test_in_a_distillation_terms_see_the_first_output_and_l_seg_all(kind: str) -> None:
    teacher = Teacher(["a", "b"], ["a", "b"], 2, SIZE, network=make("list")).eval()
    distiller = Distiller(segmentation_network(make(kind)), {"t": teacher}).train()
    terms = {"soft": {"tap": "logits", "weight": 1.0, "loss": SoftPredictionLoss()}}
    loss = DistillationLoss(DiceCELoss(to_onehot_y=True, softmax=True), distiller, terms)
    outputs = distiller(IMAGE)
    heads = NETWORKS[kind][2](make(kind).train()(IMAGE))
    assert sum(name.startswith("logits") for name in outputs) == len(heads)
    values = loss.terms(outputs, LABEL)
    torch.testing.assert_close(values["segmentation"], expected_loss(heads))
    torch.testing.assert_close(values["soft"], SoftPredictionLoss()(heads[0], make("list").eval()(IMAGE)))
    assert distiller.eval()(IMAGE).shape == (1, 2, *SIZE)


def test_group_normalisation_trains_on_contiguous_tensors() -> None:
    """Its gradients in channels_last_3d take a CPU many times as long."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.GroupNorm(1, 2), nn.Conv3d(2, 2, 3))
    network = segmentation_network(copy.deepcopy(plain))
    assert network[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    formats = []
    network[0].register_forward_hook(lambda _, __, output: formats.append(output.is_contiguous()))
    image = IMAGE.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    logits, expected = network(image), plain(IMAGE)
    assert formats == [True]
    torch.testing.assert_close(logits, expected)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_full_resolution_comes_first() -> None:
    logits = torch.randn(1, 2, 4, 4, 4)
    image = torch.zeros(1, 3, 4, 4, 4)
    assert first_output([logits, logits[..., ::2]], image) is logits
    assert first_output(logits, image) is logits
    stacked = torch.stack([logits, -logits], 1)
    assert [torch.equal(head, logits) for head in output_heads(stacked, image)] == [True, False]
    flat = torch.randn(1, 2, 4, 4)  # of a 2D network
    assert output_heads(flat, torch.zeros(1, 3, 4, 4))[0] is flat


def test_no_teacher_may_have_the_name_of_the_outputs() -> None:
    teacher = Teacher(["a", "b"], ["a", "b"], 2, SIZE, network=make("one"))
    with pytest.raises(ValueError, match="no teacher 'student' or 'logits'"):
        Distiller(make("one"), {"logits": teacher})


class Heads(nn.Module):
    """Two heads, and a weight of four dimensions as a 2D convolution has it."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.coarse = nn.Conv3d(1, 2, 1), nn.Conv3d(1, 2, 1)
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.full(image) * self.scale, self.coarse(image[..., ::2, ::2, ::2])]


def test_a_teacher_is_trained_at_every_head_and_answers_with_the_first() -> None:
    teacher = Teacher(["ct"], ["ct"], 2, [4, 4, 4], network=Heads())
    image = torch.rand(1, 1, 4, 4, 4)
    heads = teacher.train()(image)
    assert [tuple(head.shape) for head in heads] == [(1, 2, 4, 4, 4), (1, 2, 2, 2, 2)]
    torch.testing.assert_close(teacher.eval()(image), heads[0])


def test_a_network_may_have_weights_of_four_dimensions() -> None:
    network = segmentation_network(Heads()).eval()
    assert network.full.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert tuple(network(torch.rand(1, 1, 4, 4, 4)).shape) == (1, 2, 4, 4, 4)
