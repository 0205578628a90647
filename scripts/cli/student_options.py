# SPDX-License-Identifier: Apache-2.0
"""Options that name a student of the user's own: its network and its segmentation loss, as JSON files."""

from __future__ import annotations

import argparse
import pydoc
from typing import Any

from scripts.cli.bundle_run import TARGET, Overrides, interpreted
from scripts.cli.config import SEPARATOR, Config, read_config
from scripts.cli.options import Parser, parse_set
from scripts.utils.json_files import read_object
from scripts.utils.values import TAPS

LAYERS = "layers"  # key of a network's file: tap -> layer, for methods that compare features
OF_EVERY_NETWORK = {"in_channels", "out_channels"}  # ids in the student's definition that are not its own


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
        ValueError: the file defines no network, or a setting is given that only the included student has.
    """
    if not args.network:
        return {}
    refuse_settings(args, student_ids(), "remove --network")
    if vars(args).get("modality_dropout"):
        raise ValueError("--modality-dropout works with the included student only. Remove it, or remove --network.")
    definition = _read_network(args)[0]
    return {"network_def": interpreted(definition)}


def student_ids() -> set[str]:
    """The config ids that only the included student reads, such as ``student_features`` and ``modality_dropout``."""
    definition = read_config("train")["network_def"]
    references = {value[1:] for value in definition.values() if isinstance(value, str) and value.startswith("@")}
    return references - OF_EVERY_NETWORK


def refuse_settings(args: argparse.Namespace, ids: set[str], remedy: str) -> None:
    """Refuse settings of the included student where they would change nothing.

    Args:
        args: parsed options.
        ids: those of ``student_ids`` that are refused.
        remedy: what to do instead of removing the setting, such as ``remove --network``.

    Raises:
        ValueError: ``--set`` names one.
    """
    for key in parse_set(args.set):
        if key.removeprefix("+").partition(SEPARATOR)[0] in ids:
            raise ValueError(f"--set {key} works with the included student only. Remove it, or {remedy}.")


def loss_overrides(args: argparse.Namespace) -> Overrides:
    """The config override of ``--segmentation-loss``; ValueError where the file defines no loss."""
    if not args.segmentation_loss:
        return {}
    path = args.segmentation_loss
    return {
        "segmentation_loss": interpreted(
            _require_class(path, read_object(path, "definition of a loss"), "loss", "DiceFocalLoss")
        )
    }


def require_own_loss_fits(args: argparse.Namespace, config: Config) -> None:
    """Refuse ``--segmentation-loss`` for a task whose label such a loss cannot read.

    Args:
        args: parsed options.
        config: the merged config of the training.

    Raises:
        ValueError: the task has a sigmoid head, or ignored voxels.
    """
    if args.segmentation_loss and (config["head"] == "sigmoid" or config["ignore"] not in (None, "$None")):
        reason = "a sigmoid head" if config["head"] == "sigmoid" else "voxels to ignore"
        raise ValueError(
            f"--segmentation-loss {args.segmentation_loss} gets class indices, but the task has {reason}. Remove the "
            "option: the included loss handles both."
        )


def layers_overrides(args: argparse.Namespace) -> Overrides:
    """The layers of the own network that a distillation taps, from the key ``layers`` of its file."""
    if not args.network:
        return {}
    return {f"student_layers#{tap}": layer for tap, layer in _read_network(args)[1].items()}


def _read_network(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The definition of ``--network`` and its layers; in the file it stands alone, or under the key ``network``."""
    content = read_object(args.network, "definition of a network")
    definition = content if TARGET in content else content.get("network", content)  # a class may have this argument
    definition = {**definition} if isinstance(definition, dict) else {}
    layers = content.get(LAYERS, {})
    definition.pop(LAYERS, None)
    if not isinstance(layers, dict) or not set(layers) <= set(TAPS):
        raise ValueError(f"{args.network}: layers must name the layer of {', '.join(TAPS)}, or of some of them.")
    return _require_class(args.network, definition, "network", "monai.networks.nets.UNet"), layers


def _require_class(path: str, definition: dict[str, Any], kind: str, example: str) -> dict[str, Any]:
    """The definition, if its class exists and takes its arguments."""
    package = "monai.losses" if kind == "loss" else "monai.networks.nets"
    target = definition.get("_target_")
    if not isinstance(target, str):
        raise ValueError(f'{path} names no {kind}. Add its class, such as "_target_": "{example}".')
    try:
        exists = "." not in target or pydoc.locate(target) is not None  # MONAI finds names without dots itself
    except pydoc.ErrorDuringImport as error:
        raise ValueError(f"{path}: {target} cannot be imported ({error.value}). Correct its module.") from error
    if not exists:
        raise ValueError(f"{path}: there is no {target}. Correct the name, or install its package.")
    from scripts.networks.architecture import parameters, require_arguments

    if parameters(target, package) is not None:  # MONAI finds names in other packages, too
        require_arguments(f"{path}: {target}", definition, package)
    return definition
