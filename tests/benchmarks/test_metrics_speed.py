# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the metrics, in real processes on tiny masks. Times are not tested."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from benchmarks import metrics_speed
from benchmarks.__main__ import main
from benchmarks.lower_bound import cpu_name
from benchmarks.metrics_speed import (
    IMPLEMENTATIONS,
    OURS,
    cohort_pairs,
    format_table,
    measure,
    select_implementations,
    synthetic_pairs,
)

pytestmark = pytest.mark.benchmarks
COLUMNS = ["side", "what", "median_s", "ratio", "peak_mib", "n", "hd95_mm", "assd_mm", "dice"]
TINY = synthetic_pairs((60, 56, 48), 0.12)


@pytest.mark.parametrize("what", TINY)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_agrees_with_ours_up_to_its_definition(name: str, what: str) -> None:
    pytest.importorskip(IMPLEMENTATIONS[name].package)
    for pair in TINY[what]():
        expected_dice, expected_hd95, expected_assd = IMPLEMENTATIONS[OURS].compute(*pair)
        dice, hd95, assd = IMPLEMENTATIONS[name].compute(*pair)
        assert dice == pytest.approx(expected_dice, abs=1e-6)
        if name == "surface-distance":  # its surface elements lie between the voxels
            assert (hd95, assd) == pytest.approx((expected_hd95, expected_assd), abs=1.0)
            continue
        assert assd == pytest.approx(expected_assd, abs=1e-4)
        if name == "MedPy":  # the percentile of both directions together is at most the larger of the two
            assert hd95 <= expected_hd95 + 1e-4
        else:
            assert hd95 == pytest.approx(expected_hd95, abs=1e-4)


def test_rows_are_complete_and_slow_implementations_have_fewer_rounds() -> None:
    what = "one lesion of 3 cm"
    rows = measure({what: TINY[what]}, [OURS, "SimpleITK"], rounds=3)
    assert [list(row) for row in rows] == [COLUMNS, COLUMNS]
    assert [row["side"] for row in rows] == [OURS, "SimpleITK"]
    assert [row["n"] for row in rows] == [3, 2]  # SimpleITK is slow
    assert rows[0]["ratio"] == 1
    assert all(row["median_s"] > 0 and row["peak_mib"] >= 0 and row["what"] == what for row in rows)
    for name in ("hd95_mm", "assd_mm", "dice"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4)
    assert multiprocessing.active_children() == []
    assert format_table(rows).count("\n") == 3


def test_the_masks_of_a_pair_are_seeded_differ_and_do_not_touch_the_border() -> None:
    for load in TINY.values():
        (prediction, reference, spacing), (again, _, _) = load()[0], load()[0]
        assert spacing == metrics_speed.SPACING
        assert np.array_equal(prediction, again)
        assert not np.array_equal(prediction, reference)
        assert prediction.dtype == np.uint8
        assert set(np.unique(prediction)) == {0, 1}
        edges = [np.take(mask, i, axis) for mask in (prediction, reference) for axis in range(3) for i in (0, -1)]
        assert not any(edge.any() for edge in edges)


def test_a_cohort_compares_pet_with_ct_on_the_grid_of_the_ct(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="No <patient>/CT_mask"):
        cohort_pairs(tmp_path / "A")


def test_an_implementation_without_its_package_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("medpy", "surface_distance", "edt") else True
    )
    installed, notes = select_implementations([])
    assert installed == [OURS, "MONAI", "SimpleITK"]
    assert len(notes) == 3
    assert "MedPy is left out: medpy is not installed." in notes
    assert select_implementations(["MONAI"])[0] == [OURS, "MONAI"]
    with pytest.raises(ValueError, match="Unknown candidate Medpy"):
        select_implementations(["Medpy"])


def test_an_implementation_whose_process_ends_is_named() -> None:
    pytest.importorskip("SimpleITK")
    shapes = [(np.ones((3, 3, 3), np.uint8), np.ones((3, 3, 4), np.uint8), (1.0, 1.0, 1.0))]
    with pytest.raises(RuntimeError, match="The process of 'SimpleITK' has ended"):
        measure({"two shapes": lambda: shapes}, ["SimpleITK"], rounds=1)


def test_the_command_prints_the_table_and_writes_the_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["metrics", "--only", "MONAI", "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == [OURS, "MONAI"]
    calls = []

    def fake_measure(pairs: dict, names: list[str], rounds: int) -> list[dict]:
        calls.append((list(pairs), names, rounds))
        return [dict.fromkeys(COLUMNS, 0) | {"side": OURS, "what": "tiny"}]

    monkeypatch.setattr(metrics_speed, "measure", fake_measure)
    command = ["metrics", "--only", OURS, "--rounds", "2", "--json", str(tmp_path / "rows.json")]
    assert main(command) == 0
    assert calls == [(list(TINY), [OURS], 2)]
    assert cpu_name() in capsys.readouterr().out
    assert [row["what"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["tiny"]
