# SPDX-License-Identifier: Apache-2.0
"""Find the images of all modalities of a case."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any


def _siblings(reference: Path, layout: Mapping[str, str], key: str) -> dict[str, str]:
    """Existing files of the other modalities by a naming layout; empty if the layout does not fit ``reference``."""
    head, _, tail = layout[key].partition("{case}")
    name = reference.name
    if "{case}" not in layout[key]:
        case = name if name == layout[key] else ""
    else:
        case = name[len(head) : len(name) - len(tail)] if name.startswith(head) and name.endswith(tail) else ""
    if not case:
        return {}
    paths = {k: reference.parent / pattern.replace("{case}", case) for k, pattern in layout.items() if k != key}
    return {k: str(path) for k, path in paths.items() if path.exists()}


def modalities_used(modalities: Sequence[str], present: Sequence[str] | None = None) -> list[str]:
    """The modalities that ``present`` names, in the order of ``modalities``; all of them if it is None.

    Raises:
        ValueError: ``present`` is empty, or names an unknown modality.
    """
    if present is not None and (not present or not set(present) <= set(modalities)):
        raise ValueError(f"present is {list(present)}. Name one or more of {', '.join(modalities)}.")
    return [key for key in modalities if present is None or key in present]


def stack_advice(case: Mapping[Any, Any], modalities: Sequence[str]) -> str:
    """The advice for a case of several modalities that names one image only; empty for others."""
    if len(modalities) > 1 and "image" in case and not any(key in case for key in modalities):
        return " If the image is a 4D file of all modalities, use --set stacked=true."
    return ""


def _refuse_same_file(files: Mapping[str, str], item: Mapping[Any, Any]) -> None:
    """Refuse one file as two modalities; a DICOM folder may hold the series of several.

    Raises:
        ValueError: two modalities are one file.
    """
    first: dict[str, str] = {}
    for key, path in files.items():
        if os.path.isfile(path) and (other := first.setdefault(os.path.realpath(path), key)) != key:
            raise ValueError(
                f"Case {item.get('case_id')}: {other} and {key} are one file, {path}. Name the file of each."
            )


class GatherModalities:
    """Complete an item of a data list: explicit keys first, then the data set's naming rules.

    Args:
        modalities: keys to find.
        naming: layouts that are tried in order. Each gives a file name per modality, relative to the reference's
            folder; ``{case}`` is the variable part: ``{"ct": "{case}_ct.nii.gz", "pet": "{case}_pt.nii.gz"}``.
        allow_missing: accept absent modalities (they become zeros) instead of refusing the case.
        reference: the modality that ``image`` names if its own key is absent; by default the first.
        present: modalities to use, by default all. The others are left out and need not exist. Only the reference's
            file is always kept, because it defines the grid.
        stacked: ``image`` is one 4D file of all modalities.

    Raises:
        ValueError: an unknown reference or ``present``; (when called) the item names neither ``image`` nor the
            reference modality, or a modality is absent.
        FileNotFoundError: (when called) a file that the item names does not exist.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        naming: Sequence[Mapping[str, str]] = (),
        allow_missing: bool = False,
        reference: str | None = None,
        present: Sequence[str] | None = None,
        stacked: bool = False,
    ) -> None:
        self.modalities, self.allow_missing, self.stacked = list(modalities), allow_missing, stacked
        self.reference, self.used = reference or self.modalities[0], modalities_used(modalities, present)
        if self.reference not in self.modalities:
            raise ValueError(f"The reference {reference!r} is not a modality. Choose one of {', '.join(modalities)}.")
        self.naming = [layout for layout in naming if self.reference in layout]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        reference = self.reference
        if self.stacked and "image" in data:
            data = {**data, **dict.fromkeys(self.modalities, data["image"])}
        # If the item also names `image` as another modality, it is not the reference.
        others = [str(data[k]) for k in self.modalities if k != reference and k in data]
        if reference not in data and ("image" not in data or str(data["image"]) in others):
            case = f"Case {data['case_id']}" if "case_id" in data else "A case"
            raise ValueError(
                f"{case} has no {reference}, the reference modality, and no image in its place. Add it. It has "
                f"{', '.join(sorted(map(str, data)))}."
            )
        item = dict(data)
        item.setdefault(reference, data.get("image"))
        item["image"] = item[reference]
        if isinstance(item[reference], str | Path):
            for layout in self.naming:
                for key, path in _siblings(Path(item[reference]), layout, reference).items():
                    if key in self.modalities:
                        item.setdefault(key, path)
            item.setdefault("case_id", Path(item[reference]).name.split(".")[0])
        for key in set(self.modalities) - {reference, *self.used}:
            item.pop(key, None)
        files = [Path(item[k]) for k in self.modalities if isinstance(item.get(k), str | Path)]
        missing_paths = [str(path) for path in files if not path.exists()]
        if missing_paths:
            raise FileNotFoundError(f"Case {item.get('case_id')}: no such file: {', '.join(missing_paths)}.")
        if not self.stacked:
            _refuse_same_file({k: str(item[k]) for k in self.modalities if isinstance(item.get(k), str | Path)}, item)
        absent = [k for k in self.used if k not in item]
        if absent and not self.allow_missing:
            raise ValueError(
                f"Case {item.get('case_id')}: no {', '.join(absent)} was given or found next to {item['image']}. "
                f"Add the file, or allow absent modalities.{stack_advice(data, self.modalities)}"
            )
        return item
