# SPDX-License-Identifier: Apache-2.0
"""Score masks on disk against reference masks: one case table, one summary and one report per evaluation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from scripts.evaluation.mask_files import MaskFiles, find_masks, no_masks_message
from scripts.evaluation.masks import MaskCoding, predicted_classes, read_on_grid, reference_classes
from scripts.evaluation.overlays import case_overlays
from scripts.evaluation.prediction_measures import measure_prediction
from scripts.evaluation.records import Case, add_centres, cases_in_manifest
from scripts.evaluation.summary_table import markdown_summary
from scripts.evaluation.training_cases import trained_on, training_notes, training_summary
from scripts.image_io.checks import ERROR, LABEL, NOTE, WARNING, Finding, Rules, check_headers
from scripts.image_io.dicom_rules import pet_modality
from scripts.image_io.mask_checks import check_mask
from scripts.image_io.reader import header_of, read_itk
from scripts.metrics import Row, aggregate, aggregate_regions, image_diagonal_mm, region_metrics, write_rows
from scripts.metrics.lesion_measures import write_measures
from scripts.report import write_report
from scripts.report.curves import curve_names, read_curves
from scripts.runtime.modalities import modalities_used
from scripts.utils.atomic_files import write_json
from scripts.utils.process_pool import end_with_parent
from scripts.utils.run_manifest import torch_usage, write_manifest

if TYPE_CHECKING:
    from torch import nn

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
    weights: str | None = None,
    regions: Mapping[str, Sequence[float]] | None = None,
    ignore: float | None = None,
    mask_values: str = "file",
    dicom: Mapping[str, Any] | None = None,
    single_file: bool = False,
    modalities: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score a folder of masks.

    Writes ``cases.csv``, ``measures.csv``, ``summary.json``, ``report.html`` and ``manifest.json``.

    Every region of every case is scored: the table has a row for each.

    Args:
        name: display name of the network in tables and reports.
        cases: data list. Cases without ``label`` are not scored; a warning names them.
        labels: per class the values of the reference masks.
        predictions: folder of ``<case_id>.nii.gz`` (or .nii, .mha, .nrrd).
        output_dir: folder of the results.
        intensity: the network's modalities, each with its intensity range; the report draws them so.
        network: its parameters and operations are counted.
        curves: paths of learning curves to draw.
        patch: size in voxels of the window for which operations are counted.
        seed: seed of the bootstrap.
        workers: number of processes.
        present: modalities that the network was given, by default all. A subset is appended to ``name``.
        checks: which files are accepted; by default all.
        weights: file of the network's weights. The record beside it tells which cases trained them.
        regions: name -> values of the reference masks; by default one region for each foreground class.
        ignore: value of the reference masks whose voxels count as background in both masks.
        mask_values: what the masks hold: ``"file"``, values in ``labels``, or ``"index"``, class indices.
        dicom: rules of the modalities, which tell the PET where none is called so.
        single_file: write the report as one file, instead of a page and the folder ``report_files``.
        modalities: those of ``intensity`` that the network has; by default all.

    Returns:
        The summary.

    Raises:
        ValueError: an unknown modality, no case with a reference mask, a reference mask that cannot be read or has
            values that ``labels`` does not list, several masks of one case, no mask at all, or (after everything is
            written) no mask that can be scored.
        FileNotFoundError: the folder of masks does not exist.
    """
    if not cases:
        raise ValueError("No cases to score. Name the folder of the data set with --dataset-dir (--dataset_dir).")
    scored_cases = [case for case in cases if "label" in case]
    if not scored_cases:
        raise ValueError(f"None of the {len(cases)} cases has a reference mask. Scoring needs a `label` per case.")
    if not Path(predictions).is_dir():
        raise FileNotFoundError(f"Folder of masks not found: {predictions}. Check --predictions.")
    intensity = {key: intensity[key] for key in (intensity if modalities is None else modalities)}  # in their order
    used = modalities_used(list(intensity), present)
    if len(used) < len(intensity):
        name = f"{name} ({', '.join(used)} only)"
    case_ids = [str(case["case_id"]) for case in scored_cases]
    masks = find_masks(predictions, [str(case["case_id"]) for case in cases])
    if not masks.paths.keys() & set(case_ids):
        raise ValueError(no_masks_message(predictions, masks, case_ids))
    trained, trained_unknown = trained_on(weights, scored_cases)
    pet = pet_modality(list(intensity), dicom or {})
    coding = MaskCoding(labels, regions, ignore, mask_values)
    work = partial(score_case, paths=masks.paths, coding=coding, rules=checks or Rules())
    with ProcessPoolExecutor(min(workers, len(scored_cases)), initializer=end_with_parent) as pool:
        results = list(tqdm(pool.map(work, scored_cases), total=len(scored_cases), desc="scoring", unit="case"))
        scorable = [case for case, (_, problem, _) in zip(scored_cases, results, strict=True) if not problem]
        measure = partial(measure_prediction, **work.keywords, modalities=list(intensity), pet=pet)
        measured = list(pool.map(measure, scorable))
    rows = [row for case_rows, _, _ in results for row in case_rows]
    by_case = dict(zip(case_ids, results, strict=True))
    problems = {case_id: problem for case_id, (_, problem, _) in by_case.items() if problem}
    findings = {case_id: case_findings for case_id, (_, _, case_findings) in by_case.items()}
    missing = [case_id for case_id in case_ids if case_id not in masks.paths]
    texts = {case_id: _case_texts(case_id, masks, problems.get(case_id), findings[case_id]) for case_id in case_ids}
    for row in rows:
        row["trained_on"] = trained[str(row["case_id"])]
        row["findings"] = "; ".join(text.rstrip(".") for text in texts[str(row["case_id"])])
    manifest = _manifest(output_dir, predictions, cases)
    summary = {
        "name": name,
        "present": used,
        "aggregate": aggregate(rows, seed=seed),
        "regions": aggregate_regions(rows, seed=seed),
        "trained_on": training_summary(rows, seed),
        **_cost(network, patch, len(intensity)),
        "seconds_per_case": _seconds_per_case(manifest, scored_cases),
        "missing": sorted(missing),
        "unreadable": [problems[case_id] for case_id in sorted(problems)],
        "without_reference": sorted(str(case["case_id"]) for case in cases if "label" not in case),
        "extra_files": masks.extra,
        "findings": {case_id: texts[case_id] for case_id in sorted(texts) if texts[case_id]},
        "predictions": _relative(predictions, output_dir),
    }
    notes = training_notes([summary])
    _log_warnings(summary, findings, [*masks.hints.values(), *notes])
    if trained_unknown:
        logger.info("%s", trained_unknown)
    for case, (_, unmeasured) in zip(scorable, measured, strict=True):
        for text in unmeasured:
            logger.warning("%s: %s", case["case_id"], text)
    measures = [row for case_rows, _ in measured for row in case_rows]
    write_measures(measures, Path(output_dir) / "measures.csv")
    write_rows(rows, Path(output_dir) / "cases.csv")
    write_json(summary, Path(output_dir) / "summary.json")
    run = {**summary, "rows": add_centres(rows, cases), "predictions": predictions}
    write_report(
        Path(output_dir) / "report.html",
        f"Evaluation of {name}",
        [run],
        case_overlays(scored_cases, run, intensity, coding, checks),
        {curve: read_curves(path) for curve, path in curve_names(curves).items()},
        manifest,
        notes,
        single_file=single_file,
        measures=measures,
    )
    print(f"{markdown_summary([summary])}\nreport: {Path(output_dir) / 'report.html'}")
    if len(problems) + len(missing) == len(case_ids):
        raise ValueError(f"None of the {len(case_ids)} masks could be scored. {next(iter(problems.values()))}")
    return summary


