# SPDX-License-Identifier: Apache-2.0
"""Write a folder that segments without the bundle, PyTorch and MONAI: a program, the exported network and its task."""

from __future__ import annotations

import importlib.util
import py_compile
import shutil
import string
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts import bundle_root
from scripts.runtime.app import MODEL, TASK
from scripts.runtime.engines import UnavailableError
from scripts.runtime.exported_files import PROBE, RECORD, export_command, export_folder, read_export, require_files
from scripts.runtime.segmenter import Settings
from scripts.utils.atomic_files import write_json, write_text
from scripts.utils.run_manifest import code_version

PROGRAM = "segment.pyz"
PACKAGES = ("scripts.runtime", "scripts.image_io", "scripts.utils", "scripts.metrics")  # in the program
WITHOUT = ("tensor_files", "monai_metric")  # modules that need PyTorch
ENGINES = {"openvino": "openvino", "onnxruntime": "onnxruntime"}  # engine -> its package
REQUIRED = ("numpy", "nibabel", "SimpleITK", "pydicom")
EXTRA = ("codes", "dicom")  # of the task, for DICOM
OF_RUN = ("reference", "naming")  # settings that the program decides for itself
MAIN = "import sys\n\nfrom scripts.runtime.app import main\n\nsys.exit(main())\n"
TEMPLATES = Path(__file__).with_name("templates")


def write_runtime_folder(weights: str | Path, config: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the program, the network, the task, pinned requirements, a README and a Dockerfile.

    Args:
        weights: whose exported files are taken, OpenVINO's if there are any, else ONNX Runtime's.
        config: the merged configs of inference with the task of the weights.
        folder: to write into; it must not hold anything else.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds other files, or the weights are not exported (``UnavailableError``).
    """
    record, source, target = read_export(weights), export_folder(weights), Path(folder)
    if "probe" not in record:
        raise UnavailableError(f"{source} was exported by an older release. Export again: {export_command(weights)}")
    if target.exists() and any(target.iterdir()) and not (target / PROGRAM).is_file():
        raise ValueError(f"{target} holds other files. Choose an empty folder.")
    engine = next((name for name in ENGINES if f"{name} fp32" in record["models"]), None)
    if engine is None:
        raise UnavailableError(f"{source} holds no model for OpenVINO or ONNX Runtime. Run {export_command(weights)}.")
    models = {name: entry for name, entry in record["models"].items() if name.startswith(engine)}
    checksums = {file: checksum for entry in models.values() for file, checksum in entry["files"].items()}
    require_files(source, {**checksums, PROBE: record["probe"]}, f"Export again: {export_command(weights)}")
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target / MODEL, ignore_errors=True)
    (target / MODEL).mkdir()
    for file in (*checksums, PROBE):
        shutil.copy(source / file, target / MODEL / file)
    write_json({**record, "models": models}, target / MODEL / RECORD)
    keys = [key for key in (*Settings.__dataclass_fields__, *EXTRA) if key in config and key not in OF_RUN]
    task = {"engine": engine, "divisor": record["divisor"], **{key: config[key] for key in keys}}
    write_json({**task, "weights_sha256": record["weights_sha256"], "bundle_version": code_version()}, target / TASK)
    write_program(target / PROGRAM)
    _write_texts(target, task, record)
    return target


def write_program(path: Path) -> None:
    """Write the zipapp. Compiled modules lie beside the sources, for the Python that wrote them: it starts sooner."""
    root = Path(bundle_root())
    files = [root / "scripts" / "__init__.py"]
    for package in PACKAGES:
        folder = root.joinpath(*package.split("."))
        files += [file for file in sorted(folder.glob("*.py")) if file.stem not in WITHOUT]
    with tempfile.TemporaryDirectory() as temporary, open(path, "wb") as stream:
        stream.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__main__.py", MAIN)
            for file in files:
                name = file.relative_to(root)
                archive.write(file, str(name))
                compiled = Path(temporary) / "module.pyc"
                py_compile.compile(
                    str(file), str(compiled), str(name), doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )  # fmt: skip
                archive.write(compiled, str(name.with_suffix(".pyc")))


def _write_texts(target: Path, task: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    packages = (*REQUIRED, ENGINES[task["engine"]])
    others = f'psutil=={version("psutil")}; sys_platform != "linux"\n'  # Linux tells the free memory itself
    write_text("".join(f"{name}=={version(name)}\n" for name in packages) + others, target / "requirements.txt")
    images = " ".join(f"--{key} {key}.nii.gz" for key in task["modalities"])
    has_highdicom = importlib.util.find_spec("highdicom") is not None
    words = {
        "name": ", ".join(task["modalities"]),
        "packages": ", ".join(packages),
        "images": images,
        "reference": task["modalities"][0],
        "highdicom": version("highdicom") if has_highdicom else "0.27.0",
        "version": code_version(),
        "weights": record["weights_sha256"][:12],
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    for file in sorted(TEMPLATES.iterdir()):
        write_text(string.Template(file.read_text(encoding="utf-8")).substitute(words), target / file.name)
