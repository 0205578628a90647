# SPDX-License-Identifier: Apache-2.0
"""Options that name the teachers of a distillation."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from scripts.cli.bundle_run import trusted_classes
from scripts.cli.config import SEPARATOR, config_names, read_config
from scripts.cli.options import Parser, parse_set
from scripts.utils.json_files import read_object

FILE_ORIGINS = ("predictions", "nnunet")  # teachers that are a folder
LABEL = "label"  # in a teacher's place: the control of every distillation


def add_teachers_options(parser: Parser) -> None:
    """Options that name the trained teachers of a distillation."""
    parser.add_argument("--teachers-dir", metavar="DIR", help="folder of teacher_<modality>/model.pt")
    parser.add_argument(
        "--teacher",
        action="append",
        metavar="SPEC",
        help="a teacher instead of the default three, repeatable: [NAME=]ARCHITECTURE[:MODALITY+MODALITY]=WEIGHTS, "
        "NAME=FILE.json, NAME=predictions=FOLDER, NAME=nnunet=FOLDER, or label (a control). WEIGHTS is a file, several "
        "files with commas between them (an ensemble), or random",
    )
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="accept cases without a label: on them the student learns from the teachers only",
    )


def teacher_specs(args: argparse.Namespace, modalities: list[str]) -> dict[str, dict[str, Any]]:
    """The teachers of ``--teacher``, as the config id ``teacher_specs``.

    A teacher is ``ARCHITECTURE[:MODALITY+MODALITY]=WEIGHTS``, with ``NAME=`` or ``NAME:`` in front where it needs a
    name of its own, and where the architecture may be the path of a file; or ``NAME=FILE.json`` with the keys of a
    specification (docs/how_to/own_teacher.md); or ``label``, the label in a teacher's place. The text of a
    specification is not evaluated, but ``_target_`` names code: use only files that you trust.

    Args:
        args: parsed options.
        modalities: of the data set, for teachers that name none.

    Raises:
        ValueError: a teacher without weights, a file that is no specification, or two teachers of one name.
    """
    specs: dict[str, dict[str, Any]] = {}
    for text in args.teacher or []:
        name, spec = _teacher_spec(text, modalities)
        if name in specs:
            raise ValueError(f"Two teachers are named {name}. Give each a name: --teacher NAME=ARCHITECTURE=WEIGHTS.")
        specs[name] = spec if spec.get("label") else {"modalities": modalities, **trusted_classes(spec)}
    return specs


def _teacher_spec(text: str, modalities: list[str]) -> tuple[str, dict[str, Any]]:
    """The name and the specification of one ``--teacher``."""
    first, equals, rest = text.partition("=")
    if text == LABEL or rest == LABEL:
        return first, {"label": True}
    if not equals or not first or not rest:
        raise ValueError(f"--teacher {text} has no weights. Write ARCHITECTURE=FILE, or ARCHITECTURE=random.")
    if rest.endswith(".json"):
        return first, read_object(rest, "specification of a teacher")
    second, equals, weights = rest.partition("=")
    if equals and re.fullmatch(r"(\w+|.+\.json)(:[\w+-]+)?", second):
        name, network = first, second
    else:
        name, network, weights = "", first, rest
    architecture, _, seen = network.partition(":")
    second = seen.partition(":")[0]
    if not name and (second in [*config_names("teachers"), *FILE_ORIGINS] or second.endswith(".json")):
        name, network = architecture, seen  # NAME:ARCHITECTURE[:MODALITY+MODALITY]
        architecture, _, seen = network.partition(":")
    unknown = sorted(set(seen.split("+")) - set(modalities)) if seen else []
    if unknown:
        raise ValueError(
            f"--teacher {text}: {unknown[0]} is no modality ({', '.join(modalities)}) and no architecture "
            f"({', '.join(config_names('teachers'))})."
        )
    spec: dict[str, Any] = {"architecture": architecture, "weights": _weights(weights)}
    if architecture in FILE_ORIGINS:
        spec = {architecture: weights}
    if seen:
        spec["modalities"] = seen.split("+")
    return name or os.path.basename(network).replace(".json", "").replace(":", "_").replace("+", "_"), spec


def _weights(text: str) -> str | list[str] | None:
    files = [file for file in text.split(",") if file]
    if files == ["random"]:
        return None
    return text if len(files) < 2 or os.path.exists(text) else files


def teachers_overrides(args: argparse.Namespace, modalities: list[str]) -> dict[str, Any]:
    """The config overrides of ``--teachers-dir`` and ``--teacher``.

    Raises:
        ValueError: see ``teacher_specs``; both are named; or no teacher is named, and the default teachers need other
            modalities.
    """
    specs = teacher_specs(args, modalities)
    if specs and args.teachers_dir:
        raise ValueError(
            f"--teachers-dir holds the weights of the default teachers, and {', '.join(specs)} replace them. Remove "
            "--teachers-dir, or name each teacher with its weights."
        )
    named = {key.removeprefix("+").partition(SEPARATOR)[0] for key in parse_set(args.set)}
    if not specs and not named & {"teachers", "teacher_specs"}:
        defaults = read_config("distill")["teacher_specs"].values()
        missing = [modality for spec in defaults for modality in spec["modalities"] if modality not in modalities]
        if missing:
            raise ValueError(
                f"This task has no {', '.join(missing)} for the three default teachers, only {', '.join(modalities)}. "
                "Name yours: --teacher ARCHITECTURE=WEIGHTS."
            )
    values = {"teachers_dir": args.teachers_dir, "teacher_specs": specs, "unlabelled": args.unlabelled}
    return {key: value for key, value in values.items() if value}
