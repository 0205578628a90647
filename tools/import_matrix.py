# SPDX-License-Identifier: Apache-2.0
"""Draw which package of scripts/ imports which: ``python -m tools.import_matrix docs/imports.png``.

The packages stand in the order of the layers in pyproject.toml. A row imports the packages of its filled cells; the
number counts import statements. Imports go down only, so that no cell left of the diagonal is filled.
"""

from __future__ import annotations

import argparse
import tomllib
from collections import Counter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]


def layers() -> list[str]:
    """The packages from top to bottom, from the contract that ``make lint`` checks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    packages: list[str] = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return packages


def count_imports() -> Counter[tuple[str, str]]:
    """Import statements from one package to another."""
    graph = grimp.build_graph("scripts")
    counts: Counter[tuple[str, str]] = Counter()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            source, target = (name.split(".")[1] if "." in name else "" for name in (importer, imported))
            if source and target and source != target and not source.startswith("__"):
                counts[source, target] += len(graph.get_import_details(importer=importer, imported=imported))
    return counts


def draw(path: Path) -> None:
    """Write the matrix as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    packages, counts = layers(), count_imports()
    matrix = [[counts[row, column] for column in packages] for row in packages]
    figure, axes = plt.subplots(figsize=(7.5, 6.5))
    axes.imshow([[min(value, 8) for value in row] for row in matrix], cmap="Blues", vmin=0, vmax=12)
    for row, values in enumerate(matrix):
        axes.text(row, row, "·", ha="center", va="center", color="grey")
        for column, value in enumerate(values):
            if value:
                axes.text(column, row, str(value), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(packages)), packages, rotation=45, ha="left")
    axes.set_yticks(range(len(packages)), packages)
    axes.xaxis.tick_top()
    axes.set(xlabel="is imported", ylabel="imports")
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Draw the picture of docs/architecture.md."""
    parser = argparse.ArgumentParser(description="Draw which package of scripts/ imports which.")
    parser.add_argument("picture", type=Path)
    draw(parser.parse_args().picture)


if __name__ == "__main__":
    main()
