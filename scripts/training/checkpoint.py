# SPDX-License-Identifier: Apache-2.0
"""Weights and training states on disk: checksums, strict loading, atomic writing, resuming."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from scripts.utils.tensor_files import is_whole, load_plain, write_atomically

logger = logging.getLogger(__name__)


class TrainingCheckpoint:
    """Handler: save the training state every few epochs, resume from it, and write the final weights.

    A resumed run ends with the same bits as one that was never interrupted: states are saved at the ends of epochs, and
    all random numbers of an epoch come from the seed and its number (``SeedEpochs``, ``data.CaseSampler``). The last
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
