# SPDX-License-Identifier: Apache-2.0
"""What enters a config of the bundle: text from data is kept from being evaluated, at this one place."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from typing import Any

from fire.parser import DefaultParseValue

# MONAI evaluates a config's text that starts with $, replaces @ID and %FILE::ID by what they name, and turns # into ::.
_SPECIAL = re.compile(r"[$@%#]")


class Expression(str):
    """A config's text that MONAI interprets: from this program or from ``--set``, never from a file, name or table."""

    __slots__ = ()


def interpreted(value: Any) -> Any:
    """A value of ``--set`` in which every text is an ``Expression``."""
    if isinstance(value, str):
        return Expression(value)
    if isinstance(value, dict):
        return {key: interpreted(each) for key, each in value.items()}
    return [interpreted(each) for each in value] if isinstance(value, list) else value


def literal(text: str) -> str:
    """A config's text that MONAI reads as exactly ``text``, whatever characters it holds."""
    if not _SPECIAL.search(text):
        return text
    return "$" + _SPECIAL.sub(lambda found: f"\\x{ord(found[0]):02x}", ascii(text))


def protected(value: Any) -> Any:
    """A config override whose texts are literals, except those marked as ``Expression``."""
    if isinstance(value, Expression):
        return str(value)
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, Mapping):
        return {key: protected(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [protected(each) for each in value]
    return value


def shell_word(value: Any) -> str:
    """A protected override as a word of the shell that ``python -m monai.bundle run`` reads as this very value."""
    if isinstance(value, str) and DefaultParseValue(value) == value:
        return shlex.quote(value)
    text = repr(value)
    readable = text.replace("'", '"')  # the shell's own quotes are single ones
    try:
        same = ast.literal_eval(readable) == value
    except (SyntaxError, ValueError):
        same = False
    return shlex.quote(readable if same else text)