def _cost(network: nn.Module | None, patch: Sequence[int], channels: int) -> dict[str, Any]:
    """``network_cost``, for which PyTorch is loaded; unknown without a network."""
    if network is None:
        return {"parameters": None, "gflops": None}
    from scripts.evaluation.network_cost import network_cost

    return network_cost(network, patch, channels)


def score_case(
    case: Case, paths: Mapping[str, Path], coding: MaskCoding, rules: Rules
) -> tuple[list[Row], str, list[Finding]]:
    """Compare one mask with its reference, on the grid of the reference.

    Args:
        case: an item of the data list, with ``label``.
        paths: the masks by case.
        coding: what the values of both masks mean.
        rules: which files are accepted.

    Returns:
        A row of the case table for each region, the reason why the mask cannot be scored (else empty), and what is
        unusual about both masks. ``status`` is ``error`` where the mask is missing or cannot be scored, which counts as
        the worst value.

    Raises:
        ValueError: the reference cannot be read or contains unknown values.
    """
    header, label = header_of(case["label"], rules), read_itk(case["label"], rules)
    findings = check_headers({LABEL: header}, LABEL)
    reference, ignored = reference_classes(label, coding, str(case["label"]))
    spacing, regions = label.GetSpacing()[::-1], coding.region_classes
    rows: list[Row] = [
        {
            "case_id": case["case_id"],
            "patient_id": case.get("patient_id", case["case_id"]),
            "region": region,
            "reference_volume_ml": volume_ml,
            "diagonal_mm": image_diagonal_mm(reference.shape, spacing),
        }
        for region, volume_ml in _volumes_ml(reference, regions, spacing).items()
    ]
    unknown: Row = {"dice": None, "hd95_mm": None, "assd_mm": None, "status": "error", "volume_ml": None}
    error_rows = [{**row, **unknown} for row in rows]
    path, background = paths.get(str(case["case_id"])), coding.predicted_background
    if path is None:
        return error_rows, "", findings
    try:
        findings = check_mask(header, header_of(path, rules))
        errors = [finding.what for finding in findings if finding.level == ERROR]
        if errors:
            return error_rows, " ".join(errors), [finding for finding in findings if finding.level == WARNING]
        mask = read_on_grid(path, label, rules, background)
        prediction = predicted_classes(mask, coding, str(path), ignored)
    except (ValueError, OSError) as error:
        return error_rows, str(error), findings
    metrics, volumes = (
        region_metrics(prediction, reference, regions, spacing),
        _volumes_ml(prediction, regions, spacing),
    )
    rows = [{**row, "volume_ml": volumes[row["region"]], **metrics[row["region"]]} for row in rows]
    return rows, "", findings


