# SPDX-License-Identifier: Apache-2.0
"""Any folder of files: one pattern per modality, and one for the label.

    "layout": {"t1": "{case}/{case}_t1.nii.gz", "t2": "{case}/{case}_t2.nii.gz", "label": "{case}/{case}_seg.nii.gz"}

Patterns are relative to the data set's folder. ``{case}`` is the case's id, and may occur several times; it is part of
one name, so it contains no slash. ``{patient}`` is the patient's id, if one patient has several cases. A pattern may
name a DICOM folder.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from scripts.data.case_list import Item, check_cases, make_item, require_folder, require_patterns
from scripts.image_io.checks import LABEL
from scripts.utils.file_names import nfc

FIELDS = ("case", "patient")
EXAMPLE = '"{case}/{case}_ct.nii.gz"'


class _Found(NamedTuple):
    """What a pattern's fields are in one path."""

    case: str
    patient: str | None
    path: Path


class _Pattern(NamedTuple):
    """A pattern, the regular expression for its paths, and the number of its characters that are not in a field."""

    text: str
    expression: re.Pattern[str]
    literal: int

    def path(self, case: str, patient: str | None) -> str:
        """The path of a case; an unknown patient stays ``{patient}``."""
        return self.text.replace("{case}", case).replace("{patient}", patient or "{patient}")


def datalist(root: Path, modalities: Sequence[str], layout: Mapping[str, str], _: bool = False) -> list[Item]:
    """List the cases: whatever matches the pattern of the first modality, the reference.

    A path that fits several patterns belongs to the one with the most characters of its own: ``a_seg.nii.gz`` to
    ``{case}_seg.nii.gz`` and not to ``{case}.nii.gz``. A case without another modality or the label is listed without
    it. Names that begin with a dot are not read.

    Args:
        root: folder of the data set.
        modalities: the reference first.
        layout: a pattern for each modality, and for ``label`` if there are labels.

    Raises:
        ValueError: a pattern is missing, unknown, absolute, has no ``{case}`` or leads out of the folder; or two paths
            belong to one case.
        FileNotFoundError: no folder, no case, or files of a case without its reference.
    """
    require_patterns(layout, modalities, "files", EXAMPLE)
    reference = modalities[0]
    patterns = {key: _parse(key, layout[key]) for key in layout}
    for key, pattern in patterns.items():
        if "{patient}" in pattern.text and "{patient}" not in patterns[reference].text:
            raise ValueError(
                f"The pattern of {key} has {{patient}}, but that of {reference}, the reference, has not. Add it there."
            )
    root = require_folder(root, "files", ", ".join(layout.values()))
    problems: list[str] = []
    found = {key: _by_case(key, each, problems) for key, each in _matches(root, patterns).items()}
    cases = []
    for case in dict.fromkeys(case for each in found.values() for case in each):
        own = {key: each[case] for key, each in found.items() if case in each}
        patients = list(dict.fromkeys(each.patient for each in own.values() if each.patient))
        patient = next(iter(patients), None)
        if len(patients) > 1:
            problems.append(
                f"The case {case} has files of {len(patients)} patients ({', '.join(patients)}). Give each case an id "
                "of its own."
            )
        paths = {
            key: own[key].path if key in own else root / pattern.path(case, patient)
            for key, pattern in patterns.items()
        }
        files = {key: paths[key] for key in modalities}
        cases.append((make_item(case, patient or case, files, paths.get(LABEL)), files))
    return check_cases(cases, root, "files", ", ".join(layout.values()), problems)


def _parse(key: str, text: str) -> _Pattern:
    """Compile a pattern.

    Raises:
        ValueError: it is absolute, leads out of the folder, has no ``{case}``, or an unknown field.
    """
    where = f'The pattern of {key}, "{text}",'
    path = PurePosixPath(text)
    if path.is_absolute() or re.match(r"[A-Za-z]:|\\", text):
        raise ValueError(f"{where} is absolute. Give it relative to the data set's folder, such as {EXAMPLE}.")
    if ".." in path.parts:
        raise ValueError(f"{where} leads out of the data set's folder. Give a pattern inside, such as {EXAMPLE}.")
    parts = re.split(r"\{(.*?)\}", str(path))
    unknown = [name for name in parts[1::2] if name not in FIELDS]
    if unknown or "*" in text:
        raise ValueError(f"{where} has {unknown[0] if unknown else '*'!r}. Use only {{case}} and {{patient}}.")
    if "case" not in parts[1::2]:
        raise ValueError(f"{where} has no {{case}}. Write {{case}} where the case's id stands, such as {EXAMPLE}.")
    expression, known = "", set()
    for index, part in enumerate(parts):
        if index % 2 == 0:
            expression += re.escape(nfc(part))
        else:
            expression += f"(?P={part})" if part in known else f"(?P<{part}>[^/]+?)"
            known.add(part)
    return _Pattern(str(path), re.compile(expression), sum(len(part) for part in parts[::2]))


def _matches(root: Path, patterns: Mapping[str, _Pattern]) -> dict[str, list[_Found]]:
    """The paths of each pattern. The search follows links, and leaves out names that begin with a dot."""
    found: dict[str, list[_Found]] = {key: [] for key in patterns}
    for name in sorted(glob.iglob("**", root_dir=root, recursive=True)):
        text = nfc(name).replace("\\", "/")
        matches = {key: each.expression.fullmatch(text) for key, each in patterns.items()}
        most = max((patterns[key].literal for key, match in matches.items() if match), default=0)
        for key, match in matches.items():
            if match and patterns[key].literal == most:
                fields = match.groupdict()
                found[key].append(_Found(fields["case"], fields.get("patient"), root / name))
    return found


def _by_case(key: str, found: Sequence[_Found], problems: list[str]) -> dict[str, _Found]:
    """The first path of each case; a second one is a problem."""
    chosen: dict[str, _Found] = {}
    for each in found:
        first = chosen.setdefault(each.case, each)
        if first is not each:
            problems.append(
                f"Case {each.case} has two files for {key}, {first.path} and {each.path}. Remove one, or let {{case}} "
                "contain what distinguishes them."
            )
    return chosen
