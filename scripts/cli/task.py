# SPDX-License-Identifier: Apache-2.0
"""The task of a command: its data, classes and grid, by the name of a config in configs/data or as a file.

A file is read as data. Its text is never evaluated, and it wins over ``--scale``, which then sets widths and schedule.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scripts.cli.config import Config, config_names, read_config
from scripts.utils.json_files import read_object

FILES = "files"  # the cohort of a task with a layout
# What every task must say. An nnU-Net data set says the first two itself.
REQUIRED = ("modalities", "labels", "intensity", "spacing", "patch")
NNUNET = "nnunet"
# What belongs to the labels of a task, as it is where nothing is named.
UNNAMED: Config = {"classes": None, "regions": None, "codes": {}}


def task_name(text: str) -> str:
    """An option's task: the name of a config in configs/data, or the path of a file."""
    names = config_names("data")
    if text in names or Path(text).is_file():
        return text
    if text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(names)}, and no FILE.json")


def is_file(name: str | None) -> bool:
    """Whether a task is named by the path of a file."""
    return name is not None and name not in config_names("data")


def file_settings(args: argparse.Namespace) -> Config:
    """The settings of a task that ``--data`` names as a file; empty for a name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, or has an unknown key.
    """
    if not is_file(args.data):
        return {}
    return {**_read_file(str(args.data)), **_of_data_set(args)}


def _read_file(path: str) -> Config:
    task = read_object(path, "description of a task")
    # Null says nothing of what must be said.
    task = {
        key: value for key, value in task.items() if value is not None or key not in (*REQUIRED, "cohort", "layout")
    }
    known = {**read_config("train"), **read_config("inference")}
    for key in task:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{path} has the unknown key {key}.{hint}")
    if "cohort" not in task and "layout" not in task:
        raise ValueError(f'{path} has no cohort. Add one, such as "cohort": "files" with a layout.')
    if isinstance(task.get("splits_file"), str):  # beside the file, from wherever it is used
        task["splits_file"] = os.path.join(os.path.dirname(os.path.abspath(path)), task["splits_file"])
    return {"cohort": FILES, "naming": [], **task}


def _of_data_set(args: argparse.Namespace) -> Config:
    """What the data set's own description says and the file leaves out."""
    task = _read_file(str(args.data))
    if task["cohort"] != NNUNET or not args.dataset_dir:
        return {}
    from scripts.data.cohorts.nnunet_task import nnunet_task

    stated = nnunet_task(Path(args.dataset_dir))
    if "labels" in task:  # its own classes and regions belong to them
        stated = {"modalities": stated["modalities"]}
    return {key: value for key, value in stated.items() if key not in task}


def require_complete(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Refuse a task file that lacks what every run needs.

    Raises:
        ValueError: it has no modalities, labels, intensity, spacing or patch.
    """
    missing = [key for key in REQUIRED if key not in settings] if is_file(args.data) else []
    if missing:
        raise ValueError(
            f"{args.data} has no {', '.join(missing)}. Add it, or let `python -m scripts plan --data {args.data} "
            "--dataset-dir DATA --output FILE.json` propose it."
        )
