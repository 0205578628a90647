# SPDX-License-Identifier: Apache-2.0
"""What a value of a config or a JSON file is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

HEADS = ("softmax", "sigmoid")  # of a network: over the classes, or one channel per region
TAPS = ("deep", "middle", "fine")  # of a network's features, each with a layer


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    """Whether it is a list or a tuple; text is none."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_three(value: Any, accepts: Callable[[Any], bool]) -> bool:
    """Whether it is a list of three accepted values above 0, one per axis."""
    return is_list(value) and len(value) == 3 and all(accepts(each) and each > 0 for each in value)


def is_range(value: Any) -> bool:
    """Whether it is an intensity rule: ``[low, high]``, or ``"zscore"``."""
    if isinstance(value, str):
        return value == "zscore"
    return is_list(value) and len(value) == 2 and all(map(is_number, value)) and value[0] < value[1]
