# SPDX-License-Identifier: Apache-2.0
"""One report of several evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.evaluation.records import Case, add_centres, evaluated_cases, read_summary
from scripts.evaluation.summary_table import table
from scripts.metrics import read_rows
from scripts.report import write_report
from scripts.report.case_view import case_overlays
from scripts.report.curves import read_curves
from scripts.utils.atomic_files import write_text
from scripts.utils.run_manifest import write_manifest


def compare(
    evaluations: Sequence[str],
    output_dir: str,
    cases: Sequence[Case] = (),
    modalities: Sequence[str] | Mapping[str, Any] = (),
    curves: Sequence[str] = (),
    title: str = "Comparison",
    labels: Sequence[Sequence[float]] | None = None,
) -> str:
    """One report of several evaluations, with overlays of the last one's best, median and worst cases.

    Args:
        evaluations: folders that ``score`` wrote.
        output_dir: folder of ``report.html`` and ``table.md``.
        cases: data list, for the overlays.
        modalities: keys of the data list to draw, and where known the ranges that the network is given.
        curves: files of learning curves, named after their folders.
        title: head of the page.
        labels: per class the reference's values, for the overlays; by default all but 0 are foreground.

    Returns:
        The table, as Markdown.

    Raises:
        FileNotFoundError: a folder holds no evaluation.
        ValueError: a file there is not an evaluation's.
    """
    runs = []
    for folder in evaluations:
        summary = Path(folder) / "summary.json"
        if not summary.is_file():
            raise FileNotFoundError(f"{folder} holds no summary.json: run `python -m scripts evaluate` first.")
        known = read_summary(summary)
        rows = add_centres(read_rows(Path(folder) / "cases.csv"), [*evaluated_cases(folder), *cases])
        runs.append({**known, "rows": rows})
    scored = [case for case in cases if "label" in case]
    last = runs[-1]
    ranges = modalities if isinstance(modalities, Mapping) else dict.fromkeys(modalities, "")
    text = table(runs)
    write_report(
        Path(output_dir) / "report.html",
        title,
        runs,
        case_overlays(scored, last["rows"], last["predictions"], ranges, labels) if scored else [],
        {Path(path).parent.name: read_curves(path) for path in curves},
        write_manifest(output_dir, list(cases)),
    )
    write_text(text + "\n", Path(output_dir) / "table.md")
    return text
