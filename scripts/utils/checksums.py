# SPDX-License-Identifier: Apache-2.0
"""SHA-256 checksums of files, and those that lie beside them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def sha256(path: str | Path) -> str:
    """Checksum of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_beside(path: str | Path) -> str | None:
    """The sha256 in ``<path>.sha256``, as ``sha256sum`` writes it; None where there is no such file.

    Raises:
        ValueError: the file holds no sha256.
    """
    beside = Path(f"{path}.sha256")
    if not beside.is_file():
        return None
    with open(beside, "rb") as file:
        found = re.match(rb"\s*([0-9a-fA-F]{64})(?:\s|$)", file.read(1000))
    if found is None:
        raise ValueError(
            f"{beside} holds no sha256 of 64 hexadecimal digits: write it again by sha256sum, or remove it."
        )
    return found[1].decode().lower()
