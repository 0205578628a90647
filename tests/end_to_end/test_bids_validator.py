# SPDX-License-Identifier: Apache-2.0
"""Masks that ``segment --bids`` writes, judged by the validator of BIDS, and read again as the labels of a data set.

The images are phantoms in a BIDS data set: sub-01 has two sessions, sub-02 has none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.data import datalist

pytestmark = pytest.mark.bids

ROOT = Path(__file__).parents[2]
VALIDATOR = ROOT / ".venv-bids/bin/bids-validator-deno"
PLACES = {"CT_image": ("anat", "ct"), "PET_image": ("pet", "pet"), "MR_T1_image": ("anat", "T1w")}
SESSIONS = {"PHANTOM_001": ("sub-01", "ses-pre"), "PHANTOM_002": ("sub-01", "ses-post"), "PHANTOM_003": ("sub-02",)}
MODALITIES = ["ct", "pet", "mr"]
TASK: dict[str, Any] = {
    "cohort": "bids",
    "layout": {"ct": "ct", "pet": "pet", "mr": "T1w", "label": "*label-tumour_mask"},
    "modalities": MODALITIES,
    "intensity": {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]},
    "labels": [[0], [1]],
    "classes": ["background", "tumour"],
    "codes": {"tumour": ["108369006", "SCT", "Neoplasm"]},
    "spacing": [6, 6, 6],
    "patch": [32, 32, 32],
}
NETWORK = ["--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]']


def _run(*words: str, folder: Path) -> str:
    """Run a verb as a user types it, in a folder with the data set; returns what it prints."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def _issues(folder: Path) -> list[dict[str, Any]]:
    """What the validator says of a data set."""
    if not VALIDATOR.is_file():
        pytest.skip("The BIDS validator is not installed. `make bids-test` installs it; that needs a network.")
    command = [VALIDATOR, "--format", "json", folder]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return report["issues"]["issues"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set ``raw``, labels that somebody drew in its derivatives, and ``task.json``."""
    folder = tmp_path_factory.mktemp("bids")
    raw = folder / "raw"
    for case in phantoms[: len(SESSIONS)]:
        entities = SESSIONS[case["case_id"]]
        for path in Path(case["image"]).parent.glob("*.nii.gz"):
            kind, suffix = PLACES.get(path.name.removesuffix(".nii.gz"), ("anat", "label-tumour_mask"))
            root = raw if suffix != "label-tumour_mask" else raw / "derivatives/manual"
            target = root.joinpath(*entities, kind, "_".join([*entities, suffix]) + ".nii.gz")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (raw / "dataset_description.json").write_text(json.dumps({"Name": "Phantoms", "BIDSVersion": "1.10.0"}))
    (folder / "task.json").write_text(json.dumps(TASK))
    return folder


@pytest.fixture(scope="module")
def weights(folder: Path) -> str:
    """Weights of a small student."""
    import torch

    from scripts.networks import Student

    torch.manual_seed(3)
    torch.save(Student(3, 2, (4, 8, 8, 8), norm=("group", {"num_groups": 4})).state_dict(), folder / "tiny.pt")
    return "tiny.pt"


@pytest.fixture(scope="module")
def segmented(folder: Path, weights: str) -> Path:
    """The masks of every session, as derivatives of the data set."""
    options = ["--data", "task.json", "--dataset-dir", "raw", "--output-dir", "raw/derivatives/student", "--bids"]
    printed = _run("segment", *options, "--weights", weights, *NETWORK, folder=folder)
    assert "3 cases: 3 segmented" in printed
    assert "3 already there" in _run("segment", *options, "--weights", weights, *NETWORK, folder=folder)
    return folder / "raw/derivatives/student"


def test_the_validator_has_nothing_to_say_of_masks_with_sessions(segmented: Path) -> None:
    assert _issues(segmented) == []


def test_the_validator_finds_a_fault(segmented: Path, tmp_path: Path) -> None:
    """So that its silence says something."""
    shutil.copytree(segmented, tmp_path / "copy")
    (tmp_path / "copy/README.md").unlink()
    (tmp_path / "copy/sub-01/stray.txt").write_text("stray")
    assert {each["code"] for each in _issues(tmp_path / "copy")} == {"README_FILE_MISSING", "NOT_INCLUDED"}


def test_masks_of_several_classes_and_of_a_table_are_valid_too(folder: Path, weights: str) -> None:
    table = folder / "cohort.csv"
    image = "raw/sub-02/anat/sub-02_ct.nii.gz,raw/sub-02/pet/sub-02_pet.nii.gz,raw/sub-02/anat/sub-02_T1w.nii.gz"
    table.write_text(f"case_id,patient_id,ct,pet,mr\nP1_pre,P1,{image}\n")
    options = ["--data-list", table.name, "--data", "several.json", "--output-dir", "several", "--bids"]
    labels = {"labels": [[0], [7]], "classes": ["background", "tumour"], "codes": {}}
    (folder / "several.json").write_text(json.dumps({**TASK, **labels}))
    _run("segment", *options, "--weights", weights, *NETWORK, folder=folder)
    (mask,) = (folder / "several").rglob("*.nii.gz")
    assert mask.name == "sub-P1_ses-pre_space-ct_desc-auto_dseg.nii.gz"
    assert _issues(folder / "several") == []


def test_the_masks_are_read_again_as_labels_of_their_sessions(folder: Path, segmented: Path) -> None:
    """And are no labels where the task names those that somebody drew."""
    drawn = datalist("bids", folder / "raw", modalities=MODALITIES, layout=TASK["layout"])
    layout = {**TASK["layout"], "label": "*desc-auto_mask"}
    cases = datalist("bids", folder / "raw", modalities=MODALITIES, layout=layout)
    assert [case["case_id"] for case in cases] == ["sub-01_ses-post", "sub-01_ses-pre", "sub-02"]
    for case, other in zip(cases, drawn, strict=True):
        assert {key: case[key] for key in MODALITIES} == {key: other[key] for key in MODALITIES}
        assert Path(other["label"]).is_relative_to(folder / "raw/derivatives/manual")
        mask, image = nib.load(case["label"]), nib.load(case["ct"])
        assert Path(case["label"]).is_relative_to(segmented)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
        assert mask.header.get_xyzt_units()[0] == "mm"
    (folder / "auto.json").write_text(json.dumps({**TASK, "layout": layout}))
    assert "0 errors" in _run("check", "--data", "auto.json", "--dataset-dir", "raw", folder=folder)
