# SPDX-License-Identifier: Apache-2.0
"""Find the image series of a DICOM study, and choose one for each modality of a network."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from scripts.image_io.checks import DICOM_MODALITIES, WARNING, Finding, report_findings
from scripts.image_io.dicom_classes import ENHANCED, no_image
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_rules import Rule, element_texts, matches, rule_text
from scripts.image_io.dicom_series import series_files
from scripts.image_io.dicom_structure import read_structure
from scripts.image_io.series_preference import KEYWORDS, PREFER, narrow
from scripts.utils.errors import EXPECTED_ERRORS, error_sentence

TAGS = (
    *("Modality", "SeriesInstanceUID", "PatientID", "FrameOfReferenceUID", "SeriesDescription", "Rows", "ImageType"),
    "SOPClassUID",
)
UNKNOWN_FOLDER = Path()  # of a series that is not on this machine


class Series(NamedTuple):
    """The images of one series in one folder; ``elements`` are texts by keyword from the header of its first file."""

    uid: str
    kind: str
    folder: Path
    patient: str
    frame: str
    description: str
    slices: int
    enhanced: bool = False
    elements: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def find_series(study: str | Path, keywords: Iterable[str] = ()) -> list[Series]:
    """Every image series below a folder. Structure sets, segmentations, scouts and other files are skipped.

    Args:
        study: the folder.
        keywords: of DICOM elements to read from the series' headers, beside those that every series needs.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image series, or a series that is spread over several folders.
    """
    root = Path(study)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    images: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    tags = series_tags(keywords)
    for path, head in _image_heads(root, tags):
        images[str(head.SeriesInstanceUID)].append((path, head))
    if not images:
        raise ValueError(f"{root} contains no series of DICOM images. Give the folder of one study.")
    return [_series(uid, images[uid], tags) for uid in sorted(images)]


def series_tags(keywords: Iterable[str] = ()) -> list[str]:
    """The keywords of the elements that are read of every image: those that a choice needs, and others."""
    return list(dict.fromkeys((*TAGS, *KEYWORDS, *keywords)))


def is_volume_image(head: Any) -> bool:
    """Whether a header (pydicom) is that of an image that may belong to a volume, and not that of a scout.

    Raises:
        Exception: pydicom raises many types for a damaged header.
    """
    is_scout = "LOCALIZER" in list(head.get("ImageType", []) or [])
    is_image = head.get("Rows") and head.get("SeriesInstanceUID") and head.get("Modality") in DICOM_MODALITIES.values()
    return bool(is_image) and not is_scout and not no_image(str(head.get("SOPClassUID", "")))


def _image_heads(root: Path, tags: Sequence[str]) -> Iterator[tuple[Path, Any]]:
    pydicom = dicom_package("pydicom")
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            if read_structure(path) is None:
                continue
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
            values = [str(head.get(tag, "")) for tag in tags]  # raises for values of another type than the element's
            is_image = is_volume_image(head)
        # Not DICOM, or damaged: pydicom raises many exception types. The missing slice is noticed when the series is
        # read.
        except Exception:
            continue
        if values and is_image:
            yield path, head


def _series(uid: str, images: Sequence[tuple[Path, Any]], tags: Sequence[str]) -> Series:
    folders = sorted({path.parent for path, _ in images})
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders[:4])
        raise ValueError(f"The series {uid} is spread over {len(folders)} folders ({names}). Put it into one.")
    return series_of([head for _, head in images], folders[0], tags)


def series_of(heads: Sequence[Any], folder: Path, tags: Sequence[str]) -> Series:
    """The series of some images.

    Args:
        heads: headers of its images (pydicom data sets).
        folder: of its files, or ``UNKNOWN_FOLDER``.
        tags: from ``series_tags``.
    """
    head = heads[0]
    patient, frame, description = (
        str(head.get(tag, "") or "") for tag in ("PatientID", "FrameOfReferenceUID", "SeriesDescription")
    )
    enhanced = any(str(each.get("SOPClassUID")) in ENHANCED for each in heads)
    elements = {tag: element_texts(head.get(tag)) for tag in tags}
    uid = str(head.SeriesInstanceUID)
    return Series(uid, str(head.Modality), folder, patient, frame, description, len(heads), enhanced, elements)


class Choice(NamedTuple):
    """The series of each modality, and for every series of the study why it was taken, or not."""

    series: dict[str, Series]
    reasons: dict[str, str]


def choose_series(
    study: Sequence[Series],
    rules: Mapping[str, Rule],
    series_uids: Sequence[str] = (),
    preferences: Mapping[str, Sequence[str]] | None = None,
) -> Choice:
    """Choose one series per modality; modalities without a series are left out.

    A series is of one modality: where it is the only one that fits a modality, it is none of another.

    Args:
        study: series of a study, from ``find_series`` with the keywords of the rules.
        rules: of each modality, from ``series_rules``.
        series_uids: series to choose if several fit one modality.
        preferences: of each modality, which of several series to choose, see ``scripts.image_io.series_preference``.

    Raises:
        ValueError: several series fit one modality, and no preference tells them apart, or one series fits two; a UID
            does not exist, or its series fits no modality; a chosen series has no frame of reference; or the chosen
            series have different patients or frames of reference. The messages do not contain patient ids.
    """
    unknown = sorted(set(series_uids) - {series.uid for series in study})
    if unknown:
        uids = ", ".join(series.uid for series in study)
        raise ValueError(f"The study has no series {', '.join(unknown)}. It has {uids}.")
    candidates, fitting = {}, {}
    for key, rule in rules.items():
        found = [series for series in study if matches({**series.elements, "Modality": (series.kind,)}, rule)]
        fitting[key] = [series.uid for series in found]
        candidates[key] = [series for series in found if series.uid in series_uids] or found
    unfit = sorted(set(series_uids) - {uid for uids in fitting.values() for uid in uids})
    if unfit:
        listed = "; ".join(f"{key}: {rule_text(rule)}" for key, rule in rules.items())
        raise ValueError(
            f"The series {', '.join(unfit)} fits no modality of the task ({listed}). Change the rules in the task's "
            "dicom, or name another series."
        )
    _leave_out_taken(candidates)
    reasons = _prefer(candidates, rules, preferences or {}, series_uids)
    for key, found in candidates.items():
        if len(found) > 1:
            listed = "; ".join(f"{s.uid} ({s.description or 'no description'}, {s.slices} images)" for s in found)
            advice = f'Choose one with --series-uid, or by a rule or "{PREFER}" in the task\'s dicom'
            if all(series.uid in series_uids for series in found):
                advice = "Tell them apart by a rule in the task's dicom"
            raise ValueError(
                f"The study has {len(found)} series for {key} ({rule_text(rules[key])}). {advice}: {listed}."
            )
    chosen = {key: found[0] for key, found in candidates.items() if found}
    _refuse_shared(chosen)
    _refuse_unusable(list(chosen.values()))
    for series in study:
        fits = " and ".join(key for key, uids in fitting.items() if series.uid in uids)
        reasons.setdefault(series.uid, f"fits {fits}, another is taken" if fits else "fits no rule")
    return Choice(chosen, reasons)


def _prefer(
    candidates: dict[str, list[Series]],
    rules: Mapping[str, Rule],
    preferences: Mapping[str, Sequence[str]],
    series_uids: Sequence[str],
) -> dict[str, str]:
    """Leave out of each modality what is not preferred; why, by the UIDs of the series."""
    reasons: dict[str, str] = {}
    for key, found in candidates.items():
        elements = {series.uid: series.elements for series in found}
        left, reason, others = narrow(elements, preferences.get(key, ()))
        candidates[key] = [series for series in found if series.uid in left]
        reasons |= {uid: f"fits {key}, {why}" for uid, why in others.items()}
        reason = reason or f"the only one with {rule_text(rules[key])}"
        reasons |= {uid: "named by --series-uid" if uid in series_uids else reason for uid in left}
    return reasons


def _leave_out_taken(candidates: dict[str, list[Series]]) -> None:
    """Leave out of each modality, while there is another choice, the series that are the only ones of another."""
    before = None
    while before != (counts := [len(found) for found in candidates.values()]):
        before = counts
        taken = {found[0].uid for found in candidates.values() if len(found) == 1}
        for key, found in candidates.items():
            free = [series for series in found if series.uid not in taken]
            if len(found) > 1 and free:
                candidates[key] = free


def _refuse_shared(chosen: Mapping[str, Series]) -> None:
    owners: dict[str, str] = {}
    for key, series in chosen.items():
        other = owners.setdefault(series.uid, key)
        if other != key:
            raise ValueError(
                f"The series {series.uid} ({series.description or 'no description'}) fits both {other} and {key}. Tell "
                "them apart by a rule in the task's dicom."
            )


def _refuse_unusable(chosen: Sequence[Series]) -> None:
    """Refuse series that cannot be read, or whose position relative to each other is unknown."""
    for series in chosen:
        if not series.frame:
            raise ValueError(
                f"The series {series.uid} has no FrameOfReferenceUID, so its position relative to other series is "
                "unknown. Export it with one, or convert it to NIfTI and use `segment`."
            )
    for what, values in (
        ("patients", {series.patient for series in chosen}),
        ("frames of reference", {series.frame for series in chosen}),
    ):
        if len(values) > 1:
            uids = ", ".join(series.uid for series in chosen)
            raise ValueError(
                f"The series {uids} have {len(values)} different {what}. Give one study of one patient and one frame "
                "of reference."
            )


def require_series(chosen: Mapping[str, Series], rules: Mapping[str, Rule], allow_missing: bool, name: str) -> None:
    """Refuse a study in which modalities have no series.

    Args:
        chosen: series by modality.
        rules: of each modality, the reference first.
        allow_missing: accept this for all modalities but the reference.
        name: of the study.

    Raises:
        ValueError: a modality has no series.
    """
    missing = [key for key in rules if key not in chosen]
    reference = next(iter(rules))
    if missing and (reference in missing or not allow_missing):
        names = " and none for ".join(f"{key} ({rule_text(rules[key])})" for key in missing)
        advice = "Add it" if reference in missing else "Add it, use --allow-missing"
        raise ValueError(f"{name} has no series for {names}. {advice}, or correct the rules in the task's dicom.")


def series_folders(chosen: Mapping[str, Series], links: Path) -> dict[str, str]:
    """A folder for each modality that holds only its series; of series that share a folder, links to their files.

    Args:
        chosen: series by modality.
        links: an empty folder, for the links.

    Returns:
        Modality -> absolute path of its folder.
    """
    counts = Counter(series.folder for series in chosen.values())
    folders = {}
    for key, series in chosen.items():
        folder = series.folder
        if counts[folder] > 1:
            folder = links / key
            folder.mkdir()
            files = series_files(series.folder, [series.uid])
            report_findings(Finding(WARNING, text) for text in files.warnings)
            for number, file in enumerate(files.heads):
                (folder / f"{number:05d}").symlink_to(Path(file).resolve())
            print(f"{key}: series {series.uid} of {series.folder}")
        folders[key] = str(folder.absolute())
    return folders


@contextmanager
def series_named(
    folders: Mapping[str, str | Path], chosen: Mapping[str, Series], debug: bool = False
) -> Iterator[None]:
    """Let the errors of a block name series by their UIDs, and not by folders that are about to be removed.

    Args:
        folders: of each modality's files, absolute.
        chosen: the series of each.
        debug: let the errors through as they are.
    """
    try:
        yield
    except EXPECTED_ERRORS as error:
        text = error_sentence(error)
        names = {str(folder): f"The series {chosen[key].uid} ({key})" for key, folder in folders.items()}
        longest_first = "|".join(re.escape(folder) for folder in sorted(names, key=len, reverse=True))
        # Not the beginning of another folder's name.
        named = re.sub(rf"(?<![\w./-])({longest_first})(?![\w-])(?!\.\w)", lambda match: names[match[1]], text)
        if debug or named == text:
            raise
        raise ValueError(named) from None
