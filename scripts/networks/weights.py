# SPDX-License-Identifier: Apache-2.0
"""Load the weights of a network strictly, and verify their checksum."""

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
    """Load weights into a network. All names and shapes must match, and no code in the file is ever executed.

    Args:
        network: receives the weights.
        path: file with a state dict, or with a checkpoint that contains one under ``key``.
        checksum: sha256 that the file must have. Default: the checksum in ``<path>.sha256``, if it exists.
        key: key of the state dict in a checkpoint.

    Returns:
        The sha256 of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the checksum differs, the file contains anything but tensors and plain values, or the weights are
            not finite or do not fit the network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No weights at {path}: train the network first or check the path.")
    digest, expected = sha256(path), checksum or checksum_beside(path)
    if expected is not None and digest != expected.lower():
        raise ValueError(
            f"{path} has the sha256 {digest[:12]}..., not {expected[:12]}...: it is not the expected file."
        )
    state = load_plain(path)
    try:
        weights = state.get(key, state) if isinstance(state, dict) else state
        _require_finite(path, weights)
        network.load_state_dict(weights, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"The weights in {path} do not fit {type(network).__name__}: {detail}") from error
    return digest


def _require_finite(path: str | Path, weights: Mapping[str, Any]) -> None:
    """Reject NaN or infinite weights: such a network silently returns an empty mask."""
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    nonfinite = sum(not bool(value.isfinite().all()) for value in tensors)
    if nonfinite:
        raise ValueError(
            f"{path} holds NaN or infinite values in {nonfinite} of its {len(tensors)} tensors: take weights from an "
            "earlier checkpoint, or train again."
        )


class WeightsLoader:
    """Handler that loads weights strictly when the engine starts.

    The file is not needed before that, so a config with this handler can be parsed without it.

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
        """Load the weights and log their checksum."""
        logger.info("weights %s, sha256 %s", self.path, load_weights(self.network, self.path, self.checksum))
