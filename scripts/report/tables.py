# SPDX-License-Identifier: Apache-2.0
"""The page's tables: every network, subgroups of modalities and centres, every case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from scripts.metrics.aggregate import FAILURES, STATUSES, Row, aggregate, paired_difference

Run = Mapping[str, Any]

_UNITS = (("dice", "Dice", 3), ("hd95_mm", "HD95 mm", 2), ("assd_mm", "ASSD mm", 2))
_VOLUMES = (("volume_ml", "Volume ml", 2), ("reference_volume_ml", "Reference ml", 2))
_COSTS = (("parameters", "Parameters", 0), ("gflops", "GFLOPs", 1), ("seconds_per_case", "s per case", 2))
_METRICS = (*(label for _, label, _ in _UNITS), "Failures")


def pick_cases(rows: Sequence[Row]) -> dict[str, str]:
    """Case ids of the best, (lower) median and worst Dice; equal values go by case id, undefined ones are left out."""
    found = sorted((row["dice"], str(row["case_id"])) for row in rows if row.get("dice") is not None)
    best = sorted(found, key=lambda pair: (-pair[0], pair[1]))
    return {"best": best[0][1], "median": found[(len(found) - 1) // 2][1], "worst": found[0][1]} if found else {}


def summary_table(runs: Sequence[Run]) -> str:
    """One row per network: metrics, failures, costs."""
    rows = []
    for run in runs:
        cells = [*_metric_cells(run["aggregate"]), *(_number(run.get(key), digits) for key, _, digits in _COSTS)]
        rows.append(_header(run["name"], _size(run["aggregate"])) + _numbers(cells))
    note = "Mean over cases [interval] (number of cases), where the metric is defined and with failures at their worst."
    names = [*_METRICS, *(label for _, label, _ in _COSTS)]
    return f"<p>{note}</p>" + _table("Summary", [_column("Network"), *map(_right, names)], rows)


def modality_table(runs: Sequence[Run]) -> str:
    """One row per evaluation that says what it was given; empty where all were given the same."""
    told = sorted((run for run in runs if run.get("present")), key=lambda run: -len(run["present"]))
    if len({tuple(run["present"]) for run in told}) < 2:
        return ""
    modalities = list(dict.fromkeys(name for run in told for name in run["present"]))
    rows = []
    for run in told:
        given = "".join(f"<td>{'yes' if name in run['present'] else 'no'}</td>" for name in modalities)
        cells = [_against_all(run, told), *_metric_cells(run["aggregate"])]
        rows.append(_header(_base(run), _size(run["aggregate"])) + given + _numbers(cells))
    columns = [_column(name) for name in ("Network", *(escape(name.upper()) for name in modalities))]
    note = (
        "The same network with fewer modalities. The difference is the mean over the cases in common of Dice minus "
        "that with the most modalities, failures at their worst [interval]."
    )
    headers = [*columns, *map(_right, ("Difference in Dice", *_METRICS))]
    return f"<p>{note}</p>" + _table("By modalities", headers, rows)


def _base(run: Run) -> str:
    """The network's name without the modalities that ``evaluate --present`` puts behind it."""
    return str(run["name"]).removesuffix(f" ({', '.join(run['present'])} only)")


def _against_all(run: Run, runs: Sequence[Run]) -> str:
    same = [other for other in runs if _base(other) == _base(run)]
    whole = max(same, key=lambda other: len(other["present"]))
    if len(whole["present"]) == len(run["present"]):
        return "&ndash;"
    return _with_interval(paired_difference(run["rows"], whole["rows"], "dice", **_bootstrap(run)), 3)


def centre_table(runs: Sequence[Run]) -> str:
    """One row per network and centre; empty where no case names a centre."""
    rows = []
    for run in runs:
        centres = sorted({str(row["centre"]) for row in run["rows"] if row.get("centre")})
        for centre in [*centres, ""] if centres else []:
            found = [row for row in run["rows"] if str(row.get("centre") or "") == centre]
            if found:
                part = aggregate(found, **_bootstrap(run))
                name = _header(centre or "not given", _size(part))
                rows.append(f"{name}<td>{escape(run['name'])}</td>" + _numbers(_metric_cells(part)))
    if not rows:
        return ""
    headers = [_column("Centre"), _column("Network"), *map(_right, _METRICS)]
    note = "As in the summary, per centre that the data list names. Small groups make wide intervals."
    return f"<p>{note}</p>" + _table("By centre", headers, rows)


