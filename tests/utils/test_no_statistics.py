# SPDX-License-Identifier: Apache-2.0
"""Packages that send statistics of their use send none from this bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bundle_root

CONTACTS = """
import socket, sys
contacts = []

def refuse(*address, **_):
    contacts.append(address)
    raise OSError("a test has no network")

socket.getaddrinfo = socket.socket.connect = refuse
"""


def _contacts(code: str, home: Path) -> str:
    """What a process that runs this code tries to connect to, as printed at its end, in a home without any settings."""
    printed = "\nimport atexit; atexit.register(lambda: print(contacts))"  # after the threads have ended
    variables = ("CI", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "PYTEST_CURRENT_TEST", "PYTEST_VERSION")
    kept = {key: value for key, value in os.environ.items() if key not in variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{CONTACTS}{printed}\n{code}"],
        capture_output=True, text=True, check=False, cwd=bundle_root(), env={**kept, "HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_importing_an_engine_contacts_nobody(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    code = f"import scripts.runtime.engines as engines; engines.import_optional({package!r})"
    assert _contacts(code, tmp_path) == "[]"
    assert not [*tmp_path.rglob("*")]  # nor does it leave a number that marks this user


def test_mlflow_sends_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    code = "import scripts; from mlflow.telemetry.utils import is_telemetry_disabled as off; assert off()"
    assert _contacts(code, tmp_path) == "[]"
