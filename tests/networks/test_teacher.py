# SPDX-License-Identifier: Apache-2.0
"""Teachers of small sizes, and the errors for files that are not their weights."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.networks import Student
from scripts.networks.label_teacher import LabelTeacher
from scripts.networks.teacher import Teacher
from scripts.networks.teacher_loading import load_teachers
from scripts.utils.checksums import sha256

OPTIONS: dict[str, dict[str, Any]] = {
    "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    "swinunetr": {"feature_size": 12, "window_size": 4, "depths": (1, 1, 1, 1)},
    "hdenseformer": {"features": 4, "depth": 4},
    "uxnet": {"features": 4, "depths": (1, 1, 1, 1)},
    "dynunet": {"filters": [4, 8, 16]},
    "segresnet": {"init_filters": 8},
}
MODALITIES = ["ct", "pet", "mr"]
PATCH = (32, 32, 32)
LONG = (64, 32, 32)  # SwinUNETR cannot normalise a deepest grid of a single cell


def build(
    architecture: str = "uxnet", modalities: tuple[str, ...] = ("pet",), seed: int = 0, **options: Any
) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(modalities, MODALITIES, 2, PATCH, architecture, options=OPTIONS, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "teacher.pt"
    torch.save({"model": build(seed=5).state_dict()}, path)
    return path


@pytest.mark.parametrize("architecture", list(OPTIONS))
def test_each_architecture_segments_the_patch_from_its_own_modalities(architecture):
    teacher = (
        build(architecture, modalities=("mr", "ct")).eval().to(memory_format=torch.channels_last_3d)
    )  # as in the configs
    patch = LONG if architecture == "swinunetr" else PATCH
    image = torch.randn(1, 3, *patch)
    other = image.clone()
    other[:, 1] = 7.0  # PET, which this teacher does not read
    with torch.no_grad():
        logits = teacher(image)
        assert torch.equal(teacher(other), logits)
        assert torch.equal(teacher.network(image[:, [2, 0]]), logits)
    assert logits.shape == (1, 2, *patch)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("architecture", list(OPTIONS))
def test_every_trainable_parameter_gets_a_gradient(architecture):
    # DistributedDataParallel waits for the gradient of each of them.
    teacher = build(architecture, modalities=("ct",))
    teacher(torch.randn(2, 3, *(LONG if architecture == "swinunetr" else PATCH))).square().mean().backward()
    assert [name for name, p in teacher.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("architecture", list(OPTIONS))
def test_saved_weights_load_unchanged(architecture, tmp_path):
    first, path = build(architecture, seed=1), tmp_path / "teacher.pt"
    torch.save({"model": first.state_dict()}, path)
    second = build(architecture, seed=2, weights=str(path))
    assert second.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_an_unknown_architecture_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"'vnet'.*Choose one of dynunet, hdenseformer, .*uxnet, or a file"):
        build("vnet")
    with pytest.raises(ValueError, match=r"'swinunet'\. Did you mean swinunetr\?"):
        build("swinunet")


@pytest.mark.parametrize("modalities", [("us",), ("ct", "us"), ()])
def test_an_unknown_or_missing_modality_is_refused(modalities):
    with pytest.raises(ValueError, match=r"must be one or more of \['ct', 'pet', 'mr'\], got"):
        build(modalities=modalities)


def test_several_outputs_of_a_sigmoid_head_are_no_region():
    """Their probabilities do not add up: 0.43 and 0.42 would be 0.59, inside."""
    with pytest.raises(ValueError, match=r"classes \[\[0, 1\], 2\], and their probabilities do not add up\. Name one"):
        build(classes=[[0, 1], 2], head="sigmoid")


def test_a_state_dict_without_a_key_is_loaded(tmp_path):
    first = build(seed=1)
    torch.save(first.state_dict(), tmp_path / "plain.pt")
    second = build(seed=2, weights=str(tmp_path / "plain.pt"))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_wrong_checksum_is_refused(weights):
    checksum_file = weights.with_name(f"{weights.name}.sha256")
    checksum_file.write_text("0" * 64)
    with pytest.raises(ValueError, match=r"has the sha256 .* not 000000000000"):
        build(weights=str(weights))
    checksum_file.unlink()
    assert build(weights=str(weights), sha256=sha256(weights)).sha256 == sha256(weights)
    with pytest.raises(ValueError, match="not the expected file") as error:
        build(weights=str(weights), sha256="0" * 64)
    assert str(weights) in str(error.value)


def test_missing_weights_are_refused_with_their_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No weights at .*absent\.pt"):
        build(weights=str(tmp_path / "absent.pt"))


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("writer", ["torch", "pickle", "inside"])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(writer, tmp_path):
    path, folder = tmp_path / "weights.pt", tmp_path / "created_by_the_payload"
    content = {"model": build().state_dict(), "more": Payload(folder)} if writer == "inside" else Payload(folder)
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="not a file of plain weights") as error:
        build(weights=str(path))
    assert str(path) in str(error.value)
    assert not folder.exists()
    # The payload works: the call that an unpickler would make creates the folder.
    function, arguments = Payload(folder).__reduce__()
    function(*arguments)
    assert folder.is_dir()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, weights, tmp_path):
    content = weights.read_bytes()
    path = tmp_path / "truncated.pt"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"truncated\.pt is not a file of plain weights"):
        build(weights=str(path))


@pytest.mark.parametrize(
    "content", [b"hello", b"{}", b"\x00" * 400, b"\x1f\x8b\x08\x00", b"\x80\x02", b"PK\x03\x04", b"."]
)
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pt is not a file of plain weights"):
        build(weights=str(path))


@pytest.mark.parametrize("kind", ["another network", "more modalities", "a list", "one name less"])
def test_weights_of_another_network_are_refused_in_a_single_line(kind, tmp_path):
    path, state = tmp_path / "foreign.pt", build().state_dict()
    if kind == "another network":
        state = Student(3, 2, features=(8, 8)).state_dict()
    elif kind == "more modalities":
        state = build(modalities=("ct", "pet")).state_dict()
    elif kind == "one name less":
        state.popitem()
    torch.save([1, 2] if kind == "a list" else {"model": state}, path)
    words = r"foreign\.pt holds a list, no state dict" if kind == "a list" else "do not fit Teacher"
    with pytest.raises(ValueError, match=words) as error:
        build(weights=str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_load_teachers_builds_each_teacher_from_its_own_specification(weights, caplog):
    specs = {
        "pet": {"architecture": "uxnet", "modalities": ["pet"], "weights": str(weights)},
        "both": {"architecture": "hdenseformer", "modalities": ["ct", "mr"]},
    }
    with caplog.at_level(logging.INFO):
        teachers = load_teachers(specs, all_modalities=MODALITIES, out_channels=2, patch=PATCH, options=OPTIONS)
    assert list(teachers) == ["pet", "both"]
    assert {name: teacher.channels for name, teacher in teachers.items()} == {"pet": [1], "both": [0, 2]}
    assert type(teachers["both"].network).__name__ == "HDenseFormer"
    assert f"teacher pet: UXNet, sha256 {sha256(weights)}" in caplog.text
    assert "teacher both: HDenseFormer, random weights" in caplog.text


def test_the_labels_logits_are_those_of_its_class() -> None:
    label = torch.tensor([[[[[0.0, 2.0]]]]])  # B 1 H W D, as the pipeline gives it
    logits = LabelTeacher(3)(label)
    assert logits.shape == (1, 3, 1, 1, 2)
    torch.testing.assert_close(logits.softmax(1)[0, :, 0, 0].T, torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    assert (
        LabelTeacher(2, [[1]])(torch.tensor([[[[0.0, 1.0]]]])).sigmoid() - torch.tensor([0.0, 1.0])
    ).abs().max() < 1e-4
