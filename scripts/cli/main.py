# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts VERB``: composes configs, calls ``monai.bundle run``, prints the command that does the same."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.cli.bundle_run import Expression, interpreted, protected, shell_word
from scripts.cli.options import CONFIGS, build_parser, config_names

Overrides = dict[str, Any]
# What gkd's stages take from the options of a training.
_SHARED = ("fold", "experiment_tracking", "modality_dropout", "volumes_dir")


def _settings(args: argparse.Namespace) -> Overrides:
    """The overrides that every verb takes, under their config ids."""
    device = Expression(f"$torch.device({args.device!r})") if args.device else None
    chosen = {
        "dataset_dir": args.dataset_dir,
        "output_dir": args.output_dir,
        "device": device,
        "threads": args.threads,
        "seed": args.seed,
        "data_list": os.path.abspath(args.data_list) if args.data_list else None,
        "allow_outside": args.allow_outside or None,
        "allow_missing": args.allow_missing or None,
        "checks#max_voxels": args.max_voxels,
        "checks#replace_nonfinite": args.replace_nonfinite,
        "checks#series_uids": args.series_uid or None,
    }
    for pair in args.set:
        key, _, value = pair.partition("=")
        chosen[key] = _value(value)
    return {key: value for key, value in chosen.items() if value is not None}


def _value(text: str) -> Any:
    """A value of --set: JSON where it is JSON, text otherwise; its texts may be expressions."""
    try:
        return interpreted(json.loads(text))
    except json.JSONDecodeError:
        return Expression(text)


def _run(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides) -> None:
    """Print the ``monai.bundle run`` line of these configs, then do it."""
    files = [os.path.relpath(CONFIGS / f"{name}.json") for name in configs]
    overrides = protected({**overrides, **_settings(args)})
    flags = [f"--{key} {shell_word(value)}" for key, value in overrides.items()]
    several = (
        f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 2)}"
        if "multi_gpu_train" in configs
        else "python"
    )
    print(" ".join([several, "-m monai.bundle run --config_file", shell_word(files), *flags]), flush=True)
    if args.dry_run:
        return
    from monai.bundle import run

    from scripts.utils.output_lock import release

    # It warns of every overlay that lies in a sub folder of configs, before configs/logging.conf is read.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    try:
        run(
            config_file=files,
            meta_file=str(CONFIGS / "metadata.json"),
            logging_file=str(CONFIGS / "logging.conf"),
            **overrides,
        )
    finally:
        release()


def _context(args: argparse.Namespace) -> list[str]:
    return [f"data/{args.data}", f"scale/{args.scale}"]


def _training(args: argparse.Namespace) -> Overrides:
    """The overrides of a training's options, as far as the verb has them."""
    given = vars(args)
    if given.get("tracking") and not args.dry_run:  # rather now than when the cases have been loaded
        from scripts.training.tracking import require_mlflow

        require_mlflow()
    ids = {
        "fold": "fold",
        "epochs": "max_epochs",
        "resume": "resume",
        "pretrained": "pretrained",
        "volumes_dir": "volumes_dir",
        "modality_dropout": "modality_dropout",
        "tracking": "experiment_tracking",
    }
    # An option that was not given is None, a switch False; fold 0 counts.
    return {key: given[name] for name, key in ids.items() if given.get(name) is not None and given[name] is not False}


def _processes(args: argparse.Namespace) -> list[str]:
    """The overlay of several processes, where they are asked for and torchrun has started this one."""
    if not args.multi_gpu:
        return []
    if "RANK" not in os.environ and not args.dry_run:
        raise ValueError(
            "--multi-gpu needs one process per GPU: start it by torchrun --nproc_per_node=N -m scripts ..."
        )
    return ["multi_gpu_train"]


def phantom(args: argparse.Namespace) -> None:
    """Write a cohort of phantoms."""
    from scripts.data.cohorts.phantom import write_phantoms

    write_phantoms(args.output_dir or "runs/phantom/data", cases=args.cases, seed=args.seed or 0)


def _rules(settings: Overrides) -> Any:
    """The rules on images among these settings."""
    from scripts.data import Rules

    return Rules(**{k.removeprefix("checks#"): value for k, value in settings.items() if k.startswith("checks#")})


