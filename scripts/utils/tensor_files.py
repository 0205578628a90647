# SPDX-License-Identifier: Apache-2.0
"""Files that contain only tensors and plain values: safe loading, atomic writing, integrity check."""

from __future__ import annotations

import importlib
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.utils.atomic_files import atomic_file

# Programs save a score or a step beside the weights as a NumPy number; creating one executes no other code. The second
# name is that of NumPy 1.
_SCALAR = import_module("numpy._core.multiarray").scalar  # numpy 1 has this module, but does not load it
NUMPY_NUMBERS: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """Load tensors and plain values from a file, without executing any code that the file contains.

    Args:
        path: a file written by ``torch.save``, or a safetensors file, whose tensors are returned by name.
        mmap: map the file into memory, so that only the parts in use are read.

    Raises:
        ValueError: the file contains anything else, or it is a safetensors file and that package is not installed.
        OSError: the file cannot be opened.
    """
    try:
        if _is_safetensors(path):
            return importlib.import_module("safetensors.torch").load_file(path, device="cpu")
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError:
        raise
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} is a safetensors file, and the package safetensors is not installed. Install it (pip install "
            "safetensors), or save the weights with torch.save."
        ) from error
    except Exception as error:  # torch.load raises many different exceptions for a file that is no checkpoint
        raise ValueError(
            f"{path} is not a file of plain weights. Other files are not loaded, because they can execute code. Save "
            "the state_dict() of the network."
        ) from error


def _is_safetensors(path: str | Path) -> bool:
    """Return whether a file begins like safetensors: the size of its JSON header in 8 bytes, then the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < Path(path).stat().st_size


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
