# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/how_to/own_teacher.md, run as they stand there on phantoms with tiny networks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from scripts.cli.main import main
from scripts.report.curves import read_curves
from scripts.utils.checksums import sha256

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "own_teacher.md"
SIZES = {"dynunet": {"filters": [2, 4, 4, 4]}, "segresnet": {"init_filters": 8}, "student": {"features": [8, 8, 8, 8]}}
RUN = ["--threads", "1", "--device", "cpu", "--set", "overwrite=true", "--set", "val_interval=100"]
TINY = [
    *RUN, "--set", "patch=[16,16,16]", "--set", "spacing=[12,12,12]", "--set", f"architectures={json.dumps(SIZES)}",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]', "--set", "max_epochs=1",
]  # fmt: skip


def commands(section: str) -> list[list[str]]:
    """The commands of a section of the page, for phantoms."""
    text = re.search(rf"## {section}\n(.*?)(\n## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text[1], re.DOTALL)).replace("\\\n", " ").splitlines()
    words = (shlex.split(line.replace("--data sts", "--data phantom"))[3:] for line in lines if line)
    return [[*command, *(() if command[0] == "teachers" else TINY)] for command in words]


def teach(architecture: str, output: str, fold: int = 0) -> None:
    """Train a teacher that the page takes for granted."""
    options = ["--architecture", architecture, "--fold", str(fold), "--output-dir", output]
    assert main(["teacher", "--data", "phantom", "--dataset-dir", "DATA", *options, *TINY]) == 0


@pytest.fixture
def here(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which DATA is the cohort."""
    (tmp_path / "DATA").symlink_to(cohort)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_included_architecture_is_listed_trained_and_distilled(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teach("student", "RUNS/teacher")
    listing, training, distilling, *others = commands("One of the included architectures")
    assert len(others) == 1  # the ensemble of three folds, which the next test has
    assert main(listing) == 0
    assert "| segresnet | cnn |" in capsys.readouterr().out
    assert main(training) == 0
    assert main(distilling) == 0
    (row,) = read_curves(here / "RUNS" / "distilled" / "curves.csv")
    assert row["weight/segresnet_ct_pet"] == row["weight/big"] == 0.5


def test_networks_of_a_cross_validation_answer_out_of_fold(here: Path) -> None:
    for fold in (1, 2, 3, 4):
        teach("dynunet", f"RUNS/fold{fold}", fold)
    caching, distilling = commands("Out of fold")
    assert main(caching) == 0
    manifest = json.loads((here / "RUNS" / "cache" / "big" / "manifest.json").read_text())
    for case, entry in manifest["cases"].items():
        runs = [here / "RUNS" / f"fold{fold}" for fold in (1, 2, 3, 4)]
        tasks = {run: json.loads((run / "model.task.json").read_text()) for run in runs}
        left_out = [run for run in runs if case not in {each["case_id"] for each in tasks[run]["training_cases"]}]
        assert entry["sources"]["weights_sha256"] == [sha256(run / "model.pt") for run in left_out] != []
    assert main(distilling) == 0
    (row,) = read_curves(here / "RUNS" / "distilled" / "curves.csv")
    assert row["weight/big"] == 1.0


def test_predictions_made_elsewhere_teach(here: Path) -> None:
    (here / "PREDICTIONS").mkdir()
    for case in (here / "DATA").iterdir():
        if (case / "CT_mask.nii.gz").is_file():
            shutil.copy(case / "CT_mask.nii.gz", here / "PREDICTIONS" / f"{case.name}.nii.gz")
    caching, distilling = commands("Predictions made elsewhere")
    assert main([*caching, "--smooth", "4"]) == 0
    assert main(distilling) == 0
    (row,) = read_curves(here / "RUNS" / "distilled" / "curves.csv")
    assert row["weight/outside"] == 1.0
