# SPDX-License-Identifier: Apache-2.0
"""ContrastiveGraphLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.contrastive_graph import ContrastiveGraphLoss


def kl_of_edges(student: list[float], teacher: list[float], temperature: float) -> float:
    """KL(softmax(teacher / t) || softmax(student / t)) over the edges of a node."""
    weights = [[math.exp(e / temperature) for e in edges] for edges in (student, teacher)]
    p_student, p_teacher = ([w / sum(row) for w in row] for row in weights)
    return sum(p * math.log(p / q) for p, q in zip(p_teacher, p_student, strict=True))


def reference(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> tuple[float, float]:
    """The intra and inter part in float64, by loops over samples, nodes and edges."""
    codes = [x.detach().double().numpy() for x in (student, teacher)]
    nodes = range(1, student.shape[1])

    def cosine(x: np.ndarray, i: int, j: int) -> float:
        return float(np.dot(x[i], x[j]) / math.sqrt(np.dot(x[i], x[i]) * np.dot(x[j], x[j])))

    intra, inter = [], []
    for s, t in zip(*codes, strict=True):
        intra.append(kl_of_edges(*([cosine(x, 0, k) for k in nodes] for x in (s, t)), temperature))
        for i in nodes:
            edges = ([cosine(x, i, j) for j in nodes if j != i] for x in (s, t))
            inter.append(kl_of_edges(*edges, temperature))
    return float(np.mean(intra)), float(np.mean(inter))


def directions(*degrees: float) -> Tensor:
    """Codes of one sample: 2D unit vectors at these angles."""
    angles = [math.radians(d) for d in degrees]
    return torch.tensor([[[math.cos(a), math.sin(a)] for a in angles]])


def test_a_star_of_two_edges_gives_the_closed_form():
    # The cosines to the image are (1, 0) in the teacher and (0, 1) in the student: KL = (p - q) log(p / q) at t = 1.
    p = math.e / (math.e + 1)
    loss = ContrastiveGraphLoss(temperature=1.0)
    value = loss(directions(0, 90, 0), directions(0, 0, 90))
    assert value.item() == pytest.approx(2 * p - 1, abs=1e-6)
    assert loss.logged == {"intra": pytest.approx(2 * p - 1, abs=1e-6), "inter": 0.0}


def test_a_complete_graph_of_three_views_gives_the_closed_form():
    # The teacher's views are at 0, 0, 90 degrees, with the rows (1, 0), (1, 0), (0, 0). The student's are at 0, 90, 0
    # degrees, with the rows (0, 1), (0, 0), (1, 0). The image is at 45 degrees, with equal cosines to all: intra is 0.
    p = math.e / (math.e + 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    rows = [2 * p - 1, math.log(2) - entropy, -(math.log(4) + math.log(p) + math.log(1 - p)) / 2]
    loss = ContrastiveGraphLoss(temperature=1.0)
    assert loss(directions(45, 0, 90, 0), directions(45, 0, 0, 90)).item() == pytest.approx(sum(rows) / 3, abs=1e-6)
    assert loss.logged["intra"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_random_codes_agree_with_numpy(normal, views, temperature):
    student, teacher = normal((3, views + 1, 8), 0), normal((3, views + 1, 8), 1)
    loss = ContrastiveGraphLoss(temperature)
    value = loss(student, teacher).item()
    intra, inter = reference(student, teacher, temperature)
    assert value == pytest.approx(intra + inter, abs=3e-6)
    assert loss.logged == {"intra": pytest.approx(intra, abs=2e-6), "inter": pytest.approx(inter, abs=2e-6)}


def test_the_default_temperature_is_0_1(normal):
    student, teacher = normal((2, 4, 32), 0), normal((2, 4, 32), 1)
    assert ContrastiveGraphLoss()(student, teacher).item() == pytest.approx(sum(reference(student, teacher)), abs=2e-6)


def test_a_single_view_gives_0(normal):
    student = normal((2, 2, 8), 0).requires_grad_()
    loss = ContrastiveGraphLoss()
    value = loss(student, normal((2, 2, 8), 1))
    value.backward()
    assert value.item() == 0.0
    assert loss.logged == {"intra": 0.0, "inter": 0.0}
    assert student.grad.abs().sum() == 0


def test_two_views_use_the_intra_graph_only(normal):
    loss = ContrastiveGraphLoss()
    loss(normal((2, 3, 8), 0), normal((2, 3, 8), 1))
    assert loss.logged["intra"] > 0.01
    assert loss.logged["inter"] == 0.0


def test_rotating_and_scaling_the_codes_of_a_network_does_not_change_the_value(normal):
    student, teacher = normal((2, 4, 6), 0), normal((2, 4, 6), 1)
    rotation = torch.linalg.qr(normal((6, 6), 2)).Q
    scale = normal((2, 4, 1), 3).abs() + 0.1
    value = ContrastiveGraphLoss()(scale * student @ rotation, teacher / scale)
    assert value.item() == pytest.approx(sum(reference(student, teacher)), abs=1e-5)


def test_the_order_of_the_views_does_not_matter_but_the_position_of_the_image_does(normal):
    student, teacher = normal((2, 4, 6), 0), normal((2, 4, 6), 1)
    loss = ContrastiveGraphLoss()
    value = loss(student, teacher).item()
    assert loss(student[:, [0, 3, 1, 2]], teacher[:, [0, 3, 1, 2]]).item() == pytest.approx(value, abs=2e-6)
    assert abs(loss(student[:, [1, 0, 2, 3]], teacher[:, [1, 0, 2, 3]]).item() - value) > 1e-2


def test_the_lengths_of_the_codes_may_differ(normal):
    student, teacher = normal((2, 4, 5), 0), normal((2, 4, 9), 1)
    assert ContrastiveGraphLoss()(student, teacher).item() == pytest.approx(sum(reference(student, teacher)), abs=2e-6)
    longer = torch.cat([student, torch.zeros(2, 4, 3)], dim=2)
    assert ContrastiveGraphLoss()(student, longer).item() == pytest.approx(0.0, abs=1e-6)


def test_the_gradient_agrees_with_finite_differences(normal, numerical_gradient):
    student, teacher = normal((1, 4, 3), 0).requires_grad_(), normal((1, 4, 3), 1).requires_grad_()
    ContrastiveGraphLoss(0.5)(student, teacher).backward()
    assert teacher.grad is None
    expected = numerical_gradient(lambda x: sum(reference(x, teacher, 0.5)), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


def test_zero_codes_give_a_finite_value_and_gradient(normal):
    student = normal((2, 4, 6), 0)
    student[0, 0], student[1, 2] = 0.0, 0.0
    student.requires_grad_()
    loss = ContrastiveGraphLoss()(student, normal((2, 4, 6), 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad.abs().max() < 1e3
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(("student", "teacher"), [((2, 4, 6), (2, 3, 6)), ((2, 1, 6), (2, 1, 6))])
def test_invalid_shapes_are_refused_with_both_shapes(student, teacher):
    with pytest.raises(ValueError, match=r"\({}, {}, {}\) and teacher \({}, {}, {}\)".format(*student, *teacher)):
        ContrastiveGraphLoss()(torch.zeros(student), torch.zeros(teacher))


def test_feature_maps_are_refused():
    with pytest.raises(ValueError, match=r"Student \(2, 4, 6, 6\) and teacher \(2, 4, 6\) must both be codes"):
        ContrastiveGraphLoss()(torch.zeros(2, 4, 6, 6), torch.zeros(2, 4, 6))
