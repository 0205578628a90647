# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``python -m scripts``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts import bundle_root

CONFIGS = Path(bundle_root()) / "configs"
Action = Callable[[argparse.Namespace], None]
Parser = argparse.ArgumentParser
MODALITIES = ("ct", "pet", "mr", "t2w", "adc", "hbv")
TRAININGS = ("train", "teacher", "distill")


def config_names(folder: str) -> list[str]:
    """Names of the configs in a folder of configs/."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.json"))


def count(text: str) -> int:
    """An argument's whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few: give at least 1")
    return number


def build_parser(actions: Sequence[Action]) -> Parser:
    """A verb for each action, named after it and described by its docstring.

    Args:
        actions: what the verbs do with their arguments.
    """
    common, training = _common(), _training()
    # Parents share their actions with every verb, so that another default needs another parent.
    compared = _common(scale=None)  # each benchmark has its own
    parser = Parser(prog="python -m scripts", description="Train, distil, segment, score: see docs/README.md.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    added: dict[str, Parser] = {}
    for action in actions:
        name = action.__name__.replace("_", "-")
        shared = compared if name == "benchmark" else common
        parents = [shared, training] if name in TRAININGS else [shared]
        added[name] = verbs.add_parser(name, help=action.__doc__, description=action.__doc__, parents=parents)
        added[name].set_defaults(action=action)
    for name in ("train", "teacher", "distill"):
        added[name].add_argument("--tracking", choices=["mlflow"], help="also track by MLflow; TensorBoard always does")
    added["phantom"].add_argument("--cases", type=int, default=24)
    added["check"].add_argument("--json", metavar="FILE", help="also write every finding, for machines")
    added["check"].add_argument("--workers", type=count, default=2, help="processes")
    _name_teacher(added["teacher"], architecture="unetr")
    _student(added["train"])
    _student(added["distill"])
    _distill(added["distill"])
    _cache(added["cache-teachers"])
    _evaluate(added["evaluate"])
    _segment(added["segment"])
    _dicom(added["dicom"])
    for name in ("evaluate", "segment", "dicom"):
        _engine(added[name])
    _export(added["export"])
    added["report"].add_argument("--evaluations", nargs="+", required=True, help="folders that `evaluate` wrote")
    added["report"].add_argument("--curves", nargs="+", default=[], help="curves.csv files to draw")
    added["report"].add_argument("--title", default="Comparison")
    _benchmark(added["benchmark"])
    return parser


def _common(scale: str | None = "small") -> Parser:
    """Options of every verb."""
    common = Parser(add_help=False)
    common.add_argument("--data", default="sts", choices=config_names("data"), help="data set (a config of its own)")
    common.add_argument("--dataset-dir", help="folder of the data set, as it was downloaded")
    common.add_argument("--output-dir", help="folder for everything that is written")
    common.add_argument("--scale", default=scale, choices=config_names("scale"), help="small: two cores; full: a GPU")
    common.add_argument("--device", help="such as cpu or cuda:0; by default a GPU where there is one")
    common.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's choice")
    common.add_argument("--seed", type=int, help="of the initial weights and the augmentation")
    common.add_argument("--data-list", metavar="FILE", help="a table of cases (.csv, .json) in place of a known layout")
    common.add_argument("--allow-outside", action="store_true", help="accept paths of the list outside of its folder")
    common.add_argument("--max-voxels", type=int, help="refuse files that claim more (default 2^30)")
    common.add_argument("--replace-nonfinite", type=float, metavar="VALUE", help="in place of NaN and infinite voxels")
    common.add_argument(
        "--series-uid", action="append", metavar="UID", help="DICOM series where a folder holds several"
    )
    common.add_argument("--allow-missing", action="store_true", help="read absent modalities as zeros")
    common.add_argument("--set", action="append", default=[], metavar="ID=VALUE", help="override any config id")
    common.add_argument("--dry-run", action="store_true", help="only print the monai.bundle command")
    return common


def _training() -> Parser:
    """Options of every training."""
    training = Parser(add_help=False)
    training.add_argument("--epochs", type=int, help="length of the training")
    training.add_argument("--fold", type=int, help="fold that validates (default 0)")
    training.add_argument("--pretrained", help="weights to start from, with a fresh schedule")
    training.add_argument("--volumes-dir", help="keep preprocessed cases on disk there, for cohorts larger than memory")
    training.add_argument("--multi-gpu", action="store_true", help="one process per GPU: start it by torchrun")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return training


def _student(parser: Parser) -> None:
    """Options of every training of a student."""
    parser.add_argument(
        "--modality-dropout",
        type=float,
        metavar="P",
        help="the student loses each modality with this probability while it trains; its teachers see all",
    )


def _name_teacher(parser: Parser, architecture: str | None) -> None:
    names = "unetr, swinunetr, hdenseformer, uxnet, dynunet or segresnet"
    parser.add_argument("--architecture", default=architecture, help=names)
    parser.add_argument("--modalities", nargs="+", default=["ct"], help="what the teacher sees, such as ct pet")


def _name_teachers(parser: Parser) -> None:
    parser.add_argument("--teachers-dir", help="folder that holds teacher_<modality>/model.pt")
    parser.add_argument(
        "--teacher",
        action="append",
        metavar="ARCHITECTURE[:MODALITY+MODALITY]=WEIGHTS",
        help="a teacher in place of the default three; may be given more than once; WEIGHTS: a file, or random",
    )


def _cache(parser: Parser) -> None:
    _name_teachers(parser)
    parser.add_argument("--fold", type=int, help="whose training cases are cached (default 0)")
    parser.add_argument("--maps", action="store_true", help="also cache the attention maps that Teach-Former compares")
    parser.add_argument("--rebuild", action="store_true", help="replace a cache of other weights or preprocessing")


def _distill(parser: Parser) -> None:
    methods = config_names("methods")
    _name_teachers(parser)
    parser.add_argument("--method", action="append", choices=methods, help="may be given more than once")
    parser.add_argument("--list", action="store_true", help="list the methods, each with its terms, and stop")
    parser.add_argument("--cache-dir", help="folder that cache-teachers wrote: the teachers are read, not run")
    parser.add_argument(
        "--balance",
        type=float,
        metavar="SHARE",
        help="weigh the terms so that their gradients together are SHARE times that of the segmentation loss",
    )
    parser.add_argument("--balance-with", metavar="WEIGHTS", help="student on which --balance measures")
    parser.add_argument("--stages-dir", help="gkd: folder of its stages (default: OUTPUT_DIR/stages)")


def _evaluate(parser: Parser) -> None:
    _name_teacher(parser, architecture=None)
    parser.add_argument("--weights", help="weights of the network (default: models/model.pt)")
    parser.add_argument("--name", help="how the table calls the network")
    parser.add_argument("--fold", type=int, help="only this fold's validation cases (default: every case)")
    parser.add_argument("--present", nargs="+", metavar="MODALITY", help="as if the cases had no others (default: all)")
    parser.add_argument("--predictions", help="folder of <case_id>.nii.gz to score instead of segmenting")
    parser.add_argument("--curves", nargs="+", help="curves.csv files to draw")


def _dicom(parser: Parser) -> None:
    parser.set_defaults(**dict.fromkeys(MODALITIES), stacked=None, report=False, bids=False)
    parser.add_argument("--study", required=True, help="folder of one DICOM study; its series may lie in sub folders")
    parser.add_argument("--rtstruct", action="store_true", help="also write an RT structure set")
    parser.add_argument("--weights", help="weights of the student (default: models/model.pt)")


def _segment(parser: Parser) -> None:
    for modality in MODALITIES:
        parser.add_argument(f"--{modality}", help="file, or DICOM folder")
    parser.add_argument("--stacked", metavar="FILE", help="one 4D file whose last axis is the modalities, in order")
    parser.add_argument("--output", help="the mask, .nii.gz")
    parser.add_argument("--workers", type=count, default=1, help="with --data-list: cases at a time")
    parser.add_argument("--bids", action="store_true", help="with --data-list: named as BIDS derivatives")
    parser.add_argument("--report", action="store_true", help="also write OUTPUT's name.report.html: slices and volume")
    parser.add_argument("--weights", help="weights of the student (default: models/model.pt)")


def _engine(parser: Parser) -> None:
    """Names as in ``scripts.inference.engines``, which would have to import PyTorch first."""
    parser.add_argument(
        "--engine",
        choices=["auto", "torch", "openvino", "onnxruntime"],
        help="what runs the network (default auto: OpenVINO where `export` has been run and it is installed)",
    )
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16", "int8"], help="of the engine (default auto: bf16 or fp32)"
    )
    parser.add_argument("--profile", action="store_true", help="also print where the time goes, stage by stage")


