# SPDX-License-Identifier: Apache-2.0
"""The definition of a network from the record of its weights.

Weights may come from elsewhere, so the record is data and no code: it may name networks and their parts, that is
classes of ``torch.nn.Module`` that are installed here, with plain values as arguments. Nothing in it is evaluated.
"""

from __future__ import annotations

import pydoc
from pathlib import Path
from typing import Any

from torch import nn

from scripts.networks.architecture import architecture_names
from scripts.training.record_comparison import class_name
from scripts.utils.task_file import task_path


def trained_network(definition: dict[str, Any], weights: str | Path) -> dict[str, Any]:
    """Check the definition of a network from a record.

    Args:
        definition: the ``network`` of the record.
        weights: the file beside which the record lies, for errors.

    Returns:
        The definition, for a config in which all text is literal; classes by their full names.

    Raises:
        ValueError: the definition is not complete, names something that is no network, or a class that is not
            installed.
    """
    try:
        return {str(key): _checked(str(key), value) for key, value in definition.items()}
    except ValueError as error:
        raise ValueError(
            f"{task_path(weights)}: the network cannot be built: {error}. Name the network's definition with --network "
            "FILE.json."
        ) from error


def _checked(key: str, value: Any) -> Any:
    if key == "_target_":
        return _module_class(str(value))
    if key == "architecture" and value not in architecture_names():
        raise ValueError(f"its architecture is the file {value}. Name it with --architecture, if you trust it")
    if key.startswith("_"):
        raise ValueError(f"it has the key {key}")
    if isinstance(value, dict):
        return {str(name): _checked(str(name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [_checked("", item) for item in value]
    if isinstance(value, str) and value[:1] in ("$", "@"):
        raise ValueError(f"the value of {key} is {value}, which depends on the training")
    return value


def _module_class(name: str) -> str:
    full = class_name(name)
    try:
        found = pydoc.locate(full)
    except pydoc.ErrorDuringImport as error:
        raise ValueError(f"{name} cannot be imported ({error.value})") from error
    if found is None:
        raise ValueError(f"{name} is not installed here")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name} is no network")
    return full
