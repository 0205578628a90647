# SPDX-License-Identifier: Apache-2.0
"""Read a JSON file that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path, what: str = "file") -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Args:
        path: of the file.
        what: it is, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} at {path}. Check the path.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not JSON ({error}). Correct the {what}.") from error


def read_object(path: str | Path, what: str = "file") -> dict[str, Any]:
    """The content of a JSON file that holds one object; arguments and errors as for ``read_json``."""
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not the {what}. Write an object with its keys.")
    return content
