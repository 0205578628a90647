# SPDX-License-Identifier: Apache-2.0
"""Find the exported files of weights, and the engine that runs them. Files of other weights are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.runtime import ENGINES, PRECISIONS
from scripts.runtime.engines import (
    NumpyEngine,
    ONNXRuntimeEngine,
    OpenVINOEngine,
    UnavailableError,
    cpu_has_bf16,
    import_optional,
)
from scripts.utils.checksums import sha256

RECORD = "export.json"
PROBE = "probe.npz"
PROBE_SIZE = 32  # voxels per axis, for engines that run on any size
PROBE_STEP = 2  # of the logits that are kept, every second one along each axis
# Largest difference of logits from PyTorch's, relative to PyTorch's largest logit. Far above rounding (the export
# checks that on masks), far below the effect of other weights, other settings or a wrong kernel.
TOLERANCES = {"fp32": 1e-2, "bf16": 0.1, "int8": 0.5}


def export_folder(weights: str | Path, output_dir: str | Path = "") -> Path:
    """Folder of the exported files of a weights file, by default next to it."""
    path = Path(weights)
    return Path(output_dir or path.parent) / f"{path.stem}_export"


def export_command(weights: str | Path) -> str:
    """The command that exports weights."""
    return f"python -m scripts export --weights {weights}"


def check_names(engine: str, precision: str) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: there is no such engine or precision.
    """
    if engine not in ENGINES:
        raise ValueError(f"Unknown engine {engine!r}. Choose one of: {', '.join(ENGINES)}.")
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown engine precision {precision!r}. Choose one of: {', '.join(PRECISIONS)}.")


def read_export(weights: str | Path) -> dict[str, Any]:
    """Read the record of the files that were exported from exactly these weights.

    Raises:
        UnavailableError: there are no exported files, the record is damaged, or it belongs to other weights.
    """
    folder, command = export_folder(weights), export_command(weights)
    if not (folder / RECORD).is_file():
        raise UnavailableError(f"no exported files next to {weights}. Create them with: {command}")
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        exported_sha256, current_sha256, _ = record["weights_sha256"], sha256(weights), record["models"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UnavailableError(f"{folder / RECORD} is damaged. Export again with: {command}") from error
    if exported_sha256 != current_sha256:
        raise UnavailableError(
            f"the files in {folder} were exported from weights with the sha256 {exported_sha256[:12]}..., but "
            f"{weights} has {current_sha256[:12]}... Export again with: {command}"
        )
    return record


def is_exported(weights: str | Path) -> bool:
    """Whether there are files that were exported from exactly these weights, or a mark that they cannot be exported."""
    try:
        read_export(weights)
    except UnavailableError:
        return False
    return True


def exported_engine(
    folder: Path, record: Mapping[str, Any], engine: str, precision: str, advice: str, threads: int = 0
) -> tuple[NumpyEngine, str]:
    """The engine that runs exported files.

    Args:
        folder: of the files.
        record: of the export, see ``read_export``.
        engine: ``openvino`` or ``onnxruntime``.
        precision: ``auto`` is bf16 if OpenVINO runs it by instructions of this CPU and the files were accepted in bf16;
            otherwise it is fp32.
        advice: what to do about damaged files, for the error.
        threads: number of CPU threads; 0 leaves it to the engine.

    Returns:
        The engine, and the reason for the log.

    Raises:
        UnavailableError: the engine is not installed, or its files are missing or damaged.
    """
    import_optional(engine)
    models, reason = record["models"], f"exported files {folder}"
    if engine == "openvino" and precision in ("auto", "bf16"):
        if "openvino bf16" in models and cpu_has_bf16():
            precision, reason = "bf16", f"{reason}, this CPU has bf16"
        elif precision == "bf16":
            obstacle = "they were not accepted in bf16" if cpu_has_bf16() else "this CPU has no bf16"
            raise UnavailableError(f"openvino cannot run the files in {folder} in bf16: {obstacle}. Use fp32.")
    precision = "fp32" if precision == "auto" else precision
    name = f"{engine} {precision}"
    if name not in models and isinstance(record.get("refused"), str):
        raise UnavailableError(f"the weights could not be exported: {record['refused']}")
    if name not in models:
        available = ", ".join(sorted(models)) or "nothing"
        raise UnavailableError(f"{folder} contains no {name}, only: {available}. See python -m scripts export --help.")
    require_files(folder, models[name]["files"], advice)
    path = folder / models[name]["file"]
    if engine == "openvino":
        return OpenVINOEngine(path, precision, threads), reason
    return ONNXRuntimeEngine(path, threads), reason


def require_files(folder: Path, checksums: Mapping[str, str], advice: str) -> None:
    """Refuse missing and damaged files.

    Args:
        folder: of the files.
        checksums: file name -> sha256.
        advice: the end of the error.

    Raises:
        UnavailableError: a file is missing, or has another checksum.
    """
    for file, checksum in checksums.items():
        if not (folder / file).is_file() or sha256(folder / file) != checksum:
            raise UnavailableError(f"{folder / file} is damaged or missing. {advice}")


def probe_image(channels: int, size: Sequence[int]) -> NDArray[np.float32]:
    """An image of random numbers, ``1 M H W D``, the same on every machine."""
    return np.random.RandomState(0).random_sample((1, channels, *size)).astype(np.float32)  # frozen by NumPy's policy


def small_probe(window: Sequence[int]) -> tuple[int, ...]:
    """The size of the probe of engines for any size; that of others is the window."""
    return tuple(min(PROBE_SIZE, length) for length in window)


def kept_logits(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits of a probe that are stored."""
    return np.ascontiguousarray(logits[(slice(None), slice(None), *[slice(None, None, PROBE_STEP)] * 3)])


def check_probe(engine: NumpyEngine, folder: Path, record: Mapping[str, Any], advice: str) -> None:
    """Compare an engine's logits of the probe with those that PyTorch gave when the files were exported.

    Another CPU has other kernels, and another release of an engine may have wrong ones.

    Args:
        engine: runs the files.
        folder: of the exported files.
        record: of the export.
        advice: what to do, for the errors.

    Raises:
        UnavailableError: there is no probe, or the logits differ by more than ``TOLERANCES``.
    """
    if "probe" not in record:
        raise UnavailableError(f"the files in {folder} were exported by an older release. {advice}")
    require_files(folder, {PROBE: record["probe"]}, advice)
    with np.load(folder / PROBE) as stored:
        expected = stored["small" if engine.window is None else "window"]
    size = engine.window or record.get("probe_size") or small_probe(record["window"])  # up to 0.14.0 it is not named
    logits = kept_logits(engine(probe_image(len(record["modalities"]), size)))
    difference = float(np.abs(logits - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not difference <= TOLERANCES[engine.description.split()[-1]]:
        raise UnavailableError(
            f"{engine.description} differs from PyTorch by {difference:.2g} of the largest logit of the probe in "
            f"{folder}. {advice}"
        )
