# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: save and restore the training state, write the final weights."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch.optim.swa_utils import AveragedModel

from scripts.runtime.task_record import value_differences
from scripts.training.accumulation import completes_step
from scripts.training.record_comparison import differences
from scripts.training.training_record import write_task
from scripts.utils.task_file import read_task
from scripts.utils.tensor_files import is_whole, load_plain, write_atomically

logger = logging.getLogger(__name__)

OF_THE_RUN = ("trainer", "seed", "record", "scaler")  # parts of a state that are no object; "scaler" is optional


def check_folder(
    path: str, weights: str, record: Mapping[str, Any], resume: bool = False, overwrite: bool = False, seed: int = 0
) -> None:
    """Refuse what a training could not write or continue, before any case is preprocessed.

    Args:
        path: file of the training state, which ``TrainingCheckpoint`` loads later.
        weights: file of the final weights.
        record: what this run trains on, see ``scripts.training.training_record``.
        resume: the run continues from the state, which must be of the same data and settings.
        overwrite: without ``resume``, the run removes the state.
        seed: seed of the run.

    Raises:
        ValueError: no existing state can be read; it is of other data or settings; or there is one, and neither
            ``resume`` nor ``overwrite`` is set.
        OSError: the final weights cannot be written.
    """
    try:
        Path(weights).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(weights).parent):
            pass
    except OSError as error:
        message = f"{weights} cannot be written ({error.strerror}): choose another folder for the final weights."
        raise OSError(error.errno, message) from error
    if overwrite and not resume:
        return
    found, state = newest_state(Path(path), logging.DEBUG)  # the warnings come when the state is loaded
    if not resume:
        _require_no_state(found, state)
    elif isinstance(state, dict):
        _require_same_run(found, state, record, seed)


def newest_state(path: Path, level: int = logging.WARNING) -> tuple[Path, Any]:
    """Return the newest undamaged training state and its file; the state is None if there is no file.

    Args:
        path: file of the training state.
        level: of the message that a state is damaged.

    Raises:
        ValueError: no existing state can be read.
    """
    existing = [file for file in (path, _previous(path)) if file.exists()]
    for file in existing:
        if is_whole(file):
            return file, load_plain(file)
        logger.log(level, "%s is damaged: trying the checkpoint before it", file)
    if existing:
        names = " and ".join(map(str, existing))
        raise ValueError(f"{names} cannot be read: remove it to start a new run, or restore it from a backup.")
    return path, None


def _previous(path: Path) -> Path:
    return path.with_suffix(f".previous{path.suffix}")


def _require_no_state(path: Path, state: Any) -> None:
    if state is not None:
        raise ValueError(
            f"{path} already contains a checkpoint{_epoch_note(state)}. Use --resume to continue, or choose another "
            "--output-dir."
        )


def _require_same_run(path: Path, state: Mapping[str, Any], record: Mapping[str, Any], seed: int) -> None:
    """Refuse a state of other data or settings than this run's, with every difference."""
    saved = state.get("record")
    clauses = value_differences("seed", state.get("seed", seed), seed) + (differences(saved, record) if saved else [])
    if clauses:
        raise ValueError(_is_another_run(path, clauses))


def _is_another_run(
    path: str | Path,
    clauses: Sequence[str],
    remedy: str = "Resume with the same settings, data and number of processes, or choose another --output-dir.",
) -> str:
    return f"{path} is from a different run: {'; '.join(dict.fromkeys(clauses))}. {remedy}"


