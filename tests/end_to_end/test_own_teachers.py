# SPDX-License-Identifier: Apache-2.0
"""Teachers of the user's own: any MONAI network, ensembles, two of one architecture, by the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SegResNet

from scripts.cli.main import main
from scripts.networks.teacher import Teacher
from scripts.networks.teacher_spec import join_checksums
from scripts.report.curves import read_curves
from scripts.utils.checksums import sha256

TINY = [
    "--data", "phantom", "--threads", "1", "--device", "cpu",
    "--set", "patch=[16,16,16]", "--set", "spacing=[12,12,12]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", "val_interval=100",
]  # fmt: skip
NETWORK = {
    "_target_": "monai.networks.nets.SegResNet", "init_filters": 8, "in_channels": 2, "out_channels": 2,
    "blocks_down": [1, 1], "blocks_up": [1],
}  # fmt: skip


def segresnet(seed: int) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(init_filters=8, in_channels=2, out_channels=2, blocks_down=[1, 1], blocks_up=[1])


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three weights files of one network, as three folds leave them."""
    folder = tmp_path_factory.mktemp("folds")
    paths = [folder / f"fold{seed}.pt" for seed in range(3)]
    for seed, path in enumerate(paths):
        torch.save(segresnet(seed).state_dict(), path)
    return paths


