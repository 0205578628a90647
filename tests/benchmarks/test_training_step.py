# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a training step: real processes that take turns, what it compares, its table; never a time."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from benchmarks.training_step import (
    PLAIN,
    TEACHERS,
    TURN,
    WARM_UP,
    Side,
    alternate,
    cost_sides,
    method_sides,
    specs,
    table,
)
from scripts.cli.bundle_run import Expression
from scripts.cli.config import CONFIGS, config_names
from scripts.data.cohorts.phantom import write_phantoms

BASE = ("train", "data/phantom", "scale/small")
MODALITIES = ("ct", "pet", "mr")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("cohort")
    write_phantoms(root, cases=6, seed=3, progress=False)
    return {
        "dataset_dir": str(root), "output_dir": str(root / "unused"), "threads": 1, "patch": [32, 32, 16],
        "device": Expression("$torch.device('cpu')"), "spacing": [12.0, 12.0, 12.0], "student_features": [4, 8, 8, 8],
        "student_norm": ["group", {"num_groups": 4}], "architectures": {"dynunet": {"filters": [2, 4, 4, 4]}},
    }  # fmt: skip


def test_two_sides_take_turns_and_do_the_same_steps(common: dict[str, Any]) -> None:
    taught = {**common, "teacher_specs": specs(["dynunet"], MODALITIES)}
    sides = [Side(PLAIN, BASE, common), Side("hinton", (*BASE, "distill", "methods/hinton"), taught)]
    rows = alternate(sides, rounds=1)
    assert [row["side"] for row in rows] == [PLAIN, "hinton"]
    for row in rows:
        assert list(row) == ["side", "what", "median_s", "ratio", "peak_mib", "data_share", "steps"]
        assert row["what"] == "training step"
        assert row["median_s"] > 0
        assert row["ratio"] > 0
        assert row["peak_mib"] > 50  # no Python with PyTorch is smaller
        assert 0 < row["data_share"] < 1
    # The first turn hands in its own steps only; the warm-up is in no row.
    assert [row["steps"] for row in rows] == [TURN, TURN]
    assert rows[0]["ratio"] == 1.0
    assert WARM_UP > 0
    assert multiprocessing.active_children() == []
    written = [path.name for path in Path(common["output_dir"]).iterdir()]
    assert written == ["splits.json"]  # no handler of the training writes


@pytest.mark.parametrize(
    "broken",
    [{"dataset_dir": "/nowhere"}, {"patch": [32, 32, 10]}],
    ids=["before its first turn", "in its first step"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_side_that_dies_is_named_and_leaves_no_process_behind(
    common: dict[str, Any], broken: dict[str, Any], place: int
) -> None:
    sides = [Side(PLAIN, BASE, common)]
    sides.insert(place, Side("the broken one", BASE, {**common, **broken}))
    with pytest.raises(RuntimeError, match="'the broken one' has ended"):
        alternate(sides, rounds=1)
    assert multiprocessing.active_children() == []


def read(side: Side) -> ConfigParser:
    """A side's configs, merged as its process merges them."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in side.configs])
    parser.update(dict(side.overrides))
    return parser


def test_the_sides_of_the_cost_are_made_of_configs_that_exist(tmp_path: Path) -> None:
    sides = cost_sides(BASE, {"threads": 1}, MODALITIES, tmp_path)
    assert [side.name for side in sides] == [
        "plain", "1 cached teacher", "1 online teacher", "3 cached teachers", "3 online teachers", "5 cached teachers",
        "5 online teachers",
    ]  # fmt: skip
    assert sides[0].configs == BASE
    for side in sides[1:]:
        parser, count = read(side), int(side.name[0])
        assert list(parser["teacher_specs"]) == list(TEACHERS[:count])
        assert all(spec["weights"] is None for spec in parser["teacher_specs"].values())
        assert list(parser["loss#terms"]) == ["hinton"]
        assert parser["threads"] == 1
        cached = "cached" in side.name
        assert parser["teachers#_target_"].endswith("cached_teachers") == cached
        assert (parser.get("cache_dir") == str(tmp_path)) == cached


def test_the_sides_of_the_methods_are_plain_and_every_method_with_its_own_teachers() -> None:
    sides = method_sides(BASE, {"threads": 1}, MODALITIES, config_names("methods"))
    assert [side.name for side in sides] == [PLAIN, *config_names("methods")]
    for side in sides[1:]:
        parser = read(side)
        assert parser["loss#terms"], side.name
        expected = ["dynunet", "hdenseformer"] if side.name == "dual" else ["dynunet"]
        assert list(parser["teacher_specs"]) == expected
        assert parser["selective_fusion"] == (side.name == "dual")


def test_the_table_shows_the_rows_as_they_are() -> None:
    rows = [
        {"side": "plain", "what": "training step", "median_s": 0.2, "ratio": 1.0, "peak_mib": 512, "data_share": 0.254,
         "steps": 25},
        {"side": "3 online teachers", "what": "training step", "median_s": 0.75, "ratio": 3.75, "peak_mib": 2048,
         "data_share": 0.07, "steps": 25},
    ]  # fmt: skip
    assert table(rows).splitlines() == [
        "| side | median s per step | ratio to plain | data share | peak MiB | steps |",
        "|---|---|---|---|---|---|",
        "| plain | 0.200 | 1.00 | 25% | 512 | 25 |",
        "| 3 online teachers | 0.750 | 3.75 | 7% | 2048 | 25 |",
    ]
