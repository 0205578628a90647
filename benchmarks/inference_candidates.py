# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of inference compares: its volumes and, for each volume, its candidates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.interleaved_timing import Candidate
from benchmarks.synthetic_body import MODALITIES, write_case
from scripts import bundle_root
from scripts.cli.bundle_run import Expression
from scripts.cli.config import read_config
from scripts.runtime.engines import UnavailableError, cpu_has_bf16
from scripts.runtime.exported_files import read_export

MAIN = "256x256x192"
PLOT_SIZES = ("128x128x96", "192x192x144", "320x320x240")  # only for the plot of time against volume size
PATIENT = "patient"  # a real patient at full resolution
WINDOW, SPACING, OVERLAP = (96, 96, 96), (1.0, 1.0, 1.0), 0.5  # at this spacing the network sees every voxel
WEIGHTS = Path(bundle_root()) / "models" / "model.pt"
LIST_LENGTH = 10_000  # repeats of the case in the data list, more than any benchmark uses
STUDENT = "student, "  # before the name of its engine
MONAI_BASELINE = f"{STUDENT}stock MONAI"  # MONAI's own transforms and sliding window
THREE_TEACHERS, SEGRESNET, NNUNET = "three teachers", "SegResNet-16", "nnU-Net v2"
WINDOWS = ", windows"  # after the name of an engine that uses the sliding window of the other candidates
# Engines and precisions. Without WINDOWS they segment the volume in one pass; ONNX Runtime supports windows only.
ENGINES = (
    "torch fp32", "torch bf16", "openvino fp32", "openvino bf16", "openvino int8", "onnxruntime fp32",
    f"torch fp32{WINDOWS}", f"openvino bf16{WINDOWS}", f"openvino int8{WINDOWS}",
)  # fmt: skip
SLOW = (THREE_TEACHERS, SEGRESNET, NNUNET)  # minutes per case: fewer rounds, warmed up on a volume of one window


@dataclass(frozen=True)
class InferencePlan:
    """The settings that all volumes share.

    Args:
        data: data set whose modalities and intensities are used.
        output: folder of the volumes and masks.
        dataset_dir: folder of the patient, or empty.
        threads: CPU threads of every candidate; 0 for PyTorch's choice.
        rounds: rounds of the fast candidates.
        slow_rounds: rounds of the slow candidates.
        only: names, or parts of names, of the candidates to time; empty for the default ones of each volume.
    """

    data: str
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
        name: name of the volume in the tables.
        case: its item in a data list.
        warm_up_case: a case of one window, on which slow candidates warm up.
        overrides: config ids and values: spacing and window; empty for those of the configs.
        teacher_scale: scale of the teachers.
    """

    name: str
    case: Mapping[str, str]
    warm_up_case: Mapping[str, str]
    overrides: Mapping[str, Any]
    teacher_scale: str


def volume_shape(name: str) -> tuple[int, ...]:
    """The shape of a synthetic volume from its name ``HxWxD``."""
    if not re.fullmatch(r"\d+x\d+x\d+", name):
        raise ValueError(f"Unknown --volume {name}. Use {PATIENT}, or a shape such as {MAIN}.")
    return tuple(int(size) for size in name.split("x"))


def find_patient(root: Path) -> dict[str, str]:
    """Find the first patient with CT and MR as DICOM.

    PET comes from the NIfTI file of the same patient, which is in SUV: the DICOM files of this data set are not.

    Args:
        root: folder with ``sts_dicom/ID`` and ``sts/ID``.

    Returns:
        The item of the case for a data list.

    Raises:
        FileNotFoundError: there is no such patient.
    """
    for folder in sorted(root.glob("sts_dicom/*")):
        files = {
            "ct": folder / "CT" / "image",
            "pet": root / "sts" / folder.name / "PET_image.nii.gz",
            "mr": folder / "MR_T1" / "image",
        }
        if all(path.exists() for path in files.values()):
            return {"case_id": folder.name, "image": str(files["ct"]), **{k: str(path) for k, path in files.items()}}
    raise FileNotFoundError(f"No patient found in {root}. Expected sts_dicom/ID/CT/image and sts/ID/PET_image.nii.gz.")


def prepare_volume(name: str, plan: InferencePlan) -> Volume:
    """Find the files of the patient, or write those of a synthetic volume."""
    folder = plan.output / "volumes"
    if name == PATIENT:
        case = find_patient(Path(plan.dataset_dir))
        warm_up_case = write_case(folder / "warm", read_config(f"data/{plan.data}")["patch"])
        return Volume(name, case, warm_up_case, {}, teacher_scale(name))
    # The spacing is not that of the weights' training: the mask means nothing here, only its time is measured.
    overrides = {"patch": list(WINDOW), "spacing": list(SPACING), "overlap": OVERLAP, "ignore_task": True}
    case = write_case(folder / name, volume_shape(name))
    return Volume(name, case, write_case(folder / "window", WINDOW), overrides, teacher_scale(name))


def all_candidates(volume: Volume, plan: InferencePlan) -> list[Candidate]:
    """Every candidate on a volume, the student's engines first."""
    data = ("inference", f"data/{plan.data}")
    student, baseline = (*data, "scale/small"), "benchmark/stock"
    teachers = (*data, f"scale/{volume.teacher_scale}", baseline)
    random_weights: dict[str, Any] = {"handlers": [], "ignore_task": True}  # no handler that loads weights
    segresnet = {
        "architecture": "segresnet",
        "teacher_modalities": read_config(f"data/{plan.data}")["modalities"],
        "architectures": {"segresnet": {"init_filters": 16}},
    }
    specs: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        *((STUDENT + name, student, _engine_overrides(name)) for name in ENGINES),
        (MONAI_BASELINE, (*student, baseline), {}),
        (THREE_TEACHERS, (*teachers, "benchmark/teachers"), random_weights),
        (SEGRESNET, (*teachers, "teacher"), {**random_weights, **segresnet}),
        (NNUNET, (*data, "benchmark/nnunet"), random_weights),
    ]
    return [
        Candidate(name, configs, {**_common_overrides(name, volume, plan), **own, **_exported_window(name)})
        for name, configs, own in specs
    ]


