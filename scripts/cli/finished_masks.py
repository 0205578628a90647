# SPDX-License-Identifier: Apache-2.0
"""What an earlier run of several cases left in its folder, and whether this run would have made the same masks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.cli.config import SEPARATOR
from scripts.cli.options import parse_set
from scripts.image_io.checks import Rules
from scripts.image_io.reader import header_of, read_volume
from scripts.image_io.suv_values import checked_suv_values
from scripts.runtime.task_record import value_differences
from scripts.utils.atomic_files import write_json
from scripts.utils.json_files import read_object

SUFFIX, MANIFEST = ".nii.gz", ".manifest.json"
# Settings that decide about a mask, besides the weights.
DECISIVE = (
    *("modalities", "intensity", "spacing", "patch", "overlap", "whole_volume", "labels", "classes", "regions", "head"),
    *("mask_values", "present", "allow_missing", "checks", "engine_precision"),
)
# Of these, settings that only decide whether a case is accepted. A mask that is there needed none of them.
ACCEPTING = ("allow_missing", "max_voxels", "replace_nonfinite", "voxel_size")
# Ids that change no mask, or whose effect is compared by itself.
HARMLESS = {*DECISIVE, "weights", "cohort", "layout", "dataset_dir", "data_list", "allow_outside", "threads", "seed"}
HARMLESS |= {"engine", "device", "ignore_task", "splits_file", "fold", "naming"}
REPLACED = "set"  # in the record: the other ids that --set replaces; up to 0.14.0 it does not say


def decisive_settings(args: argparse.Namespace, config: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """The settings of a run that decide about its masks: ``DECISIVE``, others by name, and what ``--set`` replaces.

    Args:
        args: parsed options.
        config: the merged configs with all overrides.
        others: further ids.
    """
    replaced = {key.removeprefix("+").partition(SEPARATOR)[0] for key in parse_set(args.set)} - HARMLESS
    if not config.get("whole_volume"):  # only then it decides how a volume is divided
        replaced -= {"memory_gib"}
    settings = {key: config[key] for key in (*DECISIVE, *others) if key in config}
    return {**settings, REPLACED: {key: config[key] for key in sorted(replaced) if key in config}}


def start_record(record: Path, masks: Iterable[Path], checksum: str, settings: Mapping[str, Any]) -> None:
    """Write what makes the masks of a folder, before the first of them: a run may be killed at any time.

    Args:
        record: its file.
        masks: files that the run is going to write.
        checksum: sha256 of the weights.
        settings: that decide about the masks.

    Raises:
        ValueError: the folder holds masks of other weights or settings, or masks without a record. To accept more than
            before is no other setting, such as cases with missing modalities.
    """
    earlier = read_record(record)
    there = [mask for mask in masks if mask.is_file()]
    if there and "weights_sha256" not in earlier:
        raise ValueError(
            f"{record.parent} holds {there[0].name}, but no {record.name} that says which weights made it. Remove the "
            "masks, or choose another --output-dir."
        )
    now = {"weights_sha256": checksum, "settings": json.loads(json.dumps(settings, default=str))}
    if there or any(record.parent.rglob(f"*{MANIFEST}")):  # or masks of cases that this run does not have
        _refuse_another_maker(record.parent, earlier, now)
    write_json({**earlier, **now}, record)


def _refuse_another_maker(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    checksum, made_by = now["weights_sha256"], earlier.get("weights_sha256", now["weights_sha256"])
    if made_by != checksum:
        raise ValueError(
            f"{folder} holds masks of other weights (sha256 {str(made_by)[:12]}, now {checksum[:12]}). Choose another "
            "--output-dir."
        )
    settings = now["settings"]
    before = _with_accepting(earlier.get("settings", settings), settings)
    if isinstance(before.get("checks"), dict) and isinstance(settings.get("checks"), dict):
        before["checks"] = _with_accepting(before["checks"], settings["checks"])
    before.setdefault(REPLACED, settings.get(REPLACED))
    keys = dict.fromkeys([*before, *settings])
    others = [each for key in keys for each in value_differences(key, before.get(key), settings.get(key))]
    if others:
        raise ValueError(
            f"{folder} holds masks of other settings: {'; '.join(others)}. Use the same settings, or choose another "
            "--output-dir."
        )


def _with_accepting(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of before, with those of ``ACCEPTING`` that were off and are on now; a limit may be any."""
    added = {
        key: now[key]
        for key in ACCEPTING
        if not _is_off(now.get(key)) and (key == "max_voxels" or _is_off(before.get(key)))
    }
    return {**before, **added}


def _is_off(value: Any) -> bool:
    return value is None or value is False  # 0 is a value for NaN


def read_record(record: Path) -> dict[str, Any]:
    """The record of a folder; empty if there is none, or a damaged one."""
    try:
        return read_object(record)
    except (OSError, ValueError):
        return {}


def add_to_record(record: Path, more: Mapping[str, Any]) -> None:
    """Write further entries into the record of a folder."""
    write_json({**read_record(record), **more}, record)


def beside(mask: Path, suffix: str) -> Path:
    """The file of a mask that has its name and another suffix."""
    return mask.with_name(f"{mask.name.removesuffix(SUFFIX)}{suffix}")


def is_of_mask(path: Path, mask: Path) -> bool:
    """Whether a file that is made of a mask exists, and is not of an earlier one."""
    return path.is_file() and mask.is_file() and path.stat().st_mtime >= mask.stat().st_mtime


def is_complete(mask: Path) -> bool:
    """Whether the whole mask can be read."""
    if not mask.is_file():
        return False
    try:
        read_volume(header_of(mask, Rules()), Rules())
    except (OSError, ValueError):
        return False
    return True


def has_images(
    mask: Path, images: Mapping[str, str], modalities: Iterable[str], box: Sequence[float] | None = None
) -> bool:
    """Whether the manifest beside a mask names these images, and none of them is newer than the mask.

    Args:
        mask: its file.
        images: modality -> file, or folder of DICOM files.
        modalities: of the task.
        box: the part of the reference image that the mask covers.
    """
    cases = read_record(beside(mask, MANIFEST)).get("data")
    case = cases[0] if isinstance(cases, list) and cases and isinstance(cases[0], dict) else {}
    now = {key: Path(path).absolute() for key, path in images.items()}
    named = {key: Path(str(case[key])).absolute() for key in modalities if key in case}
    same = now == named and [*(case.get("bbox_mm") or ())] == [*(box or ())]
    return same and mask.is_file() and not any(_last_change(path) > mask.stat().st_mtime for path in now.values())


def _last_change(path: Path) -> float:
    """When a file was written, or the last file of a folder; 0 where there is none."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def has_suv_values(mask: Path, values: Mapping[str, Any]) -> bool:
    """Whether the manifest beside a mask names these values for SUV, see ``scripts.image_io.suv_values``."""
    config = read_record(beside(mask, MANIFEST)).get("config")
    checks = config.get("checks") if isinstance(config, dict) else None
    named = checks.get("suv") if isinstance(checks, dict) else None
    try:
        return checked_suv_values(named or {}) == checked_suv_values(values)
    except (ValueError, AttributeError):
        return False
