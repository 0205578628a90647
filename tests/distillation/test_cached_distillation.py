# SPDX-License-Identifier: Apache-2.0
"""Distillation from a cache with the commands that a user types: a cache that does not fit is rejected."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.cli.main import main
from scripts.networks.teacher import Teacher
from scripts.report.curves import read_curves

PHANTOM = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]}}', "--set", "val_interval=100",
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two teachers of the same kind."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        options = {"dynunet": {"filters": [2, 4, 4, 4, 4]}}
        teacher = Teacher(["pet"], ["ct", "pet", "mr"], 2, [32, 32, 32], "dynunet", options=options)
        paths.append(tmp_path_factory.mktemp("teacher") / "model.pt")
        torch.save({"model": teacher.state_dict()}, paths[-1])
    return paths


@pytest.fixture(scope="module")
def cache_dir(cohort: Path, weights: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with maps of the training cases of fold 0."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "splits.json").write_text(
        json.dumps({"seed": 0, "folds": [["PHANTOM_001", "PHANTOM_002"], [f"PHANTOM_00{i}" for i in range(3, 7)]]})
    )
    arguments = ["cache-teachers", *PHANTOM, "--dataset-dir", str(cohort), "--output-dir", str(folder), "--maps"]
    arguments += ["--teacher", f"dynunet:pet={weights[0]}", "--set", f"splits_file={folder / 'splits.json'}"]
    assert main(arguments) == 0
    return folder


@pytest.fixture
def distill(
    cohort: Path, weights: list[Path], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Distil for an epoch from a cache, by default a fresh copy; return the error message, or an empty string."""
    shutil.copytree(cache_dir, tmp_path / "cache")

    def run(*more: str, folder: Path | None = None, teacher: str = "", data: Path | None = None) -> str:
        arguments = ["distill", *PHANTOM, "--dataset-dir", str(data or cohort), "--output-dir", str(tmp_path / "out")]
        arguments += ["--cache-dir", str(folder or tmp_path / "cache"), "--epochs", "1"]
        arguments += ["--teacher", teacher or f"dynunet:pet={weights[0]}"]
        arguments += ["--set", f"splits_file={cache_dir / 'splits.json'}", *more]
        capsys.readouterr()
        code = main(arguments)
        errors = re.findall(r"^.*?(error: .*)$", capsys.readouterr().err, re.MULTILINE)  # a progress bar may precede it
        assert code == len(errors) <= 1
        assert (tmp_path / "out" / "model.pt").exists() == (code == 0)
        return errors[0] if errors else ""

    return run


@pytest.fixture
def damage(tmp_path: Path) -> Callable[[str], None]:
    """Damage the copy of the cache."""
    path = tmp_path / "cache" / "dynunet_pet" / "PHANTOM_004.pt"

    def do(how: str) -> None:
        manifest = path.with_name("manifest.json")
        noted = json.loads(manifest.read_text())
        if how == "truncated":
            os.truncate(path, path.stat().st_size - 1)
        elif how == "flipped":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(bytes(content))
        elif how == "deleted":
            path.unlink()
        elif how == "case":
            del noted["cases"]["PHANTOM_004"]
        elif how == "format":
            noted["format"] = 99
        manifest.write_text(json.dumps(noted)[: 20 if how == "manifest" else None])

    return do


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "PHANTOM_004.pt is damaged. Run cache-teachers again; it replaces missing and damaged files."),
        ("flipped", "PHANTOM_004.pt is damaged. Run cache-teachers again"),
        ("deleted", "PHANTOM_004.pt is missing. Run cache-teachers again"),
        ("case", "The cache of the teacher dynunet_pet lacks 1 case(s): PHANTOM_004. Run cache-teachers again"),
        ("format", "its format is 99, this run's is 1. Rebuild it with cache-teachers --rebuild."),
        ("manifest", "manifest.json cannot be read. Rebuild the cache with cache-teachers --rebuild."),
    ],
)
def test_a_damaged_cache_is_refused(distill: Any, damage: Any, how: str, words: str) -> None:
    damage(how)
    assert words in distill("--method", "hinton")


