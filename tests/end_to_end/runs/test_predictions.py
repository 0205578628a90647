# SPDX-License-Identifier: Apache-2.0
"""Predictions that cannot be read count as the worst value and are named; scoring continues."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.cli.main import main
from scripts.evaluation.score import score

SHAPE = (12, 10, 8)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda packed: packed[:-30], "is truncated or damaged"),
    "flipped": (lambda packed: packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:], "is truncated or damaged"),
    "empty": (lambda packed: b"", "is an empty file"),
    "text": (lambda packed: b"404: not found\n", "is a text file"),
    "pointer": (lambda packed: LFS, "is a Git LFS pointer"),
    "short": (lambda packed: gzip.compress(gzip.decompress(packed)[:-5]), "contains fewer than"),
    "4D": (lambda packed: _four_dimensional(), "contains 12 x 10 x 8 x 2 voxels. Give one 3D volume per file"),
}


def _four_dimensional() -> bytes:
    return gzip.compress(nib.Nifti1Image(np.zeros((*SHAPE, 2), np.uint8), np.eye(4)).to_bytes())


def cube(shift: int = 0) -> Any:
    mask = np.zeros(SHAPE, np.uint8)
    mask[2 + shift : 8 + shift, 2:8, 2:6] = 1
    return mask


@pytest.fixture
def cases(tmp_path: Path, write_nifti: Callable[..., Path]) -> list[dict[str, Any]]:
    """Three cases, each with a perfect prediction."""
    cases = []
    for name in ("A", "B", "C"):
        label = write_nifti(tmp_path / name / "label.nii.gz", cube())
        (tmp_path / "masks").mkdir(exist_ok=True)
        shutil.copy(label, tmp_path / "masks" / f"{name}.nii.gz")
        cases.append({"case_id": name, "image": str(label), "ct": str(label), "label": str(label)})
    return cases


def scored(cases: Any, tmp_path: Path) -> dict[str, Any]:
    return score(
        "network", cases, [[0], [1]], str(tmp_path / "masks"), str(tmp_path / "out"), {"ct": [0, 1]}, workers=1
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_prediction_counts_as_the_worst_value_and_the_others_are_scored(
    damage: str, cases: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = DAMAGES[damage]
    path = tmp_path / "masks" / "B.nii.gz"
    path.write_bytes(change(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        summary = scored(cases, tmp_path)
    whole = summary["aggregate"]
    assert whole["counts"]["error"] == 1
    assert whole["metrics"]["dice"]["defined"]["mean"] == 1.0
    assert whole["metrics"]["dice"]["worst_filled"]["mean"] == pytest.approx(2 / 3)
    diagonal = np.linalg.norm(SHAPE)
    assert whole["metrics"]["hd95_mm"]["worst_filled"]["mean"] == pytest.approx(diagonal / 3)
    assert summary["missing"] == []
    assert len(summary["unreadable"]) == 1
    assert str(path) in summary["unreadable"][0]
    assert words in summary["unreadable"][0]
    assert summary["unreadable"][0] in caplog.text
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["unreadable"] == summary["unreadable"]
    rows = (tmp_path / "out" / "cases.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rows[1:]] == ["A", "B", "C"]


def test_missing_and_unreadable_predictions_are_distinguished(cases: Any, tmp_path: Path) -> None:
    (tmp_path / "masks" / "A.nii.gz").unlink()
    (tmp_path / "masks" / "C.nii.gz").write_bytes(b"")
    summary = scored(cases, tmp_path)
    assert summary["missing"] == ["A"]
    assert [str(tmp_path / "masks" / "C.nii.gz") in each for each in summary["unreadable"]] == [True]
    assert summary["aggregate"]["counts"]["error"] == 2


def test_a_reference_that_cannot_be_read_is_refused_by_name(cases: Any, tmp_path: Path) -> None:
    path = Path(cases[1]["label"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"{path} is truncated or damaged"):
        scored(cases, tmp_path)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_command_scores_readable_predictions_and_succeeds(
    tiny: list[str], cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for folder in sorted(cohort.glob("PHANTOM_*")):
        shutil.copy(folder / "CT_mask.nii.gz", masks / f"{folder.name}.nii.gz")
    broken = masks / "PHANTOM_004.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    arguments = ["evaluate", *tiny, "--dataset-dir", cohort, "--predictions", masks, "--output-dir", tmp_path / "out"]
    assert main([str(each) for each in arguments]) == 0
    assert f"unreadable: {broken} is truncated or damaged" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["aggregate"]["counts"]["ok"], summary["aggregate"]["counts"]["error"]) == (5, 1)
    assert (tmp_path / "out" / "report.html").is_file()
