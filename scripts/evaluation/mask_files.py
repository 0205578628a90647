# SPDX-License-Identifier: Apache-2.0
"""Find the predicted mask of every case in a folder."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.utils.file_names import nfc

ENDINGS = (".nii.gz", ".nii", ".mha", ".seg.nrrd", ".nrrd")
OTHER_IMAGES = (".mhd", ".hdr", ".img", ".img.gz", ".nhdr", ".mgz", ".mgh", ".dcm", ".npy", ".npz", ".tif", ".tiff")
IMAGE_SUFFIX = re.compile(r"(.+)_\d{4}")  # nnU-Net's names of images: the case, then the number of the channel


class MaskFiles(NamedTuple):
    """Masks of a folder.

    Attributes:
        paths: the mask of each case that has one.
        hints: for cases without a mask, what a similar file in the folder may mean.
        extra: names of image files that belong to no case.
    """

    paths: dict[str, Path]
    hints: dict[str, str]
    extra: list[str]


def find_masks(folder: str | Path, case_ids: Iterable[str]) -> MaskFiles:
    """Find the masks ``<case_id><ending>`` in a folder, with one of ``ENDINGS`` in upper or lower case.

    Names are compared in Unicode's composed form. Hidden files and sub folders are ignored.

    Raises:
        ValueError: two files for one case.
    """
    case_by_name = {nfc(case_id): case_id for case_id in case_ids}
    files: dict[str, list[Path]] = defaultdict(list)
    similar: dict[str, Path] = {}
    extra = []
    for path in _visible(folder):
        stems = [nfc(path.name[: -len(ending)]) for ending in ENDINGS if path.name.lower().endswith(ending)]
        case_id = next((case_by_name[stem] for stem in stems if stem in case_by_name), None)
        if case_id is not None:
            files[case_id].append(path)
        elif path.is_file() and (stems or path.name.lower().endswith(OTHER_IMAGES)):
            extra.append(path.name)
            for match in filter(None, map(IMAGE_SUFFIX.fullmatch, stems)):
                if match[1] in case_by_name:
                    similar.setdefault(case_by_name[match[1]], path)
    several = [" and ".join(path.name for path in paths) for paths in files.values() if len(paths) > 1]
    if several:
        raise ValueError(f"{folder} contains several masks of one case: {'; '.join(several)}. Keep one of each.")
    hints = {case_id: _image_suffix_hint(path, case_id) for case_id, path in similar.items() if case_id not in files}
    return MaskFiles({case_id: paths[0] for case_id, paths in files.items()}, hints, extra)


def _visible(folder: str | Path) -> list[Path]:
    """The entries of a folder without hidden ones, such as the ``._<name>`` that macOS writes beside each file."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))


def _image_suffix_hint(path: Path, case_id: str) -> str:
    ending = next(ending for ending in ENDINGS if path.name.lower().endswith(ending))
    return (
        f"{path.name} has nnU-Net's suffix of an image. If it is the mask, rename it to {case_id}{ending}; "
        "if it is an image, give the folder of the masks"
    )


def no_masks_message(folder: str | Path, masks: MaskFiles, case_ids: Sequence[str]) -> str:
    """Say that a folder contains no mask: the number of its files by ending, and the names to use."""
    entries = _visible(folder)
    endings = Counter(_ending(path) for path in entries if path.is_file())
    counts = [(number, f"{ending} file" if ending else "file") for ending, number in sorted(endings.items())]
    counts += [(sum(path.is_dir() for path in entries), "folder")]
    counts += [(sum(1 for _ in Path(folder).iterdir()) - len(entries), "hidden file")]
    contents = [f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counts if number]
    example = f"{case_ids[0]}.nii.gz"
    return " ".join(
        [
            f"None of the {len(case_ids)} masks was found in {folder}.",
            f"It contains {', '.join(contents)}." if contents else "It is empty.",
            *(f"{hint}." for hint in [*masks.hints.values()][:1]),
            f"Name the masks <case_id>.nii.gz, such as {example} (or .nii, .mha, .nrrd).",
        ]
    )


def _ending(path: Path) -> str:
    """The ending of a file's name as it is written, which may have two parts; empty where there is none."""
    known = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
    return path.name[-len(known) :] if known else path.suffix
