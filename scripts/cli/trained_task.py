# SPDX-License-Identifier: Apache-2.0
"""What the weights were trained for, from the record beside them: inference needs no setting of the training again."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from scripts import bundle_root
from scripts.cli.bundle_run import Overrides, config_parser, resolved_config, trusted_classes
from scripts.cli.config import SEPARATOR, Config, read_config
from scripts.cli.options import context_configs, parse_set
from scripts.cli.task import UNNAMED, file_settings, is_file
from scripts.runtime.task_record import COMPARED, HEAD, setting_differences
from scripts.utils.task_file import read_task, task_path

SETTINGS = (
    *("modalities", "intensity", "labels", "spacing", "patch"),
    *("classes", "regions", "ignore", "head", "mask_values", "codes", "dicom", "cohort", "layout"),
)


def weights_path(args: argparse.Namespace) -> Path:
    """The weights of a verb: ``--weights``, ``--set weights=FILE``, or those in models/."""
    return Path(args.weights or parse_set(args.set).get("weights") or Path(bundle_root()) / "models" / "model.pt")


def is_shipped(args: argparse.Namespace) -> bool:
    """Whether a verb uses the weights in models/, because the user names none."""
    return not (args.weights or parse_set(args.set).get("weights"))


def images_sentence(args: argparse.Namespace, modalities: Sequence[str]) -> str:
    """The sentence, for errors about an image, that names the options of `segment` for images and their origin."""
    weights = weights_path(args)
    if args.data:
        origin = f"--data {args.data}."
    elif read_task(weights) is None:
        origin = f"the default: {weights} has no {task_path(weights).name} beside it. Copy it too, or add --data."
    elif is_shipped(args):
        origin = "the shipped weights. Name yours with --weights."
    else:
        origin = f"{weights}."
    return f"Images are {', '.join(f'--{key}' for key in modalities)}, the modalities of {origin}"


def with_trained_settings(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides) -> Overrides:
    """Add to the overrides of a verb the settings that its weights were trained with, except for what the user names.

    The user names settings with ``--data``, ``--scale`` and ``--set``; the run compares them with the record and
    refuses contradictions. Weights without a record add nothing.

    Args:
        args: parsed options.
        configs: of the verb.
        overrides: of the verb's own options.

    Raises:
        ValueError: the record is damaged, or is that of the shipped weights and the user names another task.
    """
    task = read_task(weights_path(args))
    if task is None:
        return overrides
    return {**_settings_of_run(args, task, configs, overrides), **overrides}


def with_trained_task(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides) -> Overrides:
    """Add to the overrides of a verb the settings and the network that its weights were trained with.

    See ``with_trained_settings``. The user names a network with ``--network``, ``--architecture`` and ``--set``.

    Args:
        args: parsed options.
        configs: of the verb.
        overrides: of the verb's own options.

    Raises:
        ValueError: see ``with_trained_settings``, or the network of the record cannot be used (``trained_network``).
    """
    from scripts.training.record_comparison import network_differences
    from scripts.training.trained_network import trained_network
    from scripts.training.training_record import network_definition

    weights = weights_path(args)
    task = read_task(weights)
    if task is None:
        return overrides
    used = _settings_of_run(args, task, configs, overrides)
    if not names_network(args, overrides) and isinstance(task.get("network"), dict):
        network = trusted_classes(trained_network(task["network"], weights))
        current = network_definition(config_parser(args, configs, {**used, **overrides}))
        if network["_target_"] != current.get("_target_") or network_differences(network, current):
            used["network_def"] = network
    return {**used, **overrides}


def task_of(args: argparse.Namespace) -> Config:
    """The settings of a verb's task: those of ``--data``, ``--scale`` and ``--set``, the others from its weights."""
    configs = ["inference", *context_configs(args)]
    config = resolved_config(args, configs, {})
    task = read_task(weights_path(args)) if "weights" in args else None
    return resolved_config(args, configs, _trained_settings(args, task or {}, config))


def _settings_of_run(args: argparse.Namespace, task: Config, configs: Sequence[str], overrides: Overrides) -> Config:
    """``_trained_settings`` of a verb that uses the weights."""
    config = resolved_config(args, configs, overrides)
    if is_shipped(args):
        _require_shipped_task(args, task, config)
    return _trained_settings(args, task, config)


def _trained_settings(args: argparse.Namespace, task: Config, config: Config) -> Config:
    """The settings that the weights were trained with, where the user names no others."""
    named = _named_settings(args) | {key.removeprefix("+") for key in parse_set(args.set)}
    settings = {key: task[key] for key in SETTINGS if key in task and key not in named}
    changed = {key for key, value in settings.items() if value != config.get(key)}
    if "labels" in changed:
        changed |= set(UNNAMED)  # which go with them, even where they are the same
    return {key: value for key, value in settings.items() if key in changed}


def _require_shipped_task(args: argparse.Namespace, task: Config, config: Config) -> None:
    """Refuse another task for the shipped weights: whoever names a task has most likely forgotten ``--weights``.

    Raises:
        ValueError: ``--data`` or ``--scale`` names a setting that contradicts the record.
    """
    named = _named_settings(args) - {key.removeprefix("+") for key in parse_set(args.set)}
    settings = {key: config[key] for key in COMPARED if key in named & {*config}}
    clauses = setting_differences({**HEAD, **task}, settings)
    if clauses and not config["ignore_task"]:
        raise ValueError(
            f"{task_path(weights_path(args))} contradicts this run: {'; '.join(clauses)}. These are the shipped "
            "weights. Name yours with --weights FILE."
        )


def _named_settings(args: argparse.Namespace) -> set[str]:
    """The settings in the configs that ``--data`` and ``--scale`` name."""
    names = {"data": None if is_file(args.data) else args.data, "scale": args.scale}
    configs = {key for folder, name in names.items() if name for key in read_config(f"{folder}/{name}")}
    return configs | set(file_settings(args))


def names_network(args: argparse.Namespace, overrides: Overrides) -> bool:
    """Whether the user names the network, or one of its arguments."""
    if "network_def" in overrides or vars(args).get("architecture") or vars(args).get("network"):
        return True
    referenced = re.findall(r"@(\w+)", str(read_config("inference")["network_def"]))
    ids = {key.removeprefix("+").partition(SEPARATOR)[0] for key in parse_set(args.set)}
    return bool(ids & ({"network_def", "network", *referenced} - set(SETTINGS)))
