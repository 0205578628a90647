# SPDX-License-Identifier: Apache-2.0
"""The runtime folder: its program gives the bundle's masks and refusals in an interpreter without PyTorch and MONAI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from scripts.cli.main import main
from tests.dicom_phantom import write_study
from tests.exported_weights import copy_with_task

# A module of this name fails to be imported: the program must not need it.
HIDDEN = ("torch", "monai", "ignite", "psutil", "filelock", "tqdm", "scipy", "isal")


@pytest.fixture(scope="module")
def weights(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_task(exported, tmp_path_factory.mktemp("weights"), [[0], [3]])


@pytest.fixture(scope="module")
def folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    target = tmp_path_factory.mktemp("runtime") / "out"
    assert main(["export", "--weights", str(weights), "--runtime", str(target)]) == 0
    return target


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(folder, *arguments)``: the program as a user starts it, where none of ``HIDDEN`` can be imported."""
    blocked = tmp_path / "blocked"
    for name in HIDDEN:
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ImportError('{name} is hidden')")

    def start(folder: Path, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(folder / "segment.pyz"), *map(str, arguments), "--threads", "1"]
        variables = {**os.environ, "PYTHONPATH": str(blocked), **environment}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, check=False)

    return start


def images(case: dict[str, Any]) -> list[str]:
    return [word for key in ("ct", "pet", "mr") for word in (f"--{key}", str(case[key]))]


def voxels(path: Path) -> Any:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


def test_its_mask_is_that_of_segment(folder: Path, weights: Path, phantoms: Any, run: Any, tmp_path: Path) -> None:
    ran = run(folder, *images(phantoms[0]), "--output", "mask.nii.gz")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("mask: mask.nii.gz (")
    own = ["segment", "--weights", str(weights), *images(phantoms[0]), "--output", str(tmp_path / "own.nii.gz")]
    assert main([*own, "--threads", "1"]) == 0
    np.testing.assert_array_equal(voxels(tmp_path / "mask.nii.gz"), voxels(tmp_path / "own.nii.gz"))
    assert set(np.unique(voxels(tmp_path / "mask.nii.gz")).tolist()) == {0, 3}


def test_the_folder_is_complete_and_pinned(folder: Path) -> None:
    names = {"segment.pyz", "model", "task.json", "requirements.txt", "README.md", "Dockerfile"}
    assert {path.name for path in folder.iterdir()} == names
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines] == [
        "numpy",
        "nibabel",
        "SimpleITK",
        "pydicom",
        "openvino",
        "psutil",
    ]
    assert all("==" in line for line in lines)
    assert lines[-1].endswith('; sys_platform != "linux"')
    readme, docker = ((folder / name).read_text() for name in ("README.md", "Dockerfile"))
    assert "segment.pyz --ct ct.nii.gz --pet pet.nii.gz --mr mr.nii.gz --output mask.nii.gz" in readme
    assert "$" not in readme + docker
    instructions = dict(
        line.split(" ", 1) for line in docker.splitlines() if line.startswith(("ENTRYPOINT", "ENV", "USER"))
    )
    assert json.loads(instructions["ENTRYPOINT"]) == ["python", "/app/segment.pyz"]
    assert instructions["ENV"].split()[1:] == ["SEGMENT_IN_DIR=/input", "SEGMENT_OUT_DIR=/output"]
    assert "CMD" not in docker  # arguments would win over the variables of a platform
    assert instructions["USER"] == "app"
    assert not any("torch" in name for name in zipfile.ZipFile(folder / "segment.pyz").namelist())


def test_a_study_goes_in_and_a_segmentation_comes_out(folder: Path, phantoms: Any, run: Any, tmp_path: Path) -> None:
    """By the variables of a platform that runs containers."""
    pytest.importorskip("highdicom")
    write_study(phantoms[0], tmp_path / "study")
    container = {"SEGMENT_IN_DIR": "/input", "SEGMENT_OUT_DIR": "/output"}  # of the Dockerfile, where no platform is
    platform = {"MERCURE_IN_DIR": str(tmp_path / "study"), "MERCURE_OUT_DIR": str(tmp_path / "out")}
    ran = run(folder, **container, **platform)
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mask.nii.gz", "seg.dcm"}


def test_a_pet_without_weight_is_named_by_its_series_and_segmented_with_the_option(
    folder: Path, phantoms: Any, run: Any, tmp_path: Path
) -> None:
    study = write_study(phantoms[0], tmp_path / "study") / "dicom"
    for path in study.glob("PT_*.dcm"):
        head = pydicom.dcmread(path)
        del head.PatientWeight
        head.save_as(path)
    options = ["--input", study, "--output-dir", tmp_path / "out"]
    ran = run(folder, *options)
    assert ran.returncode == 1
    series = f"The series {head.SeriesInstanceUID} (pet)"
    assert f"{series} has no PatientWeight, which SUV requires. Give --patient-weight" in ran.stderr
    ran = run(folder, *options, "--patient-weight", "70")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "mask.nii.gz").is_file()


def test_every_case_of_a_batch_of_kaapana_is_segmented(folder: Path, phantoms: Any, run: Any, tmp_path: Path) -> None:
    """A folder for each case, with folders for input and output inside of it; the first has no images."""
    pytest.importorskip("highdicom")
    batch = tmp_path / "data" / "batch"
    (batch / "case 1" / "get-input").mkdir(parents=True)
    write_study(phantoms[0], batch / "case 2" / "get-input")
    (batch / "case 2" / "segment").mkdir()
    (batch / "case 2" / "segment" / "seg.dcm").write_text("of an earlier run")
    platform = {"WORKFLOW_DIR": str(tmp_path / "data"), "BATCH_NAME": "batch"}
    ran = run(folder, **platform, OPERATOR_IN_DIR="get-input", OPERATOR_OUT_DIR="segment")
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"error: {batch / 'case 1' / 'get-input'} contains no series")
    assert ran.stderr.count("\n") == 1
    assert {path.name for path in (batch / "case 2" / "segment").iterdir()} == {"mask.nii.gz", "seg.dcm"}
    assert (batch / "case 2" / "segment" / "seg.dcm").stat().st_size > 1000


