# SPDX-License-Identifier: Apache-2.0
"""Weights and training states on disk: checksums, strict loading, atomic writing, resuming."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.utils.atomic_files import atomic_file

logger = logging.getLogger(__name__)


def sha256(path: str | Path) -> str:
    """Checksum of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_beside(path: str | Path) -> str | None:
    """The sha256 in ``<path>.sha256``, as ``sha256sum`` writes it; None where there is no such file.

    Raises:
        ValueError: the file holds no sha256.
    """
    beside = Path(f"{path}.sha256")
    if not beside.is_file():
        return None
    with open(beside, "rb") as file:
        found = re.match(rb"\s*([0-9a-fA-F]{64})(?:\s|$)", file.read(1000))
    if found is None:
        raise ValueError(
            f"{beside} holds no sha256 of 64 hexadecimal digits: write it again by sha256sum, or remove it."
        )
    return found[1].decode().lower()


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """Tensors and plain numbers of a file; ValueError, without running anything, where it holds anything else.

    Args:
        path: of what ``torch.save`` wrote.
        mmap: map it into memory, so that only what is used is read.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no checkpoint make the reader fail in a dozen ways
        raise ValueError(f"{path} is not a file of plain weights, and nothing else is loaded.") from error


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


def write_atomically(state: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` by ``atomic_file``; read again by ``is_whole`` before it gets its name."""
    with atomic_file(path, check=is_whole) as file:
        torch.save(state, file)


def is_whole(path: str | Path) -> bool:
    """Whether a file that ``torch.save`` wrote is there with every byte: each member's CRC-32 is compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            # A member that a flipped bit marks as a folder keeps its CRC, but PyTorch reads zeros in its place.
            whole = archive.testzip() is None and not any(member.external_attr for member in archive.infolist())
        if whole:
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # the directory has no CRC of its own
    except Exception:  # a flipped bit makes the readers fail in a dozen ways
        return False
    return whole


class TrainingCheckpoint:
    """Handler: save the training state every few epochs, resume from it, and write the final weights.

    A resumed run ends with the same bits as one that was never interrupted: states are saved at the ends of epochs, and
    all random numbers of an epoch come from the seed and its number (``SeedEpochs``, ``scripts.data.Draws``). The last
    two states are kept; where the newest is broken, the one before is taken, and that is said. The final weights are
    those of the last epoch, so that no network is selected on the validation cases. Of several processes all load, the
    first saves.

    Args:
        path: file of the training state; the one before lies beside it, with ``.previous`` before its suffix.
        weights: file of the final weights, a plain state dict, as ``monai.bundle.load`` and the model zoo read it.
        objects: name -> anything with ``state_dict``; ``model`` is the network whose weights are shipped.
        interval: epochs between two savings.
        resume: continue from ``path`` if it is there.
        seed: of the run; a state of another seed is refused.
        overwrite: without ``resume``, remove the states of an earlier run; by default such a folder is refused.
    """

    def __init__(
        self,
        path: str,
        weights: str,
        objects: Mapping[str, Any],
        interval: int = 5,
        resume: bool = False,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        if "model" not in objects:
            raise ValueError(f"objects must name the network as 'model', got {sorted(objects)}.")
        self.path, self.weights, self.objects = Path(path), Path(weights), dict(objects)
        self.previous = self.path.with_suffix(f".previous{self.path.suffix}")
        self.interval, self.resume, self.seed, self.overwrite = interval, resume, seed, overwrite

    def attach(self, engine: Any) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.load)
        if engine.state.rank == 0:  # MONAI's workflows know their process
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)
            engine.add_event_handler(Events.COMPLETED, self.finish)

    def load(self, engine: Any) -> None:
        """Restore every object and the trainer's epoch, where asked and possible.

        Raises:
            ValueError: no state that is there can be read, it is from another kind of run, or one is there and neither
                ``resume`` nor ``overwrite`` is asked for.
        """
        if self.overwrite and not self.resume:
            if engine.state.rank == 0:  # an earlier run's states must not become this one's fallback
                self.path.unlink(missing_ok=True)
                self.previous.unlink(missing_ok=True)
            return
        path, state = self._newest()
        if not self.resume:
            if state is not None:
                raise ValueError(
                    f"{path} holds the state of an earlier run{_epoch_of(state)}: go on with it by --resume, or name "
                    "another output folder."
                )
            return
        if state is None:
            logger.warning("nothing to resume at %s: training starts at epoch 1", path)
            return
        missing = sorted({*self.objects, "trainer"} - set(state))
        if missing:
            raise ValueError(f"{path} holds no state of {', '.join(missing)}: it is from another kind of run.")
        trainer = dict(state["trainer"])
        for name, found, now in (
            ("seed", state.get("seed", self.seed), self.seed),
            ("number of steps per epoch", trainer["epoch_length"], engine.state.epoch_length),
        ):
            if found != now:
                raise ValueError(
                    f"{path} is from another run: its {name} is {found}, here it is {now}. Go on with the same seed, "
                    "data, batch size and number of processes, or name another output folder."
                )
        for name, item in self.objects.items():
            _require_length(path, state[name], item)
            item.load_state_dict(state[name])
        if "scaler" in state and engine.scaler is not None:
            engine.scaler.load_state_dict(state["scaler"])
        engine.load_state_dict({**trainer, "max_epochs": engine.state.max_epochs})
        logger.info("resumed %s after epoch %d", path, engine.state.epoch)

    def _newest(self) -> tuple[Path, Any]:
        """The newest state that is whole and its file; None where there is none at all."""
        there = [path for path in (self.path, self.previous) if path.exists()]
        for path in there:
            if is_whole(path):
                return path, load_plain(path)
            logger.warning("%s is broken: falling back to the state before it", path)
        if there:
            names = " and ".join(map(str, there))
            raise ValueError(f"{names} cannot be read: remove them to start anew, or restore one from a backup.")
        return self.path, None

    def save(self, engine: Any) -> None:
        """Write the training state, and keep the one before."""
        state = {name: item.state_dict() for name, item in self.objects.items()}
        if engine.scaler is not None:
            state["scaler"] = engine.scaler.state_dict()
        if is_whole(self.path):  # a broken one must not take the good one's place
            beside = self.path.with_name(f".{self.previous.name}")
            beside.unlink(missing_ok=True)
            try:
                os.link(self.path, beside)
            except OSError:  # some network file systems know no links
                shutil.copyfile(self.path, beside)
            os.replace(beside, self.previous)
        write_atomically({**state, "trainer": dict(engine.state_dict()), "seed": self.seed}, self.path)

    def finish(self, engine: Engine) -> None:
        """Write the training state, unless the last epoch did, and the final weights."""
        if engine.state.epoch % self.interval:
            self.save(engine)
        write_atomically(self.objects["model"].state_dict(), self.weights)


def _epoch_of(state: Any) -> str:
    """`` (epoch N)`` of a training state; nothing where it does not say."""
    try:
        return f" (epoch {state['trainer']['iteration'] // state['trainer']['epoch_length']})"
    except (KeyError, TypeError, ZeroDivisionError):
        return ""


def _require_length(path: Path, state: Any, item: Any) -> None:
    """A learning rate that has come down along one schedule cannot go on along a longer one."""
    planned, now = (state.get("total_iters") if isinstance(state, dict) else None), getattr(item, "total_iters", None)
    if planned is not None and now is not None and planned != now:
        raise ValueError(
            f"{path} is of a run of {planned} epochs, here there are {now}: go on with {planned}, or start a new run "
            "from its weights (--pretrained)."
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
