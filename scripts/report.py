# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about one or several runs: numbers, curves, outlines on images, every case, manifest.

The page loads nothing (its content security policy forbids it) and everything that comes from files is escaped.
matplotlib is optional: without it the page says so and holds the tables only.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import write_text
from .metrics.aggregate import FAILURES, STATUSES, Row

# Okabe and Ito's palette: told apart with every common colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_OUTLINES = {"reference": ("#E69F00", "solid"), "prediction": ("#56B4E9", "dashed")}
# Plane, the axis that is cut (of left, anterior, superior), letters at the panel's left, right, bottom and top.
_PLANES = (("axial", 2, "RLPA"), ("coronal", 1, "RLIS"), ("sagittal", 0, "PAIS"))
_UNITS = (("dice", "Dice", 3), ("hd95_mm", "HD95 mm", 2), ("assd_mm", "ASSD mm", 2))
_VOLUMES = (("volume_ml", "Volume ml", 2), ("reference_volume_ml", "Reference ml", 2))
_COSTS = (("parameters", "Parameters", 0), ("gflops", "GFLOPs", 1), ("seconds_per_case", "s per case", 2))

_STYLE = """
* { box-sizing: border-box; } h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072b2; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; overflow-wrap: anywhere; } figcaption, dt, summary, .warning, .failure { font-weight: 600; }
.warning { padding: .75rem 1rem; border-left: .4rem solid #d55e00; background: #fff3eb; } .failure { color: #9c3a00; }
.scroll { overflow-x: auto; overflow-wrap: normal; } .scroll > img { width: 100%; min-width: 38rem; max-width: 60rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.grid img { width: 100%; max-width: 36rem; } figure { margin: 0 0 1.5rem; } dd { margin: 0 0 .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid #bbb; text-align: left; vertical-align: top; }
thead th { background: #eef3f7; white-space: nowrap; } td.number, th.number { text-align: right; white-space: nowrap; }
th button { all: unset; } button, summary { cursor: pointer; } :focus-visible { outline: 3px solid #0072b2 !important; }
th button::after { content: " \\2195"; } [aria-sort=ascending] button::after { content: " \\2191"; }
[aria-sort=descending] button::after { content: " \\2193"; }
pre { padding: 1rem; background: #f4f4f4; white-space: pre-wrap; } small { display: block; font-weight: 400; }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headers.forEach(other => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const numeric = header.classList.contains("number");
    const key = row => numeric ? row.cells[column].dataset.value : row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // undefined values stay at the end
      return sign * (numeric ? x - y : x.localeCompare(y, undefined, {numeric: true}));
    });
    table.tBodies[0].append(...rows);
  }));
}
"""
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()


@dataclass(frozen=True)
class Overlay:
    """A case to draw: a caption, 3D volumes by modality and two masks on one grid, mm per axis.

    ``axcodes`` says where each array axis points to (``nibabel.aff2axcodes``); the letters in the panels follow it.

    Raises:
        ValueError: on volumes that are not 3D or not on one grid, or on a bad ``spacing``.
    """

    title: str
    images: Mapping[str, NDArray[Any]]
    reference: NDArray[Any]
    prediction: NDArray[Any]
    spacing: Sequence[float]
    axcodes: Sequence[str] = "RAS"

    def __post_init__(self) -> None:
        volumes = {**self.images, "reference": self.reference, "prediction": self.prediction}
        shapes = {name: np.shape(volume) for name, volume in volumes.items()}
        if len(set(shapes.values())) > 1 or len(shapes["reference"]) != 3:
            raise ValueError(f"{self.title}: images and masks must be 3D and share one grid, got shapes {shapes}")
        if len(self.spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"{self.title}: spacing must hold 3 finite positive values in mm, got {self.spacing}")


