# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a training step: its candidates, real processes and its table. Times are not tested."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.interleaved_timing import Candidate, compose
from benchmarks.training_step import (
    PLAIN,
    STEPS_PER_ROUND,
    TEACHERS,
    WARM_UP_STEPS,
    format_table,
    method_candidates,
    precision_groups,
    random_teachers,
    teacher_candidates,
    time_candidates,
)
from scripts.cli.bundle_run import Expression
from scripts.cli.config import config_names
from scripts.data.cohorts.phantom import write_phantoms

pytestmark = pytest.mark.benchmarks
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


def test_all_candidates_run_the_same_number_of_steps_and_write_nothing(common: dict[str, Any]) -> None:
    distilled = {**common, "teacher_specs": random_teachers(["dynunet"], MODALITIES)}
    hinton = Candidate("hinton", (*BASE, "distill", "methods/hinton"), distilled)
    rows = time_candidates([Candidate(PLAIN, BASE, common), hinton], rounds=1)
    assert [row["side"] for row in rows] == [PLAIN, "hinton"]
    for row in rows:
        assert list(row) == ["side", "what", "median_s", "ratio", "peak_mib", "data_share", "steps"]
        assert row["what"] == "training step"
        assert row["median_s"] > 0
        assert row["ratio"] > 0
        assert row["peak_mib"] > 50  # no Python with PyTorch is smaller
        assert 0 < row["data_share"] < 1
    assert [row["steps"] for row in rows] == [STEPS_PER_ROUND, STEPS_PER_ROUND]  # the warm-up is not counted
    assert rows[0]["ratio"] == 1.0
    assert WARM_UP_STEPS > 0
    assert multiprocessing.active_children() == []
    written = [path.name for path in Path(common["output_dir"]).iterdir()]
    assert written == ["splits.json"]  # no handler of the training has written anything


@pytest.mark.parametrize(
    "broken", [{"dataset_dir": "/nowhere"}, {"patch": [32, 32, 10]}], ids=["before its first step", "in its first step"]
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_candidate_that_fails_is_named_and_leaves_no_process_behind(
    common: dict[str, Any], broken: dict[str, Any], place: int
) -> None:
    candidates = [Candidate(PLAIN, BASE, common)]
    candidates.insert(place, Candidate("the broken one", BASE, {**common, **broken}))
    with pytest.raises(RuntimeError, match="The process of 'the broken one' has ended"):
        time_candidates(candidates, rounds=1)
    assert multiprocessing.active_children() == []


def test_the_teacher_candidates_have_existing_configs_and_their_number_of_teachers(tmp_path: Path) -> None:
    candidates = teacher_candidates(BASE, {"threads": 1}, MODALITIES, tmp_path)
    assert [candidate.name for candidate in candidates] == [
        "plain", "1 cached teacher", "1 online teacher", "3 cached teachers", "3 online teachers", "5 cached teachers",
        "5 online teachers",
    ]  # fmt: skip
    assert candidates[0].configs == BASE
    for candidate in candidates[1:]:
        parser, count = compose(candidate), int(candidate.name[0])
        assert list(parser["teacher_specs"]) == list(TEACHERS[:count])
        assert all(spec["weights"] == "$None" for spec in parser["teacher_specs"].values())  # as MONAI reads it
        assert list(parser["loss#terms"]) == ["hinton"]
        assert parser["threads"] == 1
        cached = "cached" in candidate.name
        assert parser["teachers#_target_"].endswith("cached_teachers") == cached
        assert (parser.get("cache_dir") == str(tmp_path)) == cached


def test_the_method_candidates_are_plain_and_every_method_with_its_own_teachers() -> None:
    candidates = method_candidates(BASE, {"threads": 1}, MODALITIES, config_names("methods"))
    assert [candidate.name for candidate in candidates] == [PLAIN, *config_names("methods")]
    for candidate in candidates[1:]:
        parser = compose(candidate)
        assert parser["loss#terms"], candidate.name
        expected = ["dynunet", "hdenseformer"] if candidate.name == "dual" else ["dynunet"]
        assert list(parser["teacher_specs"]) == expected
        assert parser["selective_fusion"] == (candidate.name == "dual")


def test_each_network_of_the_study_is_timed_in_both_precisions_on_the_studys_grid(common: dict[str, Any]) -> None:
    groups = precision_groups("phantom", {key: common[key] for key in ("dataset_dir", "output_dir", "device")})
    assert [[each.name for each in group] for group in groups] == [
        [f"{name}, {precision}" for precision in ("float32", "bfloat16")]
        for name in ("student", "hdenseformer", "unetr")
    ]
    parser = compose(groups[0][1])
    assert (parser["precision"], parser["patch"], parser["spacing"]) == ("bfloat16", [48, 48, 48], [4.0, 4.0, 4.0])
    assert [row["side"] for row in time_candidates(groups[0], rounds=1)] == ["student, float32", "student, bfloat16"]


def test_the_table_has_a_row_per_candidate() -> None:
    rows = [
        {"side": "plain", "what": "training step", "median_s": 0.2, "ratio": 1.0, "peak_mib": 512, "data_share": 0.254,
         "steps": 25},
        {"side": "3 online teachers", "what": "training step", "median_s": 0.75, "ratio": 3.75, "peak_mib": 2048,
         "data_share": 0.07, "steps": 25},
    ]  # fmt: skip
    assert format_table(rows).splitlines() == [
        "| candidate | median s per step | ratio to the first | data share | peak MiB | steps |",
        "| --- | --- | --- | --- | --- | --- |",
        "| plain | 0.200 | 1.00 | 25% | 512 | 25 |",
        "| 3 online teachers | 0.750 | 3.75 | 7% | 2048 | 25 |",
    ]
