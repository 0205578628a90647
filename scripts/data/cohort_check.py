# SPDX-License-Identifier: Apache-2.0
"""Check a whole data set (verb ``check``) with the checks of every run, and list all findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.data.case_jobs import run_cases
from scripts.data.case_list import TEST, CohortError, Item, datalist, missing_file
from scripts.data.cohorts.nnunet_task import label_contradiction
from scripts.data.folds import fold_problem
from scripts.image_io.checks import (
    ERROR,
    LABEL,
    NOTE,
    WARNING,
    Finding,
    Rules,
    check_headers,
    check_suv_values,
    expected_extra_axes,
)
from scripts.image_io.grid_geometry import grids_overlap, same_grid
from scripts.image_io.headers import Header
from scripts.image_io.intensity_checks import check_all_constant, check_intensities
from scripts.image_io.reader import header_of, read_modality
from scripts.runtime.grids import box_bounds, network_grid, own_grid
from scripts.runtime.label_values import class_indices
from scripts.runtime.modalities import GatherModalities, stack_advice
from scripts.runtime.regions import class_names
from scripts.runtime.resampling import resample, vanished_classes, vanished_message
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table
from scripts.utils.process_pool import PROCESS_DIED

USER_ERRORS = (ValueError, OSError)  # raised by readers with a message for the user
NAMES_SHOWN = 5  # cases that a finding names
MAX_TABLE_ROWS = 200  # the JSON file contains all findings


@dataclass(frozen=True)
class Criteria:
    """The data set's properties that every case is checked against.

    Attributes:
        modalities: the reference first.
        labels: per class the label's values.
        rules: what is accepted of files.
        naming: rules for modalities that the list does not name, see ``GatherModalities``.
        allow_missing: whether absent modalities are only warnings.
        stacked: whether each case's ``image`` is one 4D file of all modalities.
        intensity: per modality the range that the network gets, or ``"zscore"``.
        spacing: of the network's grid in mm; None does not look for labels that vanish on it.
        classes: names of the classes.
        ignore: the label's value of voxels that count in no loss and no score.
        makes_folds: whether a training would make the folds of the patients, and not read them from a file.
        one_grid: whether the data set's format requires that all files of a case have one grid.
    """

    modalities: Sequence[str]
    labels: Sequence[Sequence[float]]
    rules: Rules = field(default_factory=Rules)
    naming: Sequence[Mapping[str, str]] = ()
    allow_missing: bool = False
    stacked: bool = False
    intensity: Mapping[str, Sequence[float] | str] = field(default_factory=dict)
    spacing: Sequence[float] | None = None
    classes: Sequence[str] | None = None
    ignore: float | None = None
    makes_folds: bool = False
    one_grid: bool = False

    @property
    def stacked_modalities(self) -> Sequence[str]:
        """The modalities along the last axis of a 4D file."""
        return self.modalities if self.stacked else ()


class CaseCheck(NamedTuple):
    """What is found in one case; the foreground classes of its label, None if no label could be read."""

    findings: list[Finding]
    classes: set[int] | None


def check_cohort(
    name: str,
    root: str,
    criteria: Criteria,
    file: str = "",
    allow_outside: bool = False,
    workers: int = 2,
    layout: Mapping[str, str] | None = None,
) -> tuple[list[Finding], int]:
    """Check every case; each process keeps one volume in memory at a time.

    Args:
        name, root, file, allow_outside, layout: of the data list, see ``scripts.data.case_list.datalist``.
        criteria: what each case is checked against.
        workers: number of processes.

    Returns:
        The findings, and the number of cases.
    """
    findings: list[Finding] = []
    is_nnunet = name == "nnunet" and not file
    try:
        if is_nnunet and (contradiction := label_contradiction(Path(root), criteria.labels, criteria.ignore)):
            findings.append(Finding(ERROR, contradiction))
        cases = datalist(name, root, file, criteria.modalities, allow_outside, layout)
    except CohortError as error:
        cases = error.cases
        findings += [Finding(ERROR, problem) for problem in error.problems]
    except USER_ERRORS as error:
        return [*findings, Finding(ERROR, str(error))], 0
    criteria = replace(criteria, one_grid=is_nnunet)
    if cases:
        results = run_cases(partial(_check_case, criteria=criteria), cases, workers, "checking", _process_died)
        findings += [finding for result in results for finding in result.findings]
        findings += _absent_classes([result.classes for result in results], criteria)
        findings += _absent_labels(cases)
        findings += _fold_findings(cases) if criteria.makes_folds else []
    return findings, len(cases)


def _fold_findings(cases: Sequence[Item]) -> list[Finding]:
    """What stands in the way of a training with folds."""
    try:
        problem = fold_problem(cases)
    except USER_ERRORS as error:
        return [Finding(ERROR, str(error))]
    return [Finding(WARNING, f"A training will be refused: {problem}")] if problem else []


def _absent_labels(cases: Sequence[Item]) -> list[Finding]:
    """A warning if cases that may train or validate have no label."""
    used = [case for case in cases if case.get("partition") != TEST]
    absent = [str(case["case_id"]) for case in used if LABEL not in case]
    if not absent:
        return []
    more = f" and {len(absent) - NAMES_SHOWN} more" if len(absent) > NAMES_SHOWN else ""
    text = f"{len(absent)} of {len(used)} cases have no label: {', '.join(absent[:NAMES_SHOWN])}{more}. A training"
    return [Finding(WARNING, f"{text} refuses them, unless it is `distill --unlabelled`", key=LABEL)]


def _absent_classes(classes: Sequence[set[int] | None], criteria: Criteria) -> list[Finding]:
    """A warning for each class that no label has; none if no label could be read."""
    read = [each for each in classes if each is not None]
    if not read:
        return []
    names = [name.removeprefix("class ") for name in class_names(criteria.labels, criteria.classes)]
    absent = set(range(1, len(names))).difference(*read)
    values = {index: ", ".join(f"{value:g}" for value in criteria.labels[index]) for index in absent}
    return [
        Finding(WARNING, f"No case has class {names[index]} (label value {values[index]}): no network can learn it")
        for index in sorted(absent)
    ]


def _process_died(case_id: str) -> CaseCheck:
    text = f"Case {case_id}: {PROCESS_DIED}. Check it alone, or on a machine with more memory."
    return CaseCheck([Finding(ERROR, text, case_id)], None)


def check_case(case: Item, criteria: Criteria) -> list[Finding]:
    """Check one case: its files, their headers, their voxels, its label."""
    return _check_case(case, criteria).findings


def _check_case(case: Item, criteria: Criteria) -> CaseCheck:
    criteria = replace(criteria, rules=criteria.rules.of_case(case))
    paths, findings = _existing_files(case, criteria)
    headers: dict[str, Header] = {}
    for key, path in paths.items():
        try:
            headers[key] = header_of(path, criteria.rules)
        except USER_ERRORS as error:
            findings.append(Finding(ERROR, str(error), key=key))
    findings += check_headers(headers, criteria.modalities[0], criteria.stacked_modalities)
    findings += check_suv_values(headers, criteria.rules)
    findings += _check_grids(headers, criteria)
    reference, classes = headers.get(criteria.modalities[0]), None
    findings += [] if reference is None else _check_box(case, reference)
    for key, header in headers.items():
        if header.shape[3:] != expected_extra_axes(key, criteria.stacked_modalities):
            continue
        if key == LABEL:
            of_label, classes = _check_label(header, criteria, reference, case.get("bbox_mm"))
            findings += of_label
        else:
            findings += _check_voxels(key, header, criteria)
    findings += check_all_constant(findings, {key: str(path) for key, path in paths.items() if key != LABEL})
    return CaseCheck([finding._replace(case_id=str(case["case_id"])) for finding in findings], classes)


def _check_box(case: Item, reference: Header) -> list[Finding]:
    """An error if the case's box lies outside its reference image."""
    try:
        own_grid({str(key): value for key, value in case.items()}, reference.affine, reference.shape)
    except USER_ERRORS as error:
        return [Finding(ERROR, str(error))]
    return []


