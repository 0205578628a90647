# SPDX-License-Identifier: Apache-2.0
"""What a process of the ``start_python`` fixture runs: ``python ARGUMENTS``, in an interpreter that has imported MONAI.

The fixture runs this file with ``runpy.run_path`` and passes the global variable ``JOB``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
import traceback
import warnings

from tqdm import tqdm

from scripts.cli import exported_run


def _interpret(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """``-m MODULE ARGUMENTS``, ``-c CODE ARGUMENTS`` or ``FILE ARGUMENTS``, with the same sys.argv and sys.path."""
    option, target = (arguments[0], arguments[1]) if arguments[0] in ("-m", "-c") else ("", arguments[0])
    sys.argv = [target, *arguments[2 if option else 1 :]]
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if option == "-m":
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    elif option == "-c":
        exec(compile(target, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(target, run_name="__main__")


def _run(arguments: list[str], environment: dict[str, str], folder: str, output: str) -> int:
    """Set up the process, interpret the arguments and return the exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, suffix in ((1, ".out"), (2, ".err")):
        descriptor = os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method(None, force=True)  # the platform's default instead of the forkserver
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared with processes that may be killed while they hold it
    if "FIRST_EXPORT" not in os.environ:  # the first `segment` of weights would export them, which takes seconds
        exported_run.export_once = lambda *_: None  # type: ignore[assignment]
    try:
        _interpret(arguments, environment, folder)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()  # a forked process ends without them
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


os._exit(_run(**globals()["JOB"]))
