# SPDX-License-Identifier: Apache-2.0
"""A cohort is checked as a whole before anything starts."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from scripts.data import cases_of_rank, datalist, require_cases
from scripts.data.case_list import ContradictionError, IncompleteError


@pytest.fixture
def cohort(tmp_path: Path) -> list[dict[str, Any]]:
    """A has no MR, B has no PET, C has all modalities but no id."""
    for name in ("a_ct", "a_pt", "b_ct", "b_mr", "c_ct", "c_pt", "c_mr"):
        (tmp_path / f"{name}.nii").touch()
    a, b, c = (str(tmp_path / f"{name}_") for name in "abc")
    return [
        {"case_id": "A", "image": f"{a}ct.nii", "ct": f"{a}ct.nii", "pet": f"{a}pt.nii"},
        {"case_id": "B", "image": f"{b}ct.nii", "mr": f"{b}mr.nii"},
        {"image": f"{c}ct.nii", "pet": f"{c}pt.nii", "mr": f"{c}mr.nii"},
    ]


def test_an_empty_cohort_is_refused_with_its_folder_and_the_option() -> None:
    with pytest.raises(ValueError, match=r"No cases found in somewhere/else\. Check .*--dataset-dir"):
        require_cases([], "somewhere/else")


@pytest.mark.parametrize("root", ["", None])
def test_an_empty_cohort_without_a_folder_is_refused(root: str | None) -> None:
    with pytest.raises(ValueError, match="No data folder was given"):
        require_cases([], root, ["ct"], allow_missing=True)


def test_every_absent_modality_of_the_cohort_is_named_at_once(cohort: Any) -> None:
    with pytest.raises(ValueError, match=r"\(A: mr; B: pet\).*--allow_missing"):
        require_cases(cohort, "data", ["ct", "pet", "mr"])


def test_a_case_without_an_id_is_named_after_its_file(cohort: Any) -> None:
    with pytest.raises(ValueError, match=r"\(c_ct: adc\)"):
        require_cases(cohort[2:], "data", ["ct", "adc"])


def test_a_modality_that_the_naming_rule_finds_is_not_absent(cohort: Any) -> None:
    rule = {"ct": "{case}_ct.nii", "pet": "{case}_pt.nii"}
    require_cases([{"image": cohort[0]["image"]}], "data", ["ct", "pet"], [rule])
    with pytest.raises(ValueError, match="a_ct: pet"):
        require_cases([{"image": cohort[0]["image"]}], "data", ["ct", "pet"])


def test_every_file_that_does_not_exist_is_named_at_once(cohort: Any, tmp_path: Path) -> None:
    for name in ("a_pt", "c_ct", "c_mr"):
        (tmp_path / f"{name}.nii").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        require_cases(cohort, "data", ["ct", "pet", "mr"], allow_missing=True)
    assert all(name in str(caught.value) for name in ("Case A", "a_pt.nii", "c_ct.nii", "c_mr.nii"))
    assert not any(name in str(caught.value) for name in ("a_ct.nii", "b_ct.nii", "c_pt.nii"))


def test_absent_modalities_are_logged_where_they_are_allowed(cohort: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        require_cases(cohort, "data", ["ct", "pet", "mr"], allow_missing=True)
    assert "A: mr; B: pet" in caplog.text


def test_a_complete_cohort_is_accepted_without_a_warning(
    phantoms: Any, cohort: Any, caplog: pytest.LogCaptureFixture
) -> None:
    require_cases(phantoms, "data", ["ct", "pet", "mr"])
    require_cases(cohort, "data", ["ct"])  # the reference may stand under "image"
    require_cases(cohort, "data")
    assert not caplog.text


def test_a_cohort_of_phantoms_is_read_back_as_it_was_written(phantoms: Any) -> None:
    assert [item["case_id"] for item in phantoms] == [f"PHANTOM_{index:03d}" for index in range(1, 7)]
    root = phantoms[0]["image"].split("PHANTOM_001")[0]
    assert datalist("phantom", root) == phantoms


@pytest.mark.parametrize(("cases", "world"), [(3, 2), (8, 3), (2, 2), (5, 1), (0, 4)])
def test_every_validation_case_goes_to_exactly_one_process(cases: int, world: int) -> None:
    items = [{"case_id": str(i)} for i in range(cases)]
    shares = [cases_of_rank(items, rank, world) for rank in range(world)]
    assert sorted(item["case_id"] for share in shares for item in share) == [item["case_id"] for item in items]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_validation_cases_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"There are 1 validation case\(s\) for 2 processes"):
        cases_of_rank([{"case_id": "A"}], 0, 2)


@pytest.mark.parametrize("kind", [IncompleteError, ContradictionError])
def test_an_error_goes_from_one_process_to_another(kind: Any) -> None:
    error = pickle.loads(pickle.dumps(kind("B has no CT.", [{"case_id": "A"}], ["B has no CT."])))
    assert (str(error), error.cases, error.problems) == ("B has no CT.", [{"case_id": "A"}], ["B has no CT."])