def _check_grids(headers: Mapping[str, Header], criteria: Criteria) -> list[Finding]:
    """Warnings about a label on a grid of its own, and about images on several grids where the format forbids it."""
    reference = headers.get(criteria.modalities[0])
    if reference is None:
        return []
    findings = []
    for key, header in headers.items():
        others = [other for name, other in headers.items() if name != LABEL] if key == LABEL else [reference]
        if any(same_grid(header, other) for other in others) or not grids_overlap(reference, header):
            continue  # files that do not overlap are an error
        if key == LABEL:
            text = f"{header.path} lies on the grid of none of the case's images: it is resampled to that of"
        elif criteria.one_grid:
            text = f"{header.path} lies on another grid, which nnU-Net itself would refuse: it is resampled to that of"
        else:
            continue
        findings.append(Finding(WARNING, f"{text} {reference.path}", key=key))
    return findings


def _existing_files(case: Item, criteria: Criteria) -> tuple[dict[str, str], list[Finding]]:
    """The existing files of a case by key, and findings on the others."""
    modalities = criteria.modalities
    keys = (*modalities, "image", LABEL)
    missing = {key: case[key] for key in keys if key in case and not Path(case[key]).exists()}
    first_key = {path: key for key, path in reversed(missing.items())}  # one file may provide several modalities
    findings = [Finding(ERROR, missing_file(path), key=first_key[path]) for path in dict.fromkeys(missing.values())]
    item: dict[Any, Any] = {key: value for key, value in case.items() if key not in missing}
    try:
        item = GatherModalities(modalities, criteria.naming, allow_missing=True, stacked=criteria.stacked)(item)
    except USER_ERRORS as error:
        if not missing:
            return {key: item[key] for key in keys if key in item and key != "image"}, [Finding(ERROR, str(error))]
    absent = [key for key in modalities if key not in item and key not in missing]
    if absent:
        level = WARNING if criteria.allow_missing else ERROR
        advice = f"Add it, or allow it with --allow-missing.{stack_advice(case, modalities)}"
        findings.append(Finding(level, f"{', '.join(absent)} is absent. {advice}"))
    return {key: item[key] for key in keys if key in item and key != "image"}, findings


