# SPDX-License-Identifier: Apache-2.0
"""Check the header of a predicted mask against that of its reference mask."""

from __future__ import annotations

import nibabel as nib

from scripts.image_io.checks import ERROR, LABEL, MASK, WARNING, Finding, check_headers
from scripts.image_io.grid_geometry import MAX_SHIFT, canonical_grid, covered_fraction, largest_shift
from scripts.image_io.headers import Header


def check_mask(reference: Header, mask: Header) -> list[Finding]:
    """Compare the header of a predicted mask with the header of its reference mask.

    Returns:
        What ``check_headers`` finds in both. Besides, an error if they have one shape and their voxels lie more than
        ``MAX_SHIFT`` voxels apart anywhere; axes that are stored in another order or direction draw a warning
        instead, unless one of the headers states no position. An error if the sizes of the axes are exchanged and
        their directions are not. A warning where the mask covers only a part of the reference.
    """
    findings = check_headers({LABEL: reference, MASK: mask}, LABEL)
    if any(finding.level == ERROR for finding in findings):
        return findings
    findings += _check_axes(reference, mask)
    if any(finding.level == ERROR for finding in findings):
        return findings
    if (fraction := covered_fraction(reference, mask)) < 1:
        percent = min(99, max(1, round(100 * fraction)))
        text = (
            f"{mask.path} covers {percent}% of the extent of {reference.path}: all voxels outside count as background"
        )
        findings.append(Finding(WARNING, text, key=MASK))
    return findings


def _check_axes(reference: Header, mask: Header) -> list[Finding]:
    """An error or a warning if two masks have the same axes, in whatever order, and lie on different grids."""
    if sorted(mask.shape) != sorted(reference.shape):
        return []
    canonical = canonical_grid(reference), canonical_grid(mask)
    shift = largest_shift(reference, mask)
    if shift is None:
        if canonical[0].shape == canonical[1].shape:
            return []
        sizes = [" x ".join(map(str, header.shape)) for header in (mask, reference)]
        text = (
            f"{mask.path} has {sizes[0]} voxels, but {reference.path} has {sizes[1]}: the axes are in another order, "
            "but the affine is not. Save the mask with the axes of the image."
        )
        return [Finding(ERROR, text, key=MASK)]
    if shift[0] <= MAX_SHIFT:
        return []
    reordered = largest_shift(*canonical)
    if reordered is None or reordered[0] > MAX_SHIFT or not (reference.placed and mask.placed):
        advice = "Save both with the affine of the image."
        if not reference.placed:
            advice = "Correct the header of the reference: it states no position in space."
        text = (
            f"{mask.path} has the shape of {reference.path}, but another affine: its voxels lie up to "
            f"{shift[1]:.1f} mm ({shift[0]:.1f} voxels) away. {advice}"
        )
        return [Finding(ERROR, text, key=MASK)]
    codes = ["".join(nib.orientations.aff2axcodes(header.affine)) for header in (mask, reference)]
    text = (
        f"{mask.path} stores its axes in another order or direction ({codes[0]}) than {reference.path} "
        f"({codes[1]}): its header is believed"
    )
    return [Finding(WARNING, text, key=MASK)]
