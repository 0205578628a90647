# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: one thread, preloaded processes, the real samples if present, a cohort of phantoms, files."""

from __future__ import annotations

import contextlib
import json
import locale
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for every process that a test starts
os.environ["REPORT_VIEWER"] = ""  # reports of tests hold no viewer, whether `make viewer` was run or not

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from filelock import FileLock
from monai.bundle import ConfigParser
from numpy.typing import NDArray

from scripts.cli import exported_run
from scripts.cli.config import CONFIGS
from scripts.data.cohorts.phantom import write_phantoms
from scripts.networks import Student
from scripts.utils.output_lock import release
from scripts.utils.run_manifest import git_commit

ROOT = Path(__file__).parents[1]
LOCALE = locale.setlocale(locale.LC_ALL)
Array = NDArray[Any]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _absl_leaves_the_capture_open() -> None:
    """absl's handler closes the stream that it found at its import, here pytest's own, when logging is configured."""
    if absl := sys.modules.get("absl.logging"):
        absl.get_absl_handler().python_handler.stream = sys.__stderr__  # which it never closes


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real samples, beside the repository; it may be absent."""
    return Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def require_data(data_root: Path) -> Callable[[str], Path]:
    """``require_data("sts")`` gives the sample's folder or skips the test."""

    def require(name: str) -> Path:
        if not (data_root / name).is_dir():
            pytest.skip(f"the real sample '{name}' is not in {data_root}")
        return data_root / name

    return require


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Data list of six phantoms, to be read only."""
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), cases=6, seed=3, progress=False)


@pytest.fixture(autouse=True)
def _no_log_handler_outlives_its_test() -> Iterator[None]:
    """``configs/logging.conf`` adds a handler that writes to this test's stderr, which pytest closes afterwards."""
    before = list(logging.root.handlers)
    yield
    for handler in list(logging.root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _locale() -> Iterator[None]:
    """GDCM sets the locale to C when a test writes DICOM by SimpleITK, and Python then reads text as ASCII."""
    locale.setlocale(locale.LC_ALL, LOCALE)
    yield
    locale.setlocale(locale.LC_ALL, LOCALE)


@pytest.fixture(autouse=True)
def _outputs_are_unlocked() -> Iterator[None]:
    """A run locks its output until its process ends; here that would be the end of all tests."""
    yield
    release()


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of inference on the CPU by a tiny student with random weights, whose mask is neither empty nor full."""
    features, norm = (4, 8, 8, 8), ("group", {"num_groups": 4})
    torch.manual_seed(9)
    path = tmp_path_factory.mktemp("tiny_student") / "tiny.pt"
    torch.save({"model": Student(3, 2, features, norm=norm).state_dict()}, path)
    return [
        "--weights", str(path), "--threads", "1", "--device", "cpu", "--engine", "torch", "--set", "patch=[32,32,32]",
        "--set", "spacing=[6,6,6]", "--set", f"student_features={list(features)}",
        "--set", f"student_norm={json.dumps(norm)}",
    ]  # fmt: skip


@pytest.fixture
def first_export() -> None:
    """For tests of the export that the first `segment` makes; in all others it is off, since it takes seconds."""


@pytest.fixture(autouse=True)
def _no_first_export(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "first_export" not in request.fixturenames:
        monkeypatch.setattr(exported_run, "export_once", lambda *_: None)


@pytest.fixture(scope="session")
def cohort(phantoms: list[dict[str, Any]]) -> Path:
    """The folder of the six phantoms, to be read only."""
    return Path(phantoms[0]["image"]).parents[1]


@pytest.fixture(scope="session")
def die_in_save() -> Callable[[int], None]:
    """``die_in_save(n)``, in a process of its own: the n-th ``torch.save`` writes half a file, then kill -9."""

    def arm(number: int) -> None:
        save, calls = torch.save, []

        def half(state: Any, file: Any) -> None:
            calls.append(1)
            save(state, file)
            if len(calls) == number:
                file.flush()
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half

    return arm


@pytest.fixture(scope="session")
def start_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BaseProcess]:
    """Start ``python ARGUMENTS`` in a new process that has already imported MONAI and the bundle.

    Use this, or ``run_python``, instead of ``subprocess`` with ``sys.executable``, which imports MONAI for 10 seconds.
    The arguments are those of the interpreter: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``::

        process = start_python("-m", "scripts", "train", "--epochs", 2, output=tmp_path / "log")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        print((tmp_path / "log.err").read_text())

    The process is forked from a server (multiprocessing's forkserver) that has imported the modules and done nothing
    else. It gets this process's working directory and environment, or ``cwd`` and ``env`` (added to the environment).
    Its stdout and stderr are appended to ``output`` with the suffixes .out and .err. Variables that are read at import,
    such as OMP_NUM_THREADS, have no effect. A test of the import itself, or of the installation, needs ``subprocess``.
    """
    folder, numbers = tmp_path_factory.mktemp("start_python"), count()
    context = multiprocessing.get_context("forkserver")
    forkserver._forkserver._stop()  # `segment` of many cases starts the same server with fewer modules
    bundle = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "scripts").rglob("*.py")]
    modules = [".".join(path.parts) for path in bundle if path.name not in ("__init__", "__main__")]
    context.set_forkserver_preload(["fire", "monai.bundle", "torch._dynamo", "torch.utils.tensorboard", *modules])
    with contextlib.chdir(ROOT):  # the server imports the bundle from its working directory
        forkserver.ensure_running()

    def start(*arguments: Any, output: Path | None = None, cwd: Path = ROOT, **env: str) -> BaseProcess:
        job = {
            "arguments": [str(each) for each in arguments],
            "environment": {**os.environ, **env},
            "folder": str(cwd),
            "output": str(output or folder / str(next(numbers))),
        }
        script = str(Path(__file__).with_name("preloaded_python.py"))
        process = context.Process(target=runpy.run_path, args=(script, {"JOB": job}), daemon=False)
        process.start()
        return process

    return start


@pytest.fixture
def run_python(start_python: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``run_python(*arguments, timeout=240)``: ``start_python``, wait, and return a ``subprocess.CompletedProcess``."""

    def run(*arguments: Any, timeout: float = 240, **options: Any) -> subprocess.CompletedProcess[str]:
        output = tmp_path_factory.mktemp("run_python") / "log"
        process = start_python(*arguments, output=output, **options)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([str(each) for each in arguments], timeout)
        printed = [output.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err")]
        return subprocess.CompletedProcess(arguments, process.exitcode, *printed)

    return run


@pytest.fixture(scope="session")
def tiny_bundle(cohort: Path) -> Callable[..., ConfigParser]:
    """``tiny_bundle(output, *configs, **overrides)``: a training of four phantoms, composed and not yet run."""
    small = {
        "dataset_dir": str(cohort), "device": torch.device("cpu"), "threads": 1, "val_interval": 100, "max_epochs": 1,
        "patch": [16, 16, 16], "spacing": [12.0, 12.0, 12.0], "student_features": [4, 8, 8, 8],
        "student_norm": ["group", {"num_groups": 4}],
    }  # fmt: skip

    def compose(output: Path, *configs: str, **overrides: Any) -> ConfigParser:
        parser = ConfigParser()
        names = ("train", "data/phantom", "scale/small", *configs)
        parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
        parser.update({**small, "output_dir": str(output), **overrides})
        parser.get_parsed_content("initialize")
        return parser

    return compose


@pytest.fixture(scope="session")
def make_affine() -> Callable[..., Array]:
    """Affine (RAS, mm) of a grid from its axes' directions (columns), spacing, shape and centre."""

    def make(axes: Any, spacing: Sequence[float], shape: Sequence[int], centre: Sequence[float] = (0, 0, 0)) -> Array:
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(axes) * np.asarray(spacing)
        affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ (np.asarray(shape) - 1) / 2
        return affine

    return make


@pytest.fixture(scope="session")
def world() -> Callable[[Any, Sequence[int]], Array]:
    """World coordinates (RAS, mm) of a grid's voxel centres, ``shape x 3``."""

    def points(affine: Any, shape: Sequence[int]) -> Array:
        matrix = np.asarray(affine, dtype=float)
        return np.moveaxis(np.indices(shape), 0, -1) @ matrix[:3, :3].T + matrix[:3, 3]

    return points


@pytest.fixture(scope="session")
def write_nifti() -> Callable[..., Path]:
    """Write voxels as they are, with sform and qform; ``slope`` and ``intercept`` only go into the header."""

    def write(path: Path, voxels: Array, affine: Any = None, slope: float = 1.0, intercept: float = 0.0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
        image.set_qform(image.affine, code=1)
        image.set_sform(image.affine, code=1)
        if (slope, intercept) != (1.0, 0.0):
            image.header.set_slope_inter(slope, intercept)
        nib.save(image, path)
        return path

    return write


@pytest.fixture
def fake_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bool], None]]:
    """``fake_git(commit, clean)`` sets what git says about the checkout; at first a clean one at 0000..."""
    binary = tmp_path / "bin" / "git"
    binary.parent.mkdir()

    def answer(commit: str, clean: bool) -> None:
        status, root = 0 if clean else 1, Path(__file__).parents[1]
        binary.write_text(
            f'#!/bin/sh\ncase "$*" in *rev-parse*) printf "%s\\n" {root} {commit};; *diff*) exit {status};; esac\n'
        )
        binary.chmod(0o755)
        git_commit.cache_clear()

    answer("0" * 40, True)
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")
    yield answer
    git_commit.cache_clear()


@pytest.fixture(scope="session")
def exported(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small student, exported in every format and precision: path of ``model.pt``; read only.

    Conversion takes 15 s, so the processes of pytest-xdist share one export.
    """
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("nncf")
    from scripts.cli.main import main
    from scripts.export import parity

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    weights = folder / "model.pt"
    with FileLock(f"{folder}.lock"):
        if not weights.with_name("model_export").exists():
            folder.mkdir(exist_ok=True)
            torch.manual_seed(0)
            torch.save({"model": Student(3, 2, (8, 16, 16, 16)).state_dict()}, weights)
            arguments = [
                "export", "--data", "phantom", "--threads", "1", "--device", "cpu", "--set", "patch=[32,32,16]",
                "--set", "spacing=[8,8,8]", "--set", "student_features=[8,16,16,16]", "--weights", str(weights),
                "--dataset-dir", str(cohort), "--precisions", "fp32", "bf16", "int8",
            ]  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                # Random weights give no clear masks.
                patch.setitem(parity.GATES, "bf16", parity.Gate(0.9))
                patch.setitem(parity.GATES, "int8", parity.Gate(0.5, validation=0.5))
                assert main(arguments) == 0
    return weights
