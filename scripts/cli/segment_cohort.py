# SPDX-License-Identifier: Apache-2.0
"""Segment the cases of a table or data set, several at a time: finished masks are skipped, failed cases are listed."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import multiprocessing
import os
import warnings
from collections.abc import Mapping, Sequence
from logging.handlers import BufferingHandler
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from scripts.cli import exported_run
from scripts.cli.bundle_run import build_item, resolved_config, run_bundle
from scripts.cli.config import Config
from scripts.cli.finished_masks import (
    SUFFIX,
    add_to_record,
    beside,
    decisive_settings,
    has_images,
    has_suv_values,
    is_complete,
    is_of_mask,
    read_record,
    start_record,
)
from scripts.cli.measure_case import SUFFIX as MEASURES
from scripts.cli.measure_case import join_measures
from scripts.cli.options import context_configs, engine_overrides, profile_configs
from scripts.cli.segment_case import REPORT, refuse_other_folder, segment_case
from scripts.cli.student_options import network_overrides
from scripts.cli.trained_task import weights_path, with_trained_settings, with_trained_task
from scripts.data.bids import BidsTask, bids_name, bids_task, describe_mask, image_sources, write_dataset_files
from scripts.data.case_list import datalist
from scripts.image_io.checks import LABEL
from scripts.runtime.exported_files import is_exported
from scripts.runtime.memory_check import SharedMemoryError, share_memory
from scripts.runtime.suv_options import refuse_values_of_one_patient
from scripts.utils.checksums import sha256
from scripts.utils.cpus import usable_cpus
from scripts.utils.errors import error_sentence, root_error
from scripts.utils.output_lock import hold
from scripts.utils.process_pool import PROCESS_DIED, run_jobs

SEGMENTED, SKIPPED = "segmented", "already there"
ALONE = "needs more than its share of the memory"
RECORD = "segment.json"  # in the output folder: what made the masks, and what became of each case
# Modules that the processes of the pool share: of a run with exported files, and of monai.bundle.
MEASURES_MODULE = "scripts.image_io.mask_measures"
RUNTIME = ["scripts.cli.segment_case", "scripts.runtime.segmenter", "scripts.data.settings_check", MEASURES_MODULE]
BUNDLE = ["monai.bundle", "scripts.data.pipelines", "scripts.inference.engine_choice", "scripts.training.handlers"]
EXPORTED_WORKERS = 2  # by default: one reads and writes while the network of the other runs
MAX_WARNINGS = 10_000  # kept per case


class Outcome(NamedTuple):
    """The result of a case (``SEGMENTED``, ``SKIPPED`` or an error) and the warnings that were logged."""

    result: str
    warnings: tuple[str, ...] = ()


def segment_cohort(args: argparse.Namespace) -> None:
    """Segment the cases of ``args.data_list`` or ``args.dataset_dir``; write ``segment.json`` and ``measures.csv``.

    Raises:
        ValueError: an option works with one case only; the folder contains masks of other weights; a mask would
            overwrite an image; or some cases failed (all others are segmented).
    """
    _refuse_options_of_one_case(args)
    configs = ["inference", *context_configs(args), *profile_configs(args)]
    weights = {"weights": args.weights} if args.weights else {}
    overrides = with_trained_settings(args, configs, weights | network_overrides(args))
    if args.dry_run:  # the same masks, one after the other in one process
        # As for one case, an image that the list does not name is not looked for.
        dry: dict[str, Any] = with_trained_task(args, configs, overrides) | {"naming": []}
        run_bundle(args, configs, engine_overrides(args) | dry)
        return
    config = resolved_config(args, configs, engine_overrides(args) | overrides)
    exported_run.export_once(args, config)
    _start_server(BUNDLE if exported_run.asked_for(args, config) or not is_exported(weights_path(args)) else RUNTIME)
    reason = exported_run.obstacle(args, config)
    if reason:
        build_item(args, configs, with_trained_task(args, configs, overrides), "same_task")  # once, not per case
    else:
        exported_run.require_trained_settings(args, config)
    args.workers = args.workers or (1 if reason else min(EXPORTED_WORKERS, usable_cpus()))
    modalities = config["modalities"]
    output = Path(args.output_dir or "runs/segment")
    unread = LABEL if args.bids else None  # masks of an earlier run may fit its pattern
    layout = {key: pattern for key, pattern in config["layout"].items() if key != unread}
    cases = datalist(
        config["cohort"], args.dataset_dir, config["data_list"], modalities, config["allow_outside"], layout
    )
    bids = bids_task(config) if args.bids else None
    masks = _mask_paths(args, cases, modalities, output, bids)
    settings = decisive_settings(args, config)
    with hold(output):  # a second batch, or the resume of a running one, is refused
        start_record(output / RECORD, masks.values(), sha256(weights_path(args)), settings)
        _segment_cases(args, cases, masks, config, output, bids)


def _segment_cases(
    args: argparse.Namespace,
    cases: Sequence[dict[str, Any]],
    masks: Mapping[str, Path],
    config: Config,
    output: Path,
    bids: BidsTask | None,
) -> None:
    """Segment the cases that have no mask, and write the record."""
    modalities = config["modalities"]
    sources = image_sources(cases, modalities) if bids else {}
    if bids:
        write_dataset_files(output, bids, sources)
    remaining = [case for case in cases if not _is_done(masks[case["case_id"]], case, config, args)]
    outcomes = {case["case_id"]: Outcome(SKIPPED) for case in cases if case not in remaining}
    largest_first = sorted(remaining, key=_image_bytes, reverse=True)  # so that no process ends long after the others
    jobs = {case["case_id"]: _case_options(args, case, modalities, masks[case["case_id"]]) for case in largest_first}
    try:
        with exported_run.loaded_meanwhile(*([] if args.no_measures else [MEASURES_MODULE])):
            _run_jobs(jobs, args.workers, outcomes)
            large = [case_id for case_id in jobs if case_id in outcomes and outcomes[case_id].result == ALONE]
            if large:
                alone = {case_id: argparse.Namespace(**{**vars(jobs[case_id]), "workers": 1}) for case_id in large}
                _run_jobs(alone, 1, outcomes)
    finally:
        _record_outcomes(output / RECORD, masks, outcomes)
    done = [case_id for case_id, outcome in outcomes.items() if outcome.result in (SEGMENTED, SKIPPED)]
    if args.no_measures:
        (output / "measures.csv").unlink(missing_ok=True)  # of earlier masks
    else:
        tables = {case_id: beside(mask, MEASURES) for case_id, mask in masks.items() if case_id in done}
        join_measures(tables, output / "measures.csv")
    if bids:
        for case in (case for case in cases if case["case_id"] in done):
            describe_mask(masks[case["case_id"]], case, modalities, bids, sources)
    report_outcomes({case_id: outcomes[case_id] for case_id in masks})


def _record_outcomes(record: Path, masks: Mapping[str, Path], outcomes: Mapping[str, Outcome]) -> None:
    """Add the outcomes to the record of the folder; a case that is already there keeps its warnings."""
    cases = read_record(record).get("cases")
    cases = dict(cases) if isinstance(cases, dict) else {}
    for case_id, mask in masks.items():
        if case_id in outcomes:
            result, warned = outcomes[case_id]
            warned = cases.get(case_id, {}).get("warnings", ()) if result == SKIPPED else warned
            cases[case_id] = {"mask": str(mask), "result": result, "warnings": warned}
    add_to_record(record, {"cases": cases})


def _refuse_options_of_one_case(args: argparse.Namespace) -> None:
    used = [key for key in ("output", "stacked", "profile", "image") if getattr(args, key)]
    if used:
        several = "--data-list" if args.data_list else "--dataset-dir"
        names = [f"--{key}" for key in used if key != "image"] + [f"--{key}" for key, _ in args.image or ()]
        raise ValueError(f"{', '.join(names)} name one case, and {several} several. Remove one or the other.")
    refuse_values_of_one_patient(args, "--data-list")
    refuse_other_folder(args)


def _mask_paths(
    args: argparse.Namespace,
    cases: Sequence[Mapping[str, Any]],
    modalities: Sequence[str],
    output: Path,
    bids: BidsTask | None,
) -> dict[str, Path]:
    """The mask of each case; ValueError where two would share a path, or one is the path of an image."""
    masks = {}
    for case in cases:
        name = bids_name(case, modalities, bids) if bids else f"{case['case_id']}{SUFFIX}"
        masks[case["case_id"]] = output / name
    cases_of: dict[Path, list[str]] = {}
    for case_id, mask in masks.items():
        cases_of.setdefault(mask, []).append(case_id)
    for mask, names in cases_of.items():
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} get the same BIDS name, {mask.name}, which holds only letters and digits. "
                "Rename one of them."
            )
    images = {Path(value).resolve() for case in cases for value in case.values() if isinstance(value, str)}
    for case_id, mask in masks.items():
        if mask.resolve() in images:
            raise ValueError(f"The mask of {case_id} would overwrite the image {mask}. Choose another --output-dir.")
    return masks


def _is_done(mask: Path, case: Mapping[str, Any], config: Config, args: argparse.Namespace) -> bool:
    """Whether the whole mask can be read, was made of the case as it is now, and what is wanted beside it exists."""
    wanted = [*([REPORT] if args.report else []), *([] if args.no_measures else [MEASURES])]
    if not all(is_of_mask(beside(mask, suffix), mask) for suffix in wanted):
        return False
    modalities, suv = config["modalities"], {**(config["checks"].get("suv") or {}), **case.get("suv", {})}
    same_images = has_images(mask, _images(case, modalities), modalities, case.get("bbox_mm"))
    same_case = same_images and has_suv_values(mask, suv)
    return same_case and is_complete(mask)


def _images(case: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, str]:
    """The image of each modality of a case."""
    images = {key: case[key] for key in modalities if key in case}
    # Else another modality stands in for a missing reference.
    if modalities[0] not in images and case["image"] not in images.values():
        images[modalities[0]] = case["image"]
    return images


def _image_bytes(case: Mapping[str, Any]) -> int:
    """Size of the reference image's file; 0 for a folder."""
    path = Path(case["image"])
    return path.stat().st_size if path.is_file() else 0


