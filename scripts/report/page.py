# SPDX-License-Identifier: Apache-2.0
"""One HTML page about one or several evaluations.

The page makes no request to a network: its content security policy allows data URIs, inline styles, the page's own
script by its hash, and what that script loads from the folder beside the page. The templates in ``templates/`` are
rendered by jinja2 with autoescape, so that text from files is never markup. matplotlib and Pillow are optional: without
them the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.report.case_view import CaseView, case_view
from scripts.report.curves import curve_figures
from scripts.report.differences import RULE
from scripts.report.overlay import Overlay
from scripts.report.page_parts import PageParts, script_hash
from scripts.report.size_figure import size_figures
from scripts.report.slice_viewer import MAX_FRAMES
from scripts.report.tables import (
    case_tables,
    centre_table,
    difference_table,
    measures_tables,
    modality_table,
    summary_table,
    volume_table,
)
from scripts.report.volume_agreement import HEIGHT, WIDTH, agreements
from scripts.report.volume_payload import viewer_library
from scripts.utils.atomic_files import write_text

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("tables.js", "stills.js", "viewer.js", "review.js", "cases.js")


class Figures(NamedTuple):
    """Figures of a section, or the package without which they cannot be drawn."""

    figures: Sequence[Any] = ()
    missing_package: str = ""


class CaseEntry(NamedTuple):
    """A case in the list of cases, the worst first."""

    id: str
    name: str
    dice: str
    reason: str
    detail: str
    tolerance_mm: float | None
    volumes_ml: Mapping[str, float]
    mask: str
    mask_sha256: str


def write_report(
    path: str | Path,
    title: str,
    runs: Sequence[Mapping[str, Any]],
    overlays: Iterable[Overlay],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Mapping[str, Any],
    notes: Sequence[str] = (),
    baseline: Mapping[str, Any] | None = None,
    single_file: bool = False,
    measures: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page; an earlier one is replaced only when the new one is complete.

    Args:
        path: the HTML file. The cases lie in ``<path without suffix>_files`` beside it.
        title: heading of the page.
        runs: per network ``{"name", "aggregate": of metrics.aggregates, "rows"}`` and, where known, ``"parameters"``,
            ``"gflops"``, ``"seconds_per_case"``, ``"present"`` (modalities) and ``"regions"`` (name -> aggregate); rows
            may name their ``"centre"`` and ``"region"``.
        overlays: cases to draw, in the order of the list; each is drawn before the next one is read. Without runs their
            volumes are listed too.
        curves: run name -> rows ``{"epoch", "loss", "loss/<term>", "val_dice"}``; missing or ``None`` values are gaps.
        manifest: the manifest of the run; shown as JSON.
        notes: sentences below the heading, for example on missing predictions.
        baseline: the run of ``runs`` that the others are compared with, if any.
        single_file: write the cases into the page instead of the folder.
        measures: rows of ``measures.csv``, shown with their case, or in tables if it is not drawn.
    """
    path = Path(path)
    parts = PageParts(None if single_file else path)
    text = _render(parts, path.stem, title, runs, overlays, curves, manifest, notes, baseline, measures)
    write_text(text, path)
    PageParts(path).remove_old_files() if single_file else parts.remove_old_files()


