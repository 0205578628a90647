# SPDX-License-Identifier: Apache-2.0
"""SHA-256 checksums of files, and ``.sha256`` files next to them."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
from pathlib import Path

SETTLED_SECONDS = 2.0  # a file that changed later than this may change again within one tick of the file system's clock


def sha256(path: str | Path) -> str:
    """Return the SHA-256 checksum of a file as 64 hexadecimal digits.

    A file that this process has read before is not read again unless its size or one of its times has changed.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}. Make it first, or check the path.") from None
    if time.time() - found.st_ctime < SETTLED_SECONDS:
        return _digest(path)
    return _kept_digest(os.path.abspath(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def _kept_digest(path: str, *state: int) -> str:
    return _digest(path)


def verified_sha256(path: str | Path, checksum: str | None = None) -> str:
    """The SHA-256 checksum of weights, compared with the expected one.

    Args:
        path: file of the weights.
        checksum: the expected one. Default: the checksum in ``<path>.sha256``, if it exists.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the checksum differs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No weights at {path}: train the network first or check the path.")
    digest, expected = sha256(path), checksum or checksum_beside(path)
    if expected is not None and digest != expected.lower():
        raise ValueError(
            f"{path} has the sha256 {digest[:12]}..., not {expected[:12]}...: it is not the expected file."
        )
    return digest


def checksum_beside(path: str | Path) -> str | None:
    """Read the checksum from ``<path>.sha256``, the format that ``sha256sum`` writes.

    Args:
        path: the file that the checksum belongs to.

    Returns:
        The checksum in lower case, or None if there is no such file.

    Raises:
        ValueError: ``<path>.sha256`` contains no checksum.
    """
    checksum_file = Path(f"{path}.sha256")
    if not checksum_file.is_file():
        return None
    with open(checksum_file, "rb") as file:
        match = re.match(rb"\s*([0-9a-fA-F]{64})(?:\s|$)", file.read(1000))
    if match is None:
        raise ValueError(
            f"{checksum_file} contains no SHA-256 checksum (64 hexadecimal digits): create it again with sha256sum, "
            "or remove it."
        )
    return match[1].decode().lower()
