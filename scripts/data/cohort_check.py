# SPDX-License-Identifier: Apache-2.0
"""Check a whole data set (verb ``check``) with the checks of every run, and list all findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.data.case_jobs import run_cases
from scripts.data.case_list import IncompleteError, Item, datalist
from scripts.data.modalities import GatherModalitiesd, MapLabelsd, box_bounds
from scripts.data.resampling import network_grid, resample, vanished_classes, vanished_message
from scripts.image_io.checks import (
    ERROR,
    LABEL,
    NOTE,
    WARNING,
    Finding,
    Rules,
    check_all_constant,
    check_headers,
    check_intensities,
    expected_extra_axes,
)
from scripts.image_io.headers import Header
from scripts.image_io.reader import header_of, read_modality
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table
from scripts.utils.process_pool import PROCESS_DIED

USER_ERRORS = (ValueError, OSError)  # raised by readers with a message for the user
MAX_TABLE_ROWS = 200  # the JSON file contains all findings


@dataclass(frozen=True)
class Criteria:
    """The data set's properties that every case is checked against.

    Attributes:
        modalities: the reference first.
        labels: per class the label's values.
        rules: what is accepted of files.
        naming: rules for modalities that the list does not name, see ``GatherModalitiesd``.
        allow_missing: whether absent modalities are only warnings.
        stacked: whether each case's ``image`` is one 4D file of all modalities.
        intensity: per modality the range that the network gets, or ``"zscore"``.
        spacing: of the network's grid in mm; None does not look for labels that vanish on it.
    """

    modalities: Sequence[str]
    labels: Sequence[Sequence[float]]
    rules: Rules = field(default_factory=Rules)
    naming: Sequence[Mapping[str, str]] = ()
    allow_missing: bool = False
    stacked: bool = False
    intensity: Mapping[str, Sequence[float] | str] = field(default_factory=dict)
    spacing: Sequence[float] | None = None

    @property
    def stacked_modalities(self) -> Sequence[str]:
        """The modalities along the last axis of a 4D file."""
        return self.modalities if self.stacked else ()


def check_cohort(
    name: str, root: str, criteria: Criteria, file: str = "", allow_outside: bool = False, workers: int = 2
) -> tuple[list[Finding], int]:
    """Check every case; each process keeps one volume in memory at a time.

    Args:
        name, root, file, allow_outside: of the data list, see ``scripts.data.case_list.datalist``.
        criteria: what each case is checked against.
        workers: number of processes.

    Returns:
        The findings, and the number of cases.
    """
    findings: list[Finding] = []
    try:
        cases = datalist(name, root, file, criteria.modalities, allow_outside)
    except IncompleteError as error:
        cases = error.cases
        findings += [Finding(ERROR, _missing_file(path)) for path in error.missing_paths]
    except USER_ERRORS as error:
        return [Finding(ERROR, str(error))], 0
    if cases:
        work = partial(check_case, criteria=criteria)
        results = run_cases(work, cases, workers, "checking", _process_died)
        findings += [finding for case_findings in results for finding in case_findings]
    return findings, len(cases)


def _missing_file(path: object) -> str:
    return f"{path} is missing. Add it, or remove the case."


def _process_died(case_id: str) -> list[Finding]:
    text = f"Case {case_id}: {PROCESS_DIED}. Check it alone, or on a machine with more memory."
    return [Finding(ERROR, text, case_id)]


def check_case(case: Item, criteria: Criteria) -> list[Finding]:
    """Check one case: its files, their headers, their voxels, its label."""
    paths, findings = _existing_files(case, criteria)
    headers: dict[str, Header] = {}
    for key, path in paths.items():
        try:
            headers[key] = header_of(path, criteria.rules)
        except USER_ERRORS as error:
            findings.append(Finding(ERROR, str(error), key=key))
    findings += check_headers(headers, criteria.modalities[0], criteria.stacked_modalities)
    for key, header in headers.items():
        if header.shape[3:] == expected_extra_axes(key, criteria.stacked_modalities):
            findings += _check_voxels(key, header, criteria, headers.get(criteria.modalities[0]), case.get("bbox_mm"))
    findings += check_all_constant(findings, {key: str(path) for key, path in paths.items() if key != LABEL})
    return [finding._replace(case_id=str(case["case_id"])) for finding in findings]


def _existing_files(case: Item, criteria: Criteria) -> tuple[dict[str, str], list[Finding]]:
    """The existing files of a case by key, and findings on the others."""
    modalities = criteria.modalities
    keys = (*modalities, "image", LABEL)
    missing = {key: case[key] for key in keys if key in case and not Path(case[key]).exists()}
    first_key = {path: key for key, path in reversed(missing.items())}  # one file may provide several modalities
    findings = [Finding(ERROR, _missing_file(path), key=first_key[path]) for path in dict.fromkeys(missing.values())]
    item: dict[Any, Any] = {key: value for key, value in case.items() if key not in missing}
    try:
        item = GatherModalitiesd(modalities, criteria.naming, allow_missing=True, stacked=criteria.stacked)(item)
    except USER_ERRORS as error:
        if not missing:
            return {key: item[key] for key in keys if key in item and key != "image"}, [Finding(ERROR, str(error))]
    absent = [key for key in modalities if key not in item and key not in missing]
    if absent:
        level = WARNING if criteria.allow_missing else ERROR
        findings.append(Finding(level, f"{', '.join(absent)} is absent. Add it, or allow it with --allow-missing."))
    return {key: item[key] for key in keys if key in item and key != "image"}, findings


def _check_voxels(
    key: str, header: Header, criteria: Criteria, reference: Header | None, box: Sequence[float] | None
) -> list[Finding]:
    """Read and check a file's voxels; the volume is released afterwards."""
    try:
        volume = read_modality(key, header, criteria.rules, criteria.stacked_modalities)
        if key != LABEL:
            return check_intensities(volume, key, criteria.rules, criteria.intensity.get(key))
        mapped = MapLabelsd(LABEL, criteria.labels)({LABEL: volume})[LABEL].as_tensor()
    except USER_ERRORS as error:
        return [Finding(ERROR, str(error), key=key)]
    if not mapped.any():
        return [Finding(NOTE, f"{header.path} is empty: no voxel is foreground", key=key)]
    if reference is None or criteria.spacing is None:
        return []
    message = _vanished(header, mapped[0], reference, box, criteria.spacing)
    return [Finding(WARNING, message, key=key)] if message else []


def _vanished(
    header: Header, label: torch.Tensor, reference: Header, box: Sequence[float] | None, spacing: Sequence[float]
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
