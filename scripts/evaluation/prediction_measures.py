# SPDX-License-Identifier: Apache-2.0
"""Measures of the predicted masks of an evaluation, each on its own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.evaluation.masks import MaskCoding
from scripts.evaluation.records import Case, modality_images
from scripts.image_io.checks import Rules
from scripts.image_io.mask_measures import measure_files
from scripts.metrics.lesion_measures import Row, measure_rows


def measure_prediction(
    case: Case, paths: Mapping[str, Path], coding: MaskCoding, rules: Rules, modalities: Sequence[str], pet: str | None
) -> tuple[list[Row], list[str]]:
    """The rows of a case in the table of measures.

    Args:
        case: an item of the data list.
        paths: the masks by case.
        coding: what the values of the masks mean.
        rules: which files are accepted.
        modalities: of the task.
        pet: that of them which is a PET, if there is one.

    Returns:
        The rows, none where the mask is missing or cannot be read; and sentences about what is not measured or unusual.
    """
    case_id, path = str(case["case_id"]), paths.get(str(case["case_id"]))
    if path is None:
        return [], []
    image, position = modality_images(case, modalities, rules).get(pet or "", (None, 0))
    channel = None if pet in case else position  # of a 4D file
    rules, measured = rules.of_case(case), []
    texts: list[str] = []
    try:
        measured = measure_files(path, coding.predicted_regions, image, rules, channel, texts)
    except (ValueError, OSError) as error:
        texts = [f"no uptake is measured: {error}" if image else f"it is not measured: {error}"]
    if texts and image and not measured:
        try:
            measured = measure_files(path, coding.predicted_regions, rules=rules)
        except (ValueError, OSError) as error:
            texts = [f"it is not measured: {error}"]  # because of the mask itself
    return measure_rows(case_id, measured), texts
