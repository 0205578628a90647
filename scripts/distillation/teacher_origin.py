# SPDX-License-Identifier: Apache-2.0
"""What a teacher of a cache is, without building it: what its manifest says, and what each answer was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.data.case_list import source_files
from scripts.networks.teacher import join_checksums, weight_files
from scripts.utils.checksums import sha256

Case = Mapping[str, Any]


def origin_of(name: str, spec: Mapping[str, Any]) -> Origin:
    """The origin of a teacher by its specification, which ``scripts.networks.teacher.check_spec`` has checked."""
    return Origin(spec)


class Origin:
    """A teacher that answers every case by the same weights.

    Args:
        spec: its specification.

    Attributes:
        identity: its architecture or network class, and its modalities.
        sha256: checksum of its weights; None for random weights.
    """

    def __init__(self, spec: Mapping[str, Any] | None = None) -> None:
        spec = spec or {}
        architecture = spec.get("architecture") or type(spec.get("network")).__name__
        self.identity: dict[str, Any] = {"architecture": architecture, "modalities": list(spec.get("modalities", ()))}
        self.digests = [sha256(file) for file in weight_files(spec.get("weights"))]
        self.sha256 = join_checksums(self.digests)

    def require_answers(self, cases: Sequence[Case]) -> None:
        """Raise an error that names all cases that this teacher cannot answer."""

    def members(self, case: Case) -> list[int]:
        """The indices of the networks that answer a case."""
        return [0]

    def sources(self, case: Case, checksums: bool = True) -> dict[str, Any]:
        """What an answer is made of; see ``source_fingerprint`` for the arguments."""
        return source_fingerprint(case, checksums)


def source_fingerprint(case: Case, checksums: bool = True) -> dict[str, Any]:
    """Return what identifies a case's images: size and checksum of every file, and values such as ``bbox_mm``.

    Args:
        case: item of a data list.
        checksums: include the files' checksums, which means reading them.
    """
    files = {key: path for key, path in source_files(case).items() if key != "label"}
    fingerprint: dict[str, Any] = {f"{key} bytes": path.stat().st_size for key, path in files.items()}
    if checksums:
        fingerprint |= {f"{key} sha256": sha256(path) for key, path in files.items()}
    others = {key: value for key, value in case.items() if not isinstance(value, str)}
    return {**fingerprint, **json.loads(json.dumps(others, sort_keys=True, default=str))}
