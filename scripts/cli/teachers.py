# SPDX-License-Identifier: Apache-2.0
"""List the architectures with parameters, operations and layers."""

from __future__ import annotations

import argparse
from typing import Any

from scripts.cli.bundle_run import resolved_config
from scripts.cli.config import config_names
from scripts.cli.options import Parser, add_common_options, architecture_name, context_configs
from scripts.utils.errors import error_sentence

EXAMPLE = (
    "python -m scripts teachers --data sts --scale full\npython -m scripts teachers --architecture unetr mine.json"
)
HEAD = ("architecture", "kind", "parameters", "GFLOPs per patch", "deep", "middle", "fine")


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--architecture",
        nargs="+",
        type=architecture_name,
        metavar="NAME",
        help="only these, by name or FILE.json (default: all of configs/teachers)",
    )
    add_common_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: a file describes no architecture.
    """
    config = resolved_config(args, ["train", *context_configs(args)], {})
    if args.dry_run:
        return
    from scripts.networks.architecture import read_architecture
    from scripts.utils.markdown import markdown_table

    names = args.architecture or config_names("teachers")
    rows, misfits = [], []
    for name in names:
        architecture = read_architecture(name)
        try:
            cells = cost_cells(architecture, name, config)
        except (ValueError, RuntimeError) as error:  # RuntimeError: sizes that do not match in forward
            cells = ("", "")
            misfits.append(f"{name}: {error_sentence(error)}")
        layers = (architecture.layers.get(layer) for layer in HEAD[-3:])
        rows.append((name, architecture.kind, *cells, *layers))
    print(markdown_table(HEAD, rows))
    size = " x ".join(map(str, config["patch"]))
    print(
        f"\n{len(config['modalities'])} modalities, {len(config['labels'])} classes, patch {size} voxels",
        *misfits,
        sep="\n",
    )


def cost_cells(architecture: Any, name: str, config: dict[str, Any]) -> tuple[str, str]:
    """Parameters and GFLOPs for the modalities, classes, patch and scale of a merged config.

    Raises:
        ValueError, RuntimeError: the network does not fit the patch, or cannot be built.
    """
    from scripts.evaluation.network_cost import network_cost
    from scripts.networks.architecture import changes_of

    channels, patch = len(config["modalities"]), config["patch"]
    changes = changes_of(name, config["architectures"])
    network = architecture.build(channels, len(config["labels"]), patch, config["scale"], changes)
    cost = network_cost(network.to("meta"), patch, channels)
    return f"{cost['parameters'] / 1e6:.2f} M", f"{cost['gflops']:.2f}"
