# SPDX-License-Identifier: Apache-2.0
"""Score masks on disk against reference masks: one case table, one summary and one report per evaluation."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from scripts.data.modalities import modalities_used
from scripts.evaluation.masks import foreground_mask, read_prediction
from scripts.evaluation.network_cost import network_cost
from scripts.evaluation.overlays import case_overlays
from scripts.evaluation.records import Case, add_centres, cases_in_manifest
from scripts.evaluation.summary_table import markdown_summary
from scripts.image_io.checks import Rules
from scripts.image_io.reader import read_itk
from scripts.metrics import Row, aggregate, image_diagonal_mm, surface_metrics, write_rows
from scripts.report import write_report
from scripts.report.curves import read_curves
from scripts.training.handlers import torch_usage
from scripts.utils.atomic_files import write_json
from scripts.utils.run_manifest import write_manifest

logger = logging.getLogger(__name__)


def score(
    name: str,
    cases: Sequence[Case],
    labels: Sequence[Sequence[float]],
    predictions: str,
    output_dir: str,
    intensity: Mapping[str, Any],
    network: nn.Module | None = None,
    curves: Sequence[str] = (),
    patch: Sequence[int] = (64, 64, 64),
    seed: int = 0,
    workers: int = 2,
    present: Sequence[str] | None = None,
    checks: Rules | None = None,
) -> dict[str, Any]:
    """Score a folder of masks and write ``cases.csv``, ``summary.json``, ``report.html`` and ``manifest.json``.

    Foreground is every class but the first; several foreground classes are scored as their union.

    Args:
        name: display name of the network in tables and reports.
        cases: data list. Cases without ``label`` are not scored; a warning names them.
        labels: per class the values of the reference masks.
        predictions: folder of ``<case_id>.nii.gz``, whose values are class indices.
        output_dir: folder of the results.
        intensity: the network's modalities, each with its intensity range; the report draws them so.
        network: its parameters and operations are counted.
        curves: paths of learning curves to draw.
        patch: size in voxels of the window for which operations are counted.
        seed: seed of the bootstrap.
        workers: number of processes.
        present: modalities that the network was given, by default all. A subset is appended to ``name``.
        checks: which files are accepted; by default all.

    Returns:
        The summary.

    Raises:
        ValueError: an unknown modality, no case with a reference mask, a mask with values that ``labels`` does not
            list, or a reference mask that cannot be read.
        FileNotFoundError: the folder of masks does not exist.
    """
    scored_cases = [case for case in cases if "label" in case]
    if not scored_cases:
        raise ValueError(f"None of the {len(cases)} cases has a reference mask. Scoring needs a `label` per case.")
    if not Path(predictions).is_dir():
        raise FileNotFoundError(f"Folder of masks not found: {predictions}. Check --predictions.")
    used = modalities_used(list(intensity), present)
    if len(used) < len(intensity):
        name = f"{name} ({', '.join(used)} only)"
    work = partial(score_case, predictions=predictions, labels=labels, rules=checks or Rules())
    with ProcessPoolExecutor(min(workers, len(scored_cases))) as pool:
        rows = list(tqdm(pool.map(work, scored_cases), total=len(scored_cases), desc="scoring", unit="case"))
    problems = {row["case_id"]: row.pop("problem") for row in rows if "problem" in row}
    expected_names = {f"{case['case_id']}.nii.gz" for case in cases}
    manifest = _manifest(output_dir, cases)
    summary = {
        "name": name,
        "present": used,
        "aggregate": aggregate(rows, seed=seed),
        **network_cost(network, patch, len(intensity)),
        "seconds_per_case": _seconds_per_case(manifest, scored_cases),
        "missing": sorted(
            row["case_id"] for row in rows if row["status"] == "error" and row["case_id"] not in problems
        ),
        "unreadable": [problems[case_id] for case_id in sorted(problems)],
        "without_reference": sorted(str(case["case_id"]) for case in cases if "label" not in case),
        "extra_files": sorted(p.name for p in Path(predictions).glob("*.nii*") if p.name not in expected_names),
        "predictions": str(predictions),
    }
    for kind in ("missing", "unreadable", "without_reference", "extra_files"):
        if summary[kind]:
            logger.warning("%s: %s", kind.replace("_", " "), ", ".join(summary[kind]))
    write_rows(rows, Path(output_dir) / "cases.csv")
    write_json(summary, Path(output_dir) / "summary.json")
    write_report(
        Path(output_dir) / "report.html",
        f"Evaluation of {name}",
        [{**summary, "rows": add_centres(rows, cases)}],
        case_overlays(scored_cases, rows, predictions, intensity, labels, checks),
        {Path(path).parent.name: read_curves(path) for path in curves},
        manifest,
    )
    print(f"{markdown_summary([summary])}\nreport: {Path(output_dir) / 'report.html'}")
    return summary


def score_case(case: Case, predictions: str, labels: Sequence[Sequence[float]], rules: Rules) -> Row:
    """Compare one mask with its reference, on the grid of the reference.

    Args:
        case: an item of the data list, with ``label``.
        predictions: folder of ``<case_id>.nii.gz``, whose values are class indices.
        labels: per class the values of the reference mask.
        rules: which files are accepted.

    Returns:
        A row of the case table. ``status`` is ``error`` where the mask is missing or cannot be read, which counts as
        the worst value; ``problem`` then says why it cannot be read.

    Raises:
        ValueError: the reference cannot be read, or one of the masks holds unknown values.
    """
    label = read_itk(case["label"], rules)
    reference = foreground_mask(label, labels, str(case["label"]))
    spacing = label.GetSpacing()[::-1]
    voxel_ml = float(np.prod(spacing)) / 1000
    row: Row = {
        "case_id": case["case_id"],
        "patient_id": case.get("patient_id", case["case_id"]),
        "reference_volume_ml": float(reference.sum()) * voxel_ml,
        "diagonal_mm": image_diagonal_mm(reference.shape, spacing),
    }
    path = Path(predictions) / f"{case['case_id']}.nii.gz"
    error_row: Row = {**row, "dice": None, "hd95_mm": None, "assd_mm": None, "status": "error", "volume_ml": None}
    if not path.is_file():
        return error_row
    try:
        mask = read_prediction(path, label, rules)
    except (ValueError, OSError) as error:
        return {**error_row, "problem": str(error)}
    prediction = foreground_mask(mask, [[i] for i in range(len(labels))], str(path))
    row["volume_ml"] = float(prediction.sum()) * voxel_ml
    return {**row, **surface_metrics(prediction, reference, spacing)}


def _manifest(output_dir: str, cases: Sequence[Case]) -> dict[str, Any]:
    """The manifest of the inference that wrote the masks; a new one where there is none for these cases."""
    path = Path(output_dir) / "manifest.json"
    # The folder may hold the manifest of an earlier run on other cases.
    if path.is_file() and cases_in_manifest(path) == json.loads(json.dumps(list(cases), default=str)):
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return manifest
    return write_manifest(output_dir, list(cases), **torch_usage())


def _seconds_per_case(manifest: Mapping[str, Any], cases: Sequence[Case]) -> float | None:
    seconds = manifest.get("wall_seconds")
    return None if seconds is None else round(float(seconds) / max(1, len(manifest["data"]) or len(cases)), 2)
