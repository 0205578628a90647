# SPDX-License-Identifier: Apache-2.0
"""The weights of the fixture ``exported``, with the record that a training writes beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from scripts.utils.checksums import sha256

NETWORK = {"_target_": "scripts.networks.Student", "in_channels": 3, "out_channels": 2, "features": [8, 16, 16, 16]}


def copy_with_task(exported: Path, folder: Path, labels: Sequence[Sequence[int]]) -> Path:
    """Copy the weights and their exported files, and write the record.

    Args:
        exported: the weights of the fixture.
        folder: gets ``model.pt``, ``model_export`` and ``model.task.json``.
        labels: of the task.

    Returns:
        The path of the copied weights.
    """
    shutil.copytree(exported.parent, folder, dirs_exist_ok=True)
    task = {
        "modalities": ["ct", "pet", "mr"],
        "intensity": {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]},
        "labels": labels,
        "spacing": [8, 8, 8],
        "patch": [32, 32, 16],
        "cohort": "phantom",
        "network": NETWORK,
    }
    record = {"weights_sha256": sha256(folder / "model.pt"), **task}
    (folder / "model.task.json").write_text(json.dumps(record))
    return folder / "model.pt"
