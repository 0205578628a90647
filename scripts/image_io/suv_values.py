# SPDX-License-Identifier: Apache-2.0
"""What a PET's header may lack for SUV by body weight, and a user gives instead: by options, or in a table of cases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from scripts.utils.values import is_number

SuvValues = Mapping[str, float | str]


class Quantity(NamedTuple):
    """A value in words, its unit, and its plausible limits."""

    what: str
    unit: str = ""
    limits: tuple[float, float] = (0.0, 0.0)


WEIGHT, DOSE, TIME, HALF_LIFE, FACTOR = (
    *("patient_weight", "injected_dose", "injection_time"),
    *("half_life", "suv_factor"),
)
# By the name of the column; the option has hyphens.
QUANTITIES = {
    WEIGHT: Quantity("weight of the patient", "kg", (0.2, 500.0)),
    DOSE: Quantity("injected activity", "Bq", (1e5, 1e11)),  # one given in MBq is below
    TIME: Quantity("time of the injection"),
    HALF_LIFE: Quantity("half life of the nuclide", "s", (1.0, 1e9)),
    FACTOR: Quantity("SUV of a value of 1 after rescaling", "", (1e-12, 1e6)),
}
OF_ANY_PATIENT = (HALF_LIFE,)  # the others are those of one patient
CLOCK = re.compile(r"(?:(\d{4})-?(\d{2})-?(\d{2})[ T]?)?(\d{2}):?(\d{2})(?::?(\d{2}))?")


def option(key: str) -> str:
    """The option of a value, such as ``--patient-weight``."""
    return f"--{key.replace('_', '-')}"


def checked_suv_values(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, float | str]:
    """The values as numbers; the time as DICOM writes it, ``HHMMSS`` or, with a date, ``YYYYMMDDHHMMSS``.

    Args:
        values: by the keys of ``QUANTITIES``: kg, Bq, a time such as ``10:05`` or ``2020-01-02 10:05:30``, s, and a
            factor. None counts as not given.
        names: what to call a value in errors, by default its option.

    Raises:
        ValueError: a key is unknown, a value is implausible or no number or time, or the factor is not alone.
    """
    names = {**{key: option(key) for key in QUANTITIES}, **(names or {})}
    given = {key: value for key, value in values.items() if value is not None}
    unknown = [key for key in given if key not in QUANTITIES]
    if unknown:
        raise ValueError(f"{unknown[0]} is no value for SUV. Use {', '.join(QUANTITIES)}.")
    if FACTOR in given and len(given) > 1:
        other = next(key for key in given if key != FACTOR)
        raise ValueError(f"{names[FACTOR]} is the whole conversion to SUV. Remove {names[other]}, or the factor.")
    return {
        key: _time(value, names[key]) if key == TIME else _number(value, key, names) for key, value in given.items()
    }


def _number(value: Any, key: str, names: Mapping[str, str]) -> float:
    quantity = QUANTITIES[key]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    low, high = quantity.limits
    if not is_number(number) or isinstance(value, bool) or not low <= number <= high:
        unit = f" {quantity.unit}" if quantity.unit else ""
        raise ValueError(
            f"{names[key]} is {value!r}. Give the {quantity.what}, a number from {low:g} to {high:g}{unit}."
        )
    return number


def _time(value: Any, name: str) -> str:
    """A time as DICOM's TM, or with a date as its DT."""
    parts = CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    text = "".join(part or "" for part in parts.groups(default="")) if parts else ""
    if parts and not parts[6]:
        text += "00"
    try:
        datetime.strptime(text, "%Y%m%d%H%M%S" if len(text) == 14 else "%H%M%S")
    except ValueError:
        raise ValueError(
            f"{name} is {value!r}. Give the time of the injection as the scanner's clock shows it, such as 10:05, "
            "10:05:30 or 2020-01-02 10:05."
        ) from None
    return text


def options_of(keys: Iterable[str]) -> str:
    """The options of values, such as ``--patient-weight and --injected-dose``."""
    names = [option(key) for key in keys]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
