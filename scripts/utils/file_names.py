# SPDX-License-Identifier: Apache-2.0
"""Compare file names regardless of their Unicode form.

"ü" is one character (composed, NFC) or a "u" and a combining diaeresis (decomposed, NFD, as macOS writes file names).
Both look the same, but Linux treats them as two names. So ids and names are compared in NFC.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


def nfc(text: str) -> str:
    """Text in Unicode's composed form: two names that look the same are equal in it."""
    return unicodedata.normalize("NFC", text)


def find_file(path: str | Path) -> Path | None:
    """The existing file or folder that a path names, whichever Unicode form its parts have on disk.

    Args:
        path: any path. If it exists as written, it is returned as written.

    Returns:
        The path as it is on disk, or None if there is no such file.

    Raises:
        ValueError: a folder contains two entries of this name, in different Unicode forms.
    """
    path = Path(path)
    if path.exists():
        return path
    if str(path).isascii() or path.parent == path:
        return None
    folder = find_file(path.parent)
    if folder is None or not folder.is_dir():
        return None
    wanted = nfc(path.name)
    names = sorted(name for name in os.listdir(folder) if nfc(name) == wanted)
    if len(names) > 1:
        raise ValueError(
            f"{folder} contains {len(names)} entries that are spelt {wanted}, in different Unicode forms. Keep one."
        )
    return folder / names[0] if names else None
