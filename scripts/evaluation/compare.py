# SPDX-License-Identifier: Apache-2.0
"""One report about several evaluations."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.evaluation.masks import MaskCoding
from scripts.evaluation.overlays import case_overlays
from scripts.evaluation.records import (
    Case,
    add_centres,
    evaluated_cases,
    evaluated_measures,
    masks_folder,
    read_summary,
)
from scripts.evaluation.seeds import group_seeds
from scripts.evaluation.summary_table import markdown_differences, markdown_summary
from scripts.evaluation.training_cases import training_notes
from scripts.image_io.checks import Rules
from scripts.metrics import read_rows
from scripts.report import write_report
from scripts.report.curves import curve_names, read_curves
from scripts.utils.atomic_files import write_text
from scripts.utils.run_manifest import torch_usage, write_manifest

logger = logging.getLogger(__name__)


def compare(
    evaluations: Sequence[str],
    output_dir: str,
    cases: Sequence[Case] = (),
    modalities: Sequence[str] | Mapping[str, Any] = (),
    curves: Sequence[str] = (),
    title: str = "Comparison",
    labels: Sequence[Sequence[float]] | None = None,
    checks: Rules | None = None,
    regions: Mapping[str, Sequence[float]] | None = None,
    ignore: float | None = None,
    mask_values: str = "file",
    baseline: str = "",
    average_seeds: bool = False,
    single_file: bool = False,
) -> str:
    """Write one report about several evaluations.

    It shows the cases of the evaluation with the most modalities, of several such of the first one.

    Args:
        evaluations: folders that ``score`` wrote.
        output_dir: folder of ``report.html``, ``table.md`` and ``manifest.json``.
        cases: data list, for the overlays and the centres.
        modalities: keys of the data list to draw; as a mapping also the network's intensity range of each.
        curves: paths of learning curves; each is named after its folder.
        title: heading of the page.
        labels: per class the values of the reference masks, for the overlays; by default every value but 0 is
            foreground.
        checks: which files are accepted; by default all.
        regions: see ``score``; without ``labels`` it has no effect.
        ignore: likewise.
        mask_values: likewise.
        baseline: name of the evaluation that the others are compared with, if any.
        average_seeds: average the evaluations of one name case by case, see ``group_seeds``; otherwise their folders
            tell them apart.
        single_file: write the report as one file, instead of a page and the folder ``report_files``.

    Returns:
        The summary table and that of the differences, as Markdown.

    Raises:
        FileNotFoundError: a folder holds no evaluation.
        ValueError: a file of an evaluation is damaged, an evaluation is named twice or is the output folder, or none
            has the name ``baseline``.
    """
    runs = []
    twice = [folder for folder, count in Counter(map(os.path.realpath, evaluations)).items() if count > 1]
    if twice:
        raise ValueError(f"The evaluation {twice[0]} is named twice. Keep one.")
    if os.path.realpath(output_dir) in map(os.path.realpath, evaluations):
        raise ValueError(f"{output_dir} is an evaluation, whose page would be replaced. Choose another --output-dir.")
    for folder in evaluations:
        path = Path(folder) / "summary.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} contains no summary.json. Run `python -m scripts evaluate` first.")
        summary = read_summary(path)
        rows = add_centres(read_rows(Path(folder) / "cases.csv"), [*evaluated_cases(folder), *cases])
        masks = masks_folder(folder, summary)
        if cases and not Path(masks).is_dir():
            logger.warning("%s: its masks are not at %s, so none is drawn", folder, masks)
        runs.append({**summary, "rows": rows, "folder": folder, "predictions": masks})
    if not average_seeds:
        runs = _with_own_names(runs)
    names = [str(run["name"]) for run in runs]
    if baseline and baseline not in names:
        raise ValueError(f"No evaluation is named {baseline}. Choose one of {', '.join(names)} as --baseline.")
    if average_seeds:
        runs, names = group_seeds(runs), list(dict.fromkeys(names))
    scored_cases = [case for case in cases if "label" in case]
    intensity = modalities if isinstance(modalities, Mapping) else dict.fromkeys(modalities, "")
    shown = max(runs, key=lambda run: len(run.get("present") or intensity))
    coding = MaskCoding(labels, regions, ignore, mask_values) if labels else None
    reference = runs[names.index(baseline)] if baseline else None
    drawn = shown.get("drawn", shown)  # whose masks are drawn and measured
    named = {"network": drawn["name"]} if len(runs) > 1 or drawn is not shown else {}
    table = "\n\n".join([markdown_summary(runs), *([markdown_differences(runs, reference)] if reference else [])])
    write_report(
        Path(output_dir) / "report.html",
        title,
        runs,
        case_overlays(scored_cases, drawn, intensity, coding, checks) if scored_cases else [],
        {name: read_curves(path) for name, path in curve_names(curves).items()},
        write_manifest(output_dir, list(cases), **torch_usage()),
        training_notes(runs),
        reference,
        single_file,
        [{**named, **row} for row in evaluated_measures(shown["folder"])],
    )
    write_text(table + "\n", Path(output_dir) / "table.md")
    return table


def _with_own_names(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations, with the folder behind a name that several of them have."""
    count = Counter(run["name"] for run in runs)
    return [{**run, "name": f"{run['name']} ({run['folder']})"} if count[run["name"]] > 1 else run for run in runs]
