# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported at their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def import_name(package: str, names: Mapping[str, Sequence[str]], name: str) -> Any:
    """The body of a package's ``__getattr__`` (PEP 562).

    Args:
        package: its ``__name__``.
        names: the names that each module offers; modules of the package without its name, others in full.
        name: the name that is looked up.

    Raises:
        AttributeError: no module offers it.
    """
    for module, offered in names.items():
        if name in offered:
            full = module if "." in module else f"{package}.{module}"
            value = getattr(importlib.import_module(full), name)
            setattr(sys.modules[package], name, value)
            return value
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
