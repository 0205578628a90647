# SPDX-License-Identifier: Apache-2.0
"""Configs are merged as MONAI merges them, and ``--set`` only changes ids that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from scripts.cli.config import CONFIGS, config_names, has_id, merge_configs
from scripts.cli.main import main

TRAINING = ["train", "data/sts", "scale/small"]
COMPOSITIONS = [
    [*TRAINING, "teacher", "multi_gpu_train"],
    [*TRAINING, "distill", "cache_teachers"],
    [*TRAINING, "stages/autoencoder"],
    ["inference", "data/picai22", "scale/full", "teacher", "score", "profile"],
    ["inference", "data/hecktor21", "scale/demo", "export"],
    *([*TRAINING, "distill", f"methods/{name}", "cached"] for name in config_names("methods")),
]


@pytest.mark.parametrize("names", COMPOSITIONS, ids=lambda names: names[-2])
def test_configs_are_merged_as_monai_merges_them(names: list[str]) -> None:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    monai = {key: value for key, value in parser.get().items() if key != "_meta_"}
    assert merge_configs(names) == monai


def test_nested_ids_and_list_items_are_found() -> None:
    config = merge_configs(TRAINING)
    assert has_id(config, "train#handlers#0#_target_")
    assert has_id(config, "checks#_target_")
    assert not has_id(config, "train#handlers#99")
    assert not has_id(config, "train#handler")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ("patchh=[1,1,1]", "no such id. Did you mean patch? To add a new id, write --set +patchh=VALUE."),
        ("train#datset=1", "no such id. Did you mean train#dataset?"),
        ("qqqqqqqqqq=1", "no such id. To add"),
        ("overlap", "write ID=VALUE"),
        ("=3", "write ID=VALUE"),
        ("+a#b#c=3", "the configs have no a#b that could hold it"),
    ],
)
def test_an_id_that_the_configs_do_not_have_is_refused(
    pair: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "train", "--set", pair, "--dry-run")


def test_every_verb_refuses_an_unknown_id(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("segment --ct a --output b.nii.gz", "evaluate", "export", "distill", "cache-teachers", "teacher"):
        assert "--set nothing: the configs have no such id" in refused(capsys, *verb.split(), "--set", "nothing=1")
    for verb in ("check --dataset-dir .", "report --evaluations .", "dicom --study .", "segment --data-list a.csv"):
        assert "--set nothing: the configs have no such id" in refused(capsys, *verb.split(), "--set", "nothing=1")


def test_new_ids_null_and_text_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", "+note=hello", "--set", "splits_file=null", "--set", "patch=[16,16,16]"]
    assert main(["train", *arguments, "--dry-run"]) == 0
    line = capsys.readouterr().out
    assert "--note hello" in line
    assert "--splits_file '$None'" in line
    assert "--patch '[16, 16, 16]'" in line


def test_null_reaches_the_workflow(tmp_path: Path, cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a file for the split, the training writes none."""
    tiny = {"patch": [16, 16, 16], "spacing": [12, 12, 12], "student_features": [4, 8, 8, 8], "max_epochs": 1}
    settings = [word for key, value in tiny.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    settings += ["--set", 'student_norm=["group", {"num_groups": 4}]', "--set", "splits_file=null"]
    command = ["train", "--data", "phantom", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path), *settings]
    assert main([*command, "--threads", "1"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.pt" in names
    assert "splits.json" not in names
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["command"].startswith("python -m monai.bundle run --config_file")
    assert "--splits_file '$None'" in manifest["command"]
    printed = capsys.readouterr()
    assert "monai.bundle" not in printed.out + printed.err  # only with --verbose


def test_teachers_and_start_weights_are_checked_before_any_case_is_read(
    tmp_path: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("a case was read")

    monkeypatch.setattr("scripts.data.training_set.training_set", read)
    monkeypatch.setattr("monai.data.CacheDataset.__init__", read)
    (tmp_path / "bad.pt").write_text("no weights")
    data = ["--data", "phantom", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    for options in (
        ["train", "--pretrained", str(tmp_path / "bad.pt")],
        ["distill", "--teacher", f"unetr:ct={tmp_path / 'bad.pt'}"],
    ):
        assert main([*options, *data]) == 1
        assert f"{tmp_path / 'bad.pt'}" in capsys.readouterr().err