def require_same_stage(weights: str | Path, record: Mapping[str, Any]) -> None:
    """Refuse the final weights of a training that this run would train otherwise, with every difference.

    Weights without a record, of an older version, are used with a warning.

    Args:
        weights: file of the weights.
        record: what this run would train on, see ``scripts.training.training_record``.

    Raises:
        ValueError: the record beside the weights is of other data, settings or start weights, or cannot be read.
    """
    saved = read_task(weights)
    if saved is None:
        logger.warning("%s has no record of its data and settings. Make sure that they are those of this run.", weights)
        return
    clauses = differences(saved, record) + value_differences("epochs", saved.get("epochs"), record.get("epochs"))
    if clauses:
        remedy = "Choose another --stages-dir, or train all stages again by --set overwrite=true."
        raise ValueError(_is_another_run(weights, clauses, remedy))


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
        average: keeps an average of ``model``'s weights. It is updated after every step of the optimizer and kept in
            the state, and its weights are the final ones.
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
        average: AveragedModel | None = None,
    ) -> None:
        if "model" not in objects:
            raise ValueError(f"objects must contain the network as 'model', got {sorted(objects)}.")
        self.path, self.weights, self.objects = Path(path), Path(weights), dict(objects)
        self.average = average
        self.scale: float | None = None
        if average is not None:
            self.objects["average"] = average
        self.previous = _previous(self.path)
        self.interval, self.resume, self.seed, self.overwrite = interval, resume, seed, overwrite
        self.record = dict(record or {})

    def attach(self, engine: Any) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        if self.average is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.update_average)
        if engine.state.rank == 0:  # MONAI's workflows set their rank
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)
            engine.add_event_handler(Events.COMPLETED, self.finish)

    def update_average(self, engine: Any) -> None:
        """Update the average of the weights if the optimizer has changed them."""
        if self.average is None:
            return
        scale, before = _scale(engine), self.scale
        self.scale = scale
        if not completes_step(engine) or getattr(engine.state, "skipped", False):
            return
        if scale is None or before is None or scale >= before:  # else the scaler of float16 has skipped the step
            self.average.update_parameters(self.objects["model"])

    def start(self, engine: Any) -> None:
        """Load the state, see ``load``, and note the scale of float16."""
        self.load(engine)
        self.scale = _scale(engine)

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
        path, state = newest_state(self.path)
        if not self.resume:
            _require_no_state(path, state)
            return
        if state is None:
            logger.warning("No checkpoint at %s: training starts at epoch 1", path)
            return
        missing = sorted({*self.objects, "trainer"} - set(state))
        if missing:
            raise ValueError(f"{path} contains no state of {', '.join(missing)}: it is from another kind of run.")
        unused = sorted(set(state) - {*self.objects, *OF_THE_RUN})
        if unused:
            raise ValueError(
                f"{path} contains a state of {', '.join(unused)}, which this run does not use. Resume with the options "
                "of the earlier run, or choose another --output-dir."
            )
        if self.record and not state.get("record"):
            logger.warning(
                "%s holds no record of its data and settings, because an older version wrote it. Make sure that they "
                "are those of this run.",
                path,
            )
        trainer = dict(state["trainer"])
        _require_same_run(path, state, self.record, self.seed)
        steps, steps_now = trainer["epoch_length"], engine.state.epoch_length
        if steps != steps_now:
            clause = f"its number of steps per epoch is {steps}, this run's is {steps_now}"
            raise ValueError(_is_another_run(path, [clause]))
        for name, item in self.objects.items():
            _require_same_schedule(path, state[name], item)
            item.load_state_dict(state[name])
        if "scaler" in state and engine.scaler is not None:
            engine.scaler.load_state_dict(state["scaler"])
        engine.load_state_dict({**trainer, "max_epochs": engine.state.max_epochs})
        logger.info("resumed %s after epoch %d", path, engine.state.epoch)

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
        network = self.objects["model"] if self.average is None else self.average.module
        write_atomically(network.state_dict(), self.weights)
        if self.record:
            write_task(self.record, self.weights)


def _scale(engine: Any) -> float | None:
    """The scale of the gradients in float16; it decreases where a step is skipped."""
    scaler = getattr(engine, "scaler", None)
    return float(scaler.get_scale()) if scaler else None


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
