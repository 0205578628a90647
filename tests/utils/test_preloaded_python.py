# SPDX-License-Identifier: Apache-2.0
"""The fixtures ``start_python`` and ``run_python`` behave like a new interpreter, except that MONAI is imported."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest


def test_code_gets_arguments_environment_and_folder_and_its_output_is_separated(
    run_python: Any, tmp_path: Path
) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['MARK'], os.getcwd()); print('b', file=sys.stderr)"
    done = run_python("-c", code, "x", 1, cwd=tmp_path, MARK="here")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"['x', '1'] here {tmp_path}\n", "b\n")


@pytest.mark.parametrize(
    ("code", "expected", "printed"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import atexit, sys; atexit.register(print, 'end', file=sys.stderr)", 0, "end\n"),
    ],
)
def test_exit_codes_tracebacks_and_exit_handlers(code: str, expected: int, printed: str, run_python: Any) -> None:
    done = run_python("-c", code)
    assert done.returncode == expected
    assert printed in done.stderr


def test_modules_are_preloaded_from_this_checkout_and_processes_start_as_usual(run_python: Any) -> None:
    code = """import multiprocessing, sys
print("monai.bundle" in sys.modules, multiprocessing.get_start_method(), sys.modules["scripts.cli.main"].__file__)"""
    expected = f"True {multiprocessing.get_start_method()} {Path(__file__).parents[2] / 'scripts/cli/main.py'}\n"
    assert run_python("-c", code).stdout == expected


def test_a_module_runs_like_a_command_and_a_started_process_can_be_killed(
    run_python: Any, start_python: Any, tmp_path: Path
) -> None:
    done = run_python("-m", "scripts", "train", "--dry-run", "--dataset-dir", "x")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("python -m monai.bundle run")
    process = start_python("-c", "print('ready', flush=True); import time; time.sleep(60)", output=tmp_path / "log")
    while "ready" not in ((tmp_path / "log.out").read_text() if (tmp_path / "log.out").is_file() else ""):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
