# SPDX-License-Identifier: Apache-2.0
"""What a run was made of: config, versions, commit, data, teachers, time and memory."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from scripts import bundle_root
from scripts.utils.atomic_files import write_json

PACKAGES = ("torch", "monai", "numpy", "nibabel", "scipy", "pytorch-ignite", "itk-io", "SimpleITK")


_command: str | None = None


def set_command(command: str) -> None:
    """Note the ``monai.bundle run`` command of this process, for its manifests."""
    global _command
    _command = command


def running_config() -> dict[str, Any] | None:
    """The merged config of the bundle workflow that is running, or None.

    ``monai.bundle`` hands a running component nothing of its config, so the workflow is looked for on the stack.
    """
    for frame in inspect.stack():
        owner = frame.frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return json.loads(json.dumps(dict(owner.parser.get()), default=str))  # type: ignore[no-any-return]
    return None


def _commit() -> str | None:
    """The commit of the code, "+" behind it where tracked files differ; None outside of a checkout."""
    git = ["git", "-C", bundle_root()]
    try:
        asked = [*git, "rev-parse", "--show-toplevel", "HEAD"]
        top, head = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        if Path(top).resolve() != Path(bundle_root()).resolve():
            return None  # unpacked in another repository
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False, capture_output=True).returncode == 0
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return head if clean else head + "+"


def code_version() -> str:
    """The bundle's version and commit."""
    version_ = json.loads((Path(bundle_root()) / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
    return f"{version_} ({_commit() or 'no checkout'})"


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _peak_mib() -> float:
    """Peak resident memory of this process in MiB, and of the accelerator's allocator where there is one."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024 + (torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0)


def write_manifest(
    output_dir: str | Path,
    cases: Any,
    teachers: dict[str, str | None] | None = None,
    seconds: float | None = None,
    name: str = "manifest.json",
) -> dict[str, Any]:
    """Write a manifest into ``output_dir`` and return its content.

    Args:
        output_dir: folder of the run's output.
        cases: the data list (or lists by name); its hash identifies it.
        teachers: name -> sha256 of the weights.
        seconds: wall time.
        name: of the file.
    """
    config = running_config()
    listed = json.dumps(cases, sort_keys=True, default=str)
    meta = (config or {}).pop("_meta_", None) or {}
    manifest = {
        "bundle_version": meta.get("version"),
        "git_commit": _commit(),
        "command": _command or shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "seed": (config or {}).get("seed"),
        "threads": torch.get_num_threads(),
        "wall_seconds": None if seconds is None else round(seconds, 1),
        "peak_mib": round(_peak_mib(), 1),
        "teachers_sha256": teachers or {},
        "data_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        "data": json.loads(listed),
        "config": config,
    }
    write_json(manifest, Path(output_dir) / name)
    return manifest
