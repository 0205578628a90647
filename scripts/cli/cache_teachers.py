# SPDX-License-Identifier: Apache-2.0
"""Run the teachers once per case and store their predictions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.cli.bundle_run import Expression, resolved_config, run_bundle
from scripts.cli.config import config_names
from scripts.cli.options import Parser, add_common_options, context_configs
from scripts.cli.teacher_options import add_teachers_options, teachers_overrides

EXAMPLE = (
    "python -m scripts cache-teachers --data sts --dataset-dir DATA --teachers-dir RUNS --output-dir RUNS/cache\n"
    "python -m scripts distill --data sts --dataset-dir DATA --teachers-dir RUNS --cache-dir RUNS/cache "
    "--output-dir RUNS/distilled"
)


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    add_teachers_options(parser)
    group = parser.add_argument_group("cases")
    group.add_argument("--fold", type=int, metavar="N", help="fold whose cases are cached (default: 0)")
    group.add_argument(
        "--cases",
        choices=["training", "validation", "all"],
        help="which cases of the fold the teachers answer (default: training)",
    )
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--tta", choices=["none", "flips"], help="flips: store the mean over all flips of the image (default: none)"
    )
    group.add_argument(
        "--out-of-fold",
        nargs="*",
        metavar="RUN",
        help="answer each case only by weights that did not train on it: of every --teacher, or of the teacher that "
        "these runs trained on different folds",
    )
    group.add_argument(
        "--predictions", metavar="FOLDER", help="predictions made elsewhere, as a teacher: CASE.npz or CASE.nii.gz"
    )
    group.add_argument(
        "--smooth", type=float, metavar="MM", help="soften masks in --predictions by a Gaussian of this width"
    )
    group.add_argument("--name", help="name of the teacher of --predictions or --out-of-fold RUNS")
    group.add_argument(
        "--maps", action="store_true", help="also store the attention maps of Teach-Former, of --set attention_power=2"
    )
    group.add_argument("--rebuild", action="store_true", help="replace a cache of other weights or preprocessing")
    add_common_options(parser, output="runs/teacher_cache in the bundle's folder")


def run(args: argparse.Namespace) -> None:
    """Fill the cache."""
    context = context_configs(args)
    modalities = resolved_config(args, ["train", *context, "distill", "cache_teachers"], {})["modalities"]
    values = {"fold": args.fold, "cached_cases": args.cases, "tta": args.tta, "smooth": args.smooth}
    values["rebuild"] = args.rebuild or None
    values["out_of_fold"] = None if args.out_of_fold is None else True
    if args.out_of_fold:
        args.teacher = [*(args.teacher or []), _teacher_of_runs(args.out_of_fold, args.name)]
    if args.predictions:
        args.teacher = [*(args.teacher or []), f"{args.name or 'predictions'}=predictions={args.predictions}"]
    overrides = teachers_overrides(args, modalities)
    overrides |= {key: value for key, value in values.items() if value is not None}
    maps = []
    if args.maps:
        overrides["maps"] = Expression("@taps")
        maps = ["methods/teachformer"]
    run_bundle(args, ["train", *context, "distill", *maps, "cache_teachers"], overrides)


def _teacher_of_runs(runs: Sequence[str], name: str | None) -> str:
    """The ``--teacher`` whose weights files are the ``model.pt`` of these runs.

    Raises:
        FileNotFoundError: a run has no weights.
        ValueError: a run is given twice, has no description of its training, or trained no teacher, or another one.
    """
    from scripts.utils.task_file import read_task, task_path

    files = [str(Path(run) / "model.pt") for run in runs]
    repeated = sorted({file for file in files if files.count(file) > 1})
    if repeated:
        raise ValueError(f"--out-of-fold names {repeated[0]} twice. Give each run once.")
    kinds: dict[str, str] = {}  # description -> architecture
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There are no weights at {file}. Give the folders of finished runs of `teacher`.")
        network = (read_task(file) or {}).get("network")
        if not isinstance(network, dict) or not network.get("architecture"):
            raise ValueError(
                f"{task_path(file)} names no architecture of a teacher. Give the folder of a run of `teacher`, or name "
                "network and weights by --teacher NAME=FILE.json --out-of-fold."
            )
        if network["architecture"] not in config_names("teachers"):
            raise ValueError(
                f"{task_path(file)} names the architecture {network['architecture']}, a file that is trusted like "
                "code. Name it yourself: --teacher NAME=FILE.json=WEIGHTS,WEIGHTS --out-of-fold."
            )
        kinds[f"{network['architecture']}:{'+'.join(network['modalities'])}"] = network["architecture"]
    if len(kinds) > 1:
        raise ValueError(f"The runs of --out-of-fold trained different teachers: {', '.join(sorted(kinds))}.")
    kind, architecture = kinds.popitem()
    teacher = f"{name or architecture}={kind}={','.join(files)}"
    print(f"distil with --teacher {teacher}")
    return teacher
