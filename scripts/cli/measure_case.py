# SPDX-License-Identifier: Apache-2.0
"""Measure the mask of a case that a verb has segmented."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.cli.options import image_rules

if TYPE_CHECKING:
    from scripts.metrics.lesion_measures import Measures

SUFFIX = ".measures.csv"


def measure_case(mask: Path, images: Mapping[str, str], stacked: bool, config: Mapping[str, Any]) -> list[Measures]:
    """The measures of every region and lesion of a mask, with the uptake where the task has a PET and the case too.

    Args:
        mask: the .nii.gz.
        images: path per modality.
        stacked: whether the paths are one 4D file of all modalities, in order.
        config: the merged config.

    Raises:
        ValueError: the PET cannot be read.
    """
    from scripts.image_io.dicom_rules import pet_modality
    from scripts.image_io.mask_measures import measure_files
    from scripts.runtime.regions import region_mask_values

    regions = region_mask_values(*(config[key] for key in ("labels", "classes", "regions", "mask_values")))
    pet = pet_modality(config["modalities"], config["dicom"])
    channel = config["modalities"].index(pet) if stacked and pet else None
    return measure_files(mask, regions, images.get(pet or ""), image_rules(dict(config)), channel)


def write_case_measures(case_id: str, path: Path, measured: list[Measures]) -> list[dict[str, Any]]:
    """Write the table of one case and return its rows."""
    from scripts.metrics.lesion_measures import measure_rows, write_measures

    rows = measure_rows(case_id, measured)
    write_measures(rows, path)
    print(f"measures: {path}")
    return rows


def join_measures(tables: Mapping[str, Path], path: Path) -> None:
    """Write the rows of the tables of several cases as one table.

    Args:
        tables: by case; the rows get the id of the case.
        path: the table to write.

    Raises:
        ValueError: a table is damaged.
    """
    from scripts.metrics.lesion_measures import read_measures, write_measures

    rows = [{**row, "case_id": case_id} for case_id, table in tables.items() for row in read_measures(table)]
    write_measures(rows, path)
