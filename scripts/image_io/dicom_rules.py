# SPDX-License-Identifier: Apache-2.0
"""Which DICOM series is which modality of a task: rules on elements of the series' header.

A rule names elements by their DICOM keywords, each with a pattern, as of file names and regardless of case, or with a
number: ``{"Modality": "MR", "SeriesDescription": "*T1*post*", "EchoTime": 90}``. All of them must match. An element
with several values matches by any of them, or by all of them with backslashes between, as DICOM writes them. The key
``prefer`` says which of several series that match is taken, see ``scripts.image_io.series_preference``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from scripts.image_io.checks import DICOM_MODALITIES
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.series_preference import PREFER, check_preferences
from scripts.utils.values import is_list, is_number

Rule = Mapping[str, str | float]

EXAMPLE = '{"Modality": "MR", "SeriesDescription": "*T1*"}'
NUMBER_TOLERANCE = 1e-4  # relative: DICOM writes decimals as text


def check_rules(modalities: Sequence[str], rules: Mapping[str, Any]) -> None:
    """Refuse rules of no modality, and rules that are none; what needs pydicom is left to ``series_rules``.

    Args:
        modalities, rules: see ``series_rules``.

    Raises:
        ValueError: there is such a rule.
    """
    for key, rule in rules.items():
        if key not in modalities:
            known = ", ".join(modalities)
            raise ValueError(f"dicom has a rule for {key}, which is no modality of this task. Use {known}.")
        if not isinstance(rule, Mapping) or (not set(rule) - {PREFER} and key not in DICOM_MODALITIES):
            raise ValueError(
                f'dicom["{key}"] is {rule!r}. Give keywords of DICOM with a pattern or a number: {EXAMPLE}.'
            )
        check_preferences(key, rule)


def series_rules(modalities: Sequence[str], rules: Mapping[str, Any]) -> dict[str, Rule]:
    """The rule of each modality, without ``prefer``; those of ``ct``, ``pet`` and ``mr`` begin with the ``Modality``.

    Args:
        modalities: of the task.
        rules: modality -> rule, the task's ``dicom``.

    Raises:
        ValueError: a modality without a rule, a rule of no modality, a rule that is none, an unknown keyword, or
            pydicom is not installed.
    """
    check_rules(modalities, rules)
    defaults = {key: {"Modality": value} for key, value in DICOM_MODALITIES.items()}
    complete: dict[str, Rule] = {}
    for key in modalities:
        if key not in rules and key not in defaults:
            raise ValueError(
                f"No rule says which DICOM series is {key}. Add one to the task: "
                f'"dicom": {{"{key}": {EXAMPLE}}}, or use `segment` with the folders of the series.'
            )
        complete[key] = {**defaults.get(key, {}), **_checked(key, rules.get(key, {}))}
    return complete


def pet_modality(modalities: Sequence[str], rules: Mapping[str, Any]) -> str | None:
    """The first modality that is a PET, by its name or by its rule; arguments as for ``series_rules``."""
    defaults = {key: {"Modality": value} for key, value in DICOM_MODALITIES.items()}
    kinds = {key: {**defaults.get(key, {}), **rules.get(key, {})}.get("Modality") for key in modalities}
    return next((key for key, kind in kinds.items() if kind and _matches(["PT"], str(kind))), None)


def rule_text(rule: Rule) -> str:
    """A rule in words, such as ``Modality MR, SeriesDescription *T1*``."""
    return ", ".join(f"{keyword} {value}" for keyword, value in rule.items())


def matches(values: Mapping[str, Sequence[str]], rule: Rule) -> bool:
    """Whether a header fits a rule.

    Args:
        values: the texts of each element by its keyword; no texts where it is absent or empty.
        rule: see the module.
    """
    return all(_matches(values.get(keyword, ()), wanted) for keyword, wanted in rule.items())


def _matches(texts: Sequence[str], wanted: str | float) -> bool:
    if not isinstance(wanted, str):
        return any(math.isclose(number, wanted, rel_tol=NUMBER_TOLERANCE) for number in _numbers(texts))
    candidates = [*texts, "\\".join(texts)] if texts else []
    return any(fnmatchcase(text.casefold(), wanted.casefold()) for text in candidates)


def _numbers(texts: Iterable[str]) -> list[float]:
    numbers = []
    for text in texts:
        try:
            numbers.append(float(text))
        except ValueError:
            continue
    return numbers


def _checked(key: str, rule: Any) -> Rule:
    """The rule, if it is one."""
    dictionary = dicom_package("pydicom.datadict")
    elements = {keyword: wanted for keyword, wanted in rule.items() if keyword != PREFER}
    for keyword, wanted in elements.items():
        tag = dictionary.tag_for_keyword(keyword)
        if tag is None or dictionary.dictionary_VR(tag) == "SQ":
            nearest = get_close_matches(keyword, dictionary.keyword_dict, n=1, cutoff=0.6)
            hint = f" Did you mean {nearest[0]}?" if nearest and tag is None else ""
            what = "is no keyword of DICOM" if tag is None else "is a sequence, which has no value to compare"
            raise ValueError(f'dicom["{key}"] has {keyword}, which {what}.{hint}')
        if not isinstance(wanted, str) and not is_number(wanted):
            raise ValueError(
                f'dicom["{key}"] has {wanted!r} for {keyword}. Give a pattern such as "*T1*", or a number.'
            )
    kinds = DICOM_MODALITIES.values()
    if "Modality" in rule and not any(_matches([kind], rule["Modality"]) for kind in kinds):
        raise ValueError(
            f'dicom["{key}"] has the Modality {rule["Modality"]}, whose images cannot be read. Use {", ".join(kinds)}.'
        )
    return elements


def element_texts(value: Any) -> tuple[str, ...]:
    """The texts of an element's value by pydicom, one for each of its values; none for an empty one."""
    values = value if is_list(value) else [value]
    return tuple(str(each).strip() for each in values if each is not None and str(each).strip())
