# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.cli.series_table import series_table
from scripts.image_io.dicom_rules import series_rules
from scripts.image_io.dicom_study import Series, choose_series
from scripts.image_io.series_preference import narrow, preferences

ORIGINAL, DERIVED = ("ORIGINAL", "PRIMARY", "AXIAL"), ("DERIVED", "SECONDARY", "MPR")


def elements(
    image_type: tuple[str, ...] = ORIGINAL, thickness: str = "", time: str = "", corrected: Any = ()
) -> dict[str, tuple[str, ...]]:
    made = {"ImageType": image_type, "CorrectedImage": tuple(corrected)}
    made |= {"SliceThickness": (thickness,)} if thickness else {}
    return made | ({"SeriesDate": ("20200102",), "SeriesTime": (time,)} if time else {})


@pytest.mark.parametrize(
    ("series", "wanted", "left", "reason"),
    [
        ({"a": elements(), "b": elements(DERIVED)}, ["original"], ["a"], "original of 2"),
        ({"a": elements(("ORIGINAL", "SECONDARY")), "b": elements()}, ["original"], ["b"], "original of 2"),
        (
            {"a": elements(thickness="5"), "b": elements(thickness="1.25")},
            ["thinnest"],
            ["b"],
            "thinnest of 2 (1.25 mm)",
        ),
        ({"a": elements(time="100000"), "b": elements(time="100001.5")}, ["newest"], ["b"], "newest of 2"),
        ({"a": elements(time="10"), "b": elements(time="0959")}, ["newest"], ["a"], "newest of 2"),
        (
            {"a": elements(corrected=["DECY"]), "b": elements(corrected=["DECY", "ATTN"])},
            ["corrected"],
            ["b"],
            "corrected of 2",
        ),
        (
            {
                "a": elements(DERIVED, "1", "120000"),
                "b": elements(ORIGINAL, "3", "110000"),
                "c": elements(ORIGINAL, "3", "100000"),
                "d": elements(ORIGINAL, "5", "130000"),
            },
            ["original", "thinnest", "newest"],
            ["b"],
            "original of 4, thinnest of 3 (3 mm), newest of 2",
        ),
        ({"a": elements(thickness="1"), "b": elements()}, ["thinnest"], ["a", "b"], ""),  # unknown of one
        ({"a": elements(thickness="0"), "b": elements(thickness="2")}, ["thinnest"], ["a", "b"], ""),
        ({"a": elements(thickness="1"), "b": elements(thickness="1.0001")}, ["thinnest"], ["a", "b"], ""),
        ({"a": elements(), "b": elements(DERIVED)}, [], ["a", "b"], ""),
        ({"a": elements()}, ["newest"], ["a"], ""),
        ({}, ["newest"], [], ""),
    ],
)
def test_preferences_are_applied_in_their_order(series: Any, wanted: list[str], left: list[str], reason: str) -> None:
    found, why, others = narrow(series, wanted)
    assert (found, why) == (left, reason)
    assert set(others) == (set(series) - set(left))


def _series(uid: str, kind: str, frame: str = "1.9", **known: Any) -> Series:
    text = f"series {uid}\x1b[31m"
    named = {"SeriesDescription": (text,), **elements(**known)}
    return Series(uid, kind, Path("study") / uid, "P", frame, text, 9, elements=named)


def test_ct_and_pet_have_preferences_and_mr_needs_a_rule() -> None:
    study = [
        _series("1.1", "CT", thickness="5"),
        _series("1.2", "CT", thickness="1"),
        _series("1.3", "PT", corrected=["DECY"], time="120000"),
        _series("1.4", "PT", corrected=["DECY", "ATTN"], time="110000"),
        _series("1.5", "MR", time="100000"),
    ]
    modalities = ["ct", "pet", "mr"]
    rules, wanted = series_rules(modalities, {}), preferences(modalities, {})
    choice = choose_series(study, rules, preferences=wanted)
    assert {key: series.uid for key, series in choice.series.items()} == {"ct": "1.2", "pet": "1.4", "mr": "1.5"}
    assert choice.reasons == {
        "1.1": "fits ct, thicker slices (5 mm)",
        "1.2": "thinnest of 2 (1 mm)",
        "1.3": "fits pet, not attenuation-corrected",
        "1.4": "corrected of 2",
        "1.5": "the only one with Modality MR",
    }
    with pytest.raises(ValueError, match=r'2 series for mr .*Choose one with --series-uid, or by a rule or "prefer"'):
        choose_series([*study, _series("1.6", "MR", time="110000")], rules, preferences=wanted)
    by_hand = choose_series(study, rules, ["1.1"], wanted)
    assert by_hand.series["ct"].uid == "1.1"
    assert by_hand.reasons["1.1"] == "named by --series-uid"
    assert by_hand.reasons["1.2"] == "fits ct, another is taken"
    with pytest.raises(ValueError, match=r"The series 1\.6 fits no modality of the task \(ct: Modality CT; pet: .*"):
        choose_series([*study, _series("1.6", "US")], rules, ["1.6"], wanted)
    lines = series_table(study, choice).splitlines()
    assert [line.split()[0] for line in lines] == ["as", "ct", "pet", "mr", "-", "-"]
    assert lines[1].split() == ["ct", "CT", "9", "series", "1.2", "[31m", "thinnest", "of", "2", "(1", "mm)", "1.2"]
    assert all(line.isprintable() for line in lines)


def test_a_task_sets_its_own_preferences() -> None:
    rules = {"mr": {"SeriesDescription": "*", "prefer": ["newest"]}, "ct": {"prefer": []}}
    assert preferences(["ct", "pet", "mr"], rules) == {
        "ct": (),
        "pet": ("corrected", "original", "thinnest", "newest"),
        "mr": ("newest",),
    }
    assert series_rules(["ct", "mr"], rules)["mr"] == {"Modality": "MR", "SeriesDescription": "*"}
    study = [_series("1.1", "MR", time="100000"), _series("1.2", "MR", time="110000")]
    chosen = choose_series(study, series_rules(["mr"], {"mr": rules["mr"]}), preferences=preferences(["mr"], rules))
    assert chosen.series["mr"].uid == "1.2"


@pytest.mark.parametrize("wanted", ["newest", ["latest"], [1], {"newest": 1}])
def test_what_is_no_preference_is_refused(wanted: Any) -> None:
    with pytest.raises(ValueError, match=r'dicom\["mr"\] has prefer .*Give a list of original, corrected, thinnest, n'):
        series_rules(["mr"], {"mr": {"prefer": wanted}})


def test_a_rule_of_another_modality_needs_more_than_a_preference() -> None:
    with pytest.raises(ValueError, match=r'dicom\["t1"\] is .*Give keywords'):
        series_rules(["t1"], {"t1": {"prefer": ["newest"]}})
