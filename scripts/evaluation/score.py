# SPDX-License-Identifier: Apache-2.0
"""Score masks on disk against the reference masks; one table, one JSON and one report per evaluation."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from scripts.data.modalities import modalities_used
from scripts.evaluation.records import Case, add_centres, cases_in_manifest
from scripts.evaluation.summary_table import table
from scripts.image_io.checks import Rules
from scripts.image_io.reader import read_itk
from scripts.metrics import Row, aggregate, image_diagonal_mm, surface_metrics, write_rows
from scripts.report import write_report
from scripts.report.case_view import case_overlays, foreground, onto
from scripts.report.curves import read_curves
from scripts.utils.atomic_files import write_json
from scripts.utils.run_manifest import write_manifest

logger = logging.getLogger(__name__)


def score_case(case: Case, predictions: str, labels: Sequence[Sequence[float]], rules: Rules) -> Row:
    """Compare one mask with its reference on the reference's own grid.

    Args:
        case: an item of the data list, with ``label``.
        predictions: folder of ``<case_id>.nii.gz``, whose values are class indices.
        labels: per class the reference's values, as in the config.
        rules: what files are accepted.

    Returns:
        A row of the case table; ``status`` is ``error`` where the mask is missing or cannot be read, which counts as
        the worst value. ``problem`` says why it cannot be read.

    Raises:
        ValueError: the reference cannot be read, or one of the two holds unknown values.
    """
    label = read_itk(case["label"], rules)
    reference = foreground(label, labels, str(case["label"]))
    spacing = label.GetSpacing()[::-1]
    millilitres = float(np.prod(spacing)) / 1000
    row: Row = {
        "case_id": case["case_id"],
        "patient_id": case.get("patient_id", case["case_id"]),
        "reference_volume_ml": float(reference.sum()) * millilitres,
        "diagonal_mm": image_diagonal_mm(reference.shape, spacing),
    }
    path = Path(predictions) / f"{case['case_id']}.nii.gz"
    worst: Row = {**row, "dice": None, "hd95_mm": None, "assd_mm": None, "status": "error", "volume_ml": None}
    if not path.is_file():
        return worst
    try:
        mask = onto(read_itk(path, rules), label, sitk.sitkNearestNeighbor)
    except (ValueError, OSError) as error:
        return {**worst, "problem": str(error)}
    prediction = foreground(mask, [[i] for i in range(len(labels))], str(path))
    row["volume_ml"] = float(prediction.sum()) * millilitres
    return {**row, **surface_metrics(prediction, reference, spacing)}


def _cost(network: nn.Module | None, patch: Sequence[int], channels: int) -> dict[str, Any]:
    """Parameters and GFLOPs (2 per multiply-add) of one window; empty without a network."""
    if network is None:
        return {"parameters": None, "gflops": None}
    network = network.cpu().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, *patch))
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, "gflops": round(counter.get_total_flops() / 1e9, 2)}


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
    """Score a folder of masks: ``cases.csv``, ``summary.json`` and ``report.html`` in ``output_dir``.

    Foreground is every class but the first; several foreground classes are scored as their union.

    Args:
        name: how the report calls the network.
        cases: data list; cases without ``label`` are left out, and named.
        labels: per class the reference's values.
        predictions: folder of ``<case_id>.nii.gz``.
        output_dir: folder of the results.
        intensity: the modalities to draw, with the ranges that the network is given.
        network: whose parameters and operations are noted.
        curves: files of learning curves to draw.
        patch: window for which operations are counted, in voxels.
        seed: of the bootstrap.
        workers: processes.
        present: modalities that the network was given, by default all; others stand behind its name in the report.
        checks: what files are accepted.

    Returns:
        The summary.

    Raises:
        ValueError: an unknown modality, no case has a reference mask, a mask holds unknown values, or a reference mask
            cannot be read.
        FileNotFoundError: the folder of masks does not exist.
    """
    scored = [case for case in cases if "label" in case]
    if not scored:
        raise ValueError(f"None of the {len(cases)} cases has a reference mask, so that there is nothing to score.")
    if not Path(predictions).is_dir():
        raise FileNotFoundError(f"There is no folder of masks at {predictions}.")
    used = modalities_used(list(intensity), present)
    if len(used) < len(intensity):
        name = f"{name} ({', '.join(used)} only)"
    work = partial(score_case, predictions=predictions, labels=labels, rules=checks or Rules())
    with ProcessPoolExecutor(min(workers, len(scored))) as pool:
        rows = list(tqdm(pool.map(work, scored), total=len(scored), desc="scoring", unit="case"))
    problems = {row["case_id"]: row.pop("problem") for row in rows if "problem" in row}
    expected = {f"{case['case_id']}.nii.gz" for case in cases}
    manifest = _manifest(output_dir, cases)
    summary = {
        "name": name,
        "present": used,
        "aggregate": aggregate(rows, seed=seed),
        **_cost(network, patch, len(intensity)),
        "seconds_per_case": _seconds_per_case(manifest, scored),
        "missing": sorted(
            row["case_id"] for row in rows if row["status"] == "error" and row["case_id"] not in problems
        ),
        "unreadable": [problems[case_id] for case_id in sorted(problems)],
        "without_reference": sorted(str(case["case_id"]) for case in cases if "label" not in case),
        "extra_files": sorted(p.name for p in Path(predictions).glob("*.nii*") if p.name not in expected),
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
        case_overlays(scored, rows, predictions, intensity, labels, checks),
        {Path(path).parent.name: read_curves(path) for path in curves},
        manifest,
    )
    print(f"{table([summary])}\nreport: {Path(output_dir) / 'report.html'}")
    return summary


def _manifest(output_dir: str, cases: Sequence[Case]) -> dict[str, Any]:
    """The manifest of the inference that made the masks, or a new one where they were made elsewhere."""
    path = Path(output_dir) / "manifest.json"
    # Not one of an earlier run on other cases.
    if path.is_file() and cases_in_manifest(path) == json.loads(json.dumps(list(cases), default=str)):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return write_manifest(output_dir, list(cases))


def _seconds_per_case(manifest: Mapping[str, Any], scored: Sequence[Case]) -> float | None:
    seconds = manifest.get("wall_seconds")
    return None if seconds is None else round(float(seconds) / max(1, len(manifest["data"]) or len(scored)), 2)
