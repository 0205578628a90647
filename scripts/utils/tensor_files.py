# SPDX-License-Identifier: Apache-2.0
"""Files of tensors and plain values: safe loading, whole-file writing."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from scripts.utils.atomic_files import atomic_file


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """Tensors and plain numbers of a file; ValueError, without running anything, where it holds anything else.

    Args:
        path: of what ``torch.save`` wrote.
        mmap: map it into memory, so that only what is used is read.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no checkpoint make the reader fail in a dozen ways
        raise ValueError(f"{path} is not a file of plain weights, and nothing else is loaded.") from error


def write_atomically(state: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` by ``atomic_file``; read again by ``is_whole`` before it gets its name."""
    with atomic_file(path, check=is_whole) as file:
        torch.save(state, file)


def is_whole(path: str | Path) -> bool:
    """Whether a file that ``torch.save`` wrote is there with every byte: each member's CRC-32 is compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            # A member that a flipped bit marks as a folder keeps its CRC, but PyTorch reads zeros in its place.
            whole = archive.testzip() is None and not any(member.external_attr for member in archive.infolist())
        if whole:
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # the directory has no CRC of its own
    except Exception:  # a flipped bit makes the readers fail in a dozen ways
        return False
    return whole
