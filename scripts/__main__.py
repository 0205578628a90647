# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts VERB``: composes configs, calls ``monai.bundle run``, prints the command that does the same."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts import bundle_root

CONFIGS = Path(bundle_root()) / "configs"
Overrides = dict[str, Any]


def _names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.json"))


def _settings(args: argparse.Namespace) -> Overrides:
    """The overrides that every verb takes, under their config ids; a string that starts with $ is an expression."""
    device = f"$torch.device('{args.device}')" if args.device else None
    chosen = {
        "dataset_dir": args.dataset_dir,
        "output_dir": args.output_dir,
        "device": device,
        "threads": args.threads,
        "seed": args.seed,
        "allow_missing": args.allow_missing or None,
    }
    for pair in args.set:
        key, _, value = pair.partition("=")
        chosen[key] = _value(value)
    return {key: value for key, value in chosen.items() if value is not None}


def _value(text: str) -> Any:
    """A value of --set: JSON where it is JSON, text otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _quoted(value: Any) -> str:
    """A value as a shell takes it; double quotes inside, so that the shell's own stay readable."""
    return shlex.quote(value if isinstance(value, str) else repr(value).replace("'", '"'))


def _run(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides) -> None:
    """Print the ``monai.bundle run`` line of these configs, then do it."""
    files = [os.path.relpath(CONFIGS / f"{name}.json") for name in configs]
    overrides = {**overrides, **_settings(args)}
    flags = [f"--{key} {_quoted(value)}" for key, value in overrides.items()]
    print(" ".join(["python -m monai.bundle run --config_file", _quoted(files), *flags]), flush=True)
    if args.dry_run:
        return
    from monai.bundle import run

    # It warns of every overlay that lies in a sub folder of configs, before configs/logging.conf is read.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    run(
        config_file=files,
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=str(CONFIGS / "logging.conf"),
        **overrides,
    )


def _context(args: argparse.Namespace) -> list[str]:
    return [f"data/{args.data}", f"scale/{args.scale}"]


