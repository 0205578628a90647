# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of inference compares: volumes, and on each the sides, as configs and overrides of the bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.synthetic_body import DRAWN, write_case
from benchmarks.turn_taking import Side
from scripts import bundle_root
from scripts.cli.bundle_run import Expression
from scripts.cli.config import CONFIGS
from scripts.inference.engine_choice import read_export
from scripts.inference.engines import UnavailableError, cpu_has_bf16

MAIN = "256x256x192"
SIZES = ("128x128x96", "192x192x144", "320x320x240")  # only the student, for the plot of time against volume
PATIENT = "patient"  # at full resolution, where the data are
WINDOW, SPACING, OVERLAP = (96, 96, 96), (1.0, 1.0, 1.0), 0.5  # so that the network sees every voxel
WEIGHTS = Path(bundle_root()) / "models" / "model.pt"
REPEATS = 10_000  # entries of a data list, more than any benchmark takes
STUDENT = "student, "  # before the name of its engine
STOCK, TEACHERS, SEGRESNET, NNUNET = f"{STUDENT}stock MONAI", "three teachers", "SegResNet-16", "nnU-Net v2"
WINDOWS = ", windows"  # after the name of an engine that slides the windows of the other sides
# Engines and precisions, of one pass over the volume unless named otherwise; ONNX Runtime knows windows only.
ENGINES = (
    "torch fp32", "torch bf16", "openvino fp32", "openvino bf16", "openvino int8", "onnxruntime fp32",
    f"torch fp32{WINDOWS}", f"openvino bf16{WINDOWS}", f"openvino int8{WINDOWS}",
)  # fmt: skip
SLOW = (TEACHERS, SEGRESNET, NNUNET)  # minutes per case: fewer rounds, and warmed up on a volume of one window


@dataclass(frozen=True)
class Plan:
    """What all volumes share.

    Args:
        data: name of the data set whose modalities and intensities count.
        scale: of the student.
        output: folder of the volumes and masks.
        dataset_dir: folder that holds the patient, or empty.
        threads: of every side; 0 for PyTorch's choice.
        rounds, slow_rounds: turns of the fast and of the slow sides.
        only: parts of the names of the sides to time; empty: those that the volume is meant for.
    """

    data: str
    scale: str
    output: Path
    dataset_dir: str = ""
    threads: int = 0
    rounds: int = 5
    slow_rounds: int = 1
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Volume:
    """A case to segment.

    Args:
        name: of the volume.
        case: its data list's item.
        warm: a case of one window, for sides whose first case is not counted and would take minutes.
        overrides: spacing and windows, or nothing for those of the configs.
        teachers: scale of the teachers.
    """

    name: str
    case: Mapping[str, str]
    warm: Mapping[str, str]
    overrides: Mapping[str, Any]
    teachers: str


def shape_of(name: str) -> tuple[int, ...]:
    """The voxels of a synthetic volume, ``HxWxD``."""
    if not re.fullmatch(r"\d+x\d+x\d+", name):
        raise ValueError(f"--volume {name}: give {PATIENT}, or voxels such as {MAIN}.")
    return tuple(int(size) for size in name.split("x"))


def find_patient(root: Path) -> dict[str, str]:
    """The first patient that is there as DICOM, with PET in SUV from the files beside it, since PET as DICOM has none.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in sorted(root.glob("sts_dicom/*")):
        files = {
            "ct": folder / "CT" / "image",
            "pet": root / "sts" / folder.name / "PET_image.nii.gz",
            "mr": folder / "MR_T1" / "image",
        }
        if all(path.exists() for path in files.values()):
            return {"case_id": folder.name, "image": str(files["ct"]), **{k: str(path) for k, path in files.items()}}
    raise FileNotFoundError(f"{root} holds no patient: expected sts_dicom/ID/CT/image and sts/ID/PET_image.nii.gz.")


def make_volume(name: str, plan: Plan) -> Volume:
    """Find or write a volume's files."""
    folder = plan.output / "volumes"
    if name == PATIENT:
        case = find_patient(Path(plan.dataset_dir))
        small = json.loads((CONFIGS / "data" / f"{plan.data}.json").read_text(encoding="utf-8"))["patch"]
        return Volume(name, case, write_case(folder / "warm", small), {}, teachers_scale(name))
    overrides = {"patch": list(WINDOW), "spacing": list(SPACING), "overlap": OVERLAP}
    case = write_case(folder / name, shape_of(name))
    return Volume(name, case, write_case(folder / "window", WINDOW), overrides, teachers_scale(name))


def all_sides(volume: Volume, plan: Plan) -> list[Side]:
    """Every side on a volume, the student's engines first."""
    data = ("inference", f"data/{plan.data}")
    student, teachers = (*data, f"scale/{plan.scale}"), (*data, f"scale/{volume.teachers}", "benchmark/stock")
    modalities = json.loads((CONFIGS / "data" / f"{plan.data}.json").read_text(encoding="utf-8"))["modalities"]
    random: dict[str, Any] = {"handlers": []}
    wide = {"architecture": "segresnet", "teacher_modalities": modalities}
    wide["architectures"] = {"segresnet": {"init_filters": 16}}
    named: list[tuple[str, tuple[str, ...], dict[str, Any]]]
    named = [(STUDENT + name, student, _engine(name)) for name in ENGINES]
    named += [
        (STOCK, (*student, "benchmark/stock"), {}),
        (TEACHERS, (*teachers, "benchmark/teachers"), random),
        (SEGRESNET, (*teachers, "teacher"), {**random, **wide}),
        (NNUNET, (*data, "benchmark/nnunet"), random),
    ]
    return [
        Side(name, configs, {**_common(name, volume, plan), **own, **_own_window(name)}) for name, configs, own in named
    ]


