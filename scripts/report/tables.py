# SPDX-License-Identifier: Apache-2.0
"""The tables of the page, as data for ``templates/table.html``: networks, subgroups of the cases, every case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scripts.metrics.aggregates import aggregate, case_count, paired_difference
from scripts.metrics.case_rows import FAILURES, FOREGROUND, STATUSES, Row, region_of

Run = Mapping[str, Any]

_MEASURED = ("_ml", "_mm", "_g")  # endings of columns of numbers in the table of measures
SEEDS_NOTE = "A case has its mean over the seeds. The intervals show how cases vary, not how seeds vary."
DASH = "\N{EN DASH}"  # where a value is undefined
# Key, column title, number of decimals.
_METRICS = (("dice", "Dice", 3), ("hd95_mm", "HD95 mm", 2), ("assd_mm", "ASSD mm", 2))
_VOLUMES = (("volume_ml", "Volume ml", 2), ("reference_volume_ml", "Reference ml", 2))
_TEXTS = (("trained_on", "Trained on"), ("findings", "Findings"))
_COSTS = (("parameters", "Parameters", 0), ("gflops", "GFLOPs", 1), ("seconds_per_case", "s per case", 2))


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell.

    Args:
        text: its text.
        notes: lines in small print below the text.
        css_class: ``number``, ``failure`` or nothing.
        sort_value: what the column is sorted by instead of the text; an empty string where it is undefined.
        header: whether it is the head of its row.
    """

    text: str
    notes: tuple[str, ...] = ()
    css_class: str = ""
    sort_value: str | None = None
    header: bool = False


@dataclass(frozen=True)
class Table:
    """A table; ``label`` is its name for screen readers, ``note`` a paragraph above it."""

    label: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    sortable: bool = False


def summary_table(runs: Sequence[Run]) -> Table:
    """One row per network: metrics, failures, costs. Where there are several regions, a row for each follows."""
    rows = []
    for run in runs:
        regions: Mapping[str, Any] = run.get("regions") or {}
        costs = [_number_cell(_format(run.get(key), digits)) for key, _, digits in _COSTS]
        training = run.get("trained_on") or {}
        note = f"trained on {len(training['cases'])} of them" if training.get("cases") else ""
        dice, *others = _metric_cells(run["aggregate"])
        if text := seeds_text(run):
            dice = replace(dice, notes=(*dice.notes, "each seed", text))
        rows.append([_head(run["name"], run["aggregate"], note, _region_count(run)), dice, *others, *costs])
        if len(regions) > 1:
            blank = [_number_cell("")] * len(_COSTS)
            heads = {region: _head(f"{run['name']}: {region}", each) for region, each in regions.items()}
            rows += [[heads[region], *_metric_cells(each), *blank] for region, each in regions.items()]
        if unseen := training.get("unseen_aggregate"):
            head = _head(f"{run['name']}, unseen cases", unseen, regions=_region_count(run))
            rows.append([head, *_metric_cells(unseen), *costs])
    columns = [Column("Network"), *_metric_columns(), *(Column(title, number=True) for _, title, _ in _COSTS)]
    note = "Mean [interval] (number of values)."
    if any(_failures(run["aggregate"]) for run in runs):
        note += (
            " First where the metric is defined, then with failures: each counts as Dice 0, or as the diagonal of the "
            "image."
        )
    if any(map(seeds_text, runs)):
        note += f" {SEEDS_NOTE}"
    if any(_region_count(run) > 1 for run in runs):
        note += " The first row of a network is over all regions of all cases, then follows each region."
    return Table("Summary", columns, rows, note)


def seeds_text(run: Run) -> str:
    """The mean Dice of each seed of a network, such as ``0.701, 0.744``; empty for a network of one seed."""
    return ", ".join(_format(dice, 3) for dice in run.get("seed_dice") or ())