def check(args: argparse.Namespace) -> None:
    """Judge every file of a cohort and list all that is wrong with it."""
    from scripts.data.cohort_check import check_and_tell

    if not args.dataset_dir and not args.data_list:
        raise ValueError("There is nothing to check: name a folder by --dataset-dir, or a table by --data-list.")
    if not args.dry_run:
        spec = {**_merged(args), **json.loads((CONFIGS / "data" / f"{args.data}.json").read_text(encoding="utf-8"))}
        check_and_tell(args, spec, _rules(spec))


def train(args: argparse.Namespace) -> None:
    """Train the student alone."""
    _run(args, ["train", *_context(args), *_processes(args)], _training(args))


def teacher(args: argparse.Namespace) -> None:
    """Train one teacher."""
    own = {"architecture": args.architecture, "teacher_modalities": args.modalities}
    _run(args, ["train", *_context(args), "teacher", *_processes(args)], {**_training(args), **own})


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


def _named_teachers(args: argparse.Namespace) -> Overrides:
    """Where the teachers are, as overrides."""
    found = {"teachers_dir": args.teachers_dir, "teacher_specs": _teachers(args)}
    return {key: value for key, value in found.items() if value}


def cache_teachers(args: argparse.Namespace) -> None:
    """Run the teachers once per training case and keep their predictions."""
    chosen = {"fold": args.fold, "rebuild": args.rebuild or None, "maps": Expression("@taps") if args.maps else None}
    own = {**_named_teachers(args), **{key: value for key, value in chosen.items() if value is not None}}
    maps = ["methods/teachformer"] if args.maps else []
    _run(args, ["train", *_context(args), "distill", *maps, "cache_teachers"], own)


def _merged(args: argparse.Namespace) -> dict[str, Any]:
    """Plain values of the configs that every training composes, and of --set."""
    merged: dict[str, Any] = {}
    for name in ("train", *_context(args)):
        merged |= json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return {**merged, **_settings(args), **_training(args)}


def _prepare(args: argparse.Namespace, teachers: dict[str, dict[str, Any]], own: Overrides) -> Overrides:
    """Train what gkd builds on, where it is not there yet; returns the distillation's own overrides."""
    from scripts.distillation.staged_training import finished, gkd_stages

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
            shared = {key: value for key, value in _training(args).items() if key in _SHARED}
            _run(again, ["train", *_context(args), *stage.configs], {**shared, **stage.overrides, **resume})
    start = {"pretrained": str(folder / "student" / "model.pt"), "headers_dir": str(folder)}
    return {**own, **start, "max_epochs": epochs - epochs // 2}


def distill(args: argparse.Namespace) -> None:
    """Train the student with its teachers."""
    if args.list:
        print(_methods())
        return
    chosen, teachers = args.method or ["teachformer"], _teachers(args)
    own: Overrides = {**_training(args), **_named_teachers(args)}
    if "gkd" in chosen:
        if args.cache_dir or args.multi_gpu:
            raise ValueError(
                "gkd needs its teachers' features and trains in stages, one process after the other: leave out "
                "--cache-dir and --multi-gpu."
            )
        own = _prepare(args, teachers, own)
    configs = ["train", *_context(args), "distill", *(f"methods/{method}" for method in chosen)]
    if args.cache_dir:
        configs.append("cached")
        own["cache_dir"] = args.cache_dir
    configs += _processes(args)
    if args.balance is not None and not args.dry_run:
        own |= _balance(args, configs, own)
    _run(args, configs, own)


def _balance(args: argparse.Namespace, configs: Sequence[str], own: Overrides) -> Overrides:
    """The terms' weights by the size of their gradients, as overrides."""
    from scripts.distillation.gradient_balance import balanced_weights

    start = own.get("pretrained") or args.balance_with
    if not start:
        raise ValueError("--balance needs a student that has begun to learn: name its weights by --balance-with.")
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    overrides = protected({**own, **_settings(args), "rank": 0, "world": 1})
    weights = balanced_weights(files, overrides, args.balance, start)
    return {f"loss#terms#{name}#weight": weight for name, weight in weights.items()}


def _methods() -> str:
    """One line per method: its name and its terms, each as loss(tap)."""
    lines = []
    for name in config_names("methods"):
        config = json.loads((CONFIGS / "methods" / f"{name}.json").read_text(encoding="utf-8"))
        terms = [value for key, value in config.items() if key.startswith("loss#terms#")]
        losses = (f"{term['loss']['_target_'].rsplit('.', 1)[-1]}({term['tap']})" for term in terms)
        lines.append(f"{name:<12} {', '.join(losses)}")
    return "\n".join(lines)


def _engine(args: argparse.Namespace) -> Overrides:
    """The overrides of --engine and --precision."""
    chosen = {"engine": args.engine, "engine_precision": args.precision}
    return {key: value for key, value in chosen.items() if value}


def _profile(args: argparse.Namespace) -> list[str]:
    """The overlay of --profile."""
    return ["profile"] if args.profile else []


def evaluate(args: argparse.Namespace) -> None:
    """Segment a cohort and score it, or score masks made elsewhere."""
    own: Overrides = {"name": args.name, **_engine(args)} if args.name else _engine(args)
    own |= {key: value for key, value in (("weights", args.weights), ("fold", args.fold)) if value is not None}
    own |= {key: value for key, value in (("curves", args.curves), ("present", args.present)) if value}
    if args.predictions:
        if args.profile or _engine(args):
            raise ValueError(
                "--predictions scores masks that are there: leave out --engine, --precision and --profile."
            )
        own |= {"predictions": args.predictions, "run": Expression("@score"), "score#network": Expression("$None")}
    configs = ["inference", *_context(args)]
    if args.architecture:
        configs.append("teacher")
        own |= {"architecture": args.architecture, "teacher_modalities": args.modalities}
        own.setdefault("engine", "torch")  # only students are exported
    _run(args, [*configs, "evaluate", *_profile(args)], own)


def segment(args: argparse.Namespace) -> None:
    """Segment one case onto the grid of its first modality, or every case of a table."""
    from scripts.cli.segment_case import one_case

    configs = ["inference", *_context(args), *_profile(args)]
    own: Overrides = _engine(args) | ({"weights": args.weights} if args.weights else {})
    if args.data_list:
        from scripts.cli.segment_cohort import refuse_options, segment_list

        refuse_options(args)
        if args.dry_run:
            return _run(args, configs, own)  # the same masks, one after the other in one process
        return segment_list(args, segment, _sentence)
    spec = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text(encoding="utf-8"))
    output, files, reference = one_case(args, spec["modalities"], bool(_settings(args).get("allow_missing")))
    case = {"case_id": output.name.removesuffix(".nii.gz"), "image": files[reference]}
    own |= {"datalist": [case | ({} if args.stacked else files)], "naming": [], "reference": reference}
    own |= {"output_dir": str(output.parent), "manifest_name": f"{case['case_id']}.manifest.json"}
    own |= {"locked": str(output)} | ({"stacked": True} if args.stacked else {})
    _run(args, configs, own)
    if not args.dry_run:
        print(f"mask: {output}")
        if args.report:
            from scripts.report.case_view import report_mask

            rules = _rules(_settings(args))
            print(f"report: {report_mask(output, files, bool(args.stacked), rules, spec['intensity'])}")