def _training(args: argparse.Namespace) -> Overrides:
    chosen = {
        "fold": args.fold,
        "max_epochs": args.epochs,
        "resume": args.resume or None,
        "pretrained": args.pretrained,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def phantom(args: argparse.Namespace) -> None:
    """Write a cohort of phantoms."""
    from scripts.data.phantom import write_phantoms

    write_phantoms(args.output_dir or "runs/phantom/data", cases=args.cases, seed=args.seed or 0)


def train(args: argparse.Namespace) -> None:
    """Train the student alone."""
    _run(args, ["train", *_context(args)], _training(args))


def teacher(args: argparse.Namespace) -> None:
    """Train one teacher."""
    own = {"architecture": args.architecture, "teacher_modalities": args.modalities}
    _run(args, ["train", *_context(args), "teacher"], {**_training(args), **own})


def _teachers(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The teachers of --teacher: ARCHITECTURE[:MODALITY+MODALITY]=WEIGHTS, WEIGHTS a file or "random"."""
    found = {}
    for text in args.teacher or []:
        seen, _, weights = text.partition("=")
        architecture, _, modalities = seen.partition(":")
        if not weights:
            raise ValueError(f"--teacher {text} names no weights: write {text}=FILE, or {text}=random as a control.")
        found[seen.replace(":", "_").replace("+", "_")] = {
            "architecture": architecture,
            "modalities": modalities.split("+") if modalities else _merged(args)["modalities"],
            "weights": None if weights == "random" else weights,
        }
    return found


def _merged(args: argparse.Namespace) -> dict[str, Any]:
    """Plain values of the configs that every training composes, and of --set."""
    merged: dict[str, Any] = {}
    for name in ("train", *_context(args)):
        merged |= json.loads((CONFIGS / f"{name}.json").read_text())
    return {**merged, **_settings(args), **_training(args)}


def _prepare(args: argparse.Namespace, teachers: dict[str, dict[str, Any]], own: Overrides) -> Overrides:
    """Train what gkd builds on, where it is not there yet; returns the distillation's own overrides."""
    from scripts.stages import finished, gkd_stages

    if not teachers:
        raise ValueError("gkd trains a header for each teacher: name them by --teacher ARCHITECTURE=WEIGHTS.")
    epochs = int(_merged(args)["max_epochs"])
    folder = Path(args.stages_dir or Path(args.output_dir or "runs/distilled") / "stages")
    for stage in gkd_stages(folder, teachers, epochs):
        output = folder / stage.name
        if not finished(output):
            print(f"stage {stage.name}", flush=True)
            resume = {"resume": True} if (output / "checkpoint.pt").is_file() else {}
            again = argparse.Namespace(**{**vars(args), "output_dir": str(output)})
            shared = {key: value for key, value in _training(args).items() if key == "fold"}
            _run(again, ["train", *_context(args), *stage.configs], {**shared, **stage.overrides, **resume})
    start = {"pretrained": str(folder / "student" / "model.pt"), "headers_dir": str(folder)}
    return {**own, **start, "max_epochs": epochs - epochs // 2}


def distill(args: argparse.Namespace) -> None:
    """Train the student with its teachers."""
    if args.list:
        print(_methods())
        return
    chosen, teachers = args.method or ["teachformer"], _teachers(args)
    own: Overrides = {**_training(args)}
    if args.teachers_dir:
        own["teachers_dir"] = args.teachers_dir
    if teachers:
        own["teacher_specs"] = teachers
    if "gkd" in chosen:
        own = _prepare(args, teachers, own)
    configs = ["train", *_context(args), "distill", *(f"methods/{method}" for method in chosen)]
    if args.balance is not None and not args.dry_run:
        own |= _balance(args, configs, own)
    _run(args, configs, own)


def _balance(args: argparse.Namespace, configs: Sequence[str], own: Overrides) -> Overrides:
    """The terms' weights by the size of their gradients, as overrides."""
    from scripts.balance import balanced_weights

    start = own.get("pretrained") or args.balance_with
    if not start:
        raise ValueError("--balance needs a student that has begun to learn: name its weights by --balance-with.")
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    weights = balanced_weights(files, {**own, **_settings(args)}, args.balance, start)
    return {f"loss#terms#{name}#weight": weight for name, weight in weights.items()}


def _methods() -> str:
    """One line per method: its name and its terms, each as loss(tap)."""
    lines = []
    for name in _names("methods"):
        config = json.loads((CONFIGS / "methods" / f"{name}.json").read_text())
        terms = [value for key, value in config.items() if key.startswith("loss#terms#")]
        losses = (f"{term['loss']['_target_'].rsplit('.', 1)[-1]}({term['tap']})" for term in terms)
        lines.append(f"{name:<12} {', '.join(losses)}")
    return "\n".join(lines)


def evaluate(args: argparse.Namespace) -> None:
    """Segment a cohort and score it, or score masks made elsewhere."""
    own: Overrides = {"name": args.name} if args.name else {}
    own |= {key: value for key, value in (("weights", args.weights), ("fold", args.fold)) if value is not None}
    if args.curves:
        own["curves"] = args.curves
    if args.predictions:
        own |= {"predictions": args.predictions, "run": "@score", "score#network": "$None"}
    configs = ["inference", *_context(args)]
    if args.architecture:
        configs.append("teacher")
        own |= {"architecture": args.architecture, "teacher_modalities": args.modalities}
    _run(args, [*configs, "evaluate"], own)


def segment(args: argparse.Namespace) -> None:
    """Segment one case onto the reference modality's own grid."""
    output = Path(args.output)
    if not output.name.endswith(".nii.gz"):
        raise ValueError(f"--output is {output}: give a file name that ends in .nii.gz.")
    spec = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text())
    files = {key: getattr(args, key) for key in spec["modalities"] if getattr(args, key)}
    reference = spec["modalities"][0]
    if reference not in files:
        raise ValueError(f"--{reference} is missing: it is the reference modality, on whose grid the mask is written.")
    case = {"case_id": output.name.removesuffix(".nii.gz"), "image": files[reference], **files}
    own: Overrides = {"datalist": [case], "output_dir": str(output.parent), "naming": []}
    if args.weights:
        own["weights"] = args.weights
    _run(args, ["inference", *_context(args)], own)
    if not args.dry_run:
        print(f"mask: {output}")


def report(args: argparse.Namespace) -> None:
    """One report of several evaluations."""
    from scripts.data import datalist
    from scripts.evaluation import compare

    spec = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text())
    cases = datalist(args.data, args.dataset_dir) if args.dataset_dir else []
    output = args.output_dir or "runs/report"
    print(compare(args.evaluations, output, cases, spec["modalities"], args.curves, args.title))
    print(f"report: {Path(output) / 'report.html'}")


def benchmark(args: argparse.Namespace) -> None:
    """Compare all methods on one data set: train, evaluate, one table; goes on where it was stopped."""
    from scripts.comparison import Plan, compare_methods
    from scripts.comparison_table import write_comparison

    if not args.dataset_dir:
        raise ValueError("There is nothing to compare on: name the data set's folder by --dataset-dir.")
    plan = Plan(
        data=args.data,
        dataset_dir=args.dataset_dir,
        scale=args.scale,
        output=Path(args.output_dir or "runs/compare"),
        modalities=tuple(_merged(args)["modalities"]),
        methods=tuple(_names("methods")),
        seeds=tuple(args.seeds),
        epochs=args.epochs or Plan.epochs,
        teacher_epochs=args.teacher_epochs,
        fold=args.fold or 0,
    )
    jobs = compare_methods(plan, args.workers, main, args.only)
    print(write_comparison(plan, jobs, args.json))


def _name_teacher(parser: argparse.ArgumentParser, architecture: str | None) -> None:
    parser.add_argument(
        "--architecture", default=architecture, help="unetr, swinunetr, hdenseformer, uxnet, dynunet or segresnet"
    )
    parser.add_argument("--modalities", nargs="+", default=["ct"], help="what the teacher sees, such as ct pet")


def _shared() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Options of every verb, and those of every training."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", default="sts", choices=_names("data"), help="data set (its config in configs/data)")
    common.add_argument("--dataset-dir", help="folder of the data set, as it was downloaded")
    common.add_argument("--output-dir", help="folder for everything that is written")
    common.add_argument("--scale", default="small", choices=_names("scale"), help="small: two cores; full: one GPU")
    common.add_argument("--device", help="such as cpu or cuda:0; by default a GPU where there is one")
    common.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's choice")
    common.add_argument("--seed", type=int, help="of the initial weights and the augmentation")
    common.add_argument("--allow-missing", action="store_true", help="read absent modalities as zeros")
    common.add_argument("--set", action="append", default=[], metavar="ID=VALUE", help="override any config id")
    common.add_argument("--dry-run", action="store_true", help="only print the monai.bundle command")
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--epochs", type=int, help="length of the training")
    training.add_argument("--fold", type=int, help="fold that validates (default 0)")
    training.add_argument("--pretrained", help="weights to start from, with a fresh schedule")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return common, training


