# SPDX-License-Identifier: Apache-2.0
"""``segment --data-list``: a cohort, several cases at a time; what is whole is skipped, what fails is listed."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from scripts import bundle_root
from scripts.cli.options import CONFIGS, MODALITIES
from scripts.data import Rules, datalist
from scripts.data.bids import bids_name, describe, describe_mask
from scripts.image_io.reader import header_of, read_volume
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.process_pool import DIED, survive

Segment = Callable[[argparse.Namespace], None]
DONE, SKIPPED = "segmented", "there already"
RECORD = "segment.json"
KEPT = 10_000  # warnings of one case


def refuse_options(args: argparse.Namespace) -> None:
    """ValueError for options that are of one case."""
    given = [key for key in ("output", "stacked", "profile", *MODALITIES) if getattr(args, key)]
    if given:
        raise ValueError(f"--{', --'.join(given)} are of one case: leave them out beside --data-list.")


class Outcome(NamedTuple):
    """What became of a case, and what was warned of meanwhile."""

    result: str
    warnings: tuple[str, ...] = ()


def segment_list(args: argparse.Namespace, segment: Segment, sentence: Callable[[BaseException], str]) -> None:
    """Segment every case of a table into ``args.output_dir``, and write ``segment.json``: what became of each.

    Args:
        args: of the verb, with ``data_list``, ``output_dir``, ``workers`` and ``bids``.
        segment: the verb that segments one case; a function that processes of a pool can import.
        sentence: what to say of an error; such a function, too.

    Raises:
        ValueError: options that are of one case; masks of other weights lie there; a mask would take an image's place;
            or some cases failed, and every other one is segmented.
    """
    modalities = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text(encoding="utf-8"))["modalities"]
    output = Path(args.output_dir or "runs/segment")
    cases = datalist(args.data, args.dataset_dir, args.data_list, modalities, args.allow_outside)
    masks = _masks(args, cases, modalities, output)
    weights = sha256(args.weights or Path(bundle_root()) / "models" / "model.pt")
    _refuse_other_weights(output / RECORD, weights)
    if args.bids:
        describe(output)
    todo = [case for case in cases if not _is_done(masks[case["case_id"]], args.report)]
    told = {case["case_id"]: Outcome(SKIPPED) for case in cases if case not in todo}
    jobs = {case["case_id"]: _arguments(args, case, modalities, masks[case["case_id"]]) for case in todo}
    work = partial(_one, segment=segment, sentence=sentence)
    spawn = multiprocessing.get_context("spawn")
    try:
        with tqdm(total=len(jobs), desc="segmenting", unit="case") as bar:

            def done(case: str, outcome: Outcome) -> None:
                told[case] = outcome
                bar.update()

            survive(work, jobs, args.workers, lambda _: Outcome(DIED), done, mp_context=spawn)
    finally:
        record = {case: {"mask": str(masks[case]), **told[case]._asdict()} for case in masks if case in told}
        write_json({"weights_sha256": weights, "cases": record}, output / RECORD)
    if args.bids:
        for case in cases:
            describe_mask(masks[case["case_id"]], case, modalities)
    _tell({case: told[case] for case in masks})


def _masks(
    args: argparse.Namespace, cases: Sequence[dict[str, Any]], modalities: Sequence[str], output: Path
) -> dict[str, Path]:
    """Where each case's mask goes; ValueError where two would share a place, or one takes an image's."""
    masks = {case["case_id"]: output / (bids_name(case, modalities) if args.bids else f"{case['case_id']}.nii.gz")
             for case in cases}  # fmt: skip
    if len(set(masks.values())) < len(masks):
        raise ValueError(f"Cases of {args.data_list} would share a name in BIDS, which knows letters and digits only.")
    images = {Path(value).resolve() for case in cases for value in case.values() if isinstance(value, str)}
    for case, mask in masks.items():
        if mask.resolve() in images:
            raise ValueError(f"The mask of {case} would take the place of {mask}: name another --output-dir.")
    return masks


def _refuse_other_weights(record: Path, weights: str) -> None:
    try:
        before = json.loads(record.read_text(encoding="utf-8"))["weights_sha256"]
    except (OSError, ValueError, TypeError, KeyError):  # none, or a damaged one
        return
    if before != weights:
        raise ValueError(
            f"{record.parent} holds masks of other weights (sha256 {str(before)[:12]}, now {weights[:12]}): name "
            "another --output-dir."
        )


def _is_done(mask: Path, report: bool) -> bool:
    """Whether a mask is there, to its last byte, with its report where one is wanted."""
    if report and not mask.with_name(f"{mask.name.removesuffix('.nii.gz')}.report.html").is_file():
        return False
    try:
        read_volume(header_of(mask, Rules()), Rules())
    except (OSError, ValueError):
        return False
    return True


def _arguments(
    args: argparse.Namespace, case: dict[str, Any], modalities: Sequence[str], mask: Path
) -> argparse.Namespace:
    """The verb's arguments for one case."""
    files = {key: case.get(key) for key in modalities}
    if case["image"] not in files.values():  # else it is another modality, which stands in for an absent reference
        files[modalities[0]] = case["image"]
    own = {**files, "data_list": None, "output_dir": None, "bids": False, "output": str(mask)}
    return argparse.Namespace(**{**vars(args), **own})


def _one(args: argparse.Namespace, segment: Segment, sentence: Callable[[BaseException], str]) -> Outcome:
    """In a process of the pool, which prints nothing."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    kept = BufferingHandler(KEPT)
    kept.setLevel(logging.WARNING)
    logging.getLogger("scripts").addHandler(kept)
    logging.getLogger("scripts").propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            segment(args)
        result = DONE
    except Exception as error:  # whatever it is, the other cases go on
        result = sentence(error)
    finally:
        logging.getLogger("scripts").removeHandler(kept)
    return Outcome(result, tuple(record.getMessage() for record in kept.buffer))


def _tell(told: dict[str, Outcome]) -> None:
    """Print what is to be known; ValueError where cases failed."""
    for case, outcome in told.items():
        for line in outcome.warnings:
            print(f"{case}: {line}")
    results = [outcome.result for outcome in told.values()]
    failed = {case: outcome.result for case, outcome in told.items() if outcome.result not in (DONE, SKIPPED)}
    print(f"{len(told)} cases: {results.count(DONE)} segmented, {results.count(SKIPPED)} there already, "
          f"{len(failed)} failed")  # fmt: skip
    if failed:
        listed = "; ".join(f"{case}: {result}" for case, result in failed.items())
        raise ValueError(f"{len(failed)} of {len(told)} cases failed ({listed}): mend them and run the command again.")