def _common(name: str, volume: Volume, plan: Plan) -> dict[str, Any]:
    """Overrides of every side: the same case again and again, after one to warm up on."""
    return {
        "device": Expression("$torch.device('cpu')"),
        "threads": plan.threads,
        "naming": [],
        "case": dict(volume.case),
        "warm": dict(volume.warm if name in SLOW else volume.case),
        "cases": Expression(f"$[@warm] + [@case] * {REPEATS}"),
        "output_dir": str(mask_path(name, volume, plan).parent),
        **volume.overrides,
    }


def mask_path(name: str, volume: Volume, plan: Plan) -> Path:
    """The mask that a side writes."""
    folder = re.sub(r"\W+", "_", name)
    return plan.output / "masks" / volume.name / folder / f"{volume.case['case_id']}.nii.gz"


def _missing(name: str) -> str:
    """Why a side cannot be timed here; empty where it can."""
    if name == NNUNET:
        return "" if find_spec("nnunetv2") else "nnunetv2 is not installed (make bench-env)"
    if not is_engine(name) or name.startswith(f"{STUDENT}torch"):
        return ""
    model = name.removeprefix(STUDENT).removesuffix(WINDOWS)
    if not find_spec(model.split()[0]):
        return f"{model.split()[0]} is not installed (make bench-env)"
    try:
        record = read_export(WEIGHTS)
        if model == "openvino bf16" and not cpu_has_bf16():
            return "this CPU has no bf16"
    except UnavailableError as error:
        return str(error).rstrip(".")
    if model in record["models"]:
        return ""
    reasons = " and ".join(record.get("refused", {}).get(model, {}).get("because", []))
    on = f"export refused it on {record['compared_on']['source']}: {reasons}" if reasons else ""
    return on or f"no {model} was exported from {WEIGHTS.name}"


def _engine(name: str) -> dict[str, Any]:
    """Overrides of an engine's side: one pass over the volume, unless its name says windows."""
    engine, precision = name.removesuffix(WINDOWS).split()
    return {"engine": engine, "engine_precision": precision, "whole_volume": not name.endswith(WINDOWS)}


def _own_window(name: str) -> dict[str, Any]:
    """ONNX Runtime takes windows of the exported size only, whatever the volume asks for."""
    if name != f"{STUDENT}onnxruntime fp32" or _missing(name):
        return {}
    return {"patch": read_export(WEIGHTS)["window"]}


def choose(sides: Sequence[Side], volume: str, plan: Plan, best: str = "") -> tuple[list[Side], list[str]]:
    """The sides to time on a volume, and a sentence for each that is left out though it was meant.

    Args:
        sides: all of them.
        volume: the volume's name.
        plan: names the sides that the user wants, if any.
        best: the student's fastest engine, where it is known: volumes of the plot time no other.
    """
    meant = [side for side in sides if _meant(side.name, volume, plan.only, best)]
    if not meant:
        raise ValueError(f"--only {' '.join(plan.only)} names no side of {', '.join(side.name for side in sides)}.")
    reasons = {side.name: _missing(side.name) for side in meant}
    found = [side for side in meant if not reasons[side.name]]
    return found, [f"{name} is left out: {reason}." for name, reason in reasons.items() if reason]


def _meant(name: str, volume: str, only: Sequence[str], best: str) -> bool:
    if only:
        return any(_called(name, part.lower()) for part in only)
    if volume in SIZES:
        return name in (STOCK, best) or (not best and is_engine(name))
    return volume != PATIENT or is_engine(name) or name in (STOCK, TEACHERS)


def _called(name: str, part: str) -> bool:
    """Whether the user means this side: by its name, with or without the student's, or by a part of it."""
    names = [STUDENT + engine for engine in ENGINES]
    exact = {each.lower() for each in [*ENGINES, *names, STOCK, TEACHERS, SEGRESNET, NNUNET]}
    name = name.lower()
    return part in (name, name.removeprefix(STUDENT)) if part in exact else part in name


def is_engine(name: str) -> bool:
    """Whether a side is the student in one of the bundle's engines."""
    return name.removeprefix(STUDENT) in ENGINES


def teachers_scale(volume: str) -> str:
    """The size of the teachers that belong to a volume: the shipped ones see the patient at the shipped spacing."""
    return "small" if volume == PATIENT else "full"


def check_student(modalities: Sequence[str], scale: str) -> None:
    """Refuse what the shipped weights are not of."""
    if list(modalities) != list(DRAWN) or scale != "small":
        raise ValueError(
            f"The benchmark runs the shipped weights, which are of {', '.join(DRAWN)} and of the scale small: leave "
            "out --data and --scale."
        )
