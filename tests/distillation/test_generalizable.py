# SPDX-License-Identifier: Apache-2.0
"""Domain-generalisable distillation: its codes, and which part of the student learns from which term."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.distillation.alignment_training import (
    AlignmentLoss,
    HeaderTrainer,
    build_header,
    intensity_view,
    mask_batch,
    semantic_codes,
)
from scripts.distillation.generalizable import GeneralizableDistiller
from scripts.distillation.loss import DistillationLoss
from scripts.losses import ContrastiveGraphLoss, SoftPredictionLoss
from scripts.metrics import FrechetSemanticDistance
from scripts.networks import Student
from scripts.networks.teacher import Teacher
from scripts.utils.tensor_files import write_atomically

MODALITIES = ["ct", "pet", "mr"]
PATCH = [32, 32, 16]
WINDOW = [3, *PATCH]
OPTIONS = {
    "hdenseformer": {"features": 4, "depth": 4},
    "dynunet": {"filters": [4, 8, 16]},
    "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
}


def student() -> Student:
    torch.manual_seed(0)
    return Student(3, 2, (8, 8, 16, 16))


def teacher(architecture: str = "hdenseformer") -> Teacher:
    torch.manual_seed(1)
    return Teacher(MODALITIES, MODALITIES, 2, PATCH, architecture, options=OPTIONS)


def image() -> Tensor:
    return torch.rand(2, *WINDOW, generator=torch.Generator().manual_seed(2))


def label() -> Tensor:
    mask = torch.zeros(2, 1, *PATCH)
    mask[:, :, 8:20, 8:20, 4:12] = 1
    return mask


def distiller(**options: Any) -> GeneralizableDistiller:
    teachers = {"transformer": teacher(), "cnn": teacher("dynunet")}
    return GeneralizableDistiller(student(), teachers, window=WINDOW, **options).train()


TERMS = {
    "graphs": {"tap": "codes", "weight": 1.0, "loss": ContrastiveGraphLoss()},
    "to_student": {"tap": "to_student", "weight": 0.5, "loss": SoftPredictionLoss(1.0)},
    "to_teacher": {"tap": "to_teacher", "weight": 0.5, "loss": SoftPredictionLoss(1.0)},
}


def learners(term: str) -> tuple[set[str], GeneralizableDistiller]:
    """First parts of the names of the parameters to which one term gives a gradient."""
    network = distiller()
    loss = DistillationLoss(lambda logits, label: logits.square().mean(), network, TERMS)
    loss.terms(network(image()), label())[term].backward()
    touched = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {name.rsplit(".", 1)[0] for name in touched}, network


ENCODER = ("student.encoder", "student.attention")


def test_the_codes_are_those_of_the_image_and_of_its_views_in_this_order() -> None:
    network = distiller(views=3)
    torch.manual_seed(5)
    outputs = network(image())
    assert outputs["student.codes"].shape == outputs["cnn.codes"].shape == (2, 4, 256 * 4)
    with torch.no_grad():
        for name, own in (("student", network.student), ("transformer", network.teachers["transformer"])):
            expected = network.headers[name].encode(own.encode(image())[-1]).flatten(1)
            torch.testing.assert_close(outputs[f"{name}.codes"][:, 0], expected, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(outputs[f"{name}.codes"][:, 1], expected, atol=1e-5)
    assert not outputs["cnn.codes"].requires_grad


def test_the_crossed_predictions_are_one_networks_code_through_the_others_decoder() -> None:
    network = distiller()
    outputs = network(image())
    with torch.no_grad():
        mine, theirs = network.student.encode(image()), network.teachers["cnn"].encode(image())
        own, other = network.headers["student"], network.headers["cnn"]
        to_student = own.decode(other.encode(theirs[-1]), mine[-1].shape[2:])
        to_teacher = other.decode(own.encode(mine[-1]), theirs[-1].shape[2:])
        expected = network.student.decode([*mine[:-1], to_student])
        torch.testing.assert_close(outputs["student.to_student@cnn"], expected, atol=1e-4, rtol=1e-3)
        expected = network.teachers["cnn"].decode([*theirs[:-1], to_teacher])
        torch.testing.assert_close(outputs["student.to_teacher@cnn"], expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(outputs["cnn.to_student"], outputs["cnn.logits"])


def test_the_graphs_train_the_students_encoder_only() -> None:
    touched, _ = learners("graphs")
    assert touched
    assert all(name.startswith(ENCODER) for name in touched)


def test_the_code_of_the_student_trains_the_students_encoder_only() -> None:
    touched, _ = learners("to_teacher")
    assert any(name.startswith("student.encoder.0") for name in touched)
    assert all(name.startswith(ENCODER) for name in touched)


def test_the_code_of_the_teacher_trains_the_students_decoder_only() -> None:
    touched, _ = learners("to_student")
    assert any(name.startswith("student.decoder.0") for name in touched)
    assert all(name.startswith("student.") and not name.startswith(ENCODER) for name in touched)


@pytest.mark.parametrize("term", sorted(TERMS))
def test_teachers_and_headers_never_receive_a_gradient_nor_change(term: str) -> None:
    _, network = learners(term)
    frozen = [*network.teachers.parameters(), *network.headers.parameters()]
    assert frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not any(m.training for part in (network.teachers, network.headers) for m in part.modules())


def test_in_eval_the_distiller_returns_the_students_logits() -> None:
    network = distiller().eval()
    with torch.no_grad():
        assert torch.equal(network(image()), network.student(image()))


def test_headers_are_loaded_strictly_by_the_networks_names(tmp_path: Path) -> None:
    source = distiller()
    for name, header in source.headers.items():
        with torch.no_grad():
            next(header.parameters()).fill_(0.25)
        write_atomically({"model": header.state_dict()}, tmp_path / f"header_{name}" / "model.pt")
    loaded = distiller(headers_dir=str(tmp_path))
    for name, header in loaded.headers.items():
        assert (next(header.parameters()) == 0.25).all(), name
    (tmp_path / "header_cnn" / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="header_cnn"):
        distiller(headers_dir=str(tmp_path))


def test_a_network_without_encoder_and_decoder_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="UNETR has no separate encoder and decoder"):
        GeneralizableDistiller(student(), {"one": teacher("unetr")}, window=WINDOW)
    with pytest.raises(ValueError, match="at least one view"):
        distiller(views=0)


def test_a_view_changes_only_the_intensity_and_an_absent_modality_stays_zero() -> None:
    original = image()
    original[:, 1] = 0
    torch.manual_seed(3)
    view = intensity_view(original)
    assert (view[:, 1] == 0).all()
    for sample in range(2):
        for channel in (0, 2):
            pair = torch.stack([original[sample, channel].flatten(), view[sample, channel].flatten()])
            assert torch.corrcoef(pair)[0, 1] > 0.95
            assert not torch.equal(*pair)


@pytest.fixture
def aligned() -> tuple[HeaderTrainer, dict[str, Tensor]]:
    torch.manual_seed(4)
    trainer = HeaderTrainer(teacher(), WINDOW, classes=2).train()
    return trainer, trainer(image(), label())


def test_alignment_training_changes_only_the_header(aligned: tuple[HeaderTrainer, dict[str, Tensor]]) -> None:
    trainer, outputs = aligned
    AlignmentLoss()(outputs, label()).backward()
    assert all(p.grad is not None for p in trainer.header.parameters())
    rest = [*trainer.network.parameters(), *trainer.autoencoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in rest)
    assert not trainer.network.training
    assert not trainer.autoencoder.training


def test_the_alignment_loss_is_the_sum_of_its_four_parts(aligned: tuple[HeaderTrainer, dict[str, Tensor]]) -> None:
    _, outputs = aligned
    loss = AlignmentLoss(lambda logits, label: logits.mean())
    total = loss(outputs, label()).item()
    x = {name: value.detach().double().numpy() for name, value in outputs.items()}
    code, semantic = x["code"].reshape(2, -1), x["semantic"].reshape(2, -1)
    cosine = (code * semantic).sum(1) / ((code**2).sum(1) * (semantic**2).sum(1)) ** 0.5
    expected = {
        "reconstruction": ((x["reconstruction"] - x["features"]) ** 2).mean(),
        "meaning": (1 - cosine).mean(),
        "segmentation": x["logits"].mean(),
        "consistency": ((x["view"] - x["code"]) ** 2).mean(),
    }
    assert loss.logged == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert total == pytest.approx(sum(expected.values()), rel=1e-5)


def test_the_aligned_prediction_decodes_the_reconstruction(aligned: tuple[HeaderTrainer, dict[str, Tensor]]) -> None:
    trainer, outputs = aligned
    trainer.eval()
    with torch.no_grad():
        features = trainer.network.encode(image())
        expected = trainer.network.decode([*features[:-1], trainer.header(features[-1])[1]])
        torch.testing.assert_close(trainer(image()), expected)
    assert outputs["code"].shape == outputs["view"].shape == outputs["semantic"].shape


def test_a_header_fits_the_networks_deepest_features_and_the_network_keeps_its_mode() -> None:
    network = student().train()
    header = build_header(network, WINDOW, code=1)
    code, reconstruction = header(network.encode(image())[-1])
    assert code.shape == (2, 256, 1)
    assert reconstruction.shape == network.encode(image())[-1].shape
    assert network.training


def test_the_mask_is_input_and_target_of_the_autoencoder() -> None:
    inputs, target = mask_batch({"label": label(), "image": image()}, "cpu")
    assert torch.equal(inputs, label())
    assert torch.equal(target, label())


def test_codes_of_another_kind_of_image_are_farther_away_than_codes_of_the_same_kind() -> None:
    network = student().eval()
    header = build_header(network, WINDOW, code_channels=4, code=1)
    generator = torch.Generator().manual_seed(6)
    first, second = (torch.rand(40, *WINDOW, generator=generator).split(8) for _ in range(2))
    codes, more = semantic_codes(network, header, first), semantic_codes(network, header, second)
    assert codes.shape == (40, 4)
    smooth = semantic_codes(network, header, [batch.cumsum(dim=2) / PATCH[0] for batch in second])
    distance = FrechetSemanticDistance()
    near, far = (distance(codes.numpy(), other.numpy())["distance"] for other in (more, smooth))
    assert far > 10 * near
