# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

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
    """Open a file that gets its name when it is whole: a reader sees the old file or the new one, never a half.

    It is written beside its place (``.<name>.<process>.part``), flushed to the disk, read again where there is a
    ``check``, and renamed. After an error it is removed; what a killed process leaves is a ``.part`` that nobody reads.

    Args:
        path: of the file; its folder is made.
        text: UTF-8 text, with line ends as they are written; bytes by default.
        check: whether what lies on the disk is what was written.

    Raises:
        OSError: it cannot be written, or does not pass ``check``; file and cause are named.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(beside, "w", encoding="utf-8", newline="") if text else open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None and not check(beside):
            raise OSError(errno.EIO, "what was read again is not what was written")
        os.replace(beside, target)
    except Exception as error:
        cause = _nameless(error)
        if cause is None:
            raise
        what = f"{target} could not be written ({cause.strerror}): make room on its disk, or write to another one."
        raise OSError(cause.errno, what) from error
    finally:
        beside.unlink(missing_ok=True)


def _nameless(error: BaseException | None) -> OSError | None:
    """The error of the operating system that is behind another one and names no file, if that is what it was."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) and error.filename is None else None


def write_bytes(data: bytes, path: str | Path) -> None:
    """Write bytes by ``atomic_file``, and compare them with what is read again."""
    with atomic_file(path, check=lambda part: part.read_bytes() == data) as file:
        file.write(data)


def write_text(text: str, path: str | Path) -> None:
    """Write UTF-8 text by ``write_bytes``."""
    write_bytes(text.encode("utf-8"), path)


def write_json(obj: Any, path: str | Path) -> None:
    """Write ``obj`` as JSON by ``atomic_file``. Raises ValueError on NaN or infinity, and leaves the old file alone."""
    write_text(json.dumps(obj, indent=2, allow_nan=False) + "\n", path)
