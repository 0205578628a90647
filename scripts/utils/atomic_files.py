# SPDX-License-Identifier: Apache-2.0
"""Atomic writing: a file is either complete or absent."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: str | Path, text: bool = False, check: Callable[[Path], bool] | None = None) -> Iterator[IO[Any]]:
    """Open a file for writing and give it its name only when it is complete.

    A reader sees the old file or the new one, never a partial one. The content goes to ``.<name>.<process id>.part`` in
    the same folder, is flushed to the disk, passed to ``check`` and renamed. The ``.part`` file is removed after an
    error. A killed process leaves it behind; no reader uses it.

    Args:
        path: the file to write; its folder is created.
        text: write UTF-8 text with line ends unchanged; by default write bytes.
        check: reads the ``.part`` file back and returns whether it holds what was written.

    Raises:
        OSError: the path is a folder, or the file cannot be written or does not pass ``check``; the message names the
            file and the cause.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Name a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="") if text else open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None and not check(part):
            raise OSError(errno.EIO, "the file read back differs from what was written")
        os.replace(part, target)
    except Exception as error:
        cause = _cause_without_filename(error)
        if cause is None:
            raise
        message = f"{target} could not be written ({cause.strerror}): free some space on its disk, or use another disk."
        raise OSError(cause.errno, message) from error
    finally:
        part.unlink(missing_ok=True)


def _cause_without_filename(error: BaseException | None) -> OSError | None:
    """Find the operating system's error behind an exception; None if there is none, or if it names its file."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) and error.filename is None else None


def write_bytes(data: bytes, path: str | Path) -> None:
    """Write bytes with ``atomic_file`` and compare them with the file read back."""
    with atomic_file(path, check=lambda part: part.read_bytes() == data) as file:
        file.write(data)


def write_text(text: str, path: str | Path) -> None:
    """Write UTF-8 text with ``write_bytes``."""
    write_bytes(text.encode("utf-8"), path)


def write_json(obj: Any, path: str | Path) -> None:
    """Write ``obj`` as JSON with ``write_text``.

    Raises:
        ValueError: ``obj`` contains NaN or infinity; an existing file is kept.
    """
    write_text(json.dumps(obj, indent=2, allow_nan=False) + "\n", path)
