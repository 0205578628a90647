# SPDX-License-Identifier: Apache-2.0
"""What a network was trained on: kept in the checkpoint, and as ``<stem>.task.json`` beside the final weights.

The record holds plain values only: modalities, intensity, labels, spacing (mm), patch (voxels), the definition of the
network, the training and validation cases, and the settings of the optimisation. ``--resume`` compares it with the
command, inference compares it with the config, and ``evaluate`` finds training cases by it.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.config_item import ConfigItem

from scripts.data.case_list import Item
from scripts.networks.architecture import parameters, read_architecture
from scripts.networks.teacher_spec import (
    OWN_SETTINGS,
    check_spec,
    join_checksums,
    own_settings,
    spec_files,
    teacher_head,
)
from scripts.runtime.task_record import (
    HEAD,
    refuse_contradictions,
    require_same_settings,
    setting_differences,
    value_differences,
)
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import bundle_version, git_commit, running_parser
from scripts.utils.task_file import Record, case_ids, read_task, seen_cases, seen_ids, task_path

logger = logging.getLogger(__name__)

# Of a checkpoint: its schedule is compared by itself, a training may continue in another precision, and what only names
# files and results changes no training.
NOT_COMPARED = ("epochs", "precision", "bundle_version", "git_commit", "codes", "dicom", "layout", "mask_values")
OPTIONAL = ("loss", "teachers_sha256")  # that not every training has
TEACHER_SETTINGS = ("modalities", "folds", "layers", "kind", "head", *OWN_SETTINGS)  # of a specification
PARTS = ("checks", "taps", "student_layers")  # items of the config that change what is learned
# Arguments of networks that change no mask, or only with other shapes of weights, which are refused in any case.
FREE_ARGUMENTS = re.compile("dropout|^(patch|img_size|weights|sha256)$")
NAMES_SHOWN = 5  # cases that a sentence names


def training_record(
    split: Sequence[Sequence[Item]],
    settings: Mapping[str, Any],
    teachers: Mapping[str, Any] | None = None,
    built_on: Mapping[str, str] | None = None,
    pretrained: str = "",
) -> Record:
    """Describe a training by plain values.

    The definitions of the network, the loss and the optimizer are taken from the config that is being parsed, because
    an object does not hold its definition; without such a config they are left out.

    Args:
        split: training and validation cases.
        settings: name -> value of every further setting, such as ``spacing``.
        teachers: name -> ``weights``, a file or None for random weights. No teacher is built here, because that would
            draw random numbers before the student does.
        built_on: name -> file of further weights that the training needs, ``""`` for random weights.
        pretrained: file of the weights that the training starts from; ``""`` for random weights. A warning names the
            validation cases that trained them.

    Returns:
        The settings, ``network``, ``segmentation_loss``, ``loss`` (method and terms, if it is another loss),
        ``optimizer``, the items of ``PARTS``, ``teacher_names``, ``teachers`` (the settings of each),
        ``teachers_sha256``, ``built_on_sha256``, ``training_cases``, ``validation_cases``, ``inherited_cases`` (those
        that trained the teachers or the weights that the training starts from), ``bundle_version`` and ``git_commit``.
    """
    record = {str(key): _plain(value) for key, value in settings.items()}
    parser = running_parser()
    if parser is not None:
        record["network"] = network_definition(parser)
        record["segmentation_loss"] = definition(parser, "segmentation_loss")
        loss = _without(definition(parser, "loss"), "segmentation", "distiller")
        if loss != record["segmentation_loss"]:
            record["loss"] = loss
        record["optimizer"] = _without(definition(parser, "optimizer"), "params", "lr", "weight_decay")
        record |= {key: definition(parser, key) for key in PARTS if parser.get(key) is not None}
    if teachers:
        record["teacher_names"] = list(teachers)
        record["teachers"] = {
            name: {key: _plain(spec[key]) for key in TEACHER_SETTINGS if spec.get(key) is not None}
            for name, spec in teachers.items()
        }
        record["teachers_sha256"] = {name: _checksum(spec) for name, spec in teachers.items()}
    if pretrained:
        built_on = {**(built_on or {}), "pretrained": pretrained}
        _warn_of_seen(f"The weights {pretrained} were", split[1], seen_ids(read_task(pretrained) or {}))
    if built_on:
        record["built_on_sha256"] = {name: _checksum({"weights": file}) for name, file in built_on.items()}
    record["training_cases"], record["validation_cases"] = (_case_ids(cases) for cases in split)
    files = [pretrained] * bool(pretrained) + [file for spec in (teachers or {}).values() for file in spec_files(spec)]
    inherited = {case["case_id"]: case for file in files for case in seen_cases(read_task(file) or {})}
    record["inherited_cases"] = [case for _, case in sorted(inherited.items())]
    return {**record, "bundle_version": bundle_version(), "git_commit": git_commit()}


def _warn_of_seen(what: str, validation: Sequence[Item], seen: set[tuple[str, str]]) -> None:
    """Warn of validation cases that trained other weights from which the network learns."""
    known = sorted(case["case_id"] for case in _case_ids(validation) if case_ids(case) & seen)
    if known:
        logger.warning(
            "%s trained on the patients of %d of the %d validation cases of this run: %s. Their Dice is too high.",
            what,
            len(known),
            len(validation),
            _listed(known),
        )


def _checksum(spec: Mapping[str, Any]) -> str | None:
    files = spec_files(spec)
    if not all(Path(file).is_file() for file in files):
        return None  # load_weights refuses a missing file
    return join_checksums([sha256(file) for file in files])


def _case_ids(cases: Sequence[Item]) -> list[dict[str, str]]:
    ids = []
    for case in cases:
        case_id = str(case.get("case_id") or Path(str(case.get("image", ""))).name)  # MONAI Label gives no ids
        ids.append({"case_id": case_id, "patient_id": str(case.get("patient_id", case_id))})
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


def network_definition(parser: ConfigParser) -> Any:
    """The definition of ``network_def``; where that prepares a network (``segmentation_network``), of this network."""
    found = definition(parser, "network_def")
    is_prepared = isinstance(found, dict) and str(found.get("_target_")).endswith(".segmentation_network")
    return found["network"] if is_prepared else found


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
        if key == "network":
            one, two = _with_sizes(one), _with_sizes(two)
        clauses += _case_differences(key, one, two) if key.endswith("_cases") else value_differences(key, one, two)
    return clauses


def _case_differences(key: str, saved: Any, current: Any) -> list[str]:
    name = key.replace("_", " ")
    one, two = ({tuple(case.items()): case["case_id"] for case in cases} for cases in (saved, current))
    only_saved, only_current = [one[i] for i in one if i not in two], [two[i] for i in two if i not in one]
    clauses = [f"its {name} include {_listed(only_saved)}, this run's do not"] if only_saved else []
    return clauses + ([f"this run's {name} include {_listed(only_current)}, its do not"] if only_current else [])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def write_task(record: Mapping[str, Any], weights: str | Path) -> None:
    """Write the record of a training beside its weights, with the checksum of the weights."""
    write_json({"weights_sha256": sha256(weights), **record}, task_path(weights))


def require_same_task(weights: str | Path, settings: Mapping[str, Any], ignore: bool = False) -> None:
    """Refuse a config that contradicts the record beside its weights: other input gives another mask without a word.

    Modalities and their order, intensity, spacing, labels and the head with its regions are compared, and the
    definition of the network in the config that is being parsed. Patch and overlap may differ. Without a record nothing
    is compared.

    Args:
        weights: file of the weights.
        settings: ``modalities``, ``intensity``, ``spacing`` in mm, ``labels``, ``head`` and ``sigmoid_regions`` of the
            config.
        ignore: log the contradictions as a warning instead.

    Raises:
        ValueError: the config contradicts the record, which names every difference, or the record cannot be read.
    """
    task, parser = read_task(weights), running_parser()
    if task is None:
        return
    network = [] if parser is None else network_differences(task.get("network"), network_definition(parser))
    require_same_settings(weights, task, _plain(settings), ignore, network)


def require_same_teachers(
    specs: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    split: Sequence[Sequence[Item]] = (),
    ignore: bool = False,
    patch: Sequence[int] | None = None,
) -> None:
    """Refuse teachers that were trained with other settings than they are used with; see ``require_same_task``.

    A teacher with a softmax may teach a sigmoid head; the reverse is refused (``teacher_head``). A teacher that was
    trained on validation cases of this run is a warning: it tells the student about them.

    Args:
        specs: name of a teacher -> its specification; a teacher without weights or record is accepted, and its own
            settings take the place of the task's.
        settings: ``intensity``, ``spacing`` in mm, ``labels``, ``head`` and ``sigmoid_regions`` of this run; the
            regions are compared for a sigmoid head only.
        split: training and validation cases of this run.
        ignore: log the contradictions as a warning instead.
        patch: of this run in voxels, compared for architectures with a fixed patch only; None for cached teachers,
            which get no patch.
    """
    heads = {}
    for name, spec in specs.items():
        check_spec(name, spec)
        heads[name] = teacher_head(name, spec, settings.get("head", HEAD["head"]))
    for name, spec in specs.items():
        seen: set[tuple[str, str]] = set()
        for file in spec_files(spec):
            task = read_task(file)
            if task is None:
                continue
            used = {**_own_or_task(settings, spec), "head": heads[name]}
            if heads[name] == HEAD["head"]:
                used.pop("sigmoid_regions", None)
            if patch and spec.get("architecture") and read_architecture(spec["architecture"]).fixed_patch:
                used["patch"] = spec.get("patch") or patch
            known = {key: value for key, value in task.items() if key != "modalities"}  # of the image, not the teacher
            own = own_settings(spec)
            advice = f" The specification of {name} has its own {', '.join(own)}." if own else ""
            refuse_contradictions(file, setting_differences(known, _plain(used)), ignore, advice)
            seen |= seen_ids(task)
        _warn_of_seen(f"The teacher {name} was", split[1] if split else (), seen)


def _own_or_task(settings: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a teacher is used with: its own or the task's; no labels beside own classes."""
    own = {key: spec[key] for key in ("modalities", "spacing") if spec.get(key)}
    intensity = {**settings.get("intensity", {}), **(spec.get("intensity") or {})}
    used = {**settings, **own, "intensity": intensity}
    if spec.get("classes"):
        used.pop("labels", None)
    return used


def network_differences(saved: Any, current: Any) -> list[str]:
    """Compare two definitions of networks; arguments that are left out have the defaults of the class."""
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        both = isinstance(saved, str) and isinstance(current, str)
        return value_differences("network", saved, current) if both else []
    names = [str(each.get("_target_")).rsplit(".", 1)[-1] for each in (saved, current)]
    if names[0] != names[1]:
        return value_differences("network", *names)
    defaults = _plain(_defaults(str(current["_target_"])))
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
    return {**_plain({**_defaults(str(network["_target_"])), **network}), **known}
