# SPDX-License-Identifier: Apache-2.0
"""``check``: a whole cohort judged by what every run would judge it by, to the end, whatever is found."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scripts.data.case_list import IncompleteError, Item, datalist
from scripts.data.modalities import GatherModalitiesd, MapLabelsd
from scripts.image_io.checks import (
    ERROR,
    LABEL,
    NOTE,
    WARNING,
    Finding,
    Rules,
    judge_constant,
    judge_headers,
    judge_voxels,
    last_axes,
)
from scripts.image_io.headers import Header
from scripts.image_io.reader import header_of, read_modality
from scripts.utils.atomic_files import write_json
from scripts.utils.process_pool import DIED, survive

EXPECTED = (ValueError, OSError)  # what a sentence for the user comes as
SHOWN = 200  # findings in the table; the JSON holds all


@dataclass(frozen=True)
class Criteria:
    """What every case is judged by.

    Attributes:
        modalities: the reference first.
        labels: per class the label's values.
        rules: what is accepted.
        naming: rules for modalities that the list does not name, see ``GatherModalitiesd``.
        allow_missing: whether absent modalities are warnings only.
        stacked: each case's ``image`` is one 4D file of all modalities.
    """

    modalities: Sequence[str]
    labels: Sequence[Sequence[float]]
    rules: Rules = field(default_factory=Rules)
    naming: Sequence[Mapping[str, str]] = ()
    allow_missing: bool = False
    stacked: bool = False

    @property
    def layers(self) -> Sequence[str]:
        """The modalities along the last axis of a file of several."""
        return self.modalities if self.stacked else ()


def check_cohort(
    name: str, root: str, criteria: Criteria, file: str = "", allow_outside: bool = False, workers: int = 2
) -> tuple[list[Finding], int]:
    """Judge every case; one volume per process is in memory at a time.

    Args:
        name, root, file, allow_outside: of the data list, see ``scripts.data.case_list.datalist``.
        criteria: what each case is judged by.
        workers: processes.

    Returns:
        What was found, and the number of cases.
    """
    found: list[Finding] = []
    try:
        cases = datalist(name, root, file, criteria.modalities, allow_outside)
    except IncompleteError as error:
        cases = error.cases
        found += [Finding(ERROR, f"{path} is missing: add it, or remove the case.") for path in error.lost]
    except EXPECTED as error:
        return [Finding(ERROR, str(error))], 0
    work = partial(judge_case, criteria=criteria)
    if cases:
        jobs = {str(case["case_id"]): case for case in cases}
        with tqdm(total=len(jobs), desc="checking", unit="case") as bar:
            one_thread: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
            judged = survive(work, jobs, workers, _dead, lambda *_: bar.update(), **one_thread)
        found += [each for findings in judged.values() for each in findings]
    return found, len(cases)


def _dead(case_id: str) -> list[Finding]:
    return [Finding(ERROR, f"Case {case_id}: {DIED}: check it alone, or on a machine with more memory.", case_id)]


def judge_case(case: Item, criteria: Criteria) -> list[Finding]:
    """One case: its files, their heads, their voxels, its label."""
    paths, found = _paths(case, criteria)
    headers: dict[str, Header] = {}
    for key, path in paths.items():
        try:
            headers[key] = header_of(path, criteria.rules)
        except EXPECTED as error:
            found.append(Finding(ERROR, str(error), key=key))
    found += judge_headers(headers, criteria.modalities[0], criteria.layers)
    for key, header in headers.items():
        if header.shape[3:] == last_axes(key, criteria.layers):
            found += _judge_volume(key, header, criteria)
    found += judge_constant(found, {key: str(path) for key, path in paths.items() if key != LABEL})
    return [each._replace(case_id=str(case["case_id"])) for each in found]


def _paths(case: Item, criteria: Criteria) -> tuple[dict[str, str], list[Finding]]:
    """The files of a case that are there, by key, and what is to be said of the others."""
    modalities = criteria.modalities
    keys = (*modalities, "image", LABEL)
    lost = {key: case[key] for key in keys if key in case and not Path(case[key]).exists()}
    first = {path: key for key, path in reversed(lost.items())}  # one file may stand for several modalities
    found = [
        Finding(ERROR, f"{path} is missing: add it, or remove the case.", key=first[path])
        for path in dict.fromkeys(lost.values())
    ]
    item: dict[Any, Any] = {key: value for key, value in case.items() if key not in lost}
    try:
        item = GatherModalitiesd(modalities, criteria.naming, allow_missing=True, stacked=criteria.stacked)(item)
    except EXPECTED as error:
        if not lost:
            return {key: item[key] for key in keys if key in item and key != "image"}, [Finding(ERROR, str(error))]
    absent = [key for key in modalities if key not in item and key not in lost]
    if absent:
        level = WARNING if criteria.allow_missing else ERROR
        found.append(Finding(level, f"{', '.join(absent)} is absent: add it, or allow it by --allow-missing."))
    return {key: item[key] for key in keys if key in item and key != "image"}, found


def _judge_volume(key: str, header: Header, criteria: Criteria) -> list[Finding]:
    """A file's voxels, which are let go again."""
    try:
        volume = read_modality(key, header, criteria.rules, criteria.layers)
        if key != LABEL:
            return judge_voxels(volume, key, criteria.rules)
        mapped = MapLabelsd(LABEL, criteria.labels)({LABEL: volume})[LABEL]
    except EXPECTED as error:
        return [Finding(ERROR, str(error), key=key)]
    return [] if mapped.any() else [Finding(NOTE, f"{header.path} is empty: no voxel is foreground", key=key)]


def check_and_tell(args: argparse.Namespace, spec: Mapping[str, Any], rules: Rules) -> None:
    """``check_cohort`` by the verb's arguments; prints the table, writes what machines read.

    Raises:
        ValueError: there are errors.
    """
    criteria = Criteria(
        spec["modalities"], spec["labels"], rules, spec.get("naming", ()), args.allow_missing, spec["stacked"]
    )
    found, cases = check_cohort(
        args.data, args.dataset_dir or "", criteria, args.data_list or "", args.allow_outside, args.workers
    )
    print(summary(found, cases))
    if args.json:
        write_findings(found, cases, args.json)
    if errors := sum(each.level == ERROR for each in found):
        raise ValueError(f"{errors} errors were found: correct the files, or leave their cases out.")


def summary(found: Sequence[Finding], cases: int) -> str:
    """The findings as a Markdown table, errors first, and their number."""
    levels = Counter(each.level for each in found)
    told = sorted((each for each in found if each.level != NOTE), key=lambda each: each.level)  # error, warning
    lines = [f"| {each.level} | {each.case_id} | {each.key} | {each.what} |" for each in told[:SHOWN]]
    head = ["| level | case | file | what |", "|---|---|---|---|"] if lines else []
    rest = [f"... and {len(told) - SHOWN} more: see --json."] if len(told) > SHOWN else []
    count = f"{cases} cases: {levels[ERROR]} errors, {levels[WARNING]} warnings, {levels[NOTE]} notes."
    return "\n".join([*head, *lines, *rest, count])


def write_findings(found: Sequence[Finding], cases: int, path: str | Path) -> None:
    """All findings, notes too, for machines."""
    levels: dict[str, Any] = dict(Counter(each.level for each in found))
    write_json({"cases": cases, "counts": levels, "findings": [each._asdict() for each in found]}, path)
