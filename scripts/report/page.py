# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about one or several runs: numbers, subgroups, slices, every case, curves, manifest.

The page loads nothing (its content security policy forbids it) and everything that comes from files is escaped.
matplotlib and Pillow are optional: without them the page says so and holds the tables only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scripts.utils.atomic_files import write_text

from .curves import curve_figures
from .overlay import Overlay
from .style import SCRIPT, SCRIPT_HASH, STYLE
from .tables import case_table, centre_table, modality_table, summary_table, volume_table
from .viewer import viewers

_LIMITS = (
    "Numbers hold for the cases on this page. Other scanners, tracers, body regions and patients can do worse.",
    "Every mask needs the eyes of a qualified reader on the original images: the pictures here are a selection of "
    "slices, reduced, compressed and windowed.",
    "A volume is the number of a mask's voxels times their size; it is no better than the mask.",
    "This page holds image slices and case ids: share it only where you may share the data.",
)
USE = (
    '<section class="warning"><h2>Intended use and limits</h2>\n<p class="lead">For research only: not a medical '
    "device, not for diagnosis, treatment planning or any decision about a patient.</p>\n<ul>"
    + "".join(f"<li>{limit}</li>" for limit in _LIMITS)
    + "</ul></section>"
)


def write_report(
    path: str | Path,
    title: str,
    runs: Sequence[Mapping[str, Any]],
    overlays: Sequence[Overlay],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Write the page beside ``path``, then rename.

    Args:
        path: the HTML file; ``title``: its heading; ``notes``: sentences below it, for example on missing predictions.
        runs: per network ``{"name", "aggregate": of metrics.aggregate, "rows"}`` and, where known, ``"parameters"``,
            ``"gflops"``, ``"seconds_per_case"``, ``"present"`` (modalities); rows may name their ``"centre"``.
        overlays: cases to draw, for example those of `pick_cases`; without runs their volumes are listed.
        curves: run name -> rows ``{"epoch", "loss", "loss/<term>", "val_dice"}``; missing or ``None`` values are gaps.
        manifest: what the run wrote about itself; shown as JSON.
    """
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{escape(title)}</title>',
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n{USE}",
        *(f"<p>{escape(note)}</p>" for note in notes),
        *_sections(runs, overlays, curves, manifest),
        f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
    ]
    write_text("\n".join(parts), path)


def _sections(
    runs: Sequence[Mapping[str, Any]],
    overlays: Sequence[Overlay],
    curves: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> Iterable[str]:
    texts = dict.fromkeys(pair for run in runs for pair in run["aggregate"]["definitions"].items())
    definitions = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts)
    drawn = {f"{each.title}: {name}": ml for each in overlays for name, ml in each.millilitres().items()}
    sections = {
        "Summary": summary_table(runs) if runs else "",
        "By modalities": modality_table(runs),
        "By centre": centre_table(runs),
        "Volumes": volume_table(drawn) if drawn and not runs else "",
        "Slices": _drawn(viewers, overlays),
        "Every case": case_table(runs) if runs else "",
        "Learning curves": _drawn(curve_figures, curves),
        "Definitions": f"<dl>{definitions}</dl>" if runs else "",
        "Manifest": "<details><summary>Configuration, versions, data and seeds</summary>"
        f"<pre>{escape(json.dumps(manifest, indent=2, default=str, ensure_ascii=False))}</pre></details>",
    }
    return (f"<h2>{heading}</h2>\n{body}" for heading, body in sections.items() if body)


def _drawn(draw: Callable[[Any], Iterable[str]], data: Any) -> str:
    try:
        return "\n".join(draw(data)) if data else ""
    except ImportError as error:
        return f"<p>No figures: {escape(str(error.name).partition('.')[0])} is not installed.</p>"
