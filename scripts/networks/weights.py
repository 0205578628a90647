# SPDX-License-Identifier: Apache-2.0
"""Load the weights of a network strictly, and verify their checksum."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.utils.checksums import verified_sha256
from scripts.utils.tensor_files import load_plain

logger = logging.getLogger(__name__)


# Where programs put the state dict in a file, and what wrappers put before the names in it: DataParallel and DDP,
# torch.compile, and the attribute that holds the network in a LightningModule and the like.
KEYS = ("model", "net", "network", "state_dict", "model_state_dict", "network_weights")
PREFIXES = ("module.", "_orig_mod.", "network.", "model.", "net.")
SHOWN = 3  # names that an error shows

State = dict[str, torch.Tensor]


def load_weights(network: nn.Module, path: str | Path, checksum: str | None = None) -> str:
    """Load weights into a network. All names and shapes must match, and no code in the file is ever executed.

    A prefix of ``PREFIXES`` that all names in the file, or all names in the network, share is not compared.

    Args:
        network: receives the weights, in its own precision.
        path: file with a state dict, or with one under a name of ``KEYS``; see ``load_plain`` for its formats.
        checksum: sha256 that the file must have. Default: the checksum in ``<path>.sha256``, if it exists.

    Returns:
        The sha256 of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the checksum differs, the file contains anything but tensors and plain values, or the weights are
            not finite or do not fit the network.
    """
    digest = verified_sha256(path, checksum)
    place, weights = _state_dict(path, load_plain(path))
    require_finite(path, weights)
    network.load_state_dict(_renamed(path, place, weights, network), strict=True)
    return digest


def _state_dict(path: str | Path, content: Any) -> tuple[str, State]:
    """Find the state dict in a file's content; returns its place, as text for an error, and the state dict.

    Raises:
        ValueError: there is none, or there are two different ones.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no state dict. Save the network's state_dict().")
    found = {key: content[key] for key in KEYS if _is_state_dict(content.get(key))}
    if not found and _is_state_dict(content):
        return "", dict(content)
    if not found:
        names = ", ".join(map(str, list(content)[:SHOWN])) or "nothing"
        raise ValueError(
            f"{path} holds no state dict, only {names}. Save a state dict, alone or under one of {', '.join(KEYS)}."
        )
    (key, state), *others = found.items()
    for other, value in others:
        if not _same(state, value):
            raise ValueError(f"{path} holds two different state dicts, {key} and {other}. Save the one to use alone.")
    return f" under {key}", dict(state)


def _is_state_dict(value: Any) -> bool:
    has_names = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    return has_names and any(isinstance(item, torch.Tensor) for item in value.values())


def _same(first: State, second: State) -> bool:
    def equal(one: Any, two: Any) -> bool:
        return torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one is two

    return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


def _common_prefix(names: Iterable[str]) -> str:
    """Return the prefixes of ``PREFIXES`` that all names share, one behind the other."""
    names, prefix = list(names), ""
    while names:
        following = [part for part in PREFIXES if all(name.startswith(prefix + part) for name in names)]
        if not following:
            break
        prefix += following[0]
    return prefix


def _renamed(path: str | Path, place: str, weights: State, network: nn.Module) -> State:
    """Return the weights under the network's own names.

    Raises:
        ValueError: names, shapes or kinds of numbers do not fit.
    """
    current = network.state_dict()
    prefix, own = _common_prefix(weights), _common_prefix(current)
    if weights.keys() != current.keys():
        weights = {own + name.removeprefix(prefix): value for name, value in weights.items()}
    misfit = f"The weights in {path} do not fit {type(network).__name__}"
    advice = "Check the weights, and the settings of the network."
    missing, unknown = current.keys() - weights.keys(), weights.keys() - current.keys()
    if missing or unknown:
        behind = f" behind the prefix {prefix}" if prefix else ""
        raise ValueError(
            f"{misfit}: {len(missing)} of its {len(current)} tensors are missing, and {len(unknown)} are unknown. "
            f"Found{place}{behind}: {_some(name.removeprefix(own) for name in weights)}. "
            f"Expected: {_some(name.removeprefix(own) for name in current)}. {advice}"
        )
    different = [name for name in current if not _fits(weights[name], current[name])]
    if different:
        pairs = [f"{name} is {_described(weights[name])}, not {_described(current[name])}" for name in different]
        raise ValueError(f"{misfit} in {len(pairs)} of {len(current)} tensors: {'; '.join(pairs[:SHOWN])}. {advice}")
    return weights


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _fits(value: Any, current: Any) -> bool:
    """Return whether a value has the shape of a tensor, and real numbers where those are needed."""
    if not (isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor)):
        return type(value) is type(current)
    real = value.is_floating_point() or not current.is_floating_point()
    return value.shape == current.shape and real and not value.is_complex()


def _described(value: Any) -> str:
    is_tensor = isinstance(value, torch.Tensor)
    return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}" if is_tensor else type(value).__name__


def require_finite(path: str | Path, weights: Mapping[str, Any]) -> None:
    """Reject NaN or infinite weights: such a network silently returns an empty mask."""
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    nonfinite = sum(not bool(value.float().isfinite().all()) for value in tensors if value.is_floating_point())
    if nonfinite:
        raise ValueError(
            f"{path} holds NaN or infinite values in {nonfinite} of its {len(tensors)} tensors: take weights from an "
            "earlier checkpoint, or train again."
        )


def strict_network(network: nn.Module) -> nn.Module:
    """Let a network load weights strictly whatever its caller asks for, in place.

    MONAI Label asks for ``strict=False``, and would silently run an untrained network where no name matches.

    Returns:
        The network itself, of a subclass of its class with the same name.
    """
    kind = type(network)

    def load_state_dict(self: nn.Module, state_dict: State, strict: bool = True, assign: bool = False) -> Any:
        return kind.load_state_dict(self, state_dict, strict=True, assign=assign)

    strict_class = type(kind.__name__, (kind,), {"load_state_dict": load_state_dict, "__module__": kind.__module__})
    network.__class__ = strict_class
    return network


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
        logger.debug("weights %s, sha256 %s", self.path, load_weights(self.network, self.path, self.checksum))
