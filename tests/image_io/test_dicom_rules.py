# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.image_io.dicom_rules import matches, pet_modality, rule_text, series_rules
from scripts.image_io.dicom_study import Series, choose_series

T1, T1CE = {"SeriesDescription": "*T1*"}, {"SeriesDescription": "*T1*post*"}


def _series(uid: str, description: str = "", kind: str = "MR", **elements: tuple[str, ...]) -> Series:
    named = {"SeriesDescription": (description,), **elements}
    return Series(uid, kind, Path("study") / uid, "P", "1.9", description, 9, elements=named)


def test_ct_pet_and_mr_are_told_by_their_modality():
    rules = series_rules(["ct", "pet", "mr"], {"mr": T1})
    assert rules == {"ct": {"Modality": "CT"}, "pet": {"Modality": "PT"}, "mr": {"Modality": "MR", **T1}}
    assert rule_text(rules["mr"]) == "Modality MR, SeriesDescription *T1*"


@pytest.mark.parametrize(
    ("modalities", "rules", "pet"),
    [
        (["ct", "pet"], {}, "pet"),
        (["ct", "pet"], {"pet": {"SeriesDescription": "*AC*"}}, "pet"),
        (["t1", "fdg", "psma"], {"fdg": {"Modality": "pt"}, "psma": {"Modality": "PT"}}, "fdg"),
        (["ct", "mr", "dose"], {"dose": {"SeriesDescription": "*"}}, None),
    ],
)
def test_the_pet_is_known_by_its_name_or_its_rule(modalities: list[str], rules: dict[str, Any], pet: str | None):
    assert pet_modality(modalities, rules) == pet


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({"SeriesDescription": "*t1*POST*"}, True),
        ({"SeriesDescription": "t1"}, False),
        ({"SeriesDescription": "*T1*", "EchoTime": 2.5}, True),
        ({"SeriesDescription": "*T1*", "EchoTime": 2.6}, False),
        ({"EchoTime": 2.5000001}, True),
        ({"ImageType": "primary"}, True),
        ({"ImageType": "*PRIMARY\\M*"}, True),
        ({"ImageType": "DERIVED"}, False),
        ({"ProtocolName": "*"}, False),  # absent
        ({"ImageType": 3}, False),
    ],
)
def test_a_rule_is_a_pattern_or_a_number_for_each_element(rule: dict[str, Any], fits: bool):
    elements = {
        "SeriesDescription": ("AX T1 SE post Gd",),
        "EchoTime": ("2.50",),
        "ImageType": ("ORIGINAL", "PRIMARY", "M"),
    }
    assert matches(elements, rule) is fits


def test_several_mr_series_are_told_apart():
    study = [_series("1.1", "T2 FLAIR"), _series("1.2", "T1 SE"), _series("1.3", "T1 post"), _series("1.4", "PD")]
    rules = series_rules(["t1", "t1ce", "flair"], {"t1": T1, "t1ce": T1CE, "flair": {"SeriesDescription": "*flair"}})
    chosen = choose_series(study, rules).series
    assert {key: series.uid for key, series in chosen.items()} == {"t1": "1.2", "t1ce": "1.3", "flair": "1.1"}


def test_series_that_no_rule_tells_apart_are_listed():
    study = [_series("1.1", "T1 SE"), _series("1.2", "T1 TSE")]
    rules = series_rules(["t1"], {"t1": T1})
    message = r"2 series for t1 \(SeriesDescription \*T1\*\)\. Choose one with --series-uid, or .*: 1\.1 \(T1 SE, 9 im"
    with pytest.raises(ValueError, match=message):
        choose_series(study, rules)
    assert choose_series(study, rules, ["1.2"]).series["t1"].uid == "1.2"
    with pytest.raises(ValueError, match=r"Tell them apart by a rule in the task's dicom: 1\.1"):
        choose_series(study, rules, ["1.1", "1.2"])


def test_one_series_is_not_taken_for_two_modalities():
    with pytest.raises(ValueError, match=r"1\.1 \(T1 post\) fits both t1 and t1ce\. Tell them apart"):
        choose_series([_series("1.1", "T1 post")], series_rules(["t1", "t1ce"], {"t1": T1, "t1ce": T1CE}))


def test_a_modality_without_a_series_is_left_out():
    chosen = choose_series([_series("1.1", "T1")], series_rules(["t1", "ct"], {"t1": T1})).series
    assert list(chosen) == ["t1"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, r'which DICOM series is t1\. Add one to the task: "dicom": {"t1": {"Modality": "MR", "SeriesDesc'),
        ({"t1": T1, "t2": T1}, r"a rule for t2, which is no modality of this task\. Use t1\."),
        ({"t1": {}}, r"is {}\. Give keywords"),
        ({"t1": "MR"}, r"is 'MR'\. Give keywords"),
        ({"t1": {"SeriesDescripton": "*"}}, r"SeriesDescripton, which is no keyword.*Did you mean SeriesDescription\?"),
        ({"t1": {"ReferencedImageSequence": "*"}}, "which is a sequence"),
        ({"t1": {"EchoTime": True}}, "has True for EchoTime"),
        ({"t1": {"EchoTime": [1, 2]}}, r"has \[1, 2\] for EchoTime"),
        ({"t1": {"Modality": "US"}}, r"has the Modality US, whose images cannot be read\. Use CT, PT, MR\."),
    ],
)
def test_what_is_no_rule_is_refused(rules: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        series_rules(["t1"], rules)