def modality_table(runs: Sequence[Run]) -> Table | None:
    """One row per evaluation that names its modalities; None where all have the same ones."""
    runs = sorted((run for run in runs if run.get("present")), key=lambda run: -len(run["present"]))
    if len({tuple(run["present"]) for run in runs}) < 2:
        return None
    modalities = list(dict.fromkeys(name for run in runs for name in run["present"]))
    rows = []
    for run in runs:
        present = [Cell("yes" if name in run["present"] else "no") for name in modalities]
        difference = _number_cell(_difference_to_most_modalities(run, runs))
        rows.append(
            [
                _head(network_name(run), run["aggregate"], regions=_region_count(run)),
                *present,
                difference,
                *_metric_cells(run["aggregate"]),
            ]
        )
    columns = [Column("Network"), *(Column(name.upper()) for name in modalities)]
    note = (
        "The same network with fewer modalities. The difference is the mean over the common cases of Dice minus the "
        "Dice with the most modalities, with failures at their worst value [interval]."
    )
    return Table("By modalities", [*columns, Column("Difference in Dice", number=True), *_metric_columns()], rows, note)


def network_name(run: Run) -> str:
    """The network's name without the modalities that ``evaluate --present`` appends to it."""
    return str(run["name"]).removesuffix(f" ({', '.join(run.get('present') or ())} only)")


def _difference_to_most_modalities(run: Run, runs: Sequence[Run]) -> str:
    same_network = [other for other in runs if network_name(other) == network_name(run)]
    baseline = max(same_network, key=lambda other: len(other["present"]))
    if len(baseline["present"]) == len(run["present"]):
        return DASH
    return _with_interval(paired_difference(run["rows"], baseline["rows"], "dice", **bootstrap_settings(run)), 3)


def difference_table(runs: Sequence[Run], baseline: Run) -> Table:
    """The difference in Dice of every other network to one."""
    rows = []
    for run in runs:
        if run is not baseline:
            difference = paired_difference(run["rows"], baseline["rows"], "dice", **bootstrap_settings(run))
            head = _head(run["name"], run["aggregate"], regions=_region_count(run))
            rows.append([head, _number_cell(_with_interval(difference, 3))])
    note = (
        f"Dice minus that of {baseline['name']}: mean over the common cases and regions [interval] (number of values), "
        "with failures at their worst value."
    )
    if any(map(seeds_text, runs)):
        note += f" {SEEDS_NOTE}"
    return Table("Differences", [Column("Network"), Column("Difference in Dice", number=True)], rows, note)


def centre_table(runs: Sequence[Run]) -> Table | None:
    """One row per network and centre; None where no case names a centre."""
    rows = []
    for run in runs:
        centres = sorted({str(row["centre"]) for row in run["rows"] if row.get("centre")})
        for centre in [*centres, ""] if centres else []:
            cases = [row for row in run["rows"] if str(row.get("centre") or "") == centre]
            if cases:
                summary = aggregate(cases, **bootstrap_settings(run))
                head = _head(centre or "not given", summary, regions=_region_count(run))
                rows.append([head, Cell(run["name"]), *_metric_cells(summary)])
    if not rows:
        return None
    note = "As in the summary, for each centre that the data list names. Small groups have wide intervals."
    return Table("By centre", [Column("Centre"), Column("Network"), *_metric_columns()], rows, note)


def _region_count(run: Run) -> int:
    return len(run.get("regions") or ())


def bootstrap_settings(run: Run) -> dict[str, Any]:
    """Seed, resamples and level of a run's intervals."""
    return {key: run["aggregate"]["bootstrap"][key] for key in ("seed", "resamples", "level")}


def case_tables(runs: Sequence[Run]) -> list[Table]:
    """Every case of every network: one table for each region, sortable by every column."""
    rows = [(str(run["name"]), row) for run in runs for row in run["rows"]]
    regions = list(dict.fromkeys(region_of(row) for _, row in rows))
    if len(regions) < 2:
        name = regions[0] if regions else FOREGROUND
        return [_case_table("Every case" if name == FOREGROUND else f"Every case: {name}", rows)] if runs else []
    return [
        _case_table(f"Every case: {region}", [(name, row) for name, row in rows if region_of(row) == region])
        for region in regions
    ]


