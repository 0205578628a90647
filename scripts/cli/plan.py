# SPDX-License-Identifier: Apache-2.0
"""Propose the settings of a task from its files, with the reasons."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.cli.bundle_run import resolved_config
from scripts.cli.config import SEPARATOR, Config, read_config
from scripts.cli.options import (
    Parser,
    add_common_options,
    context_configs,
    data_set,
    image_rules,
    parse_set,
    positive_int,
)
from scripts.cli.task import FILES, REQUIRED, file_settings, is_file

if TYPE_CHECKING:
    from scripts.data.planner import Proposal

EXAMPLE = "python -m scripts plan --data sts --dataset-dir DATA --output planned.json"
PLANNED = ("intensity", "spacing", "patch", "student_strides", "batch_size", "flips", "rotation", "mask_values")
CHECKED = ("modalities", "labels", "classes", "regions", "ignore", "head", *PLANNED)
IDENTITY = ("layout", "naming", "classes", "regions", "ignore", "head", "stacked", "allow_missing")
CPU_GIB = 0.5  # about what a step of --scale small needs; on a CPU time is the limit, not memory
GPU_GIB = 8.0  # nnU-Net plans for it by default
GPU_SHARE = 0.8  # of a GPU's memory


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--output", metavar="FILE", help="write the complete task: what it says already, and the rest")
    parser.add_argument("--workers", type=positive_int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument(
        "--memory-gib",
        type=_gib,
        metavar="N",
        help=f"memory of a training step (default: {CPU_GIB:g} on a CPU, at most {GPU_GIB:g} on a GPU)",
    )
    add_common_options(parser)


def _gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number of GiB")
    return number


def run(args: argparse.Namespace) -> None:
    """Read the data set, print the proposals and write the task.

    Raises:
        ValueError: no data set is named, the task has no modalities, or no case can be read.
    """
    if not args.dataset_dir and not args.data_list:
        raise ValueError("No data to plan for. Name a folder with --dataset-dir, or a table with --data-list.")
    given, fixed = _task(args)
    config = {**resolved_config(args, ["train", *context_configs(args)], {}, complete=False), **given}
    if args.dry_run:
        return
    from scripts.data.fingerprint import Source, fingerprint_cohort
    from scripts.data.folds import smallest_training
    from scripts.data.plan_warnings import plan_warnings
    from scripts.data.planner import plan_task
    from scripts.data.settings_check import check_settings

    features, full_features = config["student_features"], config["student_full_features"]
    stated = {name: given[name] for name in CHECKED if name in given and name != "intensity"}  # it may be incomplete
    check_settings(**stated, student_features=features)
    cases, problems = _cases(args, config)
    background = [*given.get("labels", [[0]])[0], *([given["ignore"]] if given.get("ignore") is not None else [])]
    naming = () if config["data_list"] else config.get("naming", ())
    source = Source(given["modalities"], image_rules(config), naming, config["stacked"], background)
    fingerprint = fingerprint_cohort(cases, source, args.workers)
    readable = [case for case in fingerprint if not case.problem]
    if not readable:
        raise ValueError(f"No case could be read. {fingerprint[0].problem}")
    training = smallest_training(cases, given.get("splits_file"))
    proposals = plan_task(readable, fixed, features, full_features, _memory_gib(args), training)
    task = {**{each.name: each.value for each in proposals if each.value is not None}, **fixed}
    task = {key: task[key] for key in (*fixed, *task) if key not in IDENTITY or _is_stated(task[key])}
    if isinstance(fixed.get("intensity"), Mapping):  # some modalities may be given, the others proposed
        task["intensity"] = next(each.value for each in proposals if each.name == "intensity")
    check_settings(**{name: task[name] for name in CHECKED if name in task}, student_features=features)
    print(_table(args, proposals, given, fixed))
    for text in [*problems, *plan_warnings(fingerprint, task)]:
        print(f"warning: {text}")
    if args.output:
        from scripts.utils.atomic_files import write_text

        write_text(task_text(task), args.output)
        print(f"The task is in {args.output}. Look at it, then run check with --data {args.output}.")


def _task(args: argparse.Namespace) -> tuple[Config, Config]:
    """What the task says already, and the part of it that is fixed.

    A file's settings are fixed, and those of ``--set``. The settings of a named data set are only compared.

    Raises:
        ValueError: it names no modalities, or ``--set`` a part of a setting.
    """
    ids = ("cohort", *REQUIRED, *IDENTITY, *PLANNED)
    for key in parse_set(args.set):
        setting, separator, _ = key.removeprefix("+").partition(SEPARATOR)
        if separator and setting in ids:
            raise ValueError(
                f"--set {key}: plan reads whole settings. Give --set {setting}=JSON, or write it into the task."
            )
    chosen = {key: value for key, value in parse_set(args.set).items() if key in ids}
    if is_file(args.data):
        given = fixed = {**file_settings(args), **chosen}
    elif args.data_list and not args.data:
        folder = args.dataset_dir or os.path.dirname(args.data_list) or "."
        given = fixed = {"cohort": "table", "layout": {"file": os.path.relpath(args.data_list, folder)}, **chosen}
    else:
        given = {**read_config(f"data/{data_set(args)}"), **chosen}
        fixed = {key: value for key, value in given.items() if key not in PLANNED or key in chosen}
    patterns = [key for key in given.get("layout") or {} if key != "label"]
    if "modalities" not in given and given["cohort"] == FILES and patterns:
        given["modalities"] = patterns
    if "modalities" not in given:
        raise ValueError('The task names no modalities. Add them, such as "modalities": ["ct", "pet"].')
    return given, fixed


def _is_stated(value: Any) -> bool:
    """Whether a setting says something; the number 0 does."""
    return bool(value) or (value == 0 and value is not False)


def _cases(args: argparse.Namespace, config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The cases that may be trained on, and sentences about cases that cannot be used.

    Raises:
        ValueError: there is no case to train on.
    """
    from scripts.data import datalist
    from scripts.data.case_list import TEST, CohortError

    files = (args.dataset_dir, *(config[key] for key in ("data_list", "modalities", "allow_outside", "layout")))
    cases, problems = [], []
    try:
        cases = datalist(config["cohort"], *files)
    except CohortError as error:
        cases, problems = error.cases, error.problems
    cases = [case for case in cases if case.get("partition") != TEST]
    if not cases:
        raise ValueError(" ".join(["No case to plan for.", *problems]))
    return cases, problems