def _case_options(
    args: argparse.Namespace, case: Mapping[str, Any], modalities: Sequence[str], mask: Path
) -> argparse.Namespace:
    """The options of ``segment`` for one case."""
    threads = args.threads or (max(1, usable_cpus() // args.workers) if args.workers > 1 else None)
    of_cohort = {"data_list": None, "output_dir": None, "bids": False, "no_export": True, "threads": threads}
    own = {
        **of_cohort,
        "output": str(mask),
        "image": [(key, os.path.abspath(path)) for key, path in _images(case, modalities).items()],
        "bbox_mm": case.get("bbox_mm"),
    }
    return argparse.Namespace(**{**vars(args), **own, **case.get("suv", {})})


def _start_server(preloaded: list[str]) -> None:
    """Start the process from which those of the pool are forked; it imports the modules, once for all of them."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    forkserver.ensure_running()


def _run_jobs(jobs: Mapping[str, argparse.Namespace], workers: int, outcomes: dict[str, Outcome]) -> None:
    """Segment the cases in a pool of processes and add the outcome of each to ``outcomes``."""
    context = multiprocessing.get_context("forkserver")
    with tqdm(total=len(jobs), desc="segmenting", unit="case") as bar:

        def add_outcome(case_id: str, outcome: Outcome) -> None:
            outcomes[case_id] = outcome
            bar.update()

        run_jobs(segment_quietly, jobs, workers, lambda _: Outcome(PROCESS_DIED), add_outcome, mp_context=context)


def segment_quietly(args: argparse.Namespace) -> Outcome:
    """Segment one case in a process of the pool; print nothing, and keep its warnings and its error.

    The result is ``ALONE`` where the case would fit into all of the memory, but not into the part of one process.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    logger = logging.getLogger("scripts")
    messages = BufferingHandler(MAX_WARNINGS)
    messages.setLevel(logging.WARNING)
    logger.addHandler(messages)
    logger.propagate = False
    share_memory(args.workers)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            segment_case(args)
        result = SEGMENTED
    except Exception as error:  # the other cases go on
        result = ALONE if isinstance(root_error(error), SharedMemoryError) else error_sentence(error)
    finally:
        logger.removeHandler(messages)
    return Outcome(result, tuple(record.getMessage() for record in messages.buffer))


def report_outcomes(outcomes: Mapping[str, Outcome], what: str = "cases") -> None:
    """Print the warnings and the counts.

    Raises:
        ValueError: cases failed.
    """
    for case_id, outcome in outcomes.items():
        for message in outcome.warnings:
            print(f"{case_id}: {message}")
    results = [outcome.result for outcome in outcomes.values()]
    failed = {key: outcome.result for key, outcome in outcomes.items() if outcome.result not in (SEGMENTED, SKIPPED)}
    print(
        f"{len(outcomes)} {what}: {results.count(SEGMENTED)} segmented, {results.count(SKIPPED)} already there, "
        f"{len(failed)} failed"
    )
    if failed:
        listed = "; ".join(f"{case_id}: {result}" for case_id, result in failed.items())
        raise ValueError(
            f"{len(failed)} of {len(outcomes)} {what} failed. Correct them and run the command again. {listed}"
        )
