# SPDX-License-Identifier: Apache-2.0
"""Read the bundle's JSON configs and merge them as MONAI does, without importing MONAI."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scripts import bundle_root

CONFIGS = Path(bundle_root()) / "configs"
SEPARATOR = "#"  # between the parts of a nested config id
Config = dict[str, Any]


def config_names(folder: str) -> list[str]:
    """Names of the configs in a folder of configs/."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.json"))


def read_config(name: str) -> Config:
    """One config of configs/ by its name, such as ``data/sts``."""
    config: Config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def merge_configs(names: Sequence[str]) -> Config:
    """Merge configs in order, as ``monai.bundle run --config_file`` does.

    A later config replaces values of an earlier one. A key ``a#b`` replaces the value ``b`` inside ``a``. A key that
    begins with ``+`` extends the list or updates the dict that is there.

    Args:
        names: of configs/, such as ``["train", "data/sts", "scale/small"]``.
    """
    merged: Config = {}
    for name in names:
        for key, value in read_config(name).items():
            set_value(merged, key, value)
    return merged


def set_value(config: Config, key: str, value: Any) -> None:
    """Set a config id in place; see ``merge_configs`` for ``#`` and ``+``.

    Raises:
        KeyError: the part of the config that should hold the value does not exist.
    """
    *parents, last = key.removeprefix("+").split(SEPARATOR)
    place: Any = config
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    index: Any = int(last) if isinstance(place, list) else last
    if key.startswith("+") and isinstance(value, dict):
        place[index].update(copy.deepcopy(value))
    elif key.startswith("+") and isinstance(value, list):
        place[index].extend(copy.deepcopy(value))
    else:
        place[index] = copy.deepcopy(value)


def has_id(config: Config, key: str) -> bool:
    """Whether a config holds an id, such as ``train#handlers#0#path``."""
    place: Any = config
    for part in key.split(SEPARATOR):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict) and part in place:
            place = place[part]
        else:
            return False
    return True


def require_id(config: Config, key: str) -> None:
    """Refuse an id that a config does not hold.

    Raises:
        ValueError: no such id; the nearest one is named.
    """
    if has_id(config, key):
        return
    nearest = get_close_matches(key, list(_ids(config)), n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"--set {key}: the configs have no such id.{hint} To add a new id, write --set +{key}=VALUE.")


def _ids(value: Any, prefix: str = "") -> Iterator[str]:
    """Every id of a config, nested ones with their path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield f"{prefix}{key}"
        yield from _ids(child, f"{prefix}{key}{SEPARATOR}")