def _case_table(label: str, named_rows: Sequence[tuple[str, Row]]) -> Table:
    """Rows with the names of their networks."""
    numbers = (*_METRICS, *_VOLUMES)
    all_rows = [row for _, row in named_rows]
    has_centres = any(row.get("centre") for row in all_rows)
    texts_after = [(key, title) for key, title in _TEXTS if {row.get(key) for row in all_rows} - {None, "", "unknown"}]
    names = ("Network", "Case", "Patient", *(("Centre",) if has_centres else ()), "Status")
    rows = []
    for name, row in named_rows:
        texts = [name, row["case_id"], row.get("patient_id") or row["case_id"]]
        texts += [row.get("centre") or ""] if has_centres else []
        status = Cell(str(row["status"]).replace("_", " "), css_class="failure" if row["status"] in FAILURES else "")
        values = []
        for key, _, digits in numbers:
            exact = "" if row.get(key) is None else repr(float(row[key]))
            values.append(Cell(_format(row.get(key), digits), css_class="number", sort_value=exact))
        rows.append(
            [
                *(Cell(str(text)) for text in texts),
                status,
                *values,
                *(Cell(str(row.get(key) or "")) for key, _ in texts_after),
            ]
        )
    columns = [*(Column(name) for name in names), *(Column(title, number=True) for _, title, _ in numbers)]
    columns += [Column(title) for _, title in texts_after]
    return Table(label, columns, rows, "Press a column title to sort by it.", sortable=True)


def volume_table(volumes_ml: Mapping[str, float]) -> Table:
    """Volumes of masks in millilitres."""
    rows = [[Cell(name, header=True), _number_cell(_format(value, 2))] for name, value in volumes_ml.items()]
    return Table("Volumes", [Column("Mask"), Column("Volume ml", number=True)], rows)


def measures_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The measures of lesions and regions, a table for each case.

    Args:
        rows: of ``measures.csv``. Columns without a value are left out.
    """
    tables = []
    for case_id in dict.fromkeys(row["case_id"] for row in rows):
        own = [row for row in rows if row["case_id"] == case_id]
        keys = [key for key in own[0] if key != "case_id" and any(row[key] not in (None, "") for row in own)]
        numbers = {key for key in keys if key.endswith(_MEASURED) or key.startswith("suv")}
        cells = [
            [_number_cell(_format(row[key], 2)) if key in numbers else Cell(str(row[key])) for key in keys]
            for row in own
        ]
        columns = [Column(key.replace("_", " "), key in numbers) for key in keys]
        tables.append(Table(f"Measures of {case_id}", columns, cells))
    return tables


def _format(value: float | None, digits: int) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _with_interval(summary: Mapping[str, Any], digits: int) -> str:
    interval = f" [{', '.join(_format(end, digits) for end in summary['ci95'])}]" if summary["ci95"] else ""
    return f"{_format(summary['mean'], digits)}{interval} ({summary['n']})"


def _metric_columns() -> Iterable[Column]:
    return (Column(title, number=True) for title in (*(title for _, title, _ in _METRICS), "Failures"))


def _metric_cells(summary: Mapping[str, Any]) -> list[Cell]:
    """Per metric the mean of the defined cases and, if any, the mean with failures; then the failures by status."""
    metrics, counts, failures = summary["metrics"], summary["counts"], _failures(summary)
    cells = []
    for metric, _, digits in _METRICS:
        defined, worst_filled = (_with_interval(metrics[metric][key], digits) for key in ("defined", "worst_filled"))
        cells.append(_number_cell(defined, *(("with failures", worst_filled) if failures else ())))
    by_status = (f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES[1:] if counts[status])
    return [*cells, _number_cell(f"{failures} of {summary.get('counted', summary['n'])}", *by_status)]


def _failures(summary: Mapping[str, Any]) -> int:
    return sum(summary["counts"][status] for status in FAILURES)


def _number_cell(text: str, *notes: str) -> Cell:
    return Cell(text, notes, css_class="number")


def _head(name: str, summary: Mapping[str, Any], note: str = "", regions: int = 1) -> Cell:
    """The head of a row: a name, and below it the numbers of cases, patients and, if several, regions, and a note."""
    counts = [(case_count(summary, regions), "case"), (summary["n_patients"], "patient")]
    counts += [(regions, "region")] if regions > 1 else []
    size = ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in counts)
    return Cell(name, (size, note) if note else (size,), header=True)
