# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: str | Path, text: bool = False) -> Iterator[IO[Any]]:
    """Open a file that gets its name when it is whole: a reader sees the old file or the new one, never a half.

    It is written beside its place (``.<name>.<process>.part``), flushed to the disk and renamed. After an error it is
    removed; what a killed process leaves is a ``.part`` that nobody reads.

    Args:
        path: of the file; its folder is made.
        text: UTF-8 text, with line ends as they are written; bytes by default.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(beside, "w", encoding="utf-8", newline="") if text else open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def write_text(text: str, path: str | Path) -> None:
    """Write UTF-8 text by ``atomic_file``."""
    with atomic_file(path, text=True) as file:
        file.write(text)


def write_json(obj: Any, path: str | Path) -> None:
    """Write ``obj`` as JSON by ``atomic_file``. Raises ValueError on NaN or infinity, and leaves the old file alone."""
    write_text(json.dumps(obj, indent=2, allow_nan=False) + "\n", path)
