# SPDX-License-Identifier: Apache-2.0
"""The cases of an evaluation that its report shows, with the outlines of both masks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813

from scripts.evaluation.mask_files import find_masks
from scripts.evaluation.masks import MaskCoding, predicted_classes, read_on_grid, reference_classes
from scripts.evaluation.records import modality_images
from scripts.image_io.checks import Rules
from scripts.image_io.reader import read_itk
from scripts.metrics import Row
from scripts.report.case_images import load_overlay
from scripts.report.overlay import Overlay
from scripts.report.tables import network_name


def mean_dice(rows: Sequence[Row]) -> dict[str, float]:
    """The mean Dice of each case over its regions; cases without a defined Dice are left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.get("dice") is not None:
            values.setdefault(str(row["case_id"]), []).append(row["dice"])
    return {case_id: statistics.fmean(each) for case_id, each in values.items()}


def worst_first(rows: Sequence[Row]) -> list[str]:
    """The scored cases by their Dice, which is the mean over regions, the lowest first.

    Equal values are ordered by case id. Cases without a defined Dice, where both masks are empty, come last; cases with
    the status ``error`` are left out.
    """
    scored = [row for row in rows if row["status"] != "error"]
    dice = mean_dice(scored)
    case_ids = {str(row["case_id"]) for row in scored}
    return sorted(case_ids, key=lambda case_id: (case_id not in dice, dice.get(case_id, 0), case_id))


def case_overlays(
    cases: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    intensity: Mapping[str, Any],
    coding: MaskCoding | None = None,
    rules: Rules | None = None,
) -> Iterator[Overlay]:
    """Overlays of all scored cases, the worst first, on the grid of the reference mask; each is read when it is needed.

    Args:
        cases: data list, with ``label``; cases that it does not list are left out.
        run: summary of the evaluation with its case table as ``rows``. Cases without a mask in its folder
            ``predictions`` are left out.
        intensity: the modalities to draw, each with its intensity range.
        coding: what the values of the masks mean; by default every value but 0 is foreground.
        rules: which files are accepted; by default all.
    """
    cases_by_id, rules = {str(case["case_id"]): case for case in cases}, rules or Rules()
    rows, predictions = run["rows"], run["predictions"]
    given = run.get("present") or list(intensity)
    # The modalities are known if the network is, or if `--present` named them.
    known = run.get("parameters") is not None or len(given) < len(intensity)
    names = ", ".join(key.upper() for key in given)
    source = f"{network_name({**run, 'present': given})}{f', given {names}' if known else ''}"
    paths = find_masks(predictions, cases_by_id).paths if Path(predictions).is_dir() else {}
    dice = mean_dice(rows)
    for case_id in worst_first(rows):
        if case_id not in paths or case_id not in cases_by_id:
            continue
        case, path = cases_by_id[case_id], paths[case_id]
        label = read_itk(case["label"], rules)
        mask = read_on_grid(path, label, rules, coding.predicted_background if coding else 0)
        if coding:
            reference, ignored = reference_classes(label, coding, str(case["label"]))
            prediction = predicted_classes(mask, coding, str(path), ignored)
        else:
            reference, prediction = (sitk.GetArrayFromImage(image) > 0 for image in (label, mask))
        regions = coding.region_classes if coding else {}
        images = modality_images(case, list(intensity), rules)
        overlay = load_overlay(
            case_id, images, label, prediction, reference, intensity, rules.of_case(case), source, given, regions
        )
        yield replace(overlay, dice=dice.get(case_id), mask_path=path)
