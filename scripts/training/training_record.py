# SPDX-License-Identifier: Apache-2.0
"""What a network was trained on: kept in the checkpoint, and as ``<stem>.task.json`` beside the final weights.

The record holds plain values only: modalities, intensity, labels, spacing (mm), patch (voxels), the definition of the
network, the training and validation cases, and the settings of the optimisation. ``--resume`` compares it with the
command, inference compares it with the config, and ``evaluate`` finds training cases by it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.config_item import ConfigItem

from scripts.data.case_list import Item
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import bundle_version, git_commit, running_parser

SUFFIX = ".task.json"
NOT_COMPARED = ("epochs", "bundle_version", "git_commit")  # of a checkpoint; its schedule is compared by itself
OPTIONAL = ("loss", "teachers_sha256")  # that not every training has
NAMES_SHOWN = 5  # cases that a sentence names
Record = dict[str, Any]


def task_path(weights: str | Path) -> Path:
    """The file that describes the weights: ``model.task.json`` beside ``model.pt``."""
    path = Path(weights)
    return path.with_name(f"{path.stem}{SUFFIX}")


def training_record(
    split: Sequence[Sequence[Item]], settings: Mapping[str, Any], teachers: Mapping[str, Any] | None = None
) -> Record:
    """Describe a training by plain values.

    The definitions of the network, the loss and the optimizer are taken from the config that is being parsed, because
    an object does not hold its definition; without such a config they are left out.

    Args:
        split: training and validation cases.
        settings: name -> value of every further setting, such as ``spacing``.
        teachers: name -> teacher with ``sha256``, the checksum of its weights or None for random weights.

    Returns:
        The settings, ``network``, ``segmentation_loss``, ``loss`` (method and terms, if it is another loss),
        ``optimizer``, ``teachers_sha256``, ``training_cases``, ``validation_cases``, ``bundle_version`` and
        ``git_commit``.
    """
    record = {str(key): _plain(value) for key, value in settings.items()}
    parser = running_parser()
    if parser is not None:
        record["network"] = definition(parser, "network_def")
        record["segmentation_loss"] = definition(parser, "segmentation_loss")
        loss = _without(definition(parser, "loss"), "segmentation", "distiller")
        if loss != record["segmentation_loss"]:
            record["loss"] = loss
        record["optimizer"] = _without(definition(parser, "optimizer"), "params", "lr", "weight_decay")
    if teachers:
        record["teachers_sha256"] = {name: teacher.sha256 for name, teacher in teachers.items()}
    record["training_cases"], record["validation_cases"] = (_case_ids(cases) for cases in split)
    return {**record, "bundle_version": bundle_version(), "git_commit": git_commit()}


def _case_ids(cases: Sequence[Item]) -> list[dict[str, str]]:
    ids = ({key: str(case.get(key, case.get("case_id"))) for key in ("case_id", "patient_id")} for case in cases)
    return sorted(ids, key=lambda item: item["case_id"])


def _without(value: Any, *keys: str) -> Any:
    return {k: v for k, v in value.items() if k not in keys} if isinstance(value, dict) else value


def definition(parser: ConfigParser, key: str) -> Any:
    """A config item as plain values, with its references and expressions replaced; no component is built.

    What cannot be replaced, such as a reference to a component that has to be built, stays as it is written.

    Args:
        parser: the config.
        key: id of the item.
    """
    config = copy.copy(parser.get())  # of one level: parsing replaces values, and the parser keeps its own
    reader = ConfigParser(config=_copied(config), globals=dict(parser.globals))
    return _resolved(reader, reader.get(key))


def _copied(value: Any) -> Any:
    """A copy of the dicts and lists of a config; other objects, such as a device, are shared."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _resolved(reader: ConfigParser, value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _resolved(reader, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(reader, item) for item in value]
    if not isinstance(value, str) or value[:1] not in ("@", "$"):
        return _plain(value)
    reader["record_value"] = value
    try:
        return _plain(reader.get_parsed_content("record_value", instantiate=False))
    except Exception:  # an expression of the config may raise anything where a component is not built
        return value


def _plain(value: Any) -> Any:
    """A value as JSON holds it; objects that JSON does not know become text."""
    if isinstance(value, ConfigItem):
        value = value.get_config()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


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
        clauses += _case_differences(key, one, two) if key.endswith("_cases") else value_differences(key, one, two)
    return clauses


def value_differences(name: str, first: Any, second: Any) -> list[str]:
    """Compare two plain values, dicts by their keys: ``its <name> is <first>, this run's is <second>``."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        pairs = ((f"{name}#{key}", first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second]))
        return [clause for pair in pairs for clause in value_differences(*pair)]
    return [] if first == second else [f"its {name} is {_shown(first)}, this run's is {_shown(second)}"]


def _case_differences(key: str, saved: Any, current: Any) -> list[str]:
    name = key.replace("_", " ")
    one, two = ({tuple(case.items()): case["case_id"] for case in cases} for cases in (saved, current))
    only_saved, only_current = [one[i] for i in one if i not in two], [two[i] for i in two if i not in one]
    clauses = [f"its {name} include {_listed(only_saved)}, this run's do not"] if only_saved else []
    return clauses + ([f"this run's {name} include {_listed(only_current)}, its do not"] if only_current else [])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    """A value in a sentence: a component by the name of its class."""
    if isinstance(value, Mapping):
        return str(value["_target_"]).rsplit(".", 1)[-1] if "_target_" in value else f"{{{', '.join(value)}}}"
    is_checksum = isinstance(value, str) and len(value) == 64
    return "none" if value is None else f"{value[:12]}..." if is_checksum else str(value)


def write_task(record: Mapping[str, Any], weights: str | Path) -> None:
    """Write the record of a training beside its weights, with the checksum of the weights."""
    write_json({"weights_sha256": sha256(weights), **record}, task_path(weights))


def read_task(weights: str | Path) -> Record | None:
    """Read the record beside weights; None if there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    path = task_path(weights)
    if not path.is_file():
        return None
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} cannot be read ({error}). Restore it, or remove it.") from error
    if not isinstance(task, dict):
        raise ValueError(f"{path} is no description of weights: it holds no names. Restore it, or remove it.")
    return task
