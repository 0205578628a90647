# SPDX-License-Identifier: Apache-2.0
"""The series of a DICOM study as a table of text: which were chosen, and why."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.image_io.dicom_study import Choice, Series

HEAD = ("as", "modality", "images", "description", "why", "series")
MAX_TEXT = 32  # characters of a description


def series_table(study: Sequence[Series], choice: Choice) -> str:
    """One line per series, the chosen ones first. Descriptions and UIDs are shown, dates and patients are not.

    Args:
        study: all image series.
        choice: by ``choose_series``.
    """
    uses = {series.uid: key for key, series in choice.series.items()}
    order = [*uses, *(series.uid for series in study if series.uid not in uses)]
    by_uid = {series.uid: series for series in study}
    rows = [HEAD]
    for series in map(by_uid.__getitem__, order):
        count, reason = str(series.slices), choice.reasons[series.uid]
        rows.append((uses.get(series.uid, "-"), series.kind, count, _plain(series.description), reason, series.uid))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _plain(text: str) -> str:
    """A text of a header in one line, without what a terminal would act on."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= MAX_TEXT else f"{words[: MAX_TEXT - 3]}..."