def test_one_folder_for_a_batch_of_several_cases_is_refused(folder: Path, run: Any, tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / "batch" / name / "a").mkdir(parents=True)
    platform = {"WORKFLOW_DIR": str(tmp_path), "BATCH_NAME": "batch", "OPERATOR_IN_DIR": "a", "OPERATOR_OUT_DIR": "b"}
    ran = run(folder, "--patient-weight", "70", **platform)
    assert "error: --patient-weight is for one case, but the batch has 2. Leave it out." in ran.stderr
    ran = run(folder, "--output-dir", tmp_path / "out", **platform)
    assert ran.returncode == 1
    assert ran.stderr == "error: --output-dir is for one case, but the batch has 2. Leave it out.\n"


def test_an_image_that_is_not_named_is_not_used(
    folder: Path, weights: Path, phantoms: Any, run: Any, tmp_path: Path
) -> None:
    """The MR lies beside the CT, under the name that data sets give it."""
    two = images(phantoms[0])[:4]
    ran = run(folder, *two, "--allow-missing", "--output", "mask.nii.gz")
    assert ran.returncode == 0, ran.stderr
    own = ["segment", "--weights", str(weights), *two, "--allow-missing", "--output", str(tmp_path / "own.nii.gz")]
    assert main([*own, "--threads", "1"]) == 0
    np.testing.assert_array_equal(voxels(tmp_path / "mask.nii.gz"), voxels(tmp_path / "own.nii.gz"))
    ran = run(folder, *two, "--output", "mask.nii.gz")
    assert (ran.returncode, "mr" in ran.stderr) == (1, True)


def test_a_model_of_other_weights_than_the_task_is_refused(
    folder: Path, phantoms: Any, run: Any, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    task = json.loads((tmp_path / "copy" / "task.json").read_text())
    (tmp_path / "copy" / "task.json").write_text(json.dumps({**task, "weights_sha256": "0" * 64}))
    ran = run(tmp_path / "copy", *images(phantoms[0]), "--output", "mask.nii.gz")
    assert ran.returncode == 1
    assert "are of different weights. Copy the runtime folder again." in ran.stderr


def test_a_batch_of_kaapana_without_a_case_is_refused(folder: Path, run: Any, tmp_path: Path) -> None:
    platform = {"WORKFLOW_DIR": str(tmp_path), "BATCH_NAME": "batch", "OPERATOR_IN_DIR": "a", "OPERATOR_OUT_DIR": "b"}
    ran = run(folder, **platform)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"error: The batch {tmp_path / 'batch'} has no case. Check WORKFLOW_DIR and BATCH_NAME.\n"


REFUSED = {
    "no image": ([], 2, "name either images and --output, or --input and --output-dir"),
    "no output": (["--ct", "a.nii.gz"], 2, "--output is missing"),
    "a missing file": (
        ["--ct", "a.nii.gz", "--pet", "b.nii.gz", "--mr", "c.nii.gz", "--output", "m.nii.gz"],
        1,
        "no such file: a.nii.gz",
    ),
    "another name": (["--ct", "a.nii.gz", "--output", "m.nii"], 1, "--output m.nii is no name of a mask."),
    "an image": (["--ct", "a.nii.gz", "--output", "a.nii.gz"], 1, "--output a.nii.gz is one of the images."),
    "the reference": (["--pet", "a.nii.gz", "--output", "m.nii.gz"], 1, "Missing images: --ct, --mr."),
    "no study": (["--input", "none", "--output-dir", "out"], 1, "There is no folder none."),
}


@pytest.mark.parametrize(("arguments", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_in_one_sentence(folder: Path, run: Any, arguments: Any, code: int, words: str) -> None:
    ran = run(folder, *arguments)
    assert ran.returncode == code
    assert words in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def test_a_damaged_model_is_refused(folder: Path, phantoms: Any, run: Any, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    model = tmp_path / "copy" / "model" / "fp32.bin"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    ran = run(tmp_path / "copy", *images(phantoms[0]), "--output", "mask.nii.gz")
    assert ran.returncode == 1
    assert f"{model} is damaged or missing. Copy the runtime folder again." in ran.stderr
    assert not (tmp_path / "mask.nii.gz").exists()


def test_a_folder_with_other_files_is_not_written_into(weights: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", "--weights", str(weights), "--runtime", str(tmp_path)]) == 1
    assert f"{tmp_path} holds other files. Choose an empty folder." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


OTHER_TASK = {
    "spacing": (["--set", "spacing=[1,1,1]"], "its spacing is [8, 8, 8], this run's is [1, 1, 1]"),
    "inferer": (["--set", "overlap=0.5", "--set", 'inferer={"a": 1}'], "--set inferer would have no effect"),
    "data set": (["--data", "hecktor21"], "its modalities is ['ct', 'pet', 'mr'], this run's is ['ct', 'pet']"),
}


@pytest.mark.parametrize(("options", "words"), OTHER_TASK.values(), ids=OTHER_TASK)
def test_settings_that_contradict_the_weights_are_refused(
    weights: Path, tmp_path: Path, options: list[str], words: str, capsys: Any
) -> None:
    assert main(["export", "--weights", str(weights), "--runtime", str(tmp_path / "out"), *options]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_that_nothing_must_be_exported(weights: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", "--weights", str(weights), "--runtime", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "is exported already" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
