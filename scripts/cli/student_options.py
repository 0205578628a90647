# SPDX-License-Identifier: Apache-2.0
"""Options that name a student of the user's own: its network and its segmentation loss, as JSON files."""

from __future__ import annotations

import argparse
import json
from typing import Any

from scripts.cli.bundle_run import Overrides, interpreted
from scripts.cli.options import Parser

LAYERS = "layers"  # key of a network's file: tap -> layer, for methods that compare features


def add_network_option(parser: Parser) -> None:
    """The option that names the student's network."""
    parser.add_argument(
        "--network",
        metavar="FILE.json",
        help="a network of your own: its class as _target_, with its arguments (default: that of the weights, or the "
        "included student). The file is trusted like code",
    )


def add_student_options(parser: Parser) -> None:
    """Options of every training of a student."""
    add_network_option(parser)
    parser.add_argument(
        "--segmentation-loss",
        metavar="FILE.json",
        help="a loss of (logits, label) of your own: its class as _target_, with its arguments. The file is trusted "
        "like code",
    )
    parser.add_argument(
        "--modality-dropout",
        type=float,
        metavar="P",
        help="hide each modality from the included student with this probability; teachers see all (default: 0)",
    )


def network_overrides(args: argparse.Namespace) -> Overrides:
    """The config override of ``--network``.

    Raises:
        ValueError: the file defines no network, or ``--modality-dropout`` is given, which an own network has not.
    """
    if not args.network:
        return {}
    if vars(args).get("modality_dropout"):
        raise ValueError("--modality-dropout works with the included student only. Remove it, or remove --network.")
    definition = _read_definition(args.network, "network", "monai.networks.nets.UNet")
    return {"network_def": interpreted({key: value for key, value in definition.items() if key != LAYERS})}


def loss_overrides(args: argparse.Namespace) -> Overrides:
    """The config override of ``--segmentation-loss``; ValueError where the file defines no loss."""
    if not args.segmentation_loss:
        return {}
    return {"segmentation_loss": interpreted(_read_definition(args.segmentation_loss, "loss", "DiceFocalLoss"))}


def layers_overrides(args: argparse.Namespace) -> Overrides:
    """The layers of the own network that a distillation taps, from the key ``layers`` of its file."""
    if not args.network:
        return {}
    layers = _read_definition(args.network, "network", "monai.networks.nets.UNet").get(LAYERS, {})
    if not isinstance(layers, dict):
        raise ValueError(f'{args.network}: layers must name a layer for each tap, such as {{"middle": "model.2"}}.')
    return {f"layers#{tap}#student": layer for tap, layer in layers.items()}


def _read_definition(path: str, kind: str, example: str) -> dict[str, Any]:
    """Read the definition of a component; ValueError where it names no class."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            definition = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Write the definition of a {kind}.") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("_target_"), str):
        raise ValueError(f'{path} names no {kind}. Add its class, such as "_target_": "{example}".')
    return definition
