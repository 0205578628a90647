# SPDX-License-Identifier: Apache-2.0
"""Files that contain only tensors and plain values: safe loading, atomic writing, integrity check."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from scripts.utils.atomic_files import atomic_file


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """Load tensors and plain values from a file, without executing any code that the file contains.

    Args:
        path: a file written by ``torch.save``.
        mmap: map the file into memory, so that only the parts in use are read.

    Raises:
        ValueError: the file contains anything else.
        OSError: the file cannot be opened.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many different exceptions for a file that is no checkpoint
        raise ValueError(
            f"{path} is not a file of plain weights. Other files are not loaded, because they can execute code."
        ) from error


def write_atomically(state: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` with ``atomic_file``; ``is_whole`` checks the file before it gets its name."""
    with atomic_file(path, check=is_whole) as file:
        torch.save(state, file)


def is_whole(path: str | Path) -> bool:
    """Return whether a file written by ``torch.save`` exists and is undamaged: every member's CRC-32 is compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            # A flipped bit can mark a member as a folder: its CRC still fits, but PyTorch reads zeros instead.
            whole = archive.testzip() is None and not any(member.external_attr for member in archive.infolist())
        if whole:
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # the zip directory itself has no CRC
    except Exception:  # the readers raise many different exceptions for a damaged file
        return False
    return whole