def _volumes_ml(
    classes: np.ndarray, regions: Mapping[str, Sequence[int]], spacing: Sequence[float]
) -> dict[str, float]:
    """The volume of each region of a mask of class indices."""
    used = {index for members in regions.values() for index in members}
    voxels = {index: int(np.count_nonzero(classes == index)) for index in used}
    voxel_ml = float(np.prod(spacing)) / 1000
    return {region: sum(voxels[index] for index in members) * voxel_ml for region, members in regions.items()}


def _case_texts(case_id: str, masks: MaskFiles, problem: str | None, findings: Sequence[Finding]) -> list[str]:
    """Everything that is said about a case, the reason of its failure first."""
    failures = [] if case_id in masks.paths else ["no mask was found", masks.hints.get(case_id)]
    return [*filter(None, [*failures, problem]), *(finding.what for finding in findings)]


def _log_warnings(summary: Mapping[str, Any], findings: Mapping[str, Sequence[Finding]], texts: Sequence[str]) -> None:
    """Log the lists of the summary, these texts, all warnings, and the number of masks on another grid."""
    for kind in ("missing", "without_reference", "extra_files"):
        if summary[kind]:
            logger.warning("%s: %s", kind.replace("_", " "), ", ".join(summary[kind]))
    for problem in summary["unreadable"]:
        logger.warning("unreadable: %s", problem)
    warnings = [finding.what for each in findings.values() for finding in each if finding.level == WARNING]
    for text in dict.fromkeys([*texts, *warnings]):
        logger.warning("%s", text)
    resampled = sum(any(finding.level == NOTE for finding in each) for each in findings.values())
    if resampled:
        logger.info("%d masks were resampled to the grid of their reference; cases.csv lists them", resampled)


def _manifest(output_dir: str, predictions: str, cases: Sequence[Case]) -> dict[str, Any]:
    """The manifest of the inference that wrote the masks; a new one where there is none for these masks."""
    path = Path(output_dir) / "manifest.json"
    # The folder may hold the manifest of an earlier run, with other masks or on other cases.
    own = Path(predictions).resolve().parent == Path(output_dir).resolve()
    if own and path.is_file() and cases_in_manifest(path) == json.loads(json.dumps(list(cases), default=str)):
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return manifest
    return write_manifest(output_dir, list(cases), **torch_usage())


def _relative(path: str, folder: str) -> str:
    """A path as seen from a folder, so that both may be moved together; as it is where no such path exists."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return os.path.abspath(path)


def _seconds_per_case(manifest: Mapping[str, Any], cases: Sequence[Case]) -> float | None:
    seconds = manifest.get("wall_seconds")
    return None if seconds is None else round(float(seconds) / max(1, len(manifest["data"]) or len(cases)), 2)