@pytest.fixture
def spec(folds: list[Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "network": NETWORK,
        "modalities": ["pet", "ct"],
        "weights": [str(path) for path in folds],
        "layers": {"deep": "down_layers.1", "middle": "up_layers.0", "fine": "up_layers.0"},
    }


def distill(cohort: Path, output: Path, *arguments: str) -> int:
    command = ["distill", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(output), "--epochs", "1"]
    return main([*command, *arguments])


def test_an_ensemble_of_a_users_network_is_the_logarithm_of_the_mean_softmax(folds: list[Path]) -> None:
    weights = [str(path) for path in folds]
    teacher = Teacher(["pet", "ct"], ["ct", "pet", "mr"], 2, [16, 16, 16], network=segresnet(9), weights=weights).eval()
    image = torch.randn(1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        members = [segresnet(seed).eval()(image[:, [1, 0]]).softmax(1) for seed in range(3)]
        torch.testing.assert_close(teacher(image), torch.stack(members).mean(0).log())
    assert teacher.sha256 == hashlib.sha256("\n".join(sha256(path) for path in folds).encode()).hexdigest()


def test_a_student_learns_from_a_users_ensemble_and_two_teachers_of_one_architecture(
    spec: dict[str, Any], folds: list[Path], cohort: Path, tmp_path: Path
) -> None:
    del spec["layers"]  # predictions only: an ensemble has no features
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    small = ["--set", 'architectures={"dynunet":{"filters":[4,8,8]}}']
    others = ["--teacher", "one=dynunet=random", "--teacher", "two=dynunet:mr=random"]
    mine = ["--teacher", f"mine={tmp_path / 'mine.json'}", "--method", "hinton"]
    assert distill(cohort, tmp_path / "out", *mine, *others, *small) == 0
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert [row[f"weight/{name}"] for name in ("mine", "one", "two")] == pytest.approx([1 / 3] * 3)
    checksums = json.loads((tmp_path / "out" / "manifest.json").read_text())["teachers_sha256"]
    assert checksums == {"mine": join_checksums([sha256(path) for path in folds]), "one": None, "two": None}


def test_features_of_a_users_network_are_tapped_at_the_layers_that_it_names(
    spec: dict[str, Any], folds: list[Path], cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.json").write_text(json.dumps({**spec, "weights": str(folds[0])}))
    one = ["--teacher", f"one={tmp_path / 'one.json'}", "--method", "hint"]
    assert distill(cohort, tmp_path / "out", *one) == 0
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert row["loss/hint"] is not None
    assert row["loss/hint"] > 0
    (tmp_path / "several.json").write_text(json.dumps(spec))
    assert distill(cohort, tmp_path / "refused", "--teacher", f"s={tmp_path / 'several.json'}", "--method", "hint") == 1
    assert "The teacher s cannot be used: An ensemble has no layers to tap." in capsys.readouterr().err


def test_a_users_architecture_and_a_larger_student_teach(cohort: Path, tmp_path: Path) -> None:
    architecture = {"network": {**NETWORK, "in_channels": "@in_channels"}, "layers": {"middle": "up_layers.0"}}
    (tmp_path / "mine.json").write_text(json.dumps(architecture))
    mine = ["--architecture", str(tmp_path / "mine.json"), "--modalities", "pet", "--output-dir", str(tmp_path / "t")]
    assert main(["teacher", *TINY, "--dataset-dir", str(cohort), "--epochs", "1", *mine]) == 0
    teachers = [f"{tmp_path / 'mine.json'}:pet={tmp_path / 't' / 'model.pt'}", "big=student=random"]
    arguments = [word for text in teachers for word in ("--teacher", text)]
    smaller = ["--set", '+architectures#student={"features": [8,8,16,16]}']
    assert distill(cohort, tmp_path / "out", *arguments, *smaller, "--method", "hint") == 0
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert (row["weight/mine_pet"], row["weight/big"]) == (0.5, 0.5)
    assert row["loss/hint"] is not None
    weights = torch.load(tmp_path / "t" / "model.pt", weights_only=True)
    torch.manual_seed(0)
    SegResNet(init_filters=8, in_channels=1, out_channels=2, blocks_down=[1, 1], blocks_up=[1]).load_state_dict(
        {name.removeprefix("network."): value for name, value in weights.items()}
    )


def test_an_ensemble_is_cached_and_read_back(
    spec: dict[str, Any], cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del spec["layers"]
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    teacher = ["--teacher", f"mine={tmp_path / 'mine.json'}"]
    cache = ["cache-teachers", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "cache"), *teacher]
    assert main(cache) == 0
    arguments = [*teacher, "--method", "hinton", "--cache-dir", str(tmp_path / "cache")]
    assert distill(cohort, tmp_path / "out", *arguments) == 0
    spec["weights"] = spec["weights"][:2]
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    assert distill(cohort, tmp_path / "other", *arguments) == 1
    assert "The cache of the teacher mine is outdated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "unetr"}, "label, predictions, nnunet; it has architecture and network."),
        ({"network": None}, "exactly one of architecture, network, bundle, label, predictions, nnunet; it has none."),
        ({"wieghts": "w.pt"}, "has the unknown key 'wieghts'. Did you mean weights?"),
        ({"modalities": ["xray"]}, "must be one or more of ['ct', 'pet', 'mr']"),
        ({"weights": "nowhere.pt"}, "No weights at nowhere.pt"),
        ({"network": {**NETWORK, "in_channels": 1}}, "The teacher mine cannot be used: The weights in"),
        ({"layers": {"deep": "down_layers.1"}}, "An ensemble has no layers to tap. Name one weights file, or remove"),
        ({"network": {**NETWORK, "_target_": "monai.networks.nets.SegResNett"}}, "SegResNett"),
        ({"classes": [0, 1, 2]}, "The teacher mine names 3 classes, the task has 2."),
        ({"classes": [0, 5]}, "its classes name the output 5, but its network has outputs 0 to 1"),
        ({"spacing": [1, 1, 1]}, "has the spacing [1, 1, 1], the task [12, 12, 12]. Only cached predictions can"),
    ],
)
def test_a_wrong_specification_is_refused_before_any_case_is_read(
    changes: dict[str, Any], sentence: str, spec: dict[str, Any], cohort: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def read(*_: object, **__: object) -> None:
        raise AssertionError("a case was read")

    monkeypatch.setattr("scripts.data.training_set.training_set", read)
    del spec["layers"]
    changed = {key: value for key, value in {**spec, **changes}.items() if value is not None}
    (tmp_path / "mine.json").write_text(json.dumps(changed))
    assert distill(cohort, tmp_path / "out", "--teacher", f"mine={tmp_path / 'mine.json'}", "--method", "hinton") == 1
    assert sentence in capsys.readouterr().err


def test_the_label_takes_a_teachers_place(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill(cohort, tmp_path / "out", "--teacher", "label", "--method", "hinton") == 0
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert row["weight/label"] == 1.0
    assert row["loss/hinton"] is not None
    assert row["loss/hinton"] > 0
    assert distill(cohort, tmp_path / "features", "--teacher", "label", "--method", "hint") == 1
    assert "No teacher in this run provides a layer for tap 'hint'" in capsys.readouterr().err
    cache = ["cache-teachers", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "c")]
    assert main([*cache, "--teacher", "label"]) == 1
    assert "is the label, which needs no cache" in capsys.readouterr().err


def test_the_label_stands_beside_cached_teachers(cohort: Path, tmp_path: Path) -> None:
    small = ["--set", 'architectures={"dynunet":{"filters":[4,8,8]}}', "--teacher", "dynunet=random"]
    cache = ["cache-teachers", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "cache"), *small]
    assert main(cache) == 0
    both = [*small, "--teacher", "control=label", "--method", "hinton", "--cache-dir", str(tmp_path / "cache")]
    assert distill(cohort, tmp_path / "out", *both) == 0
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    assert [row["weight/dynunet"], row["weight/control"]] == pytest.approx([0.5, 0.5])
