# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: save and restore the training state, write the final weights."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from scripts.training.training_record import write_task
from scripts.utils.tensor_files import is_whole, load_plain, write_atomically

logger = logging.getLogger(__name__)


class TrainingCheckpoint:
    """Handler: save the training state every few epochs, resume from it, and write the final weights.

    A resumed run ends with the same bits as an uninterrupted one: the state is saved at the end of an epoch, and all
    random numbers of an epoch depend only on the seed and the epoch (``SeedEpochs``, ``scripts.data.CaseSampler``). The
    last two states are kept. If the newest is damaged, the one before is used and a warning is logged. The final
    weights are those of the last epoch, so that no network is selected on the validation cases. With several processes
    all of them load the state, and the first one saves it.

    Args:
        path: file of the training state. The state before it is kept in the same folder, with ``.previous`` before the
            suffix.
        weights: file of the final weights, a plain state dict as ``monai.bundle.load`` and the model zoo read it.
        objects: name -> anything with ``state_dict``; ``model`` is the network whose weights are written.
        interval: number of epochs between two states.
        resume: continue from ``path`` if it exists.
        seed: seed of the run; a state with another seed is rejected.
        overwrite: without ``resume``, remove the states of an earlier run; by default such a folder is rejected.
        record: what the network is trained on, see ``scripts.training.training_record``. It is kept in the state, and
            written beside the final weights.
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
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if "model" not in objects:
            raise ValueError(f"objects must contain the network as 'model', got {sorted(objects)}.")
        self.path, self.weights, self.objects = Path(path), Path(weights), dict(objects)
        self.previous = self.path.with_suffix(f".previous{self.path.suffix}")
        self.interval, self.resume, self.seed, self.overwrite = interval, resume, seed, overwrite
        self.record = dict(record or {})

    def attach(self, engine: Any) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.load)
        if engine.state.rank == 0:  # MONAI's workflows set their rank
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)
            engine.add_event_handler(Events.COMPLETED, self.finish)

    def load(self, engine: Any) -> None:
        """Restore every object and the trainer's epoch if ``resume`` is set and a state exists.

        Raises:
            ValueError: no existing state can be read; the state is from another kind of run; or a state exists and
                neither ``resume`` nor ``overwrite`` is set.
        """
        if self.overwrite and not self.resume:
            if engine.state.rank == 0:  # a later run must not resume from an earlier run's state
                self.path.unlink(missing_ok=True)
                self.previous.unlink(missing_ok=True)
            return
        path, state = self._newest_state()
        if not self.resume:
            if state is not None:
                raise ValueError(
                    f"{path} already contains a checkpoint{_epoch_note(state)}. Use --resume to continue, or choose "
                    "another --output-dir."
                )
            return
        if state is None:
            logger.warning("No checkpoint at %s: training starts at epoch 1", path)
            return
        missing = sorted({*self.objects, "trainer"} - set(state))
        if missing:
            raise ValueError(f"{path} contains no state of {', '.join(missing)}: it is from another kind of run.")
        trainer = dict(state["trainer"])
        for name, saved, current in (
            ("seed", state.get("seed", self.seed), self.seed),
            ("number of steps per epoch", trainer["epoch_length"], engine.state.epoch_length),
        ):
            if saved != current:
                raise ValueError(
                    f"{path} is from a different run: its {name} is {saved}, this run's is {current}. Resume with the "
                    "same seed, data, batch size and number of processes, or choose another --output-dir."
                )
        for name, item in self.objects.items():
            _require_same_schedule(path, state[name], item)
            item.load_state_dict(state[name])
        if "scaler" in state and engine.scaler is not None:
            engine.scaler.load_state_dict(state["scaler"])
        engine.load_state_dict({**trainer, "max_epochs": engine.state.max_epochs})
        logger.info("resumed %s after epoch %d", path, engine.state.epoch)

    def _newest_state(self) -> tuple[Path, Any]:
        """Return the newest undamaged state and its file; the state is None if there is no file."""
        existing = [path for path in (self.path, self.previous) if path.exists()]
        for path in existing:
            if is_whole(path):
                return path, load_plain(path)
            logger.warning("%s is damaged: trying the checkpoint before it", path)
        if existing:
            names = " and ".join(map(str, existing))
            raise ValueError(f"{names} cannot be read: remove it to start a new run, or restore it from a backup.")
        return self.path, None

    def save(self, engine: Any) -> None:
        """Write the training state, and keep the one before."""
        state = {name: item.state_dict() for name, item in self.objects.items()}
        if engine.scaler is not None:
            state["scaler"] = engine.scaler.state_dict()
        if is_whole(self.path):  # a damaged state must not replace the undamaged one before it
            temporary = self.path.with_name(f".{self.previous.name}")
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.path, temporary)
            except OSError:  # some network file systems do not support hard links
                shutil.copyfile(self.path, temporary)
            os.replace(temporary, self.previous)
        run = {"trainer": dict(engine.state_dict()), "seed": self.seed, "record": self.record}
        write_atomically({**state, **run}, self.path)

    def finish(self, engine: Engine) -> None:
        """Write the training state, unless the last epoch already did, the final weights and their record."""
        if engine.state.epoch % self.interval:
            self.save(engine)
        write_atomically(self.objects["model"].state_dict(), self.weights)
        if self.record:
            write_task(self.record, self.weights)


def _epoch_note(state: Any) -> str:
    """Return `` (epoch N)`` for a training state, or nothing if the state does not contain its epoch."""
    try:
        return f" (epoch {state['trainer']['iteration'] // state['trainer']['epoch_length']})"
    except (KeyError, TypeError, ZeroDivisionError):
        return ""


def _require_same_schedule(path: Path, state: Any, item: Any) -> None:
    """Reject another number of epochs: a learning rate that decreased along one schedule cannot follow another."""
    saved = state.get("total_iters") if isinstance(state, dict) else None
    current = getattr(item, "total_iters", None)
    if saved is not None and current is not None and saved != current:
        raise ValueError(
            f"{path} is from a run of {saved} epochs, this run has {current}: resume with {saved} epochs, or start a "
            "new run from its weights (--pretrained)."
        )