def render_report(
    title: str,
    runs: Sequence[Mapping[str, Any]],
    overlays: Iterable[Overlay],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Mapping[str, Any],
    notes: Sequence[str] = (),
    baseline: Mapping[str, Any] | None = None,
    measures: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page with its cases as one text; see `write_report`."""
    return _render(PageParts(None), "report", title, runs, overlays, curves, manifest, notes, baseline, measures)


def _render(
    parts: PageParts,
    stem: str,
    title: str,
    runs: Sequence[Mapping[str, Any]],
    overlays: Iterable[Overlay],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Mapping[str, Any],
    notes: Sequence[str],
    baseline: Mapping[str, Any] | None,
    measures: Sequence[Mapping[str, Any]],
) -> str:
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = _environment()
    cases = _add_cases(parts, environment, overlays, measures)
    volumes_ml = {f"{each.name}: {mask}": ml for each in cases for mask, ml in each.volumes_ml.items()}
    before_cases = {
        "Summary": summary_table(runs) if runs else None,
        "Differences": difference_table(runs, baseline) if baseline else None,
        "By modalities": modality_table(runs),
        "By centre": centre_table(runs),
        "Volumes": volume_table(volumes_ml) if volumes_ml and not runs else None,
    }
    loaded = ["'strict-dynamic'"] if parts.files else []  # lets the page's script load files beside the page
    sources = " ".join([script_hash(script), *parts.script_hashes, *loaded])
    drawn = {case.name for case in cases}
    measures_elsewhere = measures_tables([row for row in measures if row["case_id"] not in drawn])
    tolerances = sorted({each.tolerance_mm for each in cases if each.tolerance_mm is not None})
    return environment.get_template("page.html").render(
        title=title,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {sources}",
        style=style,
        script=script,
        notes=notes,
        size=_figures(lambda: size_figures(runs)),
        tables_before_cases=[(heading, table) for heading, table in before_cases.items() if table],
        cases=cases,
        failed=_failed_cases(runs),
        rule=RULE.format(tolerance=_tolerance_text(tolerances)) if tolerances else "",
        parts=parts,
        has_viewer=bool(parts.viewer or "viewer" in parts.files),
        max_frames=MAX_FRAMES,
        review_file=f"{stem}.review.json",
        agreements=agreements(runs),
        plot_size=(WIDTH, HEIGHT),
        tables_after_cases=[(table.label, table) for table in [*measures_elsewhere, *case_tables(runs)]],
        curves=_figures(lambda: curve_figures(curves)),
        definitions=list(dict.fromkeys(pair for run in runs for pair in run["aggregate"]["definitions"].items())),
        manifest=json.dumps(manifest, indent=2, default=str, ensure_ascii=False),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["address"] = quote
    return environment


def _add_cases(
    parts: PageParts, environment: Environment, overlays: Iterable[Overlay], measures: Sequence[Mapping[str, Any]]
) -> list[CaseEntry]:
    """Draw every case, keep what belongs to it as parts of the page, and list the cases."""
    library, entries = viewer_library(), []
    figure = environment.get_template("case.html")
    for number, overlay in enumerate(overlays):
        view = case_view(overlay, f"case{number}", library is not None, measures)
        parts.add(view.id, {**view.payload, "html": figure.render(case=view)})
        if view.volumes:
            parts.add(f"{view.id}-volumes", view.volumes)
        entries.append(_entry(view))
    if library and entries:
        parts.add_viewer(library)
    return entries


def _entry(view: CaseView) -> CaseEntry:
    overlay, differences = view.overlay, view.differences
    return CaseEntry(
        view.id,
        overlay.name,
        "" if overlay.dice is None else f"{overlay.dice:.3f}",
        differences.reason if differences else "",
        differences.text if differences else view.volumes_text,
        differences.tolerance_mm if differences else None,
        overlay.volumes_ml(),
        overlay.mask_path.name if overlay.mask_path else "",
        view.mask_sha256,
    )


def _failed_cases(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on every case whose mask could not be scored."""
    return list(
        dict.fromkeys(
            f"{run['name']}, {row['case_id']}: {row.get('findings') or 'no mask was found'}."
            for run in runs
            for row in run["rows"]
            if row["status"] == "error"
        )
    )


def _tolerance_text(tolerances: Sequence[float]) -> str:
    low, high = tolerances[0], tolerances[-1]
    return f"{low:.3g} mm" if low == high else f"{low:.3g} to {high:.3g} mm (3 mm, or a voxel's longest side)"


def _figures(draw: Callable[[], Sequence[Any]]) -> Figures:
    try:
        return Figures(draw())
    except ImportError as error:
        return Figures(missing_package=str(error.name).partition(".")[0])
