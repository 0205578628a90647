# SPDX-License-Identifier: Apache-2.0
"""The image files of a case as the training pipeline finds them, and the grid that it resamples them to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from scripts.image_io.checks import Rules
from scripts.image_io.headers import Affine, Header
from scripts.image_io.reader import header_of, read_modality
from scripts.runtime.grids import network_grid, own_grid
from scripts.runtime.modalities import GatherModalities


class CaseFiles:
    """Headers, volumes and grids of cases, for what does not go through the pipeline itself.

    Args:
        gather: completes a case's files.
        rules: what is accepted of image files.
        spacing: of the network's grid, in mm.
        patch: size that the pipeline pads volumes to at least.
        stacked: modalities along the last axis of a case's 4D file.
    """

    def __init__(
        self,
        gather: GatherModalities,
        rules: Rules,
        spacing: Sequence[float],
        patch: Sequence[int],
        stacked: Sequence[str] = (),
    ) -> None:
        self.gather, self.rules, self.spacing = gather, rules, list(spacing)
        self.patch, self.stacked = tuple(patch), list(stacked)

    def header(self, case: Mapping[Any, Any], key: str | None = None) -> Header:
        """The header of a modality, by default of the reference.

        Raises:
            ValueError: the case has no such modality, or the file cannot be read.
        """
        item, key = self.gather(case), key or self.gather.reference
        if key not in item:
            raise ValueError(f"Case {case.get('case_id')} has no {key}, which a teacher reads. Add the file.")
        return header_of(item[key], self.rules.of_case(case))

    def volume(self, case: Mapping[Any, Any], key: str) -> NDArray:
        """The voxels of a modality on its own grid, ``H W D``."""
        return read_modality(key, self.header(case, key), self.rules.of_case(case), self.stacked)

    def grid(self, case: Mapping[Any, Any]) -> tuple[Affine, tuple[int, ...]]:
        """Affine (RAS, mm) and shape of a case's volumes before they are padded to a patch, from headers alone."""
        header = self.header(case)
        own = own_grid(case, header.affine, header.shape)
        return network_grid(own.part_affine, own.part, self.spacing)
