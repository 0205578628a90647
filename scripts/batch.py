# SPDX-License-Identifier: Apache-2.0
"""``segment --data-list``: a cohort, several cases at a time; what is whole is skipped, what fails is listed."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.arguments import CONFIGS
from scripts.data import Rules, datalist
from scripts.data.reading import header_of, read_volume
from scripts.files import write_json
from scripts.manifest import code_version

Segment = Callable[[argparse.Namespace], None]
DONE, SKIPPED = "segmented", "there already"


def segment_list(args: argparse.Namespace, segment: Segment, sentence: Callable[[BaseException], str]) -> None:
    """Segment every case of a table into ``args.output_dir``, and write ``segment.json``: what became of each.

    Args:
        args: of the verb, with ``data_list``, ``output_dir``, ``workers`` and ``bids``.
        segment: the verb that segments one case.
        sentence: what to say of an error.

    Raises:
        ValueError: some cases failed; every other one is segmented.
    """
    if args.dry_run:
        return
    modalities = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text(encoding="utf-8"))["modalities"]
    output = Path(args.output_dir or "runs/segment")
    cases = datalist(args.data, args.dataset_dir, args.data_list, modalities, args.allow_outside)
    masks = {case["case_id"]: output / _name(case, modalities[0], args.bids) for case in cases}
    if len(set(masks.values())) < len(masks):
        raise ValueError(f"Cases of {args.data_list} would share a name in BIDS, which knows letters and digits only.")
    if args.bids:
        _describe(output)
    todo = [case for case in cases if not is_whole(masks[case["case_id"]])]
    told = {case["case_id"]: SKIPPED for case in cases if case not in todo}
    jobs = [_arguments(args, case, modalities, masks[case["case_id"]]) for case in todo]
    told |= _run(dict(zip([case["case_id"] for case in todo], jobs, strict=True)), args.workers, segment, sentence)
    write_json(
        {"cases": {case: {"mask": str(masks[case]), "result": told[case]} for case in masks}}, output / "segment.json"
    )
    failed = [case for case in masks if told[case] not in (DONE, SKIPPED)]
    print(f"{len(masks)} cases: {sum(each == DONE for each in told.values())} segmented, "
          f"{sum(each == SKIPPED for each in told.values())} there already, {len(failed)} failed")  # fmt: skip
    if failed:
        listed = "; ".join(f"{case}: {told[case]}" for case in failed)
        raise ValueError(f"{len(failed)} of {len(masks)} cases failed ({listed}): mend them and run the command again.")


def is_whole(mask: Path) -> bool:
    """Whether a mask is there, to its last byte."""
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
    files[modalities[0]] = files[modalities[0]] or case["image"]
    return argparse.Namespace(**{**vars(args), **files, "data_list": None, "output_dir": None, "output": str(mask)})


def _one(args: argparse.Namespace, segment: Segment, sentence: Callable[[BaseException], str]) -> str:
    """In a process of the pool, which says nothing else."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            segment(args)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        return sentence(error)
    return DONE


def _run(
    jobs: dict[str, argparse.Namespace], workers: int, segment: Segment, sentence: Callable[[BaseException], str]
) -> dict[str, str]:
    """What became of each case; a process that dies takes its own case with it and no other."""
    told: dict[str, str] = {}
    spawn = multiprocessing.get_context("spawn")
    work = partial(_one, segment=segment, sentence=sentence)
    with tqdm(total=len(jobs), desc="segmenting", unit="case") as bar:
        left, at_once = list(jobs), max(1, workers)
        while left:
            with ProcessPoolExecutor(min(at_once, len(left)), mp_context=spawn) as pool:
                futures: dict[Future[str], str] = {pool.submit(work, jobs[case]): case for case in left}
                for future in as_completed(futures):
                    with contextlib.suppress(BrokenProcessPool):
                        told[futures[future]] = future.result()
                        bar.update()
            left = [case for case in left if case not in told]
            if left and at_once == 1:  # alone in the pool: the first of those left is the one that died
                told[left.pop(0)] = "its process died, perhaps for want of memory"
                bar.update()
                at_once = max(1, workers)
            else:
                at_once = 1  # one by one, to see which it is
    return told


def _name(case: dict[str, Any], reference: str, bids: bool) -> Path:
    """Where a case's mask goes, relative to the output folder."""
    if not bids:
        return Path(f"{case['case_id']}.nii.gz")
    label = re.sub(r"[^A-Za-z0-9]", "", str(case["case_id"]).removeprefix("sub-"))
    return Path(f"sub-{label}/anat/sub-{label}_space-{reference}_label-tumour_mask.nii.gz")


def _describe(output: Path) -> None:
    """The description that BIDS asks of derivatives."""
    made_by = {"Name": "multi-teacher-distillation-bundle", "Version": code_version()}
    description = {"Name": "Tumour masks, research only", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
    write_json({**description, "GeneratedBy": [made_by]}, output / "dataset_description.json")
