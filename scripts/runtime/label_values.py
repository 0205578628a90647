# SPDX-License-Identifier: Apache-2.0
"""From the values of a label or mask to class indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scripts.runtime.regions import IGNORED

Labels = Sequence[Sequence[float]]


def value_classes(labels: Labels, ignore: float | None = None) -> dict[float, int]:
    """Value -> class index; ``IGNORED`` for ``ignore``.

    Args:
        labels: values of each class, the background first.
        ignore: value of voxels that count in no loss and no score.
    """
    classes = {value: index for index, values in enumerate(labels) for value in values}
    return classes if ignore is None else {**classes, ignore: IGNORED}


def class_indices(
    values: NDArray, labels: Labels, source: str, ignore: float | None = None, others: Labels = (), hint: str = ""
) -> NDArray[np.uint8]:
    """Map values to class indices.

    Args:
        values: of any shape and type.
        labels, ignore: see ``value_classes``.
        source: the file, for the error.
        others: values of another coding. Where it lists everything that ``values`` holds, the error ends with ``hint``.
        hint: what to do then.

    Returns:
        Class indices of the same shape and memory layout; ``IGNORED`` where a voxel has the value ``ignore``.

    Raises:
        ValueError: there is any other value, including NaN.
    """
    classes, known = np.zeros_like(values, dtype=np.uint8), np.zeros_like(values, dtype=bool)
    for value, index in value_classes(labels, ignore).items():
        matches = values == value
        known |= matches
        if index:
            classes[matches] = index
    if known.all():
        return classes
    # dict.fromkeys, because unique() lists every NaN
    unknown = list(dict.fromkeys(f"{value:.7g}" for value in np.unique(values[~known]).tolist()))
    is_other = bool(others) and bool(np.isin(values, [value for members in others for value in members]).all())
    named = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    raise ValueError(
        f"{source} contains {'the value' if len(unknown) == 1 else 'the values'} {named}, which the task's labels "
        f"{[list(members) for members in labels]} do not name. "
        + (hint if is_other else "Correct the file, or `labels` (or `ignore`) of the task.")
    )