def _parser() -> argparse.ArgumentParser:
    common, training = _shared()
    parser = argparse.ArgumentParser(prog="python -m scripts", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        action: Callable[[argparse.Namespace], None], *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            action.__name__, help=action.__doc__, description=action.__doc__, parents=[common, *parents]
        )
        added.set_defaults(action=action)
        return added

    verb(phantom).add_argument("--cases", type=int, default=24)
    verb(train, training)
    _name_teacher(verb(teacher, training), architecture="unetr")
    distilling = verb(distill, training)
    distilling.add_argument("--method", action="append", choices=_names("methods"), help="may be given more than once")
    distilling.add_argument("--list", action="store_true", help="list the methods, each with its terms, and stop")
    distilling.add_argument("--teachers-dir", help="folder that holds teacher_<modality>/model.pt")
    distilling.add_argument(
        "--teacher",
        action="append",
        metavar="ARCHITECTURE[:MODALITY+MODALITY]=WEIGHTS",
        help="a teacher in place of the default three; may be given more than once; WEIGHTS: a file, or random",
    )
    distilling.add_argument(
        "--balance",
        type=float,
        metavar="SHARE",
        help="weigh the terms so that their gradients together are SHARE times that of the segmentation loss",
    )
    distilling.add_argument("--balance-with", metavar="WEIGHTS", help="student on which --balance measures")
    distilling.add_argument("--stages-dir", help="gkd: folder of its stages (default: OUTPUT_DIR/stages)")
    evaluating = verb(evaluate)
    _name_teacher(evaluating, architecture=None)
    evaluating.add_argument("--weights", help="weights of the network (default: models/model.pt)")
    evaluating.add_argument("--name", help="how the table calls the network")
    evaluating.add_argument("--fold", type=int, help="only this fold's validation cases (default: every case)")
    evaluating.add_argument("--predictions", help="folder of <case_id>.nii.gz to score instead of segmenting")
    evaluating.add_argument("--curves", nargs="+", help="curves.csv files to draw")
    benchmarking = verb(benchmark, training)
    benchmarking.set_defaults(scale="compare")
    benchmarking.add_argument("name", choices=["methods"], help="what to compare")
    benchmarking.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    benchmarking.add_argument("--teacher-epochs", type=int, default=100)
    benchmarking.add_argument("--workers", type=int, default=2, help="trainings at once, of one thread each")
    benchmarking.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="only these rows, and what they need"
    )
    benchmarking.add_argument("--json", metavar="FILE", help="also write the training costs, for machines")
    segmenting = verb(segment)
    for modality in ("ct", "pet", "mr", "t2w", "adc", "hbv"):
        segmenting.add_argument(f"--{modality}", help="file, or DICOM folder (not for PET: SUV is needed)")
    segmenting.add_argument("--output", required=True, help="the mask, .nii.gz")
    segmenting.add_argument("--weights", help="weights of the student (default: models/model.pt)")
    reporting = verb(report)
    reporting.add_argument("--evaluations", nargs="+", required=True, help="folders that `evaluate` wrote")
    reporting.add_argument("--curves", nargs="+", default=[], help="curves.csv files to draw")
    reporting.add_argument("--title", default="Comparison")
    return parser


def _sentence(error: BaseException) -> str:
    """The cause below MONAI's RuntimeErrors, which name only the config item or the transform that failed."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 on bad input (one sentence on stderr), 2 on bad arguments."""
    args = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        args.action(args)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        if os.environ.get("DEBUG"):
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
