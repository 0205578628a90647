# SPDX-License-Identifier: Apache-2.0
"""Settings of the included student where another network is trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from scripts.cli.main import main
from scripts.cli.student_options import network_overrides, student_ids


@pytest.fixture
def unet(tmp_path: Path) -> str:
    """The file of a network."""
    path = tmp_path / "unet.json"
    definition = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 3, "out_channels": 2}
    path.write_text(json.dumps({**definition, "channels": [8, 16], "strides": [2]}))
    return str(path)


def test_the_settings_of_the_student_are_those_of_its_definition() -> None:
    sizes = {"student_features", "student_full_features", "student_strides", "student_norm"}
    assert student_ids() == {*sizes, "selective_fusion", "modality_dropout"}


@pytest.mark.parametrize("verb", ["train", "distill"])
@pytest.mark.parametrize("pair", ["modality_dropout=0.3", "student_features=[8,8]", "student_norm#0=batch"])
def test_settings_of_the_student_are_refused_beside_another_network(
    verb: str, pair: str, unet: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--network", unet, "--set", pair, "--dry-run"]) == 1
    key = pair.partition("=")[0]
    error = capsys.readouterr().err
    assert f"--set {key} works with the included student only. Remove it, or remove --network." in error


@pytest.mark.parametrize("pair", ["modality_dropout=0.3", "selective_fusion=true"])
def test_settings_of_the_student_are_refused_for_a_teacher_unless_their_name_says_whose_they_are(
    pair: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["teacher", "--dataset-dir", "x", "--dry-run"]
    assert main([*teacher, "--set", pair]) == 1
    assert "works with the included student only. Remove it, or train the student by" in capsys.readouterr().err
    assert main([*teacher, "--set", "student_features=[8,8]"]) == 0


def test_other_settings_and_the_included_student_are_accepted(unet: str) -> None:
    assert main(["train", "--dataset-dir", "x", "--network", unet, "--set", "learning_rate=0.1", "--dry-run"]) == 0
    assert main(["train", "--dataset-dir", "x", "--set", "modality_dropout=0.3", "--dry-run"]) == 0


def test_a_class_may_have_an_argument_called_network(tmp_path: Path) -> None:
    """Only in a file without a class of its own is ``network`` the definition."""
    inner = {"_target_": "monai.networks.nets.UNet", "spatial_dims": 3}
    outer = {"_target_": "scripts.networks.teacher.Teacher", "modalities": ["ct"], "network": inner}
    for content, expected in ((outer, outer), ({"network": inner}, inner)):
        (tmp_path / "own.json").write_text(json.dumps(content))
        overrides = network_overrides(argparse.Namespace(network=str(tmp_path / "own.json"), set=[]))
        assert overrides == {"network_def": expected}
