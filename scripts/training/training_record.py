# SPDX-License-Identifier: Apache-2.0
"""What a network was trained on: kept in the checkpoint, and as ``<stem>.task.json`` beside the final weights.

The record holds plain values only: modalities, intensity, labels, spacing (mm), patch (voxels), the definition of the
network, the training and validation cases, and the settings of the optimisation. ``--resume`` compares it with the
command, inference compares it with the config, and ``evaluate`` finds training cases by it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from scripts.data.case_list import Item
from scripts.networks.architecture import read_architecture
from scripts.networks.teacher_spec import (
    OWN_SETTINGS,
    check_spec,
    own_settings,
    spec_checksum,
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
from scripts.training.record_comparison import listed_names, network_differences, plain_value
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import bundle_version, git_commit, running_parser
from scripts.utils.task_file import Record, case_ids, read_task, seen_cases, seen_ids, task_path

logger = logging.getLogger(__name__)

TEACHER_SETTINGS = ("modalities", "folds", "layers", "kind", "head", *OWN_SETTINGS)  # of a specification
PARTS = ("checks", "taps", "student_layers")  # items of the config that change what is learned


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
        pretrained: file of the weights that the training starts from; ``""`` for random weights. Warnings name the
            validation cases that trained them, and other input.

    Returns:
        The settings, ``network``, ``segmentation_loss``, ``loss`` (method and terms, if it is another loss),
        ``optimizer``, the items of ``PARTS``, ``teacher_names``, ``teachers`` (the settings of each),
        ``teachers_sha256``, ``built_on_sha256``, ``training_cases``, ``validation_cases``, ``inherited_cases`` (those
        that trained the teachers or the weights that the training starts from), ``bundle_version`` and ``git_commit``.
    """
    record = {str(key): plain_value(value) for key, value in settings.items()}
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
            name: {key: plain_value(spec[key]) for key in TEACHER_SETTINGS if spec.get(key) is not None}
            for name, spec in teachers.items()
        }
        record["teachers_sha256"] = {name: spec_checksum(spec) for name, spec in teachers.items()}
    if pretrained:
        built_on = {**(built_on or {}), "pretrained": pretrained}
        start = read_task(pretrained) or {}
        _warn_of_seen(f"The weights {pretrained} were", split[1], seen_ids(start))
        _warn_of_other_input(pretrained, start, record)
    if built_on:
        record["built_on_sha256"] = {name: spec_checksum({"weights": file}) for name, file in built_on.items()}
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
            listed_names(known),
        )


def _warn_of_other_input(weights: str, start: Record, record: Record) -> None:
    """Warn where the weights that a training starts from were trained on other modalities or intensities."""
    clauses = setting_differences(start, {key: record[key] for key in ("modalities", "intensity") if key in record})
    if clauses:
        logger.warning("The weights %s were trained on other input: %s.", weights, "; ".join(clauses))


def _case_ids(cases: Sequence[Item]) -> list[dict[str, str]]:
    ids = []
    for case in cases:
        # MONAI Label gives no ids. Elsewhere a case without one is named in the same way.
        case_id = str(case.get("case_id") or Path(str(case.get("image", ""))).name.split(".")[0])
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


PREPARED = (".segmentation_network", ".strict_network")  # functions that return the network that they are given


def network_definition(parser: ConfigParser) -> Any:
    """The definition of ``network_def``; where that prepares a network (``segmentation_network``), of this network."""
    found = definition(parser, "network_def")
    while isinstance(found, dict) and str(found.get("_target_")).endswith(PREPARED):
        found = found["network"]
    return found


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
        return plain_value(value)
    reader["record_value"] = value
    try:
        return plain_value(reader.get_parsed_content("record_value", instantiate=False))
    except Exception:  # an expression of the config may raise anything where a component is not built
        return value


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
    require_same_settings(weights, task, plain_value(settings), ignore, network)


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
            known = {key: value for key, value in task.items() if key != "modalities"}  # of the image, see below
            own = own_settings(spec)
            advice = f" The specification of {name} has its own {', '.join(own)}." if own else ""
            read = task.get("network")
            read = (read.get("modalities") if isinstance(read, Mapping) else None) or task.get("modalities")
            clauses = value_differences("modalities", read, list(spec["modalities"])) if read else []
            clauses += setting_differences(known, plain_value(used))
            refuse_contradictions(file, clauses, ignore, advice)
            seen |= seen_ids(task)
        _warn_of_seen(f"The teacher {name} was", split[1] if split else (), seen)


def _own_or_task(settings: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a teacher is used with: its own or the task's; no labels and regions beside own classes."""
    own = {key: spec[key] for key in ("modalities", "spacing") if spec.get(key)}
    intensity = {**settings.get("intensity", {}), **(spec.get("intensity") or {})}
    used = {**settings, **own, "intensity": intensity}
    if spec.get("classes"):
        used = {key: value for key, value in used.items() if key not in ("labels", "sigmoid_regions")}
    return used