def _common_overrides(name: str, volume: Volume, plan: InferencePlan) -> dict[str, Any]:
    """Overrides of every candidate: a data list that repeats the case, after one case to warm up on."""
    return {
        "device": Expression("$torch.device('cpu')"),
        "threads": plan.threads,
        "naming": [],
        "case": dict(volume.case),
        "warm": dict(volume.warm_up_case if name in SLOW else volume.case),
        "cases": Expression(f"$[@warm] + [@case] * {LIST_LENGTH}"),
        "output_dir": str(mask_path(name, volume, plan).parent),
        **volume.overrides,
    }


def mask_path(name: str, volume: Volume, plan: InferencePlan) -> Path:
    """Path of the mask that a candidate writes."""
    folder = re.sub(r"\W+", "_", name)
    return plan.output / "masks" / volume.name / folder / f"{volume.case['case_id']}.nii.gz"


def _unavailable_reason(name: str) -> str:
    """Why a candidate cannot be timed on this machine; empty if it can."""
    if name == NNUNET:
        return "" if find_spec("nnunetv2") else "nnunetv2 is not installed (make bench-env)"
    if not is_engine(name) or name.startswith(f"{STUDENT}torch"):
        return ""
    model = name.removeprefix(STUDENT).removesuffix(WINDOWS)
    package = model.split()[0]
    if not find_spec(package):
        return f"{package} is not installed (make bench-env)"
    try:
        record = read_export(WEIGHTS)
        if model == "openvino bf16" and not cpu_has_bf16():
            return "this CPU does not support bf16"
    except UnavailableError as error:
        return str(error).rstrip(".")
    if model in record["models"]:
        return ""
    reasons = " and ".join(record.get("refused", {}).get(model, {}).get("because", []))
    if reasons:
        return f"the export refused it on {record['compared_on']['source']}: {reasons}"
    return f"{model} has not been exported from {WEIGHTS.name}"


def _engine_overrides(name: str) -> dict[str, Any]:
    """Overrides of an engine: one pass over the volume, unless its name ends with ``WINDOWS``."""
    engine, precision = name.removesuffix(WINDOWS).split()
    return {"engine": engine, "engine_precision": precision, "whole_volume": not name.endswith(WINDOWS)}


def _exported_window(name: str) -> dict[str, Any]:
    """The window of ONNX Runtime: it accepts windows of the exported size only."""
    if name != f"{STUDENT}onnxruntime fp32" or _unavailable_reason(name):
        return {}
    return {"patch": read_export(WEIGHTS)["window"]}


def select_candidates(
    candidates: Sequence[Candidate], volume: str, plan: InferencePlan, fastest_engine: str = ""
) -> tuple[list[Candidate], list[str]]:
    """Select the candidates to time on a volume.

    Args:
        candidates: all of them.
        volume: name of the volume.
        plan: names the candidates that the user wants, if any.
        fastest_engine: name of the student's fastest engine, if known: the volumes of the plot time no other one.

    Returns:
        The candidates, and one sentence for each candidate that is left out because it cannot run here.

    Raises:
        ValueError: ``plan.only`` matches no candidate.
    """
    wanted = [each for each in candidates if _is_wanted(each.name, volume, plan.only, fastest_engine)]
    if not wanted:
        names = ", ".join(each.name for each in candidates)
        raise ValueError(f"--only {' '.join(plan.only)} matches no candidate. Choose from: {names}.")
    reasons = {each.name: _unavailable_reason(each.name) for each in wanted}
    available = [each for each in wanted if not reasons[each.name]]
    return available, [f"{name} is left out: {reason}." for name, reason in reasons.items() if reason]


def _is_wanted(name: str, volume: str, only: Sequence[str], fastest_engine: str) -> bool:
    if only:
        return any(_matches(name, part.lower()) for part in only)
    if volume in PLOT_SIZES:
        return name in (MONAI_BASELINE, fastest_engine) or (not fastest_engine and is_engine(name))
    return volume != PATIENT or is_engine(name) or name in (MONAI_BASELINE, THREE_TEACHERS)


def _matches(name: str, part: str) -> bool:
    """Whether a word of ``--only`` names a candidate: its name, with or without ``STUDENT``, or else a part of it."""
    names = [*ENGINES, *(STUDENT + engine for engine in ENGINES), MONAI_BASELINE, THREE_TEACHERS, SEGRESNET, NNUNET]
    name = name.lower()
    if part in (each.lower() for each in names):
        return part in (name, name.removeprefix(STUDENT))
    return part in name


def is_engine(name: str) -> bool:
    """Whether a candidate is the student in one of the bundle's engines."""
    return name.removeprefix(STUDENT) in ENGINES


def teacher_scale(volume: str) -> str:
    """The scale of the teachers for a volume: small at the coarse spacing of the patient, full at 1 mm."""
    return "small" if volume == PATIENT else "full"


def require_student_modalities(modalities: Sequence[str]) -> None:
    """Raise ValueError unless a data set has the modalities of the shipped weights."""
    if list(modalities) != list(MODALITIES):
        raise ValueError(
            f"This benchmark runs the shipped weights, which need {', '.join(MODALITIES)}. Leave out --data."
        )
