# SPDX-License-Identifier: Apache-2.0
"""MONAI's TensorBoard and MLflow handlers for resumed runs, and one overlay picture per validation.

MONAI's handlers record what ``CurveWriter`` stores in ``engine.state.metrics``. The classes here make sure that a
tracker holds each epoch once, even if the training was resumed several times or restarted in the same folder. Attach
them after ``TrainingCheckpoint``, which sets the epoch where a run resumes.

``monai.bundle run --tracking mlflow`` looks for ``is_not_rank0``, ``experiment_name``, ``run_name`` and
``save_execute_config`` in configs/train.json, so that the handlers which it appends use the same run and rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from scripts.runtime.regions import IGNORED
from scripts.utils.atomic_files import atomic_file
from scripts.utils.task_file import task_path


def require_known(name: str) -> None:
    """Refuse a tracker that does not exist: it would have no effect.

    Raises:
        ValueError: ``name`` is neither empty nor ``mlflow``, or MLflow is not installed.
    """
    if name not in ("", "mlflow"):
        raise ValueError(f"experiment_tracking is {name!r}. Choose mlflow, or nothing: TensorBoard is always written.")
    if name:
        require_mlflow()


class TensorBoard:
    """A ``SummaryWriter`` that creates its file at the first write, so that parsing a config creates no file.

    Args:
        log_dir: folder of the event files.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.purge_step = log_dir, 0

    @cached_property
    def writer(self) -> SummaryWriter:
        """The writer; it hides epochs from ``purge_step`` on that earlier runs wrote to the folder."""
        return SummaryWriter(self.log_dir, purge_step=self.purge_step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)


class TensorBoardCurves(TensorBoardStatsHandler):
    """MONAI's handler, which here hides epochs of earlier runs in the same folder if this run trains them again."""

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, lambda: self._writer.close())

    def start(self, engine: Engine) -> None:
        """Set the first epoch of this run before anything is written."""
        self._writer.purge_step = engine.state.epoch + 1


class MLflowCurves(MLFlowHandler):
    """MONAI's handler, which here starts a new MLflow run each time and copies the earlier epochs into a resumed one.

    The run has every setting of the training as a parameter, tags to search for, and as artifacts the final weights
    with the task beside them, the curves, the manifest and the overlays.

    MONAI's own handler continues the stopped MLflow run, which would then hold the epochs since the last checkpoint
    twice.

    Args:
        output_dir: folder of the training. The handler reads ``curves.csv`` there and creates ``mlruns.db`` and
            ``mlruns``.
        record: settings of the training, see ``scripts.training.training_record``.
        weights: file of the final weights.
        settings: further arguments of ``MLFlowHandler``; they override the defaults set here.

    Raises:
        RuntimeError: MLflow is not installed.
    """

    def __init__(
        self, output_dir: str, record: Mapping[str, Any] | None = None, weights: str | None = None, **settings: Any
    ) -> None:
        require_mlflow()
        folder, self.record = Path(output_dir), dict(record or {})
        self.curves = folder / "curves.csv"
        files = [Path(weights), task_path(weights)] if weights else []
        defaults: dict[str, Any] = {
            "tracking_uri": path_to_sqlite_uri(folder / "mlruns.db"),
            "artifacts": [folder / "overlays", self.curves, folder / "manifest.json", *files],
            "experiment_param": _parameters(self.record),
            "iteration_log": False,
            "close_on_complete": True,
        }
        super().__init__(**{**defaults, **settings})

    def start(self, engine: Engine) -> None:
        """Start the MLflow run."""
        self._set_experiment()
        assert self.experiment is not None
        self.cur_run = self.client.create_run(
            self.experiment.experiment_id, run_name=self.run_name, tags=_tags(self.record)
        )
        super().start(engine)
        rows = read_curves(self.curves) if engine.state.epoch and self.curves.is_file() else []
        for row in rows:
            epoch = int(row.pop("epoch") or 0)
            if epoch <= engine.state.epoch:
                self._log_metrics({name: value for name, value in row.items() if value is not None}, step=epoch)


