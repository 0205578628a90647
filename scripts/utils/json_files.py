# SPDX-License-Identifier: Apache-2.0
"""Read a JSON file that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}. Give the folder that contains it.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not readable JSON ({error}). Correct it.") from error


def read_json_object(path: Path) -> Mapping[str, Any]:
    """The content of a JSON file that contains one object; errors as for ``read_json``."""
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} contains no JSON object. Correct it.")
    return content
