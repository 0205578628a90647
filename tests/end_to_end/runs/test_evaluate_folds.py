# SPDX-License-Identifier: Apache-2.0
"""`train` on one fold, `evaluate` on another one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from scripts.cli.main import main


def test_a_training_and_its_evaluation_on_another_fold(
    tiny: list[str], cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fold 0 trains four of six phantoms; all of fold 1's validation cases are among them."""
    common = [*tiny, "--dataset-dir", str(cohort)]
    splits = tmp_path / "splits.json"
    ids = sorted(path.name for path in cohort.glob("PHANTOM_*"))
    splits.write_text(json.dumps({"folds": [ids[:2], ids[2:4], ids[4:]]}))
    options = ["--set", f"splits_file={splits}"]
    assert (
        main(["train", *common, *options, "--epochs", "1", "--fold", "0", "--output-dir", str(tmp_path / "run")]) == 0
    )
    weights = ["--weights", str(tmp_path / "run" / "model.pt")]
    for fold, mark in ((0, "no"), (1, "yes")):
        out = tmp_path / f"fold{fold}"
        arguments = ["evaluate", *common, *options, *weights, "--fold", str(fold), "--output-dir", str(out)]
        assert main(arguments) == 0
        with open(out / "cases.csv", newline="") as file:
            assert {row["case_id"]: row["trained_on"] for row in csv.DictReader(file)} == dict.fromkeys(
                ids[2 * fold : 2 * fold + 2], mark
            )
    assert caplog.text.count("was trained on 2 of these 2 cases") == 1
