# SPDX-License-Identifier: Apache-2.0
"""``plan`` prints what it proposes and why, and writes a complete task."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.cli.main import main
from scripts.cli.task import REQUIRED

Write = Callable[..., Path]
Task = dict[str, Any]
ORGANS = {1: (slice(6, 12), 40), 2: (slice(20, 26), 60), 3: (slice(30, 34), 100)}  # value: x, HU
LAYOUT = {"ct": "{case}/ct.nii.gz", "label": "{case}/seg.nii.gz"}


def write_image(write: Write, path: Path, voxels: Any, spacing: Sequence[float]) -> Path:
    return write(path, voxels, np.diag([*spacing, 1.0]))


@pytest.fixture
def ct(tmp_path: Path, write_nifti: Write) -> Path:
    """Five CTs of 40^3 voxels of 1 mm with three organs."""
    root = tmp_path / "ct"
    for number in range(5):
        image, label = np.full((40, 40, 40), -1024, dtype=np.int16), np.zeros((40, 40, 40), dtype=np.uint8)
        for value, (place, hu) in ORGANS.items():
            label[place, 10:20, 10:30], image[place, 10:20, 10:30] = value, hu
        write_image(write_nifti, root / f"c{number}/ct.nii.gz", image, (1, 1, 1))
        write_image(write_nifti, root / f"c{number}/seg.nii.gz", label, (1, 1, 1))
    return root


def plan(folder: Path, tmp_path: Path, task: Mapping[str, Any] | str, *more: str) -> Task:
    """The task that the verb writes."""
    data, output = str(task), tmp_path / "planned.json"
    if not isinstance(task, str):
        (tmp_path / "task.json").write_text(json.dumps(task))
        data = str(tmp_path / "task.json")
    arguments = ["plan", "--data", data, "--dataset-dir", str(folder), "--output", str(output), "--workers", "1"]
    assert main([*arguments, "--device", "cpu", *more]) == 0
    written: Task = json.loads(output.read_text())
    assert all(key in written for key in REQUIRED)
    return written


def test_ct_of_three_organs(ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ["background", "kidney_left", "kidney_right", "liver"]
    task = {
        "cohort": "files",
        "layout": LAYOUT,
        "modalities": ["ct"],
        "labels": [[0], [1], [2], [3]],
        "classes": classes,
    }
    written = plan(ct, tmp_path, task)
    assert {key: written[key] for key in task} == task
    assert written["spacing"] == [1, 1, 1]
    assert written["flips"] == [1, 2]
    assert written["patch"] == [32, 32, 32]  # of 40, divisible by 16
    assert written["intensity"] == {"ct": [40, 100]}  # 5% and more of the foreground have each value
    assert "student_strides" not in written
    out = capsys.readouterr().out
    assert "| flips | [1, 2] |  | kidney_left, kidney_right: sides matter" in out
    assert "warning" not in out
    data = tmp_path / "planned.json"
    assert main(["check", "--data", str(data), "--dataset-dir", str(ct), "--workers", "1"]) == 0


def test_given_settings_stay_and_decide(ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"layout": LAYOUT, "labels": [[0], [1, 2], [3], [7]], "spacing": [1.0, 1.0, 4.0], "batch_size": 1}
    written = plan(ct, tmp_path, task, "--set", "patch=[16,16,8]")
    assert written["modalities"] == ["ct"]  # those of the layout
    assert (written["spacing"], written["batch_size"], written["patch"]) == ([1, 1, 4], 1, [16, 16, 8])
    assert written["rotation"] == [0, 0, 15]
    out = capsys.readouterr().out
    assert "| spacing | [1, 1, 1] | [1.0, 1.0, 4.0] |" in out
    assert "warning: No case has the class 3." in out


def test_labels_are_found(ct: Path, tmp_path: Path) -> None:
    assert plan(ct, tmp_path, {"layout": LAYOUT})["labels"] == [[0], [1], [2], [3]]


def test_a_value_0_that_is_ignored_stays_ignored(ct: Path, tmp_path: Path) -> None:
    task = {"cohort": "files", "layout": LAYOUT, "modalities": ["ct"], "labels": [[1], [2], [3]], "ignore": 0}
    assert plan(ct, tmp_path, task)["ignore"] == 0


def test_mr_with_thick_slices(tmp_path: Path, write_nifti: Write) -> None:
    rng, root = np.random.default_rng(0), tmp_path / "mr"
    rows = [["case_id", "t2", "label"]]
    for number in range(3):
        image, label = rng.integers(0, 900, (96, 96, 12)).astype(np.int16), np.zeros((96, 96, 12), dtype=np.uint8)
        label[30:50, 30:50, 4:8] = 1
        write_image(write_nifti, root / f"{number}.nii.gz", image, (0.5, 0.5, 5))
        write_image(write_nifti, root / f"{number}_seg.nii.gz", label, (0.5, 0.5, 5))
        rows.append([str(number), f"{number}.nii.gz", f"{number}_seg.nii.gz"])
    with (root / "cases.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    task = {"cohort": "table", "layout": {"file": "cases.csv"}, "modalities": ["t2"], "labels": [[0], [1]]}
    written = plan(root, tmp_path, task)
    assert written["spacing"] == [0.5, 0.5, 5]
    assert written["intensity"] == {"t2": "zscore"}
    assert written["student_strides"][0] == [2, 2, 1]
    assert (written["flips"], written["rotation"]) == ([0, 1, 2], [0, 0, 15])
    assert all(n <= most for n, most in zip(written["patch"], (96, 96, 12), strict=True))
    output = tmp_path / "listed.json"
    arguments = ["plan", "--data-list", str(root / "cases.csv"), "--set", 'modalities=["t2"]', "--workers", "1"]
    assert main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == written


def test_a_data_set_of_nnunet_needs_no_more(tmp_path: Path, write_nifti: Write) -> None:
    """PET in SUV beside CT; the test case has other voxels and is left out."""
    rng, root = np.random.default_rng(0), tmp_path / "Dataset001"
    for case, folder, size in (("a", "imagesTr", 3), ("b", "imagesTr", 3), ("t", "imagesTs", 9)):
        label = np.zeros((24, 24, 24), dtype=np.uint8)
        label[8:16, 8:16, 8:16] = 1
        ct = np.where(label, 50, -1000).astype(np.int16) + rng.integers(0, 20, label.shape).astype(np.int16)
        pet = (label * 6.0 + rng.random(label.shape)).astype(np.float32)
        for channel, image in enumerate((ct, pet)):
            write_image(write_nifti, root / folder / f"{case}_000{channel}.nii.gz", image, [size] * 3)
        if folder == "imagesTr":
            write_image(write_nifti, root / "labelsTr" / f"{case}.nii.gz", label, [size] * 3)
    content = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    written = plan(root, tmp_path, {"cohort": "nnunet"})
    assert (written["modalities"], written["labels"]) == (["ct", "pet"], [[0], [1]])
    assert written["classes"] == ["background", "tumour"]
    assert written["spacing"] == [3, 3, 3]
    assert written["intensity"] == {"ct": [50, 69], "pet": [0, 7]}


def test_a_named_data_set_is_compared(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = plan(cohort, tmp_path, "phantom")
    out = capsys.readouterr().out
    assert "| setting | proposal | configs/data/phantom.json | why |" in out
    (row,) = [line for line in out.splitlines() if line.startswith("| spacing |")]
    assert f"| {json.dumps(written['spacing'])} | [3.0, 4.0, 4.0] |" in row
    assert written["cohort"] == "phantom"
    assert (written["intensity"]["mr"], written["intensity"]["pet"][0]) == ("zscore", 0)


def test_more_memory_is_an_option(ct: Path, tmp_path: Path) -> None:
    small = plan(ct, tmp_path, {"layout": LAYOUT}, "--memory-gib", "0.005")
    assert np.prod(small["patch"]) < 32**3


def test_the_file_has_one_setting_a_line(ct: Path, tmp_path: Path) -> None:
    written = plan(ct, tmp_path, {"layout": LAYOUT})
    lines = (tmp_path / "planned.json").read_text().splitlines()
    assert len(lines) == len(written) + 2
    assert list(written)[:3] == ["cohort", "layout", "modalities"]


def test_cases_that_cannot_be_read_are_named(ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ct / "c1/ct.nii.gz").write_bytes(b"")
    plan(ct, tmp_path, {"layout": LAYOUT})
    assert "warning: 1 case(s) could not be read" in capsys.readouterr().out
    (ct / "c2/ct.nii.gz").unlink()
    plan(ct, tmp_path, {"layout": LAYOUT})
    assert "c2/ct.nii.gz is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ({"layout": LAYOUT}, [], "No data to plan for"),
        ({"cohort": "bids"}, ["--dataset-dir", "."], "names no modalities"),
        ({"layout": LAYOUT, "spacing": [1, 1]}, ["--dataset-dir", "."], "spacing is [1, 1]"),
        ({"layout": LAYOUT, "intensity": {"ct": [5, 1]}}, ["--dataset-dir", "CT"], 'intensity["ct"] is [5, 1]'),
        (
            {"layout": LAYOUT},
            ["--dataset-dir", "CT", "--set", "intensity#ct=[-1,1]"],
            "--set intensity#ct: plan reads whole settings",
        ),
        ({"layout": {"ct": "{case}/no.nii.gz"}}, ["--dataset-dir", "CT"], "No cases"),
        ({"layout": {"ct": "{case}/seg.nii.gz"}}, ["--dataset-dir", "CT"], "The task has no labels"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    task: Task, options: list[str], message: str, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.json").write_text(json.dumps(task))
    output = tmp_path / "planned.json"
    options = [str(ct) if each == "CT" else each for each in options]
    arguments = ["plan", "--data", str(tmp_path / "task.json"), "--output", str(output), "--workers", "1"]
    assert main([*arguments, *options]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not output.exists()


@pytest.mark.parametrize("number", ["0", "-1", "nan", "much"])
def test_memory_is_positive(number: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--memory-gib", number])