def test_a_cache_made_with_other_settings_is_refused(distill: Any, weights: list[Path], tmp_path: Path) -> None:
    hinton = ("--method", "hinton")
    outdated = "The cache of the teacher dynunet_pet is outdated: its "
    assert f"{outdated}weights sha256 is " in distill(*hinton, teacher=f"dynunet:pet={weights[1]}")
    assert "this run's is None" in distill(*hinton, teacher="dynunet:pet=random")
    assert f"{outdated}spacing is [12.0, 12.0, 12.0], this run's is [12.0, 12.0, 14.0]" in distill(
        *hinton, "--set", "spacing=[12,12,14]"
    )
    for key, value in (("modalities", ["mr"]), ("architecture", "segresnet")):
        spec = {"architecture": "dynunet", "modalities": ["pet"], "weights": str(weights[0]), key: value}
        error = distill(*hinton, "--set", f"teacher_specs={json.dumps({'dynunet_pet': spec})}")
        assert f"{outdated}{key} is " in error
        assert f"this run's is {value}" in error
    assert "No cache of the teacher dynunet_pet at" in distill(*hinton, folder=tmp_path / "nowhere")
    assert "No cache of the teacher dynunet_ct at" in distill(*hinton, teacher="dynunet:ct=random")
    error = distill("--method", "hint")
    assert (
        "needs features of the teacher 'dynunet_pet', but its cache contains only logits, coarse_map, fine_map" in error
    )
    assert "train without the cache" in error


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_source_image_is_refused(distill: Any, cohort: Path, tmp_path: Path, same_size: bool) -> None:
    shutil.copytree(cohort, tmp_path / "data")
    path = tmp_path / "data" / "PHANTOM_005" / "PET_image.nii.gz"
    content = path.read_bytes()
    # The byte after gzip's magic number, method and flags belongs to its time stamp: the voxels stay readable.
    path.write_bytes(content[:4] + bytes([content[4] ^ 1]) + content[5:] if same_size else content + b"\0")
    error = distill("--method", "hinton", data=tmp_path / "data")
    assert "The image files of case PHANTOM_005 have changed since" in error


def test_verify_by_size_lets_a_flipped_bit_pass_but_no_truncation(distill: Any, damage: Any) -> None:
    damage("flipped")
    assert distill("--method", "hinton", "--set", "verify_cache=size") == ""


def test_verify_by_size_refuses_a_truncation(distill: Any, damage: Any) -> None:
    damage("truncated")
    assert "PHANTOM_004.pt is damaged" in distill("--method", "hinton", "--set", "verify_cache=size")


def test_teach_former_trains_on_cached_maps_without_any_teacher_network(
    distill: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a teacher was built")

    monkeypatch.setattr(Teacher, "__init__", refuse)
    assert distill("--method", "teachformer") == ""
    (row,) = read_curves(tmp_path / "out" / "curves.csv")
    for name in ("loss/soft", "loss/coarse", "loss/fine"):
        assert row[name] > 0, name
    assert row["weight/dynunet_pet"] == 1
    noted = json.loads((tmp_path / "out" / "manifest.json").read_text())["teachers_sha256"]
    assert len(noted["dynunet_pet"]) == 64


def test_a_loss_of_another_power_than_the_cached_maps_is_refused(distill: Any) -> None:
    error = distill("--method", "teachformer", "--set", "+loss#terms#fine#loss#p=4")
    assert (
        "Term 'fine' has the power p = 4, but the cached attention maps of the teacher 'dynunet_pet' have 2." in error
    )
    assert "cache-teachers --maps --set attention_power=4 --rebuild" in error
    pixels = '{"tap": "coarse_map", "weight": 1, "loss": {"_target_": "scripts.losses.PixelRelationLoss"}}'
    error = distill("--method", "teachformer", "--set", f"+loss#terms#pixels={pixels}")
    assert "Term 'pixels' needs features of the teacher 'dynunet_pet', but its cache contains only attention" in error
