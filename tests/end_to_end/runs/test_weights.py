# SPDX-License-Identifier: Apache-2.0
"""Weights that hold code, belong to another network, are truncated or have another checksum, at every entry point."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from scripts.cli.main import main
from scripts.distillation.staged_training import FINAL_FILES
from scripts.networks.teacher import Teacher

BIG = ["--set", "patch=[32,32,32]", "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]}}']
TEACHER = "dynunet:pet"
STAGES = ("autoencoder", "student", "header_student", "header_dynunet_pet")


class Code:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that exists if the code was executed."""
    return tmp_path / "code has been run"


@pytest.fixture
def spoil(marker: Path) -> Callable[[str, Path], Path]:
    """``spoil(kind, path)`` writes a bad file of weights."""

    def write(kind: str, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "code":
            torch.save({"model": Code(marker)}, path)
        elif kind == "pickle":
            path.write_bytes(pickle.dumps(Code(marker)))
        elif kind == "not finite":
            torch.save({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}, path)
        elif kind == "another network":
            torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
        else:
            torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
            path.write_bytes(path.read_bytes()[:-200])
        return path

    return write


WORDS = {
    "code": "is not a file of plain weights. Other files are not loaded",
    "pickle": "is not a file of plain weights. Other files are not loaded",
    "another network": "do not fit",
    "cut off": "is not a file of plain weights. Other files are not loaded",
    "not finite": "holds NaN or infinite values in 1 of its 2 tensors: take weights from an earlier checkpoint",
}


@pytest.mark.parametrize("kind", ["code", "pickle"])
def test_the_code_in_these_files_works(kind: str, spoil: Any, marker: Path, tmp_path: Path) -> None:
    """The test calls the pickle's function itself, so that nothing is loaded unsafely here either."""
    assert str(marker).encode() in spoil(kind, tmp_path / "bad.pt").read_bytes()
    function, arguments = Code(marker).__reduce__()
    assert not marker.exists()
    function(*arguments)
    assert marker.exists()


@pytest.fixture
def line(tiny: list[str], cohort: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``line(verb, *more)``: a command on the phantoms."""

    def make(verb: str, *more: object) -> list[str]:
        common = [*tiny, "--set", "spacing=[12,12,12]"]
        where = ["--dataset-dir", cohort, "--output-dir", tmp_path / "out"]
        return [str(each) for each in (verb, *common, *where, *more)]

    return make


TRAINING = ("--epochs", 1, "--set", "val_interval=100")
ENTRANCES: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "evaluate": lambda bad: ("evaluate", "--weights", bad),
    "pretrained": lambda bad: ("train", *TRAINING, "--pretrained", bad),
    "teacher": lambda bad: ("distill", *TRAINING, *BIG, "--teacher", f"{TEACHER}={bad}"),
    "cached teacher": lambda bad: ("cache-teachers", *BIG, "--teacher", f"{TEACHER}={bad}"),
    "export": lambda bad: ("export", "--weights", bad, "--formats", "torchscript"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_bad_weights_are_refused_by_name_at_every_entry_point_and_never_executed(
    entrance: str, kind: str, spoil: Any, line: Any, refused: Any, marker: Path, tmp_path: Path
) -> None:
    bad = spoil(kind, tmp_path / "weights" / "bad.pt")
    error = refused(*line(*ENTRANCES[entrance](bad)))
    assert str(bad) in error
    assert WORDS[kind] in error
    assert not marker.exists()
    left = {path.name for path in tmp_path.rglob("*") if path.suffix in (".pt", ".gz", ".ts", ".csv", ".html")}
    assert left == {"bad.pt"}


@pytest.mark.parametrize("kind", WORDS)
def test_segment_refuses_bad_weights_and_writes_no_mask(
    kind: str, spoil: Any, refused: Any, noise_case: Any, segment_arguments: Any, marker: Path, tmp_path: Path
) -> None:
    bad, mask = spoil(kind, tmp_path / "bad.pt"), tmp_path / "out" / "mask.nii.gz"
    error = refused(*segment_arguments(noise_case(tmp_path, 16), mask, "--weights", bad))
    assert str(bad) in error
    assert WORDS[kind] in error
    assert not marker.exists()
    assert not mask.exists()


@pytest.mark.parametrize("kind", WORDS)
def test_a_bad_checkpoint_is_refused_and_never_executed(
    kind: str, spoil: Any, line: Any, refused: Any, marker: Path, tmp_path: Path
) -> None:
    bad = spoil(kind, tmp_path / "out" / "checkpoint.pt")
    error = refused(*line("train", *TRAINING, "--resume"))
    assert str(bad) in error
    whole = kind in ("another network", "not finite")
    assert ("contains no state of" if whole else "cannot be read: remove it to start a new run") in error
    assert not marker.exists()
    assert not (tmp_path / "out" / "model.pt").exists()


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("stage", STAGES)
def test_headers_and_autoencoder_of_gkd_are_loaded_as_safely(
    stage: str, kind: str, spoil: Any, line: Any, refused: Any, marker: Path, tmp_path: Path
) -> None:
    stages = tmp_path / "stages"
    for name in STAGES:
        if name == "header_student" and stage in ("autoencoder", "student"):
            continue  # so that it is trained, from those two
        (stages / name).mkdir(parents=True)
        for file in FINAL_FILES:
            (stages / name / file).touch()
    if stage == "autoencoder":
        _plain_student(stages / "student" / "model.pt")
    if stage == "header_dynunet_pet":
        _plain_header(stages / "header_student" / "model.pt")
    bad = spoil(kind, stages / stage / "model.pt")
    options = {"dynunet": {"filters": [2, 4, 4, 4, 4]}}
    teacher = Teacher(["pet"], ["ct", "pet", "mr"], 2, [32, 32, 32], "dynunet", options=options)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    error = refused(
        *line("distill", "--epochs", 2, "--set", "val_interval=100", *BIG, "--method", "gkd",
              "--teacher", f"{TEACHER}={tmp_path / 'teacher.pt'}", "--stages-dir", stages)
    )  # fmt: skip
    assert str(bad) in error
    assert WORDS[kind] in error
    assert not marker.exists()
    assert not (tmp_path / "out" / "model.pt").exists()


def _plain_student(path: Path) -> None:
    from scripts.networks import Student

    torch.save({"model": Student(3, 2, (4, 8, 8, 8), norm=("group", {"num_groups": 4})).state_dict()}, path)


def _plain_header(path: Path) -> None:
    from scripts.distillation.alignment_training import build_header
    from scripts.networks import Student

    student = Student(3, 2, (4, 8, 8, 8), norm=("group", {"num_groups": 4}))
    torch.save({"model": build_header(student, [3, 32, 32, 32]).state_dict()}, path)


@pytest.mark.parametrize("entrance", ["segment", *ENTRANCES])
def test_weights_that_do_not_match_their_sha256_file_are_refused(
    entrance: str, weights: Path, line: Any, refused: Any, noise_case: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(weights.read_bytes())
    path.with_name("model.pt.sha256").write_text(f"{'0' * 64}  model.pt\n")
    mask = tmp_path / "out" / "mask.nii.gz"
    arguments = segment_arguments(noise_case(tmp_path, 16), mask, "--weights", path) if entrance == "segment" else None
    error = refused(*(arguments or line(*ENTRANCES[entrance](path))))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    assert f"{path} has the sha256 {digest}..., not {'0' * 12}...: it is not the expected file" in error
    assert {path.name for path in tmp_path.rglob("*.pt")} == {"model.pt"}
    assert not list(tmp_path.glob("out/**/[!.]*.gz"))


@pytest.mark.parametrize("kind", ["code", "pickle"])
def test_code_in_a_cached_prediction_is_not_executed_even_if_the_manifest_matches(
    kind: str, spoil: Any, line: Any, refused: Any, marker: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "teacher.pt"
    options = {"dynunet": {"filters": [2, 4, 4, 4, 4]}}
    torch.save(Teacher(["pet"], ["ct", "pet", "mr"], 2, [32, 32, 32], "dynunet", options=options).state_dict(), weights)
    asked = (*BIG, "--teacher", f"{TEACHER}={weights}")
    assert main(line("cache-teachers", *asked)) == 0
    folder = next(tmp_path.rglob("dynunet_pet"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for case_id, entry in manifest["cases"].items():
        bad = spoil(kind, folder / f"{case_id}.pt")
        entry |= {"bytes": bad.stat().st_size, "sha256": hashlib.sha256(bad.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    error = refused(*line("distill", *TRAINING, *asked, "--method", "hinton", "--cache-dir", folder.parent))
    assert "is not a file of plain weights. Other files are not loaded" in error
    assert str(folder) in error
    assert not marker.exists()
    assert not list(tmp_path.rglob("model.pt"))
    assert main(line("cache-teachers", *asked)) == 0  # makes it anew, without running it
    assert not marker.exists()


def test_weights_as_other_programs_save_them_give_the_same_mask(
    weights: Path, noise_case: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    state = torch.load(weights, weights_only=True)["model"]
    forms = {
        "dataparallel.pt": {f"module.{name}": value for name, value in state.items()},
        "lightning.ckpt": {"state_dict": {f"net._orig_mod.{name}": value for name, value in state.items()}, "epoch": 3},
        "research.pth": {"model_state_dict": state, "best": np.float64(0.5)},
    }
    files, masks = noise_case(tmp_path / "in", 16), []
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    for path in (weights, *(tmp_path / name for name in forms), tmp_path / "model.safetensors"):
        mask = tmp_path / path.suffix / "mask.nii.gz"
        assert main(segment_arguments(files, mask, "--weights", path)) == 0
        masks.append(np.asarray(nib.load(mask).dataobj))
    assert 0 < masks[0].sum() < masks[0].size
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
