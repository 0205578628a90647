# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about one or several evaluations.

The page loads nothing: its content security policy allows only data URIs, inline styles and the one script, by its
hash. The templates in ``templates/`` are rendered by jinja2 with autoescape, so that text from files is never markup.
matplotlib and Pillow are optional: without them the page says so and holds the tables only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.report.curves import curve_figures
from scripts.report.overlay import Overlay
from scripts.report.size_figure import size_figures
from scripts.report.slice_viewer import MAX_FRAMES, case_view
from scripts.report.tables import (
    case_tables,
    centre_table,
    difference_table,
    measures_tables,
    modality_table,
    summary_table,
    volume_table,
)
from scripts.utils.atomic_files import write_text

TEMPLATES = Path(__file__).parent / "templates"


class Figures(NamedTuple):
    """Figures of a section, or the package without which they cannot be drawn."""

    figures: Sequence[Any] = ()
    missing_package: str = ""


def write_report(
    path: str | Path,
    title: str,
    runs: Sequence[Mapping[str, Any]],
    overlays: Sequence[Overlay],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Mapping[str, Any],
    notes: Sequence[str] = (),
    baseline: Mapping[str, Any] | None = None,
    measures: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page; an earlier file is replaced only when the new one is complete.

    Args:
        path: the HTML file.
        title: heading of the page.
        runs: per network ``{"name", "aggregate": of metrics.aggregates, "rows"}`` and, where known, ``"parameters"``,
            ``"gflops"``, ``"seconds_per_case"``, ``"present"`` (modalities) and ``"regions"`` (name -> aggregate); rows
            may name their ``"centre"`` and ``"region"``.
        overlays: cases to draw. Without runs their volumes are listed too.
        curves: run name -> rows ``{"epoch", "loss", "loss/<term>", "val_dice"}``; missing or ``None`` values are gaps.
        manifest: the manifest of the run; shown as JSON.
        notes: sentences below the heading, for example on missing predictions.
        baseline: the run of ``runs`` that the others are compared with, if any.
        measures: rows of ``measures.csv``, of any number of cases.
    """
    write_text(render_report(title, runs, overlays, curves, manifest, notes, baseline, measures), path)


def render_report(
    title: str,
    runs: Sequence[Mapping[str, Any]],
    overlays: Sequence[Overlay],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Mapping[str, Any],
    notes: Sequence[str] = (),
    baseline: Mapping[str, Any] | None = None,
    measures: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as text; see `write_report`."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    volumes_ml = {f"{each.title}: {mask}": ml for each in overlays for mask, ml in each.volumes_ml().items()}
    before_slices = {
        "Summary": summary_table(runs) if runs else None,
        "Differences": difference_table(runs, baseline) if baseline else None,
        "By modalities": modality_table(runs),
        "By centre": centre_table(runs),
        "Volumes": volume_table(volumes_ml) if volumes_ml and not runs else None,
    }
    after_slices = [*measures_tables(measures), *case_tables(runs)]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'",
        style=style,
        script=script,
        notes=notes,
        size=_figures(lambda: size_figures(runs)),
        tables_before_slices=[(heading, table) for heading, table in before_slices.items() if table],
        cases=_figures(lambda: [case_view(overlay, f"case{i}") for i, overlay in enumerate(overlays)]),
        max_frames=MAX_FRAMES,
        region_count=max((len(overlay.regions) for overlay in overlays if overlay.has_regions), default=0),
        tables_after_slices=[(table.label, table) for table in after_slices],
        curves=_figures(lambda: curve_figures(curves)),
        definitions=list(dict.fromkeys(pair for run in runs for pair in run["aggregate"]["definitions"].items())),
        manifest=json.dumps(manifest, indent=2, default=str, ensure_ascii=False),
    )


def _figures(draw: Callable[[], Sequence[Any]]) -> Figures:
    try:
        return Figures(draw())
    except ImportError as error:
        return Figures(missing_package=str(error.name).partition(".")[0])