def _parameters(record: Mapping[str, Any]) -> dict[str, str]:
    """Every setting of a record as text; of the lists of cases their lengths."""
    counts = {key: len(value) for key, value in record.items() if key.endswith("_cases")}
    values = {**record, **counts}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    """What runs are searched by: data set, modalities, regions, network, teachers, and the code."""
    network = record.get("network")
    tags = {
        "cohort": record.get("cohort"),
        "modalities": ", ".join(record.get("modalities") or []),
        "regions": ", ".join(record.get("regions") or (record.get("classes") or [])[1:]),
        "network": network.get("_target_") if isinstance(network, dict) else None,
        "teachers": ", ".join(record.get("teachers_sha256") or {}),
        "bundle_version": record.get("bundle_version"),
        "mlflow.source.git.commit": str(record.get("git_commit") or "").rstrip("+"),
    }
    return {key: str(value) for key, value in tags.items() if value}


def require_mlflow() -> None:
    """Raise a RuntimeError that says what to install if MLflow is missing."""
    if find_spec("mlflow") is None:
        raise RuntimeError('MLflow is not installed: run pip install -e ".[mlflow]", or omit --tracking.')


class LossOnly:
    """Replace ``engine.state.output`` by a list with the step's loss only, like the output of a decollating trainer.

    The MLflow handlers that ``monai.bundle run --tracking mlflow`` appends read the loss from such a list. It also
    frees the networks' outputs before the next step. Attach this handler after all handlers that need the full output.
    """

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.keep_loss)

    def keep_loss(self, engine: Engine) -> None:
        """Drop everything but the loss."""
        state: Any = engine.state
        output = state.output
        state.output = [{CommonKeys.LOSS: output[CommonKeys.LOSS]}]


class OverlayWriter:
    """Draw one picture per validation: outlines of label and prediction on each modality of the first case.

    All foreground classes are one outline, and voxels that count in no score are left out. The picture shows the axial
    slice with the largest label area and is saved as ``overlays/epoch_0010.png``. Attach this handler to the
    validation's evaluator.

    Args:
        output_dir: folder of the training.
        modalities: names of the image's channels.
        spacing: spacing of the image's axes in mm. The axes run to the right, to anterior and to superior.
        summary_writer: TensorBoard's writer, which also gets the pictures.
    """

    def __init__(
        self, output_dir: str, modalities: Sequence[str], spacing: Sequence[float], summary_writer: Any
    ) -> None:
        self.folder, self.modalities = Path(output_dir) / "overlays", tuple(modalities)
        self.spacing, self.writer = tuple(spacing), summary_writer

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator, whose iterations start at 1 in every validation."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self.draw)

    def draw(self, engine: Engine) -> None:
        """Write the picture atomically. MONAI sets the evaluator's epoch to the trainer's."""
        output: Any = engine.state.output
        epoch = engine.state.epoch
        figure = slice_figure(self._overlay(output[0], f"epoch {epoch}"))
        with atomic_file(self.folder / f"epoch_{epoch:04d}.png") as file:
            figure.savefig(file, format="png", dpi=100)
        self.writer.add_figure("overlay", figure, epoch)

    def _overlay(self, item: dict[str, Tensor], title: str) -> Overlay:
        """Return volumes that hold the one slice only, because a copy of the whole case would need too much memory."""
        image, reference, prediction = (item[k] for k in (CommonKeys.IMAGE, CommonKeys.LABEL, CommonKeys.PRED))
        counted = reference[0] != IGNORED
        reference, prediction = ((mask[0] > 0) & counted for mask in (reference, prediction))
        sizes = int(reference.sum()), int(prediction.sum())
        dice = 2 * int((reference & prediction).sum()) / sum(sizes) if any(sizes) else float("nan")
        areas = (reference if sizes[0] else prediction).sum((0, 1))
        index = int(areas.argmax()) if any(sizes) else len(areas) // 2
        reference, prediction, *channels = (
            volume[..., index : index + 1].cpu().numpy() for volume in (reference, prediction, *image)
        )
        # Some networks, such as an autoencoder of masks, have other channels than the modalities.
        fits = len(channels) == len(self.modalities)
        names = self.modalities if fits else [f"channel {i}" for i in range(len(channels))]
        images = dict(zip(names, channels, strict=True))
        return Overlay(f"{title}, Dice {dice:.3f}", images, reference, prediction, self.spacing)
