# SPDX-License-Identifier: Apache-2.0
"""Call ``monai.bundle run`` with the bundle's configs.

This is the one place where text from outside enters a config. MONAI evaluates text that starts with ``$``, replaces
``@ID`` and ``%FILE``, and turns ``#`` into ``::``. So every override is escaped, unless it is marked as ``Expression``.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.cli.config import CONFIGS, SEPARATOR, merge_configs, require_id, set_value
from scripts.cli.options import MULTI_GPU, common_overrides, parse_set
from scripts.cli.task import UNNAMED, file_settings, require_complete

Overrides = dict[str, Any]
TARGET = "_target_"  # MONAI calls what it names
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)  # text that MONAI's command line reads as text
_SPECIAL = re.compile(r"[$@%#]")  # characters that MONAI interprets in a config's text


class Expression(str):
    """Config text that MONAI may evaluate: written by this program or passed by ``--set``, never data."""

    __slots__ = ()


def interpreted(value: Any) -> Any:
    """A value of ``--set`` with every text marked as ``Expression``."""
    if isinstance(value, str):
        return Expression(value)
    if isinstance(value, dict):
        return {key: interpreted(item) for key, item in value.items()}
    return [interpreted(item) for item in value] if isinstance(value, list) else value


def literal(text: str) -> str:
    """Config text that MONAI reads as exactly ``text``."""
    if not _SPECIAL.search(text):
        return text
    return "$" + _SPECIAL.sub(lambda match: f"\\x{ord(match[0]):02x}", ascii(text))


def trusted_classes(value: Any) -> Any:
    """Settings whose ``_target_`` may name code; all other text in them stays data."""
    if isinstance(value, Mapping):
        trusted = {key: trusted_classes(item) for key, item in value.items()}
        return {**trusted, TARGET: Expression(literal(str(value[TARGET])))} if TARGET in value else trusted
    return [trusted_classes(item) for item in value] if isinstance(value, list) else value


def protected(value: Any) -> Any:
    """A config override in which every text is escaped by ``literal``, unless it is an ``Expression``.

    ``None`` becomes the expression ``$None``, because ``monai.bundle run`` drops overrides that are None.

    Raises:
        ValueError: data hold a ``_target_``, which MONAI would call.
    """
    if value is None:
        return "$None"
    if isinstance(value, Expression):
        return str(value)
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, Mapping):
        if TARGET in value and not isinstance(value[TARGET], Expression):
            raise ValueError(
                f"The settings hold the class {value[TARGET]!r}, which would run code. Descriptions of tasks and "
                "records beside weights are data: remove it there. Name a network by --network, other classes by --set."
            )
        return {key: protected(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [protected(item) for item in value]
    return value


def shell_word(value: Any) -> str:
    """An override as a word on the command line of ``python -m monai.bundle run``, quoted for the shell.

    MONAI's command line parses values as Python literals, so text such as ``2024`` or ``[a]`` needs quotes of its own.
    """
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value not in ("None", "True", "False"):
        return value
    from fire.parser import DefaultParseValue  # takes long to import, and most values are plain

    if isinstance(value, str) and DefaultParseValue(value) == value:
        return shlex.quote(value)
    text = repr(value)
    readable = text.replace("'", '"')  # the shell's quotes are single ones
    try:
        same = ast.literal_eval(readable) == value
    except (SyntaxError, ValueError):
        same = False
    return shlex.quote(readable if same else text)


def user_overrides(args: argparse.Namespace) -> Overrides:
    """The overrides of the options that every verb has, and of ``--set``."""
    device = {"device": Expression(f"$torch.device({args.device!r})")} if args.device else {}
    set_values = {key.removeprefix("+"): interpreted(value) for key, value in parse_set(args.set).items()}
    return {**common_overrides(args), **device, **set_values}


def _all_overrides(
    args: argparse.Namespace, configs: Sequence[str], overrides: Overrides, complete: bool = True
) -> Overrides:
    """The overrides of a run, the strongest last: the task's file, the verb's own, the user's.

    Labels that differ from those below come without their classes, regions and codes, unless they name them, too.
    """
    known, task = merge_configs(configs), file_settings(args)
    if complete:
        require_complete(args, task)
    labels, merged = known.get("labels"), Overrides()
    for layer in ({key: value for key, value in task.items() if key in known}, overrides, user_overrides(args)):
        if layer.get("labels", labels) != labels:
            merged |= UNNAMED
        merged |= layer
        labels = merged.get("labels", labels)
    return merged


def resolved_config(
    args: argparse.Namespace, configs: Sequence[str], overrides: Overrides, complete: bool = True
) -> dict[str, Any]:
    """The merged configs with all overrides, as plain values; expressions stay text.

    ``complete`` refuses a task file that lacks what every run needs; without it the configs' defaults stand in.

    Raises:
        ValueError: ``--set`` names an id that the configs do not hold.
    """
    config = merge_configs(configs)
    for key in parse_set(args.set):
        if not key.startswith("+"):
            require_id(config, key)
    for key, value in _all_overrides(args, configs, overrides, complete).items():
        try:
            set_value(config, key, value)
        except (KeyError, IndexError, ValueError, TypeError):
            parent = key.rpartition(SEPARATOR)[0]
            raise ValueError(f"--set {key}: the configs have no {parent} that could hold it. Check the id.") from None
    return config


def build_item(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides, key: str) -> Any:
    """Build one item of the configs as ``run_bundle`` would, without a run; arguments as there.

    Raises:
        ValueError: the item refuses its input.
    """
    return config_parser(args, configs, overrides).get_parsed_content(key)


def config_parser(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides) -> Any:
    """The ``monai.bundle.ConfigParser`` that ``run_bundle`` would run, in which nothing is built yet."""
    load_monai()
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in configs])
    parser.update(protected(_all_overrides(args, configs, overrides)))
    return parser


def command_line(configs: Sequence[str], overrides: Mapping[str, Any]) -> str:
    """The ``monai.bundle run`` command of configs and protected overrides."""
    start = "python"
    if MULTI_GPU in configs:
        start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 2)}"
    flags = [f"--{key} {shell_word(value)}" for key, value in overrides.items()]
    return " ".join([start, "-m monai.bundle run --config_file", shell_word(_config_files(configs)), *flags])


def _config_files(configs: Sequence[str]) -> list[str]:
    return [os.path.relpath(CONFIGS / f"{name}.json") for name in configs]


def load_monai(reason: str = "") -> None:
    """Import MONAI, and say so before: it takes several seconds.

    Args:
        reason: why it is needed, where that is not obvious.
    """
    if "monai" not in sys.modules:
        print(f"loading MONAI ({reason})" if reason else "loading MONAI", file=sys.stderr, flush=True)
    importlib.import_module("monai.bundle")


def run_bundle(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides, reason: str = "") -> None:
    """Run configs of the bundle by ``monai.bundle run``.

    Args:
        args: parsed options; ``dry_run`` prints the command and stops, ``verbose`` prints it and MONAI's log.
        configs: names in configs/, merged in this order.
        overrides: config id -> value; the options that every verb has are added. Text is data unless it is an
            ``Expression``.
        reason: why MONAI is needed, where that is not obvious.

    Raises:
        ValueError: ``--set`` names an unknown id, or the run refuses its input.
    """
    resolved_config(args, configs, overrides)
    overrides = protected(_all_overrides(args, configs, overrides))
    command = command_line(configs, overrides)
    if args.dry_run or args.verbose:
        print(command, flush=True)
    if args.dry_run:
        return
    load_monai(reason)
    from monai.bundle import run

    from scripts.utils import run_manifest
    from scripts.utils.output_lock import release

    # MONAI warns about every config in a sub folder of configs/, and prints all overrides.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    logging.getLogger("monai.bundle.scripts").setLevel(logging.INFO if args.verbose else logging.WARNING)
    run_manifest.set_command(command)
    try:
        run(
            config_file=_config_files(configs),
            meta_file=str(CONFIGS / "metadata.json"),
            logging_file=str(CONFIGS / "logging.conf") if args.verbose else False,  # type: ignore[arg-type]
            **overrides,
        )
    finally:
        release()


def run_training(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides) -> None:
    """Train by ``run_bundle``, with its arguments and errors, and print where the weights are."""
    run_bundle(args, configs, overrides)
    if not args.dry_run and os.environ.get("RANK", "0") == "0":
        print(f"weights: {build_item(args, configs, overrides, 'final_weights')}")
