# SPDX-License-Identifier: Apache-2.0
"""Segment by the exported files of the weights, without PyTorch and MONAI.

``monai.bundle run`` gives the same mask, but needs about ten seconds to load MONAI. ``obstacle`` says when it must run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from scripts.cli.bundle_run import command_line, protected
from scripts.cli.config import SEPARATOR, Config
from scripts.cli.options import image_rules, parse_set
from scripts.cli.trained_task import names_network, weights_path
from scripts.utils.atomic_files import write_json
from scripts.utils.cpus import usable_cpus
from scripts.utils.errors import error_sentence, root_error
from scripts.utils.task_file import read_task

logger = logging.getLogger(__name__)

# The config ids that a run without MONAI reads, or that change nothing there.
READ = {
    *("modalities", "intensity", "spacing", "labels", "classes", "regions", "ignore", "head", "mask_values", "patch"),
    *("overlap", "whole_volume", "memory_gib", "present", "naming", "allow_missing", "stacked", "checks", "threads"),
    *("weights", "engine", "engine_precision", "ignore_task", "cohort", "layout", "codes", "dicom", "dataset_dir"),
    *("data_list", "allow_outside", "seed"),
}


def obstacle(args: argparse.Namespace, config: Config) -> str:
    """Why ``monai.bundle run`` must segment; empty if the exported files can.

    Args:
        args: parsed options of ``segment`` or ``dicom``.
        config: the merged configs with all overrides.

    Raises:
        UnavailableError: an engine that was asked for is not available.
    """
    from scripts.runtime.engines import UnavailableError

    reason = asked_for(args, config)
    if reason:
        return reason
    task = read_task(weights_path(args))
    if task is None or not isinstance(task.get("network"), dict):
        return "no record of the training lies beside the weights"
    try:
        with loaded_meanwhile("scripts.runtime.segmenter"):
            exported_engine(args, config)
    except UnavailableError as error:
        if config["engine"] != "auto" or config["engine_precision"] == "int8":
            raise
        return str(error)
    return ""


def asked_for(args: argparse.Namespace, config: Config) -> str:
    """The option that needs ``monai.bundle run``; empty if there is none."""
    if config["engine"] == "torch":
        return "--engine torch"
    if args.device and args.device != "cpu":
        return f"--device {args.device}"
    for option in ("profile", "verbose", "dry_run"):
        if vars(args).get(option):
            return f"--{option.replace('_', '-')}"
    if names_network(args, {}):
        return "a network of its own"
    return unread_setting(args, READ)


def unread_setting(args: argparse.Namespace, known: Collection[str]) -> str:
    """The first ``--set`` that only ``monai.bundle run`` can follow: another id than ``known``, or an expression."""
    for key, value in parse_set(args.set).items():
        if key.partition(SEPARATOR)[0] not in known or _is_expression(value):
            return f"--set {key}"
    return ""


def _is_expression(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_expression, value.values()))
    if isinstance(value, list):
        return any(map(_is_expression, value))
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def exported_engine(args: argparse.Namespace, config: Config) -> tuple[Any, dict[str, Any]]:
    """The engine that runs the exported files of the weights, and the record of the export.

    Raises:
        UnavailableError: it is not available, or differs from PyTorch.
    """
    from scripts.utils.checksums import sha256

    weights = weights_path(args)
    checksum = sha256(weights) if weights.is_file() else ""
    return _engine(weights, checksum, config["engine"], config["engine_precision"], _threads(config))


@functools.lru_cache(maxsize=1)
def _engine(weights: Path, checksum: str, engine: str, precision: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """``exported_engine``, kept for the next case with the same weights."""
    from scripts.runtime import exported_files

    exported_files.check_names(engine, precision)
    record, folder = exported_files.read_export(weights), exported_files.export_folder(weights)
    advice = f"Export again with: {exported_files.export_command(weights)}"
    name = "openvino" if engine == "auto" else engine
    selected, _ = exported_files.exported_engine(folder, record, name, precision, advice, threads)
    exported_files.check_probe(selected, folder, record, advice)
    return selected, record


@contextmanager
def loaded_meanwhile(*modules: str) -> Iterator[None]:
    """Import modules while the block runs, most of which is not Python; the imports have ended when the block ends."""

    def load() -> None:
        for module in modules:
            importlib.import_module(module)

    loading = Thread(target=load)
    loading.start()
    try:
        yield
    finally:
        loading.join()


def _threads(config: Config) -> int:
    return config["threads"] or int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())


def segment_exported(
    args: argparse.Namespace, configs: list[str], config: Config, overrides: Mapping[str, Any], mask: Path
) -> None:
    """Segment one case and write the mask and its manifest, as ``run_bundle`` would.

    Args:
        args: parsed options.
        configs: of the run, for the manifest.
        config: the merged configs with all overrides; its ``datalist`` holds the case.
        overrides: those of the verb, for the manifest.
        mask: the file to write.

    Raises:
        ValueError: a setting contradicts the weights, or a file is refused.
        OSError: a file is missing.
    """
    from scripts.data.case_list import require_cases
    from scripts.runtime.exported_files import export_folder
    from scripts.runtime.segmenter import Settings, segment_item
    from scripts.utils.checksums import verified_sha256
    from scripts.utils.output_lock import hold
    from scripts.utils.run_manifest import described_run, write_manifest

    began = time.perf_counter()
    weights = weights_path(args)
    require_trained_settings(args, config)
    verified_sha256(weights)
    engine, record = exported_engine(args, config)
    taken = {key: config[key] for key in Settings.__dataclass_fields__ if key in config}
    rest = {"threads": _threads(config), "rules": image_rules(config), "divisor": record["divisor"]}
    settings = Settings(**{**taken, **rest})
    with hold(mask):
        require_cases(
            config["datalist"],
            config["dataset_dir"],
            config["modalities"],
            config["naming"],
            config["allow_missing"],
            config["reference"],
            config["present"],
            config["stacked"],
        )
        stage_seconds = segment_item(config["datalist"][0], settings, lambda: engine, mask)
        run_config = {**config, "exported_files": str(export_folder(weights)), "stage_seconds": stage_seconds}
        with described_run(command_line(configs, protected(overrides)), run_config):
            seconds = time.perf_counter() - began
            write_manifest(mask.parent, config["datalist"], None, seconds, config["manifest_name"], settings.threads)
    print(f"engine: {engine.description}, from {export_folder(weights)}, without loading MONAI")


def check_config(config: Config) -> None:
    """Refuse wrong settings, as the id ``settings_check`` of the configs does; see ``check_settings`` for errors."""
    from scripts.data.settings_check import check_settings

    check_settings(**{key: config[key] for key in config["settings_check"] if key != "_target_" and key in config})


def require_trained_settings(args: argparse.Namespace, config: Config) -> None:
    """Refuse wrong settings, and settings that contradict the record beside the weights.

    Raises:
        ValueError: there are such settings.
    """
    from scripts.runtime.regions import sigmoid_regions
    from scripts.runtime.task_record import COMPARED, require_same_settings

    check_config(config)
    regions = sigmoid_regions(config["labels"], config["head"], config["classes"], config["regions"])
    compared = {key: regions if key == "sigmoid_regions" else config[key] for key in COMPARED}
    weights = weights_path(args)
    require_same_settings(weights, read_task(weights) or {}, compared, config["ignore_task"])


def export_once(args: argparse.Namespace, config: Config) -> None:
    """Export weights for OpenVINO if that has not been done: the first `segment` does it, so that the next are fast.

    Nothing happens where OpenVINO is not installed, the folder cannot be written, or an option needs
    ``monai.bundle run`` in any case. Weights that are refused are marked, so that it is not tried again.
    """
    from scripts.runtime.exported_files import RECORD, export_folder, is_exported

    weights = weights_path(args)
    if args.no_export or config["engine"] != "auto" or config["engine_precision"] == "int8":
        return
    if asked_for(args, config):
        return
    if not (weights.is_file() and read_task(weights) and os.access(weights.parent, os.W_OK)):
        return
    if importlib.util.find_spec("openvino") is None or is_exported(weights):
        return
    from scripts.cli.export import run
    from scripts.utils.checksums import sha256

    print(f"Exporting {weights} for OpenVINO: once, for all later runs (about half a minute).", flush=True)
    of_weights = dict.fromkeys(("precisions", "fold", "output_dir", "dataset_dir", "data_list", "scale", "data"))
    try:
        run(argparse.Namespace(**{**vars(args), **of_weights, "formats": ["openvino"], "runtime": None, "set": []}))
    except (ValueError, RuntimeError) as error:  # one precision was refused, or all; MONAI wraps errors
        logger.warning("%s", error_sentence(error))
        if isinstance(root_error(error), ValueError) and not is_exported(weights):  # else it may work the next time
            record = {"weights_sha256": sha256(weights), "models": {}, "refused": error_sentence(error)}
            write_json(record, export_folder(weights) / RECORD)
