# SPDX-License-Identifier: Apache-2.0
"""Inference with other settings than the weights were trained with is refused, on every path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.bundle import run as bundle_run

from monai_label.install import OVERRIDES
from scripts import bundle_root
from scripts.cli.config import CONFIGS
from scripts.cli.main import main
from scripts.training.training_record import write_task

SPACING = ["--set", "spacing=[12,12,12]"]
CASE = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz", "mr": "MR_T1_image.nii.gz"}


@pytest.fixture(scope="module")
def trained(tiny: list[str], cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a training at 12 mm, with their record."""
    output = tmp_path_factory.mktemp("trained")
    line = ["train", *tiny, *SPACING, "--dataset-dir", cohort, "--output-dir", output, "--epochs", 1]
    line += ["--modality-dropout", "0.2", "--set", "val_interval=100"]
    assert main([str(each) for each in line]) == 0
    return output / "model.pt"


@pytest.fixture
def segment(tiny: list[str], cohort: Path, trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``segment(*more)``: the command that segments a phantom at 12 mm."""

    def make(*more: object) -> list[str]:
        files = [f"--{key}={cohort / 'PHANTOM_001' / name}" for key, name in CASE.items()]
        line = ["segment", *tiny, *SPACING, *files, "--weights", trained, "--output", tmp_path / "out" / "mask.nii.gz"]
        return [str(each) for each in [*line, *more]]

    return make


CHANGES: dict[str, tuple[list[str], str]] = {
    "spacing": (["--set", "spacing=[6,12,12]"], "its spacing is [12, 12, 12], this run's is [6, 12, 12]"),
    "intensity": (["--set", "intensity#ct=[-100,300]"], "its intensity#ct is [-200, 300], this run's is [-100, 300]"),
    "a z-score": (["--set", "intensity#mr=zscore"], "its intensity#mr is [0, 1200], this run's is zscore"),
    "order": (
        ["--set", 'modalities=["ct","mr","pet"]'],
        "its modalities is ['ct', 'pet', 'mr'], this run's is ['ct', 'mr', 'pet']",
    ),
    "labels": (["--set", "labels=[[0],[2]]"], "its labels is [[0], [1]], this run's is [[0], [2]]"),
    "groups": (
        ["--set", 'student_norm=["group",{"num_groups":2}]'],
        "its network#norm is ['group', {'num_groups': 4}], this run's is ['group', {'num_groups': 2}]",
    ),
    "another class": (
        ["--set", 'network_def={"_target_":"monai.networks.nets.UNet"}'], "its network is Student, this run's is UNet"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_segment_refuses_a_setting_that_contradicts_the_record_and_writes_no_mask(
    change: str, segment: Any, refused: Any, trained: Path, tmp_path: Path
) -> None:
    options, clause = CHANGES[change]
    error = refused(*segment(*options))
    assert f"error: {trained.with_name('model.task.json')} contradicts this run: {clause}" in error
    assert "Use the settings that the weights were trained with, or --set ignore_task=true" in error
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_all_contradictions_are_named_at_once(segment: Any, refused: Any) -> None:
    error = refused(*segment("--set", "spacing=[6,6,6]", "--set", "intensity#ct=[0,1]"))
    assert "its intensity#ct is [-200, 300], this run's is [0, 1]; its spacing is [12, 12, 12], this" in error


def test_patch_overlap_and_arguments_with_their_default_may_differ(segment: Any) -> None:
    free = ["--set", "patch=[32,32,16]", "--set", "overlap=0.5", "--set", "selective_fusion=false"]
    assert main(segment(*free, "--set", "spacing=[12.0,12.0,12.0]", "--set", "+network_def#heads=4")) == 0


def test_ignore_task_segments_and_warns(
    segment: Any, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noisy, mask = shutil.copy(weights, tmp_path / "noisy.pt"), tmp_path / "out" / "mask.nii.gz"
    write_task({"spacing": [12, 12, 12]}, noisy)
    assert main(segment("--weights", noisy)) == 0
    before = np.asarray(nib.load(mask).dataobj)
    assert "contradicts" not in caplog.text
    assert main(segment("--weights", noisy, "--set", "spacing=[6,6,6]", "--set", "ignore_task=true")) == 0
    words = "contradicts this run: its spacing is [12, 12, 12], this run's is [6, 6, 6]. ignore_task is set."
    assert words in caplog.text
    assert not np.array_equal(np.asarray(nib.load(mask).dataobj), before)  # what a forgotten --set does


def test_weights_without_a_record_or_with_that_of_other_weights_are_used(
    segment: Any, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = shutil.copy(trained, tmp_path / "model.pt")
    other = ["--set", "spacing=[6,6,6]", "--weights", weights]
    assert main(segment(*other)) == 0
    task = json.loads(trained.with_name("model.task.json").read_text()) | {"weights_sha256": "0" * 64}
    (tmp_path / "model.task.json").write_text(json.dumps(task))
    assert main(segment("--weights", weights)) == 0
    assert f"{tmp_path / 'model.task.json'} describes other weights than {weights}" in caplog.text


@pytest.mark.parametrize("verb", ["evaluate", "export", "table"])
def test_the_other_verbs_refuse_it_before_any_case(
    verb: str, tiny: list[str], cohort: Path, trained: Path, refused: Any, tmp_path: Path
) -> None:
    where = ["--dataset-dir", cohort, "--output-dir", tmp_path / "out", "--weights", trained]
    if verb == "table":
        rows = "\n".join(f"P{i},P{i}," + ",".join(f"PHANTOM_00{i}/{name}" for name in CASE.values()) for i in (1, 2))
        (cohort / "task_cases.csv").write_text(f"case_id,patient_id,ct,pet,mr\n{rows}\n")
        where += ["--data-list", cohort / "task_cases.csv"]
    line = ["segment" if verb == "table" else verb, *tiny, "--set", "spacing=[10,12,12]", *where]
    error = refused(*line, *(["--formats", "torchscript"] if verb == "export" else []))
    assert "model.task.json contradicts this run: its spacing is [12, 12, 12], this run's is [10, 12, 12]" in error
    assert not list(tmp_path.rglob("*.nii.gz"))
    assert not list(trained.parent.glob("*_export"))
    (cohort / "task_cases.csv").unlink(missing_ok=True)


def test_scoring_masks_made_elsewhere_needs_no_weights(tiny: list[str], cohort: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for case in cohort.glob("PHANTOM_*"):
        shutil.copy(case / "CT_mask.nii.gz", masks / f"{case.name}.nii.gz")
    line = ["evaluate", *tiny, "--dataset-dir", cohort, "--predictions", masks, "--output-dir", tmp_path / "out"]
    assert main([str(each) for each in [*line, "--set", "spacing=[5,5,5]"]]) == 0


@pytest.mark.parametrize("way", ["monai.bundle run", "MONAI Label"])
def test_plain_monai_and_monai_label_refuse_it_too(way: str, cohort: Path, trained: Path, tmp_path: Path) -> None:
    task = json.loads(trained.with_name("model.task.json").read_text())
    settings = {
        "weights": str(trained),
        "spacing": [5, 5, 5],
        "modalities": task["modalities"],
        "labels": task["labels"],
    }
    settings |= {"student_features": [4, 8, 8, 8], "student_norm": ["group", {"num_groups": 4}], "device": "cpu"}
    network = {"network_def": OVERRIDES["inference"]["network_def"]}

    def start() -> None:
        if way == "MONAI Label":
            parser = ConfigParser()
            parser.read_config(str(CONFIGS / "inference.json"))
            network["student"] = parser["network_def"]
            parser.config.update({"bundle_root": bundle_root(), **settings, **network})
            parser.get_parsed_content("network_def", instantiate=True)
            parser.get_parsed_content("preprocessing", instantiate=True)
        else:
            files = [str(CONFIGS / "inference.json"), str(CONFIGS / "data/phantom.json")]
            where = {"dataset_dir": str(cohort), "output_dir": str(tmp_path / "out")}
            bundle_run(config_file=files, logging_file=False, **settings, **where)

    with pytest.raises(RuntimeError) as error:
        start()
    cause: BaseException = error.value
    while cause.__cause__:
        cause = cause.__cause__
    clauses = str(cause).partition("contradicts this run: ")[2]
    assert clauses.startswith("its spacing is [12, 12, 12], this run's is [5, 5, 5]. Use the settings")


def test_the_shipped_weights_have_their_record(refused: Any, cohort: Path, tmp_path: Path) -> None:
    task = json.loads((Path(bundle_root()) / "models" / "model.task.json").read_text())
    manifest = json.loads((Path(bundle_root()) / "docs/results/shipped/manifest_training.json").read_text())
    for key, cases in zip(("training_cases", "validation_cases"), manifest["data"], strict=True):
        assert [case["case_id"] for case in task[key]] == [case["case_id"] for case in cases]
    assert {key: task[key] for key in ("modalities", "intensity", "labels", "spacing", "patch")} == {
        key: manifest["config"][key] for key in ("modalities", "intensity", "labels", "spacing", "patch")
    }
    checksum = (Path(bundle_root()) / "models" / "model.pt.sha256").read_text().split()[0]
    assert task["weights_sha256"] == checksum
    files = [f"--{key}={cohort / 'PHANTOM_001' / name}" for key, name in CASE.items()]
    error = refused("segment", "--data", "phantom", *files, "--output", tmp_path / "mask.nii.gz")
    assert (
        "models/model.task.json contradicts this run: its spacing is [3.0, 3.0, 3.0], this run's is [3.0, 4.0" in error
    )
    assert main([*map(str, ("segment", *files, "--threads", 1, "--output", tmp_path / "mask.nii.gz"))]) == 0
