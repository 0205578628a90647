# SPDX-License-Identifier: Apache-2.0
"""MONAI's tracking handlers, which take a run's curves as they are in its table, and an overlay per validation.

MONAI's handlers track what ``CurveWriter`` puts into ``engine.state.metrics``. What is added here is
that no tracker holds an epoch twice, however often a training was stopped and went on, or began anew in its folder.
Attach them after ``TrainingCheckpoint``, which knows the epoch where a run goes on.

``is_not_rank0``, ``experiment_name``, ``run_name`` and ``save_execute_config`` in configs/train.json are the names that
``monai.bundle run --tracking mlflow`` looks for, so that the handlers it appends keep to the same run and rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler, TensorBoardStatsHandler
from monai.utils import CommonKeys, path_to_sqlite_uri
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from scripts.report import Overlay, slice_figure
from scripts.report.curves import read_curves
from scripts.utils.atomic_files import atomic_file


class TensorBoard:
    """A ``SummaryWriter`` that opens its file when something is first written: building a config leaves no file.

    Args:
        log_dir: folder of the event files.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.purge_step = log_dir, 0

    @cached_property
    def writer(self) -> SummaryWriter:
        """The writer; epochs from ``purge_step`` on that earlier runs left in the folder no longer count."""
        return SummaryWriter(self.log_dir, purge_step=self.purge_step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)


class TensorBoardCurves(TensorBoardStatsHandler):
    """MONAI's handler, which voids those epochs of earlier runs in the same folder that this run trains again."""

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, lambda: self._writer.close())

    def start(self, engine: Engine) -> None:
        """Say where this run begins, before anything is written."""
        self._writer.purge_step = engine.state.epoch + 1


class MLflowCurves(MLFlowHandler):
    """MONAI's handler, which begins an MLflow run at every start, with the earlier epochs of a resumed training.

    MONAI's own would go on in a run that was stopped, where the epochs since the last checkpoint would stand twice.

    Args:
        output_dir: of the training: it holds ``curves.csv``, and is given ``mlruns.db`` and ``mlruns``.
        settings: of ``MLFlowHandler``, in place of or beside those given here.

    Raises:
        RuntimeError: MLflow is not installed.
    """

    def __init__(self, output_dir: str, **settings: Any) -> None:
        require_mlflow()
        folder = Path(output_dir)
        self.curves = folder / "curves.csv"
        own: dict[str, Any] = {
            "tracking_uri": path_to_sqlite_uri(folder / "mlruns.db"),
            "artifacts": [folder / "overlays", self.curves, folder / "manifest.json"],
            "iteration_log": False,
            "close_on_complete": True,
        }
        super().__init__(**{**own, **settings})

    def start(self, engine: Engine) -> None:
        """Begin the run."""
        self._set_experiment()
        assert self.experiment is not None
        self.cur_run = self.client.create_run(self.experiment.experiment_id, run_name=self.run_name)
        super().start(engine)
        rows = read_curves(self.curves) if engine.state.epoch and self.curves.is_file() else []
        for row in rows:
            epoch = int(row.pop("epoch") or 0)
            if epoch <= engine.state.epoch:
                self._log_metrics({name: value for name, value in row.items() if value is not None}, step=epoch)


def require_mlflow() -> None:
    """Raise a RuntimeError that says what to install where MLflow is missing."""
    if find_spec("mlflow") is None:
        raise RuntimeError("Tracking by MLflow needs MLflow: install the extra 'mlflow', or leave --tracking out.")


class LossOnly:
    """Keep a step's loss alone in ``engine.state.output``, in a list as from a trainer that decollates.

    There the MLflow handlers that ``monai.bundle run --tracking mlflow`` appends look for it; and what the networks
    answered need not stay in memory until the next step ends. Attach it after all that reads the output otherwise.
    """

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.keep)

    def keep(self, engine: Engine) -> None:
        """Drop the rest."""
        state: Any = engine.state
        output = state.output
        state.output = [{CommonKeys.LOSS: output[CommonKeys.LOSS]}]


class OverlayWriter:
    """Draw one picture per validation: label and prediction outlined on each modality of the first case.

    It is the axial slice with the most label, in ``overlays/epoch_0010.png``. Attach it to the validation's evaluator.

    Args:
        output_dir: of the training.
        modalities: names of the image's channels.
        spacing: of the image's axes in mm; they run to the right, to anterior, to superior.
        summary_writer: TensorBoard's, which gets the pictures too.
    """

    def __init__(
        self, output_dir: str, modalities: Sequence[str], spacing: Sequence[float], summary_writer: Any
    ) -> None:
        self.folder, self.modalities = Path(output_dir) / "overlays", tuple(modalities)
        self.spacing, self.writer = tuple(spacing), summary_writer

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator, whose iterations are counted anew in every validation."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self.draw)

    def draw(self, engine: Engine) -> None:
        """Write the picture beside its place, then rename; MONAI gives the evaluator the trainer's epoch."""
        output: Any = engine.state.output
        epoch = engine.state.epoch
        figure = slice_figure(self._overlay(output[0], f"epoch {epoch}"))
        with atomic_file(self.folder / f"epoch_{epoch:04d}.png") as file:
            figure.savefig(file, format="png", dpi=100)
        self.writer.add_figure("overlay", figure, epoch)

    def _overlay(self, item: dict[str, Tensor], title: str) -> Overlay:
        """The slice alone, as volumes of one slice: a whole case would be in memory a second time."""
        image, reference, prediction = (item[k] for k in (CommonKeys.IMAGE, CommonKeys.LABEL, CommonKeys.PRED))
        reference, prediction = reference[0] > 0, prediction[0] > 0
        sizes = int(reference.sum()), int(prediction.sum())
        dice = 2 * int((reference & prediction).sum()) / sum(sizes) if any(sizes) else float("nan")
        area = (reference if sizes[0] else prediction).sum((0, 1))
        at = int(area.argmax()) if any(sizes) else len(area) // 2
        reference, prediction, *channels = (
            volume[..., at : at + 1].cpu().numpy() for volume in (reference, prediction, *image)
        )
        # An autoencoder of masks, for one, sees other channels than the modalities.
        fits = len(channels) == len(self.modalities)
        names = self.modalities if fits else [f"channel {i}" for i in range(len(channels))]
        images = dict(zip(names, channels, strict=True))
        return Overlay(f"{title}, Dice {dice:.3f}", images, reference, prediction, self.spacing)
