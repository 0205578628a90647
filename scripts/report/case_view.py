# SPDX-License-Identifier: Apache-2.0
"""A case of the report: its entry in the list, and what the page loads when a reader opens it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.report.differences import Differences, mask_differences, region_sets
from scripts.report.display import FUSION, fused_pair, is_pet, presets
from scripts.report.overlay import OUTLINES, Overlay, Volumes, to_view, view_affine, viewing_orientation
from scripts.report.slice_viewer import Outline, PlaneView, outlines_of, plane_views
from scripts.report.tables import Table, measures_tables
from scripts.report.volume_payload import volume_payload
from scripts.utils.colours import region_colour


@dataclass(frozen=True)
class Key:
    """An entry of the legend with its switch; ``number`` counts the regions, a mask has none."""

    name: str
    colour: str
    number: int | None = None
    dashed: bool = False


@dataclass(frozen=True)
class CaseView:
    """One case.

    Args:
        id: of its elements and files.
        overlay: its images and masks.
        differences: to the reference; None without one.
        planes: its still images; empty where Pillow is not installed.
        payload: what the page's scripts need, without the still images.
        volumes: what the viewer loads; None without the viewer.
        measures: its lesions, if they are given.
        mask_sha256: of the predicted mask's file; empty where it is not known.
    """

    id: str
    overlay: Overlay
    differences: Differences | None
    planes: Sequence[PlaneView]
    payload: Mapping[str, Any]
    volumes: Mapping[str, Any] | None
    measures: Table | None
    mask_sha256: str

    @property
    def keys(self) -> list[Key]:
        """The legend: the masks, and of several regions those too."""
        masks = [name for name in OUTLINES if name in self.overlay.value_masks()]
        if not self.overlay.has_regions:
            return [Key(name, OUTLINES[name]) for name in masks]
        regions = [Key(name, region_colour(i), i) for i, name in enumerate(self.overlay.regions)]
        return [*(Key(name, "#FFFFFF", None, name == "prediction") for name in masks), *regions]

    @property
    def volumes_text(self) -> str:
        """Volume of every mask."""
        return ", ".join(f"{name} {ml:,.2f} ml" for name, ml in self.overlay.volumes_ml().items())


def case_view(
    overlay: Overlay, element_id: str, with_volumes: bool, measures: Sequence[Mapping[str, Any]] = ()
) -> CaseView:
    """Everything that the page shows of a case.

    Args:
        overlay: images and masks.
        element_id: of the case, unique in the page.
        with_volumes: whether the viewer's volumes are made.
        measures: rows of ``measures.csv``; those of other cases are left out.
    """
    _, images, step = viewing_orientation(overlay)
    masks = to_view(overlay, overlay.region_values())
    affine, shape = view_affine(overlay), masks["prediction"].shape
    windows = {modality: overlay.window(modality) for modality in images}
    differences = None
    if "reference" in masks:
        values = masks
        if overlay.has_regions:
            values = {name: region_sets(mask, overlay.regions) for name, mask in masks.items()}
        differences = mask_differences(values["prediction"], values["reference"], step.tolist(), overlay.has_regions)
    try:
        planes = plane_views(overlay, element_id, masks, images, step, windows)
    except ImportError:
        planes = []
    outlines = outlines_of(overlay)
    codes = {value: code for code, value in enumerate(sorted({v for each in outlines for v in each.values}), start=1)}
    payload = {
        "case": overlay.name,
        "shape": list(shape),
        "affine": np.round(affine, 6).tolist(),
        "start": _start(planes, shape),
        "difference": list(differences.centre) if differences and differences.centre else None,
        "outlines": [_outline(each, codes) for each in outlines],
        "panels": _panels(overlay, windows),
    }
    own = measures_tables([row for row in measures if row["case_id"] == overlay.name])
    path = overlay.mask_path
    return CaseView(
        element_id,
        overlay,
        differences,
        planes,
        payload,
        volume_payload(images, _coded(masks, codes), affine) if with_volumes else None,
        own[0] if own else None,
        hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else "",
    )


def _start(planes: Sequence[PlaneView], shape: Sequence[int]) -> list[int]:
    """The index per axis that is shown first."""
    start = [n // 2 for n in shape]
    for plane in planes:
        start[plane.axis] = plane.indices[plane.first_frame]
    return start


def _coded(masks: Volumes, codes: Mapping[float, int]) -> Volumes:
    """Masks with one byte per voxel: the code of each value, or 1 where there are no values to tell apart."""
    if not codes:
        return {name: (mask > 0).astype(np.uint8) for name, mask in masks.items()}
    coded = {name: np.zeros(mask.shape, np.uint8) for name, mask in masks.items()}
    for name, mask in masks.items():
        for value, code in codes.items():
            coded[name][mask == value] = code
    return coded


def _outline(outline: Outline, codes: Mapping[float, int]) -> dict[str, Any]:
    return {
        "mask": outline.mask,
        "region": outline.region,
        "colour": outline.colour,
        "dashed": outline.dashed,
        "codes": [codes[value] for value in outline.values] or [1],
    }


def _panels(overlay: Overlay, windows: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """The viewer's panels: every modality, then PET on CT."""
    choices = {}
    for modality, window in windows.items():
        image = np.asarray(overlay.images[modality])
        choices[modality] = [preset._asdict() for preset in presets(modality, window, image[np.isfinite(image)])]
    panels: list[dict[str, Any]] = [
        {"name": name, "image": name, "over": None, "light": is_pet(name), "presets": choices[name]} for name in windows
    ]
    if pair := fused_pair(windows):
        ct, pet = pair
        panels.append(
            {
                "name": FUSION,
                "image": ct,
                "over": pet,
                "light": False,
                "window": choices[ct][0],
                "presets": choices[pet],
            }
        )
    return panels