def _export(parser: Parser) -> None:
    parser.add_argument("--weights", help="weights of the student (default: models/model.pt)")
    parser.add_argument("--fold", type=int, help="whose validation cases are compared on (default 0)")
    parser.add_argument("--formats", nargs="+", choices=["onnx", "openvino", "torchscript"], help="default: all")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=["fp32", "bf16", "int8"],
        help="of OpenVINO (default: fp32 bf16); int8 needs --dataset-dir",
    )


def _benchmark(parser: Parser) -> None:
    parser.add_argument(
        "name", choices=["methods", "missing", "training", "scaling", "inference", "metrics"], help="what to compare"
    )
    parser.add_argument("--epochs", type=int, help="of every student (scaling: of every training)")
    parser.add_argument("--fold", type=int, help="fold that is scored (default 0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--rounds", type=int, default=5, help="training, scaling, inference, metrics: turns of a side")
    parser.add_argument("--teacher-epochs", type=int, default=100)
    parser.add_argument("--workers", type=count, default=2, help="trainings at once, of one thread each")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="only these rows and what they need, or these sides"
    )
    parser.add_argument("--table", action="store_true", help="train nothing: write the table of what is there")
    parser.add_argument("--json", metavar="FILE", help="also write the costs, for machines")
    parser.add_argument("--slow-rounds", type=int, default=1, help="inference: turns of teachers and nnU-Net")
    parser.add_argument("--volume", nargs="+", metavar="NAME", help="inference: 256x256x192, or patient (default: all)")
    parser.add_argument("--plot", metavar="FILE", help="inference: draw the seconds against the voxels")
