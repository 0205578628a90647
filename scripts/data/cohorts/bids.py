# SPDX-License-Identifier: Apache-2.0
"""BIDS: one pattern per modality for what follows ``sub-X_`` or ``sub-X_ses-Y_`` in a file's name.

    "layout": {"t1": "T1w", "t1ce": "ce-gd_T1w", "pet": "*_pet", "label": "*label-tumour_mask"}

    sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz                                      images, in any folder of the subject
    derivatives/masks/sub-01/ses-1/anat/sub-01_ses-1_label-tumour_mask.nii.gz      labels, here or beside the images

``*`` in a pattern stands for any text. A file that fits several patterns belongs to the one with the most other
characters. Other files are not read.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from scripts.data.case_list import Item, check_cases, make_item, missing_file, require_folder, require_patterns
from scripts.image_io.checks import LABEL

logger = logging.getLogger(__name__)

NAME = re.compile(r"(?P<subject>sub-[^_/]+)(?:_(?P<session>ses-[^_/]+))?_(?P<rest>.+)\.nii(\.gz)?")
LAYOUT = "sub-X/[ses-Y/]anat/sub-X[_ses-Y]_SUFFIX.nii.gz"
RAW, DERIVATIVES = "sub-*/**/*", "derivatives/*/sub-*/**/*"


class _Case(NamedTuple):
    """A subject, and the session if there is one."""

    subject: str
    session: str | None

    @property
    def id(self) -> str:
        """Such as ``sub-01_ses-1``."""
        return "_".join(filter(None, self))


def datalist(root: Path, modalities: Sequence[str], layout: Mapping[str, str], _: bool = False) -> list[Item]:
    """List the cases: one for each subject and session with a file of any modality.

    `case_id` is ``sub-X`` or ``sub-X_ses-Y``, `patient_id` is ``sub-X``. Labels are searched beside the images first,
    then in ``derivatives``.

    Args:
        root: folder of the data set.
        modalities: the reference first.
        layout: a pattern for each modality, and for ``label`` if there are labels.

    Raises:
        ValueError: a pattern is missing or unknown; or a case has two files for one of them.
        FileNotFoundError: no folder, no case, or a case without its reference.
    """
    require_patterns(layout, modalities, "bids", '"T1w"')
    root = require_folder(root, "bids", LAYOUT)
    images, others = _matches(root, RAW, layout)
    labels, _others = _matches(root, DERIVATIVES, {LABEL: layout[LABEL]} if LABEL in layout else {})
    without = sorted(others - set(images))
    if without:
        listed = ", ".join(case.id for case in without)
        logger.warning("no file of these subjects or sessions fits the layout, so they are not read: %s", listed)
    problems: list[str] = []
    cases = []
    for case in sorted({*images, *labels}, key=lambda case: case.id):
        found = {**labels.get(case, {}), **images.get(case, {})}
        for key, paths in found.items():
            if len(paths) > 1:
                listed = " and ".join(map(str, paths))
                problems.append(
                    f"Case {case.id} has {len(paths)} files for {key}, {listed}. Remove one, or give a pattern that "
                    "fits one of them."
                )
        files = {key: found[key][0] if key in found else _expected(root, case, layout[key]) for key in modalities}
        label = found[LABEL][0] if LABEL in found else None
        if label is not None and not label.exists():
            problems.append(missing_file(label))
        cases.append((make_item(case.id, case.subject, files, label), files))
    return check_cases(cases, root, "bids", LAYOUT, problems)


def _expected(root: Path, case: _Case, pattern: str) -> Path:
    """Where a file of a case may lie, for messages."""
    return root.joinpath(*filter(None, case)) / "*" / f"{case.id}_{pattern}.nii.gz"


def _matches(
    root: Path, where: str, layout: Mapping[str, str]
) -> tuple[dict[_Case, dict[str, list[Path]]], set[_Case]]:
    """The files of each case by key, and the cases that have any image at all."""
    found: dict[_Case, dict[str, list[Path]]] = {}
    cases = set()
    for path in map(root.joinpath, sorted(glob.iglob(where, root_dir=root, recursive=True))):
        name = NAME.fullmatch(path.name)
        if name and (path.is_file() or path.is_symlink()):  # a link to nothing is a missing file
            case = _Case(name["subject"], name["session"])
            cases.add(case)
            literal = {key: len(p.replace("*", "")) for key, p in layout.items() if fnmatchcase(name["rest"], p)}
            for key, length in literal.items():
                if length == max(literal.values()):
                    found.setdefault(case, {}).setdefault(key, []).append(path)
    return found, cases
