# SPDX-License-Identifier: Apache-2.0
"""Distiller and DistillationLoss on two-layer networks; expected totals come from NumPy in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scripts.distillation.distiller import Distiller
from scripts.distillation.loss import DistillationLoss
from scripts.losses import AttentionMapLoss, ChannelWiseDivergence, DISTLoss, SoftPredictionLoss
from scripts.networks import ChannelAdapter, Student
from scripts.networks.label_teacher import LabelTeacher

TAPS = {"body": {"student": "body", "ct": "body", "petmr": "body"}}
SIZE = (4, 4, 4)


class Net(nn.Module):
    """Image -> body (features, batch-normalised) -> head (logits)."""

    def __init__(self, inputs: int, features: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(inputs, features, 1), nn.BatchNorm3d(features))
        self.blocks = nn.ModuleList([nn.Identity()])
        self.head = nn.Conv3d(features, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.body(x)))


class Expert(nn.Module):
    """The parts of a teacher that Distiller uses: ``network``, ``channels`` and a forward on the whole image."""

    def __init__(self, channels: Sequence[int], features: int = 5) -> None:
        super().__init__()
        self.channels, self.network, self.calls = list(channels), Net(len(channels), features), 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return self.network(image[:, self.channels])


def magnitude(logits: Tensor, label: Tensor) -> Tensor:
    """Stands for the segmentation loss."""
    return logits.float().square().mean()


class Labelled(nn.Module):
    """A term that takes the label: mean squared difference inside of it."""

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        return ((student - teacher.detach()).square() * label).mean()


def build(**options: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(Net(3), {"ct": Expert([0]), "petmr": Expert([2, 1])}, **options)


def image() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def label() -> Tensor:
    return torch.randint(0, 2, (2, 1, *SIZE), generator=torch.Generator().manual_seed(7))


def criterion(distiller: Distiller, loss: nn.Module | None = None, weight: float = 0.5, **options: Any) -> Any:
    terms = {"soft": {"tap": "logits", "weight": weight, "loss": loss or SoftPredictionLoss(2.0)}}
    return DistillationLoss(magnitude, distiller, terms, **options)


def softmax(x: Any) -> np.ndarray:
    """Probabilities of the channels; a single one is a sigmoid head, and gives its own and the background's."""
    e = np.exp(x.detach().double().numpy() if isinstance(x, Tensor) else x)
    e = np.concatenate([e, np.ones_like(e)], axis=1) if e.shape[1] == 1 else e
    return e / e.sum(axis=1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) per sample, mean over voxels."""
    return (p * np.log(p / q)).sum(axis=1).reshape(len(p), -1).mean(axis=1)


def test_train_returns_a_flat_dict_and_eval_the_students_logits():
    distiller = build(taps=TAPS, adapters={"body": {"ct": ChannelAdapter(4, 5)}})
    outputs, teachers = distiller(image()), {"ct.logits", "ct.body", "petmr.logits", "petmr.body"}
    assert set(outputs) == {"logits", "student.body", "student.body@ct", "available"} | teachers
    assert outputs["student.body@ct"].shape == outputs["ct.body"].shape == (2, 5, *SIZE)
    with torch.no_grad():
        assert torch.equal(distiller.eval()(image()), distiller.student(image()))
    assert [teacher.calls for teacher in distiller.teachers.values()] == [1, 1]


def test_tapped_features_are_those_of_the_named_layers():
    distiller = build(taps=TAPS)
    outputs = distiller(image())
    with torch.no_grad():
        assert torch.equal(outputs["petmr.body"], distiller.teachers["petmr"].network.body(image()[:, [2, 1]]))
    assert {name for name, value in outputs.items() if value.requires_grad} == {"logits", "student.body"}
    named = build(taps={"body": {**TAPS["body"], "ct": "head"}})
    assert torch.equal(named(image())["ct.body"], outputs["ct.logits"])


def test_teachers_stay_frozen_while_the_student_learns():
    distiller = build().train()
    assert distiller.student.training
    assert not any(m.training for m in distiller.teachers.modules())
    assert not any(p.requires_grad for p in distiller.teachers.parameters())
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.1, weight_decay=0.1)
    criterion(distiller)(distiller(image()), label()).backward()
    assert all(p.grad is None for p in distiller.teachers.parameters())
    optimizer.step()
    changed = {name for name, value in distiller.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"student.{n}" for n, _ in distiller.student.named_parameters()} <= changed
    assert not [name for name in changed if name.startswith("teachers.")]


def test_a_teacher_sees_its_own_channels_only():
    distiller = build()
    first, second = distiller(image()), distiller(image() + torch.tensor([0.0, 9.0, 9.0]).view(1, 3, 1, 1, 1))
    assert torch.equal(first["ct.logits"], second["ct.logits"])
    assert not torch.equal(first["petmr.logits"], second["petmr.logits"])


def test_teachers_are_available_by_the_presence_of_their_modalities():
    presence = torch.tensor([[True, True, False], [False, True, True]])
    assert build()(image(), presence)["available"].tolist() == [[True, False], [False, True]]
    assert build()(image())["available"].all()


@pytest.mark.parametrize("layer", ["tail", "blocks"])
def test_an_unknown_layer_is_refused_and_the_error_names_the_network_and_its_layers(layer):
    match = r"ct \(Net\) has no layer '(tail|blocks)' to tap\. Its layers are: body, body.0, body.1, blocks.0, head"
    with pytest.raises(ValueError, match=match):
        build(taps={"deep": {**TAPS["body"], "ct": layer}})
    with pytest.raises(ValueError, match=match.replace("ct", "student")):
        build(taps={"deep": {**TAPS["body"], "student": layer}})


def test_wrong_taps_names_and_teachers_are_refused():
    with pytest.raises(ValueError, match=r"Tap 'deep' has no layer for petmr\. It has layers for: ct, student"):
        build(taps={"deep": {"student": "body", "ct": "body"}})
    with pytest.raises(ValueError, match="rename it"):
        build(taps={"logits": TAPS["body"]})
    with pytest.raises(ValueError, match="rename it"):
        Distiller(Net(3), {"student": Expert([0])})
    with pytest.raises(ValueError, match="at least one teacher"):
        Distiller(Net(3), {})


@pytest.mark.parametrize("adapters", [{"bodies": {"ct": nn.Identity()}}, {"body": {"mr": nn.Identity()}}])
def test_an_adapter_for_an_unknown_tap_or_teacher_is_refused(adapters):
    with pytest.raises(
        ValueError, match=r"fits the adapter of tap .*\. Taps are \['body'\], teachers are \['ct', 'petmr'\]"
    ):
        build(taps=TAPS, adapters=adapters)


def test_no_hook_remains_after_a_forward_even_if_it_fails():
    distiller = build(taps=TAPS)
    distiller(image())
    assert not any(m._forward_hooks for m in distiller.modules())
    with pytest.raises(RuntimeError):
        distiller(image()[:, :2])
    assert not any(m._forward_hooks for m in distiller.modules())


def test_cached_logits_are_used_without_running_the_teacher(monkeypatch):
    distiller, cached = build(), torch.randn(2, 2, *SIZE)
    monkeypatch.setattr(distiller.teachers["ct"], "forward", lambda image: pytest.fail("the teacher ran"))
    outputs = distiller(image(), cached={"ct.logits": cached.requires_grad_()})
    assert torch.equal(outputs["ct.logits"], cached)
    assert not outputs["ct.logits"].requires_grad
    assert distiller.teachers["petmr"].calls == 1
    assert "ct.body" in build(taps=TAPS)(image(), cached={"ct.logits": cached})  # a tap makes it run all the same


def test_the_students_weights_load_into_the_plain_student():
    network, fresh = (Student(3, 2, features=(8, 8)) for _ in range(2))
    distiller = Distiller(network, {"ct": Expert([0])})
    fresh.load_state_dict(distiller.student.state_dict(), strict=True)
    x = torch.randn(1, 3, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(distiller.eval()(x), fresh.eval()(x))


def test_teachers_and_adapters_follow_the_student_to_its_device():
    distiller = Distiller(Net(3).to("meta"), {"ct": Expert([0])}, TAPS, {"body": {"ct": ChannelAdapter(4, 5)}})
    assert {p.device.type for p in distiller.parameters()} == {"meta"}


def test_adapters_receive_a_gradient():
    distiller = build(taps=TAPS, adapters={"body": {"ct": ChannelAdapter(4, 5), "petmr": ChannelAdapter(4, 5)}})
    terms = {"hint": {"tap": "body", "weight": 1.0, "loss": nn.MSELoss()}}
    DistillationLoss(magnitude, distiller, terms)(distiller(image()), label()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.adapters.parameters())


@pytest.mark.parametrize(
    ("weighting", "static", "rows"),
    [("static", [1, 3], [[0.25, 0.75]] * 2), ("mean", None, [[0.5, 0.5]] * 2), ("confidence", None, None)],
)
def test_the_total_is_the_sum_computed_by_hand(weighting, static, rows):
    distiller = build(taps=TAPS, adapters={"body": {"petmr": ChannelAdapter(4, 5)}})
    terms = {
        "soft": {"tap": "logits", "weight": 0.5, "loss": SoftPredictionLoss(2.0)},
        "map": {"tap": "body", "weight": 0.9, "loss": AttentionMapLoss()},
    }
    loss = DistillationLoss(magnitude, distiller, terms, weighting=weighting, static=static)
    loss.set_warmup(0.25)
    outputs, y = distiller(image()), label()
    total = loss(outputs, y)
    logits = [outputs["ct.logits"], outputs["petmr.logits"]]
    if rows is None:  # two teachers: each has the other's softmax of the cross-entropies
        chosen = [np.take_along_axis(softmax(z), y.numpy(), axis=1) for z in logits]
        ce = np.stack([-np.log(p).reshape(2, -1).mean(axis=1) for p in chosen], axis=1)
        rows = softmax(ce)[:, ::-1]
    soft = np.stack([4 * divergence(softmax(z / 2), softmax(outputs["logits"] / 2)) for z in logits], axis=1)
    taps = [("student.body", "ct.body"), ("student.body@petmr", "petmr.body")]
    maps = [[outputs[n].detach().double().square().mean(1).flatten(1).numpy() for n in pair] for pair in taps]
    units = [[m / np.linalg.norm(m, axis=1, keepdims=True) for m in pair] for pair in maps]
    attention = np.stack([((s - t) ** 2).sum(axis=1) for s, t in units], axis=1)
    means = [float((np.asarray(rows) * each).sum(axis=1).mean()) for each in (soft, attention)]
    segmentation = float(outputs["logits"].detach().double().square().mean())
    assert total.item() == pytest.approx(segmentation + 0.25 * (0.5 * means[0] + 0.9 * means[1]), rel=1e-6)
    names = ["segmentation", "soft", "map", "weight/ct", "weight/petmr"]
    values = [segmentation, *means, *np.asarray(rows).mean(axis=0)]
    assert loss.logged == pytest.approx(dict(zip(names, values, strict=True)), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mixing", ["loss", "probability"])
def test_both_mixings_have_the_same_gradient_but_different_values(mixing, channels):
    distiller = build()
    loss = criterion(distiller, weight=1.0, weighting="static", static=[1.0, 3.0], mixing=mixing)
    outputs = {k: v if k == "available" else v[:, :channels] for k, v in distiller(image()).items()}
    student = outputs["logits"] = outputs["logits"].detach().requires_grad_()
    (loss(outputs, label()) - student.square().mean()).backward()
    q, ct, petmr = (softmax(x / 2.0) for x in (student, outputs["ct.logits"], outputs["petmr.logits"]))
    mixed = 0.25 * ct + 0.75 * petmr
    np.testing.assert_allclose(student.grad.numpy(), 2 * (q - mixed)[:, :channels] / (2 * 4**3), atol=1e-7)
    values = {"loss": 0.25 * divergence(ct, q) + 0.75 * divergence(petmr, q), "probability": divergence(mixed, q)}
    assert values["loss"].mean() > 1.01 * values["probability"].mean()
    assert loss.logged["soft"] == pytest.approx(4 * float(values[mixing].mean()), rel=1e-5)


@pytest.mark.parametrize(("channels", "temperature"), [(1, 1.0), (2, 1.0), (3, 4.0)])
def test_probabilities_are_mixed_at_the_default_temperature_of_the_loss(channels, temperature):
    distiller = build()
    loss = criterion(distiller, SoftPredictionLoss(), 1.0, mixing="probability")
    names = ("logits", "ct.logits", "petmr.logits")
    generator = torch.Generator().manual_seed(4)
    logits = {name: 3 * torch.randn(2, channels, *SIZE, generator=generator) for name in names}
    outputs = {**distiller(image()), **logits}
    loss(outputs, label())
    q, ct, petmr = (softmax(logits[name] / temperature) for name in names)
    expected = temperature**2 * divergence((ct + petmr) / 2, q).mean()
    assert loss.logged["soft"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", [SoftPredictionLoss(), SoftPredictionLoss(3.0), DISTLoss(temperature=2.0)])
def test_a_student_that_predicts_as_its_teachers_has_no_loss_of_the_mixture(loss):
    distiller = build()
    logits = 3 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(4))
    outputs = {**distiller(image()), **dict.fromkeys(("logits", "ct.logits", "petmr.logits"), logits)}
    mixture = criterion(distiller, loss, mixing="probability")
    mixture(outputs, label())
    assert mixture.logged["soft"] == pytest.approx(0, abs=1e-6)


def test_the_mixture_of_equally_available_teachers_is_compared_over_the_whole_batch():
    """However the weights of a sample are rounded: their sum is 1 for some samples, and nearly 1 for others."""
    torch.manual_seed(0)
    distiller = Distiller(Net(3), {name: Expert([0]) for name in "abc"})
    sizes = []

    class Counting(SoftPredictionLoss):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            sizes.append(len(student))
            return super().forward(student, teacher)

    loss = criterion(distiller, Counting(), weighting="confidence", mixing="probability")
    outputs = distiller(image())
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        loss(outputs | {f"{k}.logits": torch.randn(2, 2, *SIZE, generator=generator) for k in "abc"}, label())
    assert set(sizes) == {2}


def test_probabilities_are_mixed_only_for_losses_that_compare_them():
    # A mixture's logits are the logarithm of its probabilities, which is another map over space than the logits.
    with pytest.raises(ValueError, match=r"Term 'soft' cannot use the mixing probability, because ChannelWiseDiverg"):
        criterion(build(), ChannelWiseDivergence(), mixing="probability")
    features = {"body": {"tap": "body", "weight": 1, "loss": AttentionMapLoss()}}
    with pytest.raises(ValueError, match="The mixing probability needs a term on the tap logits"):
        DistillationLoss(magnitude, build(taps=TAPS), features, mixing="probability")


def test_a_warm_up_factor_of_zero_leaves_the_segmentation_loss():
    distiller = build()
    loss, outputs = criterion(distiller), distiller(image())
    loss.set_warmup(0)
    assert loss(outputs, label()).item() == magnitude(outputs["logits"], label()).item()
    assert loss.logged["soft"] > 0


@pytest.mark.parametrize("mixing", ["loss", "probability"])
@pytest.mark.parametrize("weighting", ["mean", "static", "confidence", "entropy"])
@pytest.mark.parametrize("present", [[[1, 0, 1], [1, 1, 0]], [[1, 0, 1], [1, 1, 1]]])  # petmr in none, in one
def test_an_unavailable_teacher_contributes_nothing_even_if_it_predicts_nan(mixing, weighting, present):
    distiller = build()
    static = [1.0, 1.0] if weighting == "static" else None
    loss = criterion(distiller, weight=1.0, weighting=weighting, static=static, mixing=mixing)
    outputs = distiller(image(), torch.tensor(present).bool())
    absent = ~outputs["available"][:, 1]
    outputs["petmr.logits"][absent] = float("nan")
    loss(outputs, label()).backward()
    q, p = (softmax(outputs[k] / 2) for k in ("logits", "ct.logits"))
    assert all(torch.isfinite(x.grad).all() for x in distiller.student.parameters())
    if absent.all():  # the other teacher's divergence is all that is left
        assert loss.logged["soft"] == pytest.approx(4 * float(divergence(p, q).mean()), rel=1e-5)


def test_a_batch_without_any_teacher_has_the_segmentation_loss_alone():
    distiller = build()
    outputs = distiller(image(), torch.zeros(2, 3, dtype=torch.bool))
    outputs["logits"] = torch.full((2, 2, *SIZE), 32768.0, dtype=torch.float16)  # the sum is beyond float16
    assert criterion(distiller)(outputs, label()).item() == 2.0**30


@pytest.mark.parametrize("weighting", ["mean", "confidence"])
def test_a_term_with_a_label_gets_the_label_of_its_own_sample(weighting):
    distiller = build()
    loss, outputs, y = criterion(distiller, Labelled(), weighting=weighting), distiller(image()), label()
    loss({**outputs, "available": torch.tensor([[True, False], [False, True]])}, y)
    teacher = torch.stack([outputs["ct.logits"][0], outputs["petmr.logits"][1]])
    expected = float(((outputs["logits"] - teacher).detach().double().square() * y).mean())
    assert loss.logged["soft"] == pytest.approx(expected, rel=1e-5)


def test_wrong_terms_and_mixings_are_refused():
    distiller = build(taps=TAPS, adapters={"body": {"ct": ChannelAdapter(4, 5)}})
    with pytest.raises(ValueError, match=r"No term uses the adapters of \['body'\]"):
        criterion(distiller)
    with pytest.raises(ValueError, match=r"Term 'x' uses the unknown tap 'deep'\. Known taps are: logits, body"):
        DistillationLoss(magnitude, distiller, {"x": {"tap": "deep", "weight": 1, "loss": nn.MSELoss()}})
    soft = {"tap": "logits", "weight": 1, "loss": SoftPredictionLoss()}
    with pytest.raises(ValueError, match="No term can be named segmentation, as the segmentation loss is: rename it"):
        DistillationLoss(magnitude, build(), {"segmentation": soft})
    with pytest.raises(ValueError, match="Unknown mixing 'sum': choose loss or probability"):
        criterion(build(), mixing="sum")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "foo"}, "Unknown weighting 'foo'"),
        ({"weighting": "static"}, "static weighting needs 2 weights >= 0 and not all 0, got None"),
        ({"weighting": "static", "static": [1, 2, 3]}, "static weighting needs 2 weights"),
        ({"static": [1, 2]}, "The weighting mean does not use static weights"),
    ],
)
def test_a_weighting_is_judged_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        criterion(build(), **options)


class Fuse(nn.Module):
    """An adapter that is built from the channels: sum of its inputs, then a 1x1 convolution."""

    def __init__(self, inputs: int | list[int], outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        width = inputs if isinstance(inputs, int) else inputs[0]
        self.conv = nn.Conv3d(width, outputs, 1)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.conv(x if isinstance(x, Tensor) else torch.stack(x).sum(0))


def test_an_adapter_is_built_for_every_teacher_from_the_networks_channels():
    torch.manual_seed(0)
    teachers = {"ct": Expert([0], features=5), "petmr": Expert([2, 1], features=7)}
    distiller = Distiller(Net(3), teachers, TAPS, {"body": Fuse}, window=(3, *SIZE)).train()
    assert {name: (a.inputs, a.conv.out_channels) for name, a in distiller.adapters["body"].items()} == {
        "ct": (4, 5),
        "petmr": (4, 7),
    }
    outputs = distiller(image())
    assert outputs["student.body@petmr"].shape == outputs["petmr.body"].shape
    assert distiller.student.training


def test_adapters_are_built_beside_a_teacher_that_is_the_label():
    teachers = {"ct": Expert([0]), "label": LabelTeacher(2)}
    taps = {"body": {"student": "body", "ct": "body", "label": None}}
    distiller = Distiller(Net(3), teachers, taps, {"body": Fuse}, window=(3, *SIZE)).train()
    assert list(distiller.adapters["body"]) == ["ct"]
    assert "label.logits" in distiller(image(), label=label())


def test_an_adapter_fuses_several_layers_of_the_student():
    taps = {"both": {"student": ["body.0", "body"], "ct": "body", "petmr": "body"}}
    distiller = build(taps=taps, adapters={"both": Fuse}, window=(3, *SIZE)).train()
    assert distiller.adapters["both"]["ct"].inputs == [4, 4]
    outputs = distiller(image())
    assert "student.both" not in outputs
    first = distiller.student.body[0](image())
    fused = distiller.adapters["both"]["ct"]([first, outputs_of_body(distiller)])
    torch.testing.assert_close(outputs["student.both@ct"], fused)


def outputs_of_body(distiller: Distiller) -> Tensor:
    return distiller.student.body(image())


def test_a_term_on_a_tap_of_some_teachers_has_its_full_weight():
    taps = {"body": {"student": "body", "ct": "body", "petmr": None}}
    distiller = build(taps=taps)
    assert distiller.teachers_of("body") == ("ct",)
    outputs = distiller(image())
    assert "petmr.body" not in outputs
    terms = {"map": {"tap": "body", "weight": 1.0, "loss": AttentionMapLoss()}}
    loss = DistillationLoss(magnitude, distiller, terms)
    expected = AttentionMapLoss()(outputs["student.body"], outputs["ct.body"])
    assert loss.terms(outputs, label())["map"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"taps": {"body": {"student": "body", "ct": None, "petmr": None}}},
            "No teacher in this run provides a layer for tap",
        ),
        ({"taps": {"body": {"student": None, "ct": "body", "petmr": "body"}}}, "uses None of the student"),
        (
            {"taps": {"body": {"student": ["body", "head"], "ct": "body", "petmr": "body"}}},
            "Name one layer, or add an adapter",
        ),
        ({"taps": TAPS, "adapters": {"body": Fuse}}, "needs `window`, the shape of an image"),
        ({"taps": TAPS, "adapters": {"head": Fuse}, "window": (3, *SIZE)}, "adapter of tap 'head'"),
    ],
)
def test_bad_taps_and_adapters_are_refused_at_construction(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_a_tapped_layer_that_is_never_called_is_refused_by_name():
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__(3)
            self.spare = nn.Conv3d(4, 4, 1)

    taps = {"spare": {"student": "spare", "ct": "body", "petmr": "body"}}
    distiller = Distiller(Lazy(), {"ct": Expert([0])}, taps).train()
    with pytest.raises(ValueError, match=r"student \(Lazy\) never calls its layer 'spare'"):
        distiller(image())


def test_the_logged_values_of_a_term_are_logged_under_its_name():
    class Talking(SoftPredictionLoss):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            self.logged = {"overlap": 0.25}
            return super().forward(student, teacher)

    distiller = build()
    loss = criterion(distiller, Talking())
    loss(distiller(image()), label())
    assert loss.logged["soft/overlap"] == 0.25
