# SPDX-License-Identifier: Apache-2.0
"""Out-of-fold caches, by the commands that a user types: no network answers a case that trained it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet

from scripts.cli.main import main
from scripts.data import preprocessing
from scripts.networks.teacher import Teacher
from scripts.report.curves import read_curves
from scripts.utils.checksums import sha256

OPTIONS = {"dynunet": {"filters": [2, 4, 4, 4, 4]}}
TINY = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", f"architectures={json.dumps(OPTIONS)}", "--set", "val_interval=100",
]  # fmt: skip
IDS = [f"PHANTOM_00{number}" for number in range(1, 7)]
# Case 1 validates the student. Of the others, each run leaves two out; case 6 is left out by two runs.
LEFT_OUT = [["PHANTOM_002", "PHANTOM_006"], ["PHANTOM_003", "PHANTOM_004"], ["PHANTOM_005", "PHANTOM_006"]]


def make_teacher(seed: int) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(["pet"], ["ct", "pet", "mr"], 2, [32, 32, 32], "dynunet", options=OPTIONS)


def write_run(folder: Path, seed: int, trained_on: list[str], architecture: str = "dynunet") -> Path:
    """A run as ``teacher`` leaves it."""
    folder.mkdir()
    torch.save({"model": make_teacher(seed).state_dict()}, folder / "model.pt")
    cases = [{"case_id": each, "patient_id": each} for each in trained_on]
    network = {"_target_": "scripts.networks.teacher.Teacher", "architecture": architecture, "modalities": ["pet"]}
    (folder / "model.task.json").write_text(json.dumps({"network": network, "training_cases": cases}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    (tmp_path / "splits.json").write_text(json.dumps({"seed": 0, "folds": [IDS[:1], IDS[1:]]}))
    return [
        write_run(tmp_path / f"fold{i}", i, [each for each in IDS[1:] if each not in left_out])
        for i, left_out in enumerate(LEFT_OUT)
    ]


@pytest.fixture
def call(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(verb: str, *arguments: Any) -> tuple[int, str]:
        split = ["--set", f"splits_file={tmp_path / 'splits.json'}", "--dataset-dir", str(cohort)]
        capsys.readouterr()
        code = main([verb, *TINY, *split, *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_each_case_is_answered_by_the_networks_that_did_not_train_on_it(
    runs: list[Path], call: Any, phantoms: list[dict[str, Any]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    code, printed = call("cache-teachers", "--output-dir", cache, "--out-of-fold", *runs, "--name", "big")
    assert code == 0
    weights = [run / "model.pt" for run in runs]
    assert f"distil with --teacher big=dynunet:pet={','.join(map(str, weights))}" in printed
    manifest = json.loads((cache / "big" / "manifest.json").read_text())
    pipeline = preprocessing(
        ["ct", "pet", "mr"], {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]}, [12, 12, 12], "train",
        labels=[[0], [1]], patch=[32, 32, 32],
    )  # fmt: skip
    inferer = SlidingWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian")
    for case in phantoms[1:]:
        members = [i for i, left_out in enumerate(LEFT_OUT) if case["case_id"] in left_out]
        assert len(members) == (2 if case["case_id"] == "PHANTOM_006" else 1)
        entry = manifest["cases"][case["case_id"]]
        assert entry["sources"]["weights_sha256"] == [sha256(weights[i]) for i in members]
        volumes = pipeline.prepare(case)
        image = torch.cat([volumes[key] for key in ("ct", "pet", "mr")])[None]
        with torch.no_grad():
            mean = torch.stack([inferer(image, make_teacher(i).eval()).softmax(1) for i in members]).mean(0)[0]
        kept = torch.load(cache / "big" / f"{case['case_id']}.pt", weights_only=True)["logits"].float()
        torch.testing.assert_close(kept.softmax(0), mean, atol=2e-3, rtol=0)
    # The student learns from that cache, with the teacher as it would be named without one.
    teacher = ["--teacher", f"big=dynunet:pet={','.join(map(str, weights))}", "--method", "hinton", "--epochs", "1"]
    code, printed = call("distill", "--cache-dir", cache, *teacher, "--output-dir", tmp_path / "student")
    assert code == 0, printed
    assert "validation cases" not in printed
    assert read_curves(tmp_path / "student" / "curves.csv")[0]["weight/big"] == 1
    # A network that is said to have trained on another case makes the answer one of another teacher.
    task = runs[1] / "model.task.json"
    task.write_text(task.read_text().replace("PHANTOM_005", "PHANTOM_004"))
    code, printed = call("distill", "--cache-dir", cache, *teacher, "--output-dir", tmp_path / "other")
    assert code == 1
    assert "The image files or the out-of-fold weights of case PHANTOM_004 have changed" in printed


def test_cases_that_every_network_has_seen_are_refused_by_name(runs: list[Path], call: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code, printed = call("cache-teachers", "--output-dir", cache, "--out-of-fold", *runs[:2])
    assert code == 1
    assert "Every network of the teacher dynunet was trained on PHANTOM_005. Add the run of a fold" in printed
    code, printed = call("cache-teachers", "--output-dir", cache, "--out-of-fold", runs[0])
    assert "was trained on PHANTOM_003, PHANTOM_004, PHANTOM_005." in printed
    assert not (cache / "dynunet").exists()
    # The switch alone, on a teacher that is named as usual; of a patient's other studies nothing is answered either.
    task = runs[0] / "model.task.json"
    task.write_text(task.read_text().replace('"case_id": "PHANTOM_003"', '"case_id": "another study"'))
    files = ",".join(str(run / "model.pt") for run in (runs[0], runs[2]))
    code, printed = call(
        "cache-teachers", "--output-dir", cache, "--teacher", f"a=dynunet:pet={files}", "--out-of-fold"
    )
    assert code == 1
    assert "Every network of the teacher a was trained on PHANTOM_003, PHANTOM_004. Add" in printed


def test_runs_that_say_too_little_are_refused(runs: list[Path], call: Any, tmp_path: Path) -> None:
    cache = ["cache-teachers", "--output-dir", tmp_path / "cache"]
    other = write_run(tmp_path / "other", 5, IDS[1:3], "segresnet")
    code, printed = call(*cache, "--out-of-fold", runs[0], other)
    assert code == 1
    assert "trained different teachers: dynunet:pet, segresnet:pet." in printed
    shutil.copy(runs[0] / "model.pt", tmp_path / "alone.pt")
    code, printed = call(*cache, "--teacher", f"dynunet:pet={tmp_path / 'alone.pt'}", "--out-of-fold")
    assert "alone.task.json, which lists the training cases of its weights, is missing or lists none." in printed
    code, printed = call(*cache, "--teacher", "dynunet:pet=random", "--out-of-fold")
    assert "has random weights, which no fold trained. Remove --out-of-fold." in printed
    code, printed = call(*cache, "--teacher", "label", "--out-of-fold")
    assert "The teacher label is the label, which needs no cache: leave it out." in printed
    code, printed = call(*cache, "--out-of-fold", runs[0], runs[0])
    assert f"--out-of-fold names {runs[0] / 'model.pt'} twice. Give each run once." in printed
    code, printed = call(*cache, "--out-of-fold", tmp_path)
    assert f"There are no weights at {tmp_path / 'model.pt'}." in printed
    shutil.copy(runs[0] / "model.pt", tmp_path / "model.pt")
    code, printed = call(*cache, "--out-of-fold", tmp_path)
    assert "model.task.json names no architecture of a teacher. Give the folder of a run of `teacher`" in printed


def test_a_network_of_the_users_own_has_the_weights_of_each_run(
    call: Any, phantoms: list[dict[str, Any]], tmp_path: Path
) -> None:
    """All members come from one definition, as FILE.json gives it."""
    (tmp_path / "splits.json").write_text(json.dumps({"seed": 0, "folds": [IDS[:1], IDS[1:]]}))
    definition = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8]}
    definition["strides"] = [2]
    files = []
    for seed, left_out in enumerate(LEFT_OUT):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.pt")
        torch.save(_unet(definition).state_dict(), files[-1])
        cases = [{"case_id": each, "patient_id": each} for each in IDS[1:] if each not in left_out]
        files[-1].with_suffix(".task.json").write_text(json.dumps({"training_cases": cases}))
    spec = {"network": definition, "modalities": ["pet"], "weights": [str(file) for file in files]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    teacher = ["--teacher", f"mine={tmp_path / 'spec.json'}", "--out-of-fold"]
    code, printed = call("cache-teachers", "--output-dir", tmp_path / "cache", *teacher)
    assert code == 0, printed
    kept = {case: torch.load(tmp_path / "cache" / "mine" / f"{case}.pt", weights_only=True) for case in IDS[1:5]}
    pipeline = preprocessing(
        ["ct", "pet", "mr"], {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]}, [12, 12, 12], "train",
        labels=[[0], [1]], patch=[32, 32, 32],
    )  # fmt: skip
    inferer = SlidingWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian")
    for case in phantoms[1:5]:
        (member,) = [number for number, left_out in enumerate(LEFT_OUT) if case["case_id"] in left_out]
        network = _unet(definition)
        network.load_state_dict(torch.load(files[member], weights_only=True))
        with torch.no_grad():
            expected = inferer(pipeline.prepare(case)["pet"][None], network.eval())[0]
        torch.testing.assert_close(kept[case["case_id"]]["logits"].float(), expected, atol=5e-3, rtol=0)


def _unet(definition: dict[str, Any]) -> Any:
    return UNet(**{key: value for key, value in definition.items() if key != "_target_"})
