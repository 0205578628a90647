# SPDX-License-Identifier: Apache-2.0
"""The release as a pull request to the MONAI model zoo: the bundle's own tests, and the zoo's checks.

The bundle's tests run always. The zoo's own programs need a clone of its repository, which ``ZOO`` names:
``make release-test ZOO=../model-zoo``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.release import NAME, release

pytestmark = pytest.mark.release
ROOT = Path(__file__).parents[2]
CLONE = os.environ.get("ZOO", "")
# A process without the repository's code: `make env` installs the bundle in editable mode, which adds a finder for it.
CLEAN = "import runpy, sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]; "
RUN = CLEAN + "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
RUN += "runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def zoo(
    release_checkout: Path, tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> Callable[..., str]:
    """``zoo(program, *arguments)`` runs a program of the zoo after the pull request, and returns its output."""
    folder, out = tmp_path_factory.mktemp("zoo"), tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(release(release_checkout, out)) as archive:
        archive.extractall(folder / "models")
    if CLONE:
        shutil.copytree(Path(CLONE) / "ci", folder / "ci")
        shutil.copy(Path(CLONE) / "models/model_info.json", folder / "models")
    else:
        shutil.copytree(ROOT / "tests/tools/zoo_ci", folder / "ci/unit_tests")
    shutil.copytree(out / "model_zoo", folder, dirs_exist_ok=True)
    (folder / "models" / NAME / "eval").mkdir()
    shutil.copy(ROOT / "tests/meta_schema_20240725.json", folder / "models" / NAME / "eval/schema.json")

    def run(program: str, *arguments: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{clean_environment.get('PATH', '')}"  # with torchrun
        environment = {**clean_environment, "PYTHONPATH": str(folder), "PATH": path}
        command = [sys.executable, "-W", "ignore", "-c", RUN, str(folder / program), *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("name", [f"test_{NAME}", f"test_{NAME}_dist"])
def test_the_bundles_tests_for_the_zoo_pass(zoo: Callable[..., str], name: str) -> None:
    if CLONE:
        dist = ["--dist", "True"] if name.endswith("_dist") else []
        assert "\nOK" in zoo("ci/unit_tests/runner.py", "--b", NAME, *dist)
    else:
        assert "\nOK" in zoo(f"ci/unit_tests/{name}.py")


@pytest.mark.skipif(not CLONE, reason="Name a clone of the MONAI model zoo: make release-test ZOO=FOLDER.")
@pytest.mark.parametrize(
    ("mode", "last"),
    [
        ("min", "metadata format is verified correctly."),
        ("regular", "metadata format is verified correctly."),
        ("full", "export weights into TorchScript module successfully."),
    ],
)
def test_the_zoos_checks_pass(zoo: Callable[..., str], mode: str, last: str) -> None:
    printed = zoo("ci/verify_bundle.py", "--b", NAME, "--mode", mode)
    assert last in printed
    assert mode != "full" or printed.count("successfully checked properties.") == 1


def test_the_metadata_tells_the_scores_of_the_shipped_weights() -> None:
    """Means over the rows of the published table."""
    import csv

    with (ROOT / "docs/results/shipped/cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = json.loads((ROOT / "configs/metadata.json").read_text())["eval_metrics"]
    columns = {"val_mean_dice": "dice", "val_mean_hd95_mm": "hd95_mm", "val_mean_assd_mm": "assd_mm"}
    assert told.keys() == columns.keys()
    for key, column in columns.items():
        assert told[key] == pytest.approx(
            sum(float(row[column]) for row in rows) / len(rows), abs=5e-5 if key == "val_mean_dice" else 5e-3
        )
