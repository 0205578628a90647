# SPDX-License-Identifier: Apache-2.0
"""Compare the records of two trainings, and the definitions of two networks, see ``training_record``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from monai.bundle.config_item import ConfigItem

from scripts.networks.architecture import parameters, read_architecture
from scripts.runtime.task_record import value_differences

# Of a checkpoint: its schedule is compared by itself, a training may continue in another precision, and what only names
# files and results changes no training.
NOT_COMPARED = ("epochs", "precision", "bundle_version", "git_commit", "codes", "dicom", "layout", "mask_values")
OPTIONAL = ("loss", "teachers_sha256")  # that not every training has
# Arguments of networks that change no mask, or only with other shapes of weights, which are refused in any case.
FREE_ARGUMENTS = re.compile("dropout|^(patch|img_size|weights|sha256)$")
NAMES_SHOWN = 5  # cases that a sentence names


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare the record of a checkpoint with that of a run; a key that the older record does not know is not compared.

    Returns:
        One clause per difference, such as ``its fold is 0, this run's is 1``.
    """
    clauses = []
    for key in dict.fromkeys([*current, *saved]):
        known = key in saved and key in current
        if key in NOT_COMPARED or not (known or key in OPTIONAL):
            continue
        one, two = saved.get(key), current.get(key)
        if key == "network":
            one, two = _with_sizes(one), _with_sizes(two)
        clauses += _case_differences(key, one, two) if key.endswith("_cases") else value_differences(key, one, two)
    return clauses


def _case_differences(key: str, saved: Any, current: Any) -> list[str]:
    name = key.replace("_", " ")
    one, two = ({tuple(case.items()): case["case_id"] for case in cases} for cases in (saved, current))
    only_saved, only_current = [one[i] for i in one if i not in two], [two[i] for i in two if i not in one]
    clauses = [f"its {name} include {listed_names(only_saved)}, this run's do not"] if only_saved else []
    return clauses + ([f"this run's {name} include {listed_names(only_current)}, its do not"] if only_current else [])


def listed_names(names: Sequence[str]) -> str:
    """The first of some names with commas between them, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def network_differences(saved: Any, current: Any) -> list[str]:
    """Compare two definitions of networks; arguments that are left out have the defaults of the class."""
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        both = isinstance(saved, str) and isinstance(current, str)
        return value_differences("network", saved, current) if both else []
    names = [str(each.get("_target_")).rsplit(".", 1)[-1] for each in (saved, current)]
    if names[0] != names[1]:
        return value_differences("network", *names)
    defaults = plain_value(_defaults(str(current["_target_"])))
    arguments = [_arguments({**defaults, **each}) for each in (saved, current)]
    return value_differences("network", *arguments)


def class_name(target: str) -> str:
    """The dotted name of a class: of a name without dots that of ``monai.networks.nets``."""
    return target if "." in target else f"monai.networks.nets.{target}"


def _defaults(target: str) -> dict[str, Any]:
    """The default arguments of a class, by its dotted name or its name in ``monai.networks.nets``."""
    found = parameters(target) or {}
    return {name: each.default for name, each in found.items() if each.default is not inspect.Parameter.empty}


def _arguments(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that decide about the mask."""
    return {
        key: value
        for key, value in _with_sizes(definition).items()
        if not (key[:1] == "_" or FREE_ARGUMENTS.search(key))
    }


def _with_sizes(definition: Any) -> Any:
    """A definition with all arguments of a teacher's network instead of its ``scale`` and ``options``.

    A record of release 0.8 or earlier has no scale, and its options hold every size.
    """
    if not (isinstance(definition, Mapping) and definition.get("architecture")):
        return definition
    known, name = dict(definition), str(definition["architecture"])
    changes = (known.pop("options", None) or {}).get(name) or {}
    network = read_architecture(name).definition(known.pop("scale", None), changes)
    return {**plain_value({**_defaults(str(network["_target_"])), **network}), **known}


def plain_value(value: Any) -> Any:
    """A value as JSON holds it; objects that JSON does not know become text."""
    if isinstance(value, ConfigItem):
        value = value.get_config()
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