def pick_cases(rows: Sequence[Row]) -> dict[str, str]:
    """Case ids of the best, (lower) median and worst Dice; equal values go by case id, undefined ones are left out."""
    found = sorted((row["dice"], str(row["case_id"])) for row in rows if row.get("dice") is not None)
    best = sorted(found, key=lambda pair: (-pair[0], pair[1]))
    return {"best": best[0][1], "median": found[(len(found) - 1) // 2][1], "worst": found[0][1]} if found else {}


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
            ``"gflops"``, ``"seconds_per_case"``.
        overlays: cases to draw, for example those of `pick_cases`.
        curves: run name -> rows ``{"epoch", "loss", "loss/<term>", "val_dice"}``; missing or ``None`` values are gaps.
        manifest: what the run wrote about itself; shown as JSON.
    """
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'"
    texts = dict.fromkeys(pair for run in runs for pair in run["aggregate"]["definitions"].items())
    definitions = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts)
    sections = {
        "Summary": _summary_table(runs) if runs else "",
        "Learning curves": _drawn(_curve_figures, curves),
        "Outlines": _drawn(_overlay_figures, overlays),
        "Every case": _case_table(runs) if runs else "",
        "Definitions": f"<dl>{definitions}</dl>" if runs else "",
        "Manifest": "<details><summary>Configuration, versions, data and seeds</summary>"
        f"<pre>{escape(json.dumps(manifest, indent=2, default=str, ensure_ascii=False))}</pre></details>",
    }
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{escape(title)}</title>',
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        '<p class="warning">For research only, not for clinical use. This page holds image slices and case ids: '
        "share it only where you may share the data.</p>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        *(f"<h2>{heading}</h2>\n{body}" for heading, body in sections.items() if body),
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ]
    write_text("\n".join(parts), path)


def _number(value: float | None, digits: int) -> str:
    return "&ndash;" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _with_interval(summary: Mapping[str, Any], digits: int) -> str:
    interval = f" [{', '.join(_number(end, digits) for end in summary['ci95'])}]" if summary["ci95"] else ""
    return f"{_number(summary['mean'], digits)}{interval} ({summary['n']})"


def _table(label: str, headers: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen, by keyboard too."""
    head, body = f"<tr>{''.join(headers)}</tr>", "".join(f"<tr>{row}</tr>\n" for row in rows)
    table = f'<table class="{kind}">\n<thead>{head}</thead>\n<tbody>\n{body}</tbody></table>'
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _summary_table(runs: Sequence[Mapping[str, Any]]) -> str:
    names = [*(label for _, label, _ in _UNITS), "Failures", *(label for _, label, _ in _COSTS)]
    headers = ['<th scope="col">Network</th>', *(f'<th scope="col" class="number">{name}</th>' for name in names)]
    rows = []
    for run in runs:
        metrics, counts, n = (run["aggregate"][key] for key in ("metrics", "counts", "n"))
        cells = []
        for metric, _, digits in _UNITS:
            defined, filled = (_with_interval(metrics[metric][key], digits) for key in ("defined", "worst_filled"))
            cells.append(f"{defined}<small>with failures<br>{filled}</small>")
        kinds = "<br>".join(f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES[1:] if counts[status])
        cells.append(f"{sum(counts[status] for status in FAILURES)} of {n}<small>{kinds}</small>")
        cells += [_number(run.get(key), digits) for key, _, digits in _COSTS]
        size = f"<small>{n} cases, {run['aggregate']['n_patients']} patients</small>"
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f'<th scope="row">{escape(run["name"])}{size}</th>{numbers}')
    note = "Mean over cases [interval] (number of cases), where the metric is defined and with failures at their worst."
    return f"<p>{note}</p>" + _table("Summary", headers, rows)


def _case_table(runs: Sequence[Mapping[str, Any]]) -> str:
    measured = (*_UNITS, *_VOLUMES)
    headers = [f'<th scope="col"><button>{name}</button></th>' for name in ("Network", "Case", "Patient", "Status")]
    headers += [f'<th scope="col" class="number"><button>{name}</button></th>' for _, name, _ in measured]
    rows = []
    for name, row in ((run["name"], row) for run in runs for row in run["rows"]):
        ids = (name, row["case_id"], row.get("patient_id") or row["case_id"])
        cells = [f"<td>{escape(str(text))}</td>" for text in ids]
        kind = "failure" if row["status"] in FAILURES else ""
        cells.append(f'<td class="{kind}">{escape(str(row["status"])).replace("_", " ")}</td>')
        for key, _, digits in measured:
            exact = "" if row.get(key) is None else repr(float(row[key]))
            cells.append(f'<td class="number" data-value="{exact}">{_number(row.get(key), digits)}</td>')
        rows.append("".join(cells))
    return "<p>Press a column's name to sort by it.</p>" + _table("Every case", headers, rows, "sortable")


def _drawn(draw: Any, data: Any) -> str:
    try:
        return "\n".join(draw(data)) if data else ""
    except ImportError as error:
        return f"<p>No figures: {escape(str(error.name).partition('.')[0])} is not installed.</p>"


def _image(figure: Any, alt: str, kind: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120)
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _plain(text: str) -> str:
    """``text`` so that matplotlib shows it literally: no formula, no hidden legend entry."""
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def _curve_figures(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Training loss and validation Dice of all runs, then the loss terms of each run that has several."""
    quantities = {"Training loss": "loss", "Validation Dice": "val_dice"}
    panels = {title: {run: _series(rows, key) for run, rows in curves.items()} for title, key in quantities.items()}
    for run, rows in curves.items():
        terms = list(dict.fromkeys(key for row in rows for key in row if key.startswith("loss/")))
        if len(terms) > 1:
            panels[f"Loss terms of {run}"] = {term.removeprefix("loss/"): _series(rows, term) for term in terms}
    shown = {title: {name: points for name, points in lines.items() if points} for title, lines in panels.items()}
    return ['<div class="grid">', *(_curve_panel(title, lines) for title, lines in shown.items() if lines), "</div>"]


def _curve_panel(title: str, lines: Mapping[str, list[tuple[float, float]]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=_plain(title.split(" of ")[0]))
    for i, (name, points) in enumerate(lines.items()):
        style = ("-", "--", ":")[i // len(_COLOURS) % 3]
        axes.plot(*np.transpose(points), style, color=_COLOURS[i % len(_COLOURS)], marker=".", label=_plain(name))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    last = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in lines.items())
    image = _image(figure, f"{title} by epoch; last values: {last}", "png")
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>"


def _overlay_figures(overlays: Sequence[Overlay]) -> Iterator[str]:
    for overlay in overlays:
        alt = f"{overlay.title}: outlines of reference and prediction in three planes on {', '.join(overlay.images)}"
        image = f'<div class="scroll" tabindex="0">{_image(_overlay_figure(overlay), alt, "jpeg")}</div>'
        yield f"<figure><figcaption>{escape(overlay.title)}</figcaption>{image}</figure>"


def slice_figure(overlay: Overlay) -> Any:
    """Modalities side by side, in the axial slice with the most reference (or, without one, prediction)."""
    from matplotlib.figure import Figure

    masks, images, step = _turned(overlay)
    _, axis, letters = _PLANES[0]
    at = _fullest(masks, axis)
    cuts = {name: np.take(mask, at, axis).T for name, mask in masks.items()}
    rows, columns = np.multiply(cuts["reference"].shape, step[1::-1])
    height = float(np.clip(3.2 * rows / columns, 2, 6))
    figure = Figure(figsize=(3.2 * len(images), height + 1.0), layout="constrained")
    grid = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, (modality, image) in zip(grid, images.items(), strict=True):
        _draw_panel(axes, np.take(image, at, axis).T, cuts, step[:2], _window(image), letters)
        axes.set_title(_plain(modality))
    figure.suptitle(_plain(overlay.title))
    _add_legend(figure)
    return figure


def _turned(overlay: Overlay) -> tuple[dict[str, Any], dict[str, Any], NDArray[Any]]:
    """Masks, images and mm per axis, as a panel shows them: the axes run to the left, to anterior, to superior."""
    from nibabel.orientations import apply_orientation, axcodes2ornt

    turn = axcodes2ornt(tuple(overlay.axcodes), (("R", "L"), ("P", "A"), ("I", "S")))
    masks = {name: apply_orientation(np.asarray(getattr(overlay, name)) > 0, turn) for name in _OUTLINES}
    images = {name: apply_orientation(np.asarray(image, dtype=float), turn) for name, image in overlay.images.items()}
    return masks, images, np.asarray(overlay.spacing, dtype=float)[np.argsort(turn[:, 0])]


def _window(image: NDArray[Any]) -> Any:
    return np.nanpercentile(image[np.isfinite(image)], (1, 99))


def _fullest(masks: Mapping[str, NDArray[Any]], axis: int) -> int:
    """The slice across this axis with the most reference or, without one, prediction; the middle without both."""
    chosen = masks["reference"] if masks["reference"].any() else masks["prediction"]
    area = chosen.sum(axis=tuple(a for a in range(3) if a != axis))
    return int(area.argmax()) if area.any() else chosen.shape[axis] // 2


def _add_legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, ls=style, label=name) for name, (colour, style) in _OUTLINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, facecolor="#333333", labelcolor="white")


def _overlay_figure(overlay: Overlay) -> Any:
    """Rows are modalities, columns planes through the slice with the most reference (or, without one, prediction)."""
    from matplotlib.figure import Figure

    masks, images, step = _turned(overlay)
    windows = {name: _window(image) for name, image in images.items()}
    x, y, z = masks["reference"].shape * step
    height = float(np.clip(10 * max(y, z) / (2 * x + y), 2, 6))
    figure = Figure(figsize=(10, height * len(overlay.images) + 0.6), layout="constrained")
    grid = figure.subplots(len(overlay.images), 3, squeeze=False, width_ratios=(x, x, y))
    for column, (plane, axis, letters) in enumerate(_PLANES):
        at = _fullest(masks, axis)
        cuts = {name: np.take(mask, at, axis).T for name, mask in masks.items()}
        for row, (modality, image) in enumerate(images.items()):
            cut = np.take(image, at, axis).T
            _draw_panel(grid[row, column], cut, cuts, np.delete(step, axis), windows[modality], letters)
            grid[row, 0].set_ylabel(_plain(modality), fontsize="large")
        grid[0, column].set_title(plane)
    _add_legend(figure)
    return figure


def _draw_panel(axes: Any, cut: Any, masks: Mapping[str, Any], step: Any, window: Any, letters: str) -> None:
    grid = {"origin": "lower", "extent": (0.0, cut.shape[1] * step[0], 0.0, cut.shape[0] * step[1])}
    axes.imshow(cut, cmap="gray", vmin=window[0], vmax=window[1], **grid)
    for name, (colour, style) in _OUTLINES.items():
        if masks[name].any():
            axes.contour(masks[name], [0.5], colors=colour, linestyles=style, linewidths=1.8, **grid)
    for letter, place in zip(letters, ((0.03, 0.5), (0.97, 0.5), (0.5, 0.03), (0.5, 0.97)), strict=True):
        box = {"facecolor": "black", "alpha": 0.6, "pad": 1, "edgecolor": "none"}
        axes.text(*place, letter, transform=axes.transAxes, color="white", ha="center", va="center", size=8, bbox=box)
    axes.set(xticks=[], yticks=[])