def _bootstrap(run: Run) -> dict[str, Any]:
    return {key: run["aggregate"]["bootstrap"][key] for key in ("seed", "resamples", "level")}


def case_table(runs: Sequence[Run]) -> str:
    """Every case of every network, sortable by every column."""
    measured = (*_UNITS, *_VOLUMES)
    centres = any(row.get("centre") for run in runs for row in run["rows"])
    names = ("Network", "Case", "Patient", *(("Centre",) if centres else ()), "Status")
    headers = [_column(_button(name)) for name in names] + [_right(_button(name)) for _, name, _ in measured]
    rows = []
    for name, row in ((run["name"], row) for run in runs for row in run["rows"]):
        ids = [name, row["case_id"], row.get("patient_id") or row["case_id"]]
        cells = [f"<td>{escape(str(text))}</td>" for text in [*ids, *([row.get("centre") or ""] if centres else [])]]
        kind = "failure" if row["status"] in FAILURES else ""
        cells.append(f'<td class="{kind}">{escape(str(row["status"])).replace("_", " ")}</td>')
        for key, _, digits in measured:
            exact = "" if row.get(key) is None else repr(float(row[key]))
            cells.append(f'<td class="number" data-value="{exact}">{_number(row.get(key), digits)}</td>')
        rows.append("".join(cells))
    return "<p>Press a column's name to sort by it.</p>" + _table("Every case", headers, rows, "sortable")


def volume_table(volumes: Mapping[str, float]) -> str:
    """Volumes of masks in millilitres."""
    rows = [_header(name) + _numbers([_number(value, 2)]) for name, value in volumes.items()]
    return _table("Volumes", [_column("Mask"), _right("Volume ml")], rows)


def _number(value: float | None, digits: int) -> str:
    return "&ndash;" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _with_interval(summary: Mapping[str, Any], digits: int) -> str:
    interval = f" [{', '.join(_number(end, digits) for end in summary['ci95'])}]" if summary["ci95"] else ""
    return f"{_number(summary['mean'], digits)}{interval} ({summary['n']})"


def _metric_cells(whole: Mapping[str, Any]) -> list[str]:
    """Per metric both means, then the failures."""
    metrics, counts = whole["metrics"], whole["counts"]
    cells = []
    for metric, _, digits in _UNITS:
        defined, filled = (_with_interval(metrics[metric][key], digits) for key in ("defined", "worst_filled"))
        cells.append(f"{defined}<small>with failures<br>{filled}</small>")
    kinds = "<br>".join(f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES[1:] if counts[status])
    return [*cells, f"{sum(counts[status] for status in FAILURES)} of {whole['n']}<small>{kinds}</small>"]


def _size(whole: Mapping[str, Any]) -> str:
    cases, patients = (
        f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in ((whole["n"], "case"), (whole["n_patients"], "patient"))
    )
    return f"{cases}, {patients}"


def _header(name: str, small: str = "") -> str:
    return f'<th scope="row">{escape(name)}{f"<small>{small}</small>" if small else ""}</th>'


def _column(content: str) -> str:
    return f'<th scope="col">{content}</th>'


def _right(content: str) -> str:
    return f'<th scope="col" class="number">{content}</th>'


def _button(name: str) -> str:
    return f'<button type="button">{name}</button>'


def _numbers(cells: Iterable[str]) -> str:
    return "".join(f'<td class="number">{cell}</td>' for cell in cells)


def _table(label: str, headers: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen, by keyboard too."""
    head, body = f"<tr>{''.join(headers)}</tr>", "".join(f"<tr>{row}</tr>\n" for row in rows)
    table = f'<table class="{kind}">\n<thead>{head}</thead>\n<tbody>\n{body}</tbody></table>'
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'
