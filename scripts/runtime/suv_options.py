# SPDX-License-Identifier: Apache-2.0
"""Options that complete the header of a PET in DICOM, so that it can be converted to SUV."""

from __future__ import annotations

import argparse
from typing import Any

from scripts.image_io.suv_values import OF_ANY_PATIENT, QUANTITIES, TIME, option


def add_suv_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each value; a header that has the value must agree with it."""
    group = parser.add_argument_group("SUV of a PET in DICOM whose header lacks values")
    for key, quantity in QUANTITIES.items():
        unit = f", in {quantity.unit}" if quantity.unit else ""
        group.add_argument(
            option(key),
            type=str if key == TIME else float,
            metavar="HH:MM:SS" if key == TIME else (quantity.unit.upper() or "FACTOR"),
            help=f"{quantity.what}{unit}",
        )


def suv_values(args: argparse.Namespace) -> dict[str, Any]:
    """The values that the options give, by their keys."""
    values = {key: vars(args).get(key) for key in QUANTITIES}
    return {key: value for key, value in values.items() if value is not None}


def values_of_one_patient(args: argparse.Namespace) -> list[str]:
    """The keys of the given values that differ between patients."""
    return [key for key in suv_values(args) if key not in OF_ANY_PATIENT]


def refuse_values_of_one_patient(args: argparse.Namespace, table: str) -> None:
    """Refuse options of one patient for a table of many.

    Args:
        args: parsed options.
        table: the option that names the table.

    Raises:
        ValueError: there is such an option.
    """
    used = values_of_one_patient(args)
    if used:
        raise ValueError(
            f"{option(used[0])} is the value of one patient. With {table}, give it to each row: column {used[0]}."
        )
