# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the metrics: real processes that take turns on tiny masks; never a time."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from benchmarks import metrics_speed as metrics_benchmark
from benchmarks.hardware_floor import cpu_name
from benchmarks.metrics_speed import OURS, SIDES, chosen, cohort_pairs, measure, synthetic_pairs, table
from scripts.cli.main import main

COLUMNS = ["side", "what", "median_s", "ratio", "peak_mib", "n", "hd95_mm", "assd_mm", "dice"]
TINY = synthetic_pairs((60, 56, 48), 0.12)


@pytest.mark.parametrize("what", TINY)
@pytest.mark.parametrize("side", SIDES)
def test_every_side_computes_what_its_definition_says(side: str, what: str) -> None:
    pytest.importorskip(SIDES[side].package)
    for pair in TINY[what]():
        expected, found = SIDES[OURS].run(*pair), SIDES[side].run(*pair)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        if side == "surface-distance":  # surface elements between the voxels
            assert found[1:] == pytest.approx(expected[1:], abs=1.0)
        else:
            assert found[2] == pytest.approx(expected[2], abs=1e-4)
            # MedPy: one percentile of both directions, at most the larger of the two.
            assert (
                found[1] <= expected[1] + 1e-4 if side == "MedPy" else found[1] == pytest.approx(expected[1], abs=1e-4)
            )


def test_sides_take_turns_and_their_rows_are_complete() -> None:
    what = "one lesion of 3 cm"
    rows = measure({what: TINY[what]}, [OURS, "SimpleITK"], rounds=3)
    assert [list(row) for row in rows] == [COLUMNS, COLUMNS]
    assert [row["side"] for row in rows] == [OURS, "SimpleITK"]
    assert [row["n"] for row in rows] == [3, 2]  # slow sides have at most two turns
    assert rows[0]["ratio"] == 1
    assert all(row["median_s"] > 0 and row["peak_mib"] >= 0 and row["what"] == what for row in rows)
    for name in ("hd95_mm", "assd_mm", "dice"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4)
    assert multiprocessing.active_children() == []
    assert table(rows).count("\n") == 3


def test_the_masks_are_seeded_differ_and_lie_inside() -> None:
    for load in TINY.values():
        (prediction, reference, spacing), (again, _, _) = load()[0], load()[0]
        assert spacing == metrics_benchmark.SPACING
        assert np.array_equal(prediction, again)
        assert not np.array_equal(prediction, reference)
        assert prediction.dtype == np.uint8
        assert set(np.unique(prediction)) == {0, 1}
        edges = [np.take(mask, i, axis) for mask in (prediction, reference) for axis in range(3) for i in (0, -1)]
        assert not any(edge.any() for edge in edges)


def test_the_cohort_is_ct_against_pet_on_the_grid_of_the_ct(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    for name, size, step in (("CT", 12, 1.0), ("PET", 6, 2.0)):
        image = sitk.GetImageFromArray(np.pad(np.ones((size // 2,) * 3, dtype=np.uint8), size // 4))
        image.SetSpacing((step, step, step))
        (tmp_path / "A").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / "A" / f"{name}_mask.nii.gz"))
    ((name, load),) = cohort_pairs(tmp_path).items()
    assert name == "masks of 1 patients"
    ((pet, ct, spacing),) = load()
    assert pet.shape == ct.shape == (12, 12, 12)
    assert spacing == (1, 1, 1)
    assert pet.any()
    with pytest.raises(ValueError, match="holds no <patient>/CT_mask"):
        cohort_pairs(tmp_path / "A")


def test_a_package_that_is_not_there_leaves_its_side_out_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("medpy", "surface_distance", "edt") else True
    )
    there, absent = chosen([])
    assert there == [OURS, "MONAI", "SimpleITK"]
    assert len(absent) == 3
    assert "MedPy is left out: medpy is not installed." in absent
    assert chosen(["MONAI"])[0] == [OURS, "MONAI"]
    with pytest.raises(ValueError, match="There is no side Medpy"):
        chosen(["Medpy"])


def test_a_side_whose_process_ends_is_named() -> None:
    pytest.importorskip("SimpleITK")
    shapes = [(np.ones((3, 3, 3), np.uint8), np.ones((3, 3, 4), np.uint8), (1.0, 1.0, 1.0))]
    with pytest.raises(RuntimeError, match="The side 'SimpleITK' has ended"):
        measure({"two shapes": lambda: shapes}, ["SimpleITK"], rounds=1)


def test_the_verb_prints_its_sides_and_writes_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "metrics", "--only", "MONAI", "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == [OURS, "MONAI"]
    asked = []

    def pretend(pairs: dict, sides: list[str], rounds: int) -> list[dict]:
        asked.append((list(pairs), sides, rounds))
        return [dict.fromkeys(COLUMNS, 0) | {"side": OURS, "what": "tiny"}]

    monkeypatch.setattr(metrics_benchmark, "measure", pretend)
    command = ["benchmark", "metrics", "--only", OURS, "--rounds", "2", "--json", str(tmp_path / "rows.json")]
    assert main(command) == 0
    assert asked == [(list(TINY), [OURS], 2)]
    assert cpu_name() in capsys.readouterr().out
    assert [row["what"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["tiny"]