def _check_voxels(key: str, header: Header, criteria: Criteria) -> list[Finding]:
    """Read and check an image's voxels; the volume is released afterwards."""
    try:
        volume = read_modality(key, header, criteria.rules, criteria.stacked_modalities)
        return check_intensities(volume, header.path, key, criteria.rules, criteria.intensity.get(key))
    except USER_ERRORS as error:
        return [Finding(ERROR, str(error), key=key)]


def _check_label(
    header: Header, criteria: Criteria, reference: Header | None, box: Sequence[float] | None
) -> CaseCheck:
    """Read and check a label's voxels; the volume is released afterwards."""
    try:
        volume = read_modality(LABEL, header, criteria.rules)
        mapped = class_indices(volume, criteria.labels, header.path, criteria.ignore)
    except USER_ERRORS as error:
        return CaseCheck([Finding(ERROR, str(error), key=LABEL)], None)
    classes = {index for index in range(1, len(criteria.labels)) if (mapped == index).any()}
    if not classes:
        return CaseCheck([Finding(NOTE, f"{header.path} is empty: no voxel is foreground", key=LABEL)], classes)
    if reference is None or criteria.spacing is None:
        return CaseCheck([], classes)
    message = _vanished(header, mapped, reference, box, criteria.spacing)
    return CaseCheck([Finding(WARNING, message, key=LABEL)] if message else [], classes)


def _vanished(
    header: Header, label: NDArray, reference: Header, box: Sequence[float] | None, spacing: Sequence[float]
) -> str:
    """The warning about classes of a label that vanish on the network's grid; empty if none does."""
    affine, shape = np.array(reference.affine), reference.shape[:3]
    if box is not None:
        low, high = box_bounds(affine, shape, box)
        if (high <= low).any():
            return ""
        affine[:3, 3] += affine[:3, :3] @ low
        shape = tuple(int(n) for n in high - low)
    grid, size = network_grid(affine, shape, spacing)
    resampled = resample(label, np.linalg.solve(header.affine, grid), size, nearest=True)
    return vanished_message(header.path, vanished_classes(label, resampled), spacing)


def findings_table(findings: Sequence[Finding], cases: int) -> str:
    """Errors and warnings as a Markdown table, errors first, and the number of findings by level."""
    levels = Counter(finding.level for finding in findings)
    shown = sorted((each for each in findings if each.level != NOTE), key=lambda each: each.level)  # error < warning
    rows = [(each.level, each.case_id, each.key, each.what) for each in shown[:MAX_TABLE_ROWS]]
    table = [markdown_table(("level", "case", "file", "what"), rows)] if rows else []
    rest = [f"... and {len(shown) - MAX_TABLE_ROWS} more: see --json."] if len(shown) > MAX_TABLE_ROWS else []
    counts = f"{cases} cases: {levels[ERROR]} errors, {levels[WARNING]} warnings, {levels[NOTE]} notes."
    return "\n".join([*table, *rest, counts])


def write_findings(findings: Sequence[Finding], cases: int, path: str | Path) -> None:
    """Write all findings, including notes, as JSON."""
    levels: dict[str, Any] = dict(Counter(finding.level for finding in findings))
    write_json({"cases": cases, "counts": levels, "findings": [finding._asdict() for finding in findings]}, path)