def dicom(args: argparse.Namespace) -> None:
    """Segment a DICOM study: NIfTI, DICOM SEG and, on request, RTSTRUCT."""
    from scripts.cli.segment_dicom import segment_study

    segment_study(args, segment)


def export(args: argparse.Namespace) -> None:
    """Export a student's weights for other engines; writes only what answers as PyTorch does."""
    given = vars(args)
    own = {key: given[key] for key in ("weights", "fold", "formats", "precisions") if given[key] is not None}
    _run(args, ["inference", *_context(args), "export"], own)


def report(args: argparse.Namespace) -> None:
    """One report of several evaluations."""
    from scripts.data import datalist
    from scripts.evaluation.compare import compare

    spec = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text(encoding="utf-8"))
    cases = datalist(args.data, args.dataset_dir, args.data_list, spec["modalities"], args.allow_outside)
    output = args.output_dir or "runs/report"
    print(compare(args.evaluations, output, cases, spec["intensity"], args.curves, args.title, spec["labels"]))
    print(f"report: {Path(output) / 'report.html'}")


def benchmark(args: argparse.Namespace) -> None:
    """Compare methods, subsets of the modalities, or the cost of training; goes on where it was stopped."""
    benchmarks = importlib.import_module("benchmarks.__main__")
    args.scale = args.scale or benchmarks.SCALES.get(args.name, "small")
    run = getattr(benchmarks, args.name)
    print(run(args, _merged(args)["modalities"], main))


ACTIONS = (phantom, check, train, teacher, cache_teachers, distill, evaluate, segment, dicom, export, report, benchmark)


def _sentence(error: BaseException) -> str:
    """The cause below MONAI's RuntimeErrors, which name only the config item or the transform that failed."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 on bad input (one sentence on stderr), 2 on bad arguments."""
    args = build_parser(ACTIONS).parse_args(arguments)
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
