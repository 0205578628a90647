# SPDX-License-Identifier: Apache-2.0
"""The manifest of a run: config, versions, commit, data, teachers, time and memory."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts import bundle_root
from scripts.utils.atomic_files import write_json

PACKAGES = ("torch", "monai", "numpy", "nibabel", "scipy", "pytorch-ignite", "itk-io", "SimpleITK")
_command: str | None = None
_config: Any = None


def set_command(command: str) -> None:
    """Set the ``monai.bundle run`` command that this process's manifests contain; by default its command line."""
    global _command
    _command = command


@contextmanager
def described_run(command: str, config: Any) -> Iterator[None]:
    """Set what the manifests of a run without ``monai.bundle`` contain, until the end of the block.

    Args:
        command: the ``monai.bundle run`` command that does the same.
        config: the merged config.
    """
    global _command, _config
    before = _command, _config
    _command, _config = command, config
    try:
        yield
    finally:
        _command, _config = before


def running_parser() -> Any:
    """Return the ``monai.bundle.ConfigParser`` of the config that is being run or parsed; None if there is none.

    MONAI gives a component of a config no access to the config or its parser: an expression sees only the values that
    it references, and a macro (``%``) of the whole config would contain itself. The workflow is a local variable of
    ``monai.bundle.run``, and the parser of the method that builds a component, so this function looks for them on the
    call stack. That also works for plain ``python -m monai.bundle run``.
    """
    bundle = sys.modules.get("monai.bundle")  # if it is not loaded, nothing is parsed
    frame = sys._getframe() if bundle else None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, bundle.ConfigWorkflow):  # type: ignore[union-attr]
            return owner.parser
        if isinstance(owner, bundle.ConfigParser):  # type: ignore[union-attr]
            return owner
        frame = frame.f_back
    return None


def running_config() -> dict[str, Any] | None:
    """Return the merged config, as written, of ``running_parser``, or that of ``described_run``; None without both."""
    parser = running_parser()
    config = _config if parser is None else parser.get()
    return None if config is None else json.loads(json.dumps(config, default=str))  # type: ignore[no-any-return]


def torch_usage() -> dict[str, Any]:
    """The arguments of ``write_manifest`` that only PyTorch knows; none where it is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    mib = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"threads": torch.get_num_threads(), "accelerator_mib": mib}


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the code, with "+" if tracked files differ from it; None outside of a git checkout.

    It is that of the first call, since a process goes on with the code that it has loaded.
    """
    git = ["git", "-C", bundle_root()]
    try:
        command = [*git, "rev-parse", "--show-toplevel", "HEAD"]
        top, head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        if Path(top).resolve() != Path(bundle_root()).resolve():
            return None  # the bundle was unpacked inside another repository
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False, capture_output=True).returncode == 0
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return head if clean else head + "+"


def bundle_version() -> str:
    """Return the bundle's version."""
    metadata = json.loads((Path(bundle_root()) / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return str(metadata["version"])


def code_version() -> str:
    """Return the bundle's version and commit."""
    return f"{bundle_version()} ({git_commit() or 'no checkout'})"


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {package: _version(package) for package in packages}
    return {package: found for package, found in versions.items() if found is not None}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_manifest(
    output_dir: str | Path,
    cases: Any,
    teachers: dict[str, str | None] | None = None,
    seconds: float | None = None,
    name: str = "manifest.json",
    threads: int | None = None,
    accelerator_mib: float = 0.0,
) -> dict[str, Any]:
    """Write a manifest and return its content.

    Args:
        output_dir: folder of the run's output.
        cases: the data list, or data lists by name; the manifest also holds its SHA-256.
        teachers: name -> SHA-256 of the weights.
        seconds: wall time of the run.
        name: file name.
        threads: number of threads per operation, see ``torch_usage``.
        accelerator_mib: peak memory of the accelerator in MiB. It is added to this process's peak resident memory.
    """
    config = running_config()
    data = json.dumps(cases, sort_keys=True, default=str)
    metadata = (config or {}).pop("_meta_", None) or {}
    resident_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    manifest = {
        "bundle_version": metadata.get("version") or bundle_version(),
        "git_commit": git_commit(),
        "command": _command or shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "seed": (config or {}).get("seed"),
        "threads": threads,
        "wall_seconds": None if seconds is None else round(seconds, 1),
        "peak_mib": round(resident_mib + accelerator_mib, 1),
        "teachers_sha256": teachers or {},
        "data_sha256": hashlib.sha256(data.encode()).hexdigest(),
        "data": json.loads(data),
        "config": config,
    }
    write_json(manifest, Path(output_dir) / name)
    return manifest
