# SPDX-License-Identifier: Apache-2.0
"""A network's weights: strict loading with checksums."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.utils.checksums import checksum_beside, sha256
from scripts.utils.tensor_files import load_plain

logger = logging.getLogger(__name__)


def load_weights(network: nn.Module, path: str | Path, checksum: str | None = None, key: str = "model") -> str:
    """Load weights strictly, without ever unpickling code.

    Args:
        network: receives the weights.
        path: file of a state dict, or of a checkpoint that holds one under ``key``.
        checksum: sha256 that the file must have; by default the one beside it (``<path>.sha256``), where there is one.
        key: see ``path``.

    Returns:
        The file's sha256.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another checksum, a file that is no weights file, weights that are not finite or that do not fit the
            network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No weights at {path}: train the network first or give the right path.")
    found, expected = sha256(path), checksum or checksum_beside(path)
    if expected is not None and found != expected.lower():
        raise ValueError(f"{path} has the sha256 {found[:12]}..., not {expected[:12]}...: it is not the expected file.")
    state = load_plain(path)
    try:
        weights = state.get(key, state) if isinstance(state, dict) else state
        _require_finite(path, weights)
        network.load_state_dict(weights, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"The weights in {path} do not fit {type(network).__name__}: {detail}") from error
    return found


def _require_finite(path: str | Path, weights: Mapping[str, Any]) -> None:
    """A network whose weights are NaN answers with an empty mask and no word."""
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    bad = sum(not bool(value.isfinite().all()) for value in tensors)
    if bad:
        raise ValueError(
            f"{path} holds NaN or infinite values in {bad} of its {len(tensors)} tensors: take weights from before "
            "that, or train again."
        )


class WeightsLoader:
    """Handler: load weights strictly when an inference starts, so that only a run that needs them asks for them.

    Args:
        network: receives the weights.
        path: file of the weights.
        checksum: see ``load_weights``.
    """

    def __init__(self, network: nn.Module, path: str, checksum: str | None = None) -> None:
        self.network, self.path, self.checksum = network, Path(path), checksum

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load."""
        logger.info("weights %s, sha256 %s", self.path, load_weights(self.network, self.path, self.checksum))
