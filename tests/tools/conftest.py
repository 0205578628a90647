# SPDX-License-Identifier: Apache-2.0
"""Fixtures for git repositories that are made by tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GIT = shutil.which("git")
ROOT = Path(__file__).parents[2]
COPIED = (
    "configs",
    "docs",
    "models",
    "scripts",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
    ".gitignore",
)
COPIED += ("tools/model_zoo", *(path.name for path in ROOT.glob("requirements*.txt")))


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """The environment without the settings of git and of Python's path.

    A commit hook that runs the tests names its own repository in GIT_* variables.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "PYTHONPATH"))}
    environment["GIT_CONFIG_GLOBAL"] = os.devnull  # without the developer's hooks and line ends
    return environment


@pytest.fixture(autouse=True, scope="module")
def _use_clean_environment(clean_environment: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key in set(os.environ) - set(clean_environment):
            patch.delenv(key)
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        yield


@pytest.fixture(scope="session")
def commit() -> Callable[[Path], Path]:
    """``commit(folder)`` makes the folder a repository, or commits its changes; returns the folder."""
    if GIT is None:
        pytest.skip("git is not installed")

    def commit_all(root: Path) -> Path:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
            subprocess.run([GIT, "-C", root, *command], check=True)
        return root

    return commit_all


@pytest.fixture(scope="session")
def release_checkout(tmp_path_factory: pytest.TempPathFactory, commit: Callable[[Path], Path]) -> Path:
    """A repository with the bundle as it is in the working tree, which may have changes."""
    root = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*_export"))
        else:
            shutil.copy(ROOT / name, root / name)
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "__init__.py").touch()
    return commit(root)
