# SPDX-License-Identifier: Apache-2.0
"""What a user should look at before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scripts.data.fingerprint import CaseFingerprint, ModalityValues
from scripts.data.plan_warnings import plan_warnings

VALUES = ModalityValues(0.0, 1.0, np.array([1.0]))
TASK: dict[str, Any] = {"modalities": ["ct", "pet"], "labels": [[0], [1], [2]], "spacing": [1, 1, 1], "ignore": 9}
VOLUMES = {0.0: 1e6, 1.0: 900.0, 2.0: 900.0, 9.0: 5.0}


def case(name: str, **changes: Any) -> CaseFingerprint:
    properties: dict[str, Any] = {
        "shape": (99, 99, 99),
        "spacing": (1.0, 1.0, 1.0),
        "values": {"ct": VALUES, "pet": VALUES},
        "volumes": VOLUMES,
    }
    return CaseFingerprint(name, **{**properties, **changes})


def test_nothing_is_said_of_plain_data() -> None:
    assert plan_warnings([case("a"), case("b")], TASK) == []


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        (CaseFingerprint("z", problem="z.nii is damaged."), "1 case(s) could not be read: z.nii is damaged."),
        (case("z", values={"ct": VALUES}), "pet is absent in 1 of 2 cases (z)"),
        (case("z", volumes={**VOLUMES, 2.0: 7.9}), "class 2 has fewer than 8 voxels at the planned spacing in 1 of 2"),
        (case("z", volumes={**VOLUMES, 3.0: 1.0}), "have the values 3, which labels does not list"),
        (case("z", volumes=None), "1 of 2 cases have no label"),
        (case("z", spacing=(1.0, 1.0, 2.5)), "1 of 2 cases (z) have foot-head voxels more than 2 times as long"),
    ],
)
def test_a_sentence_for_each_oddity(odd: CaseFingerprint, expected: str) -> None:
    (text,) = plan_warnings([case("a"), odd], TASK)
    assert expected in text


def test_a_class_that_no_case_has_is_named() -> None:
    volumes = {0.0: 1e6, 1.0: 900.0}
    (text,) = plan_warnings([case("a", volumes=volumes)], {**TASK, "classes": ["background", "liver", "spleen"]})
    assert text.startswith("No case has the class spleen.")


def test_slices_across_different_axes_are_named() -> None:
    cases = [case("a", spacing=(1.0, 1.0, 5.0)), case("b", spacing=(5.0, 1.0, 1.0))]
    (text,) = plan_warnings(cases, {**TASK, "spacing": [3, 1, 3]})
    assert "left-right, foot-head" in text or "foot-head, left-right" in text


def test_many_cases_are_counted_not_listed() -> None:
    cases = [case(f"case{number}", values={"ct": VALUES}) for number in range(30)]
    (text,) = plan_warnings(cases, TASK)
    assert "30 of 30 cases" in text
    assert "and 25 more" in text


def test_no_labels_at_all() -> None:
    (text,) = plan_warnings([case("a", volumes=None)], TASK)
    assert text.startswith("No case has a label.")