def _memory_gib(args: argparse.Namespace) -> float:
    """Memory of a training step: the option, or what suits the device."""
    from scripts.runtime.memory_check import available_bytes

    if args.memory_gib:
        return float(args.memory_gib)
    if args.device != "cpu" and (args.device or any(Path("/dev").glob("nvidia[0-9]*"))):  # else PyTorch is not loaded
        import torch

        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            return min(GPU_GIB, GPU_SHARE * torch.cuda.get_device_properties(device).total_memory / 2**30)
    return min(CPU_GIB, available_bytes() / 2 / 2**30)


def _table(args: argparse.Namespace, proposals: Sequence[Proposal], given: Config, fixed: Config) -> str:
    """The proposals beside what the task says, as a Markdown table."""
    from scripts.utils.markdown import markdown_table

    hand_written = fixed is not given
    head = ("setting", "proposal", f"configs/data/{data_set(args)}.json" if hand_written else "given, kept", "why")
    rows = [
        (
            each.name,
            "default" if each.value is None else json.dumps(each.value),
            json.dumps(given[each.name]) if each.name in given else None,
            each.reason,
        )
        for each in proposals
    ]
    return markdown_table(head, rows)


def task_text(task: Mapping[str, Any]) -> str:
    """A task as JSON, one setting a line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in task.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
