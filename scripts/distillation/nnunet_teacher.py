# SPDX-License-Identifier: Apache-2.0
"""A trained nnU-Net in a teacher's place: its own preprocessing, windows and resampling; its folds are averaged.

It needs the package nnunetv2 (``pip install -e ".[nnunet]"``). nnU-Net loads its checkpoints by unpickling, which can
run code. Here they pass through ``load_plain``, and the predictor gets tensors and plain values only.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.data.case_files import CaseFiles
from scripts.distillation.imported_predictions import logits_on_grid
from scripts.distillation.teacher_cache import LOGITS
from scripts.distillation.teacher_origin import Case, NNUNetFolder
from scripts.image_io.headers import Header
from scripts.networks.weights import require_finite
from scripts.runtime.resampling import resample
from scripts.utils.json_files import read_json
from scripts.utils.tensor_files import load_plain


class NNUNetAnswers:
    """The answers of a trained nnU-Net.

    The modalities of a case are read as they are, without this task's intensity ranges, and resampled to the grid of
    the reference image where they lie on another one, as nnU-Net requires: linearly, and 0 outside their field of view,
    as SimpleITK does.

    Args:
        origin: the folder of the training.
        files: the image files of the cases.
        labels: per class the values of a label file.
        device: device of the network.
        regions: the classes of each channel of a task with a sigmoid head. The network may then have the same regions,
            in the same order, or the classes.

    Attributes:
        outputs: ``logits`` only.
        settings: what the manifest of a cache says about them.

    Raises:
        ValueError: nnunetv2 is not installed, or the network has other classes, regions or inputs than the teacher.
    """

    def __init__(
        self,
        origin: NNUNetFolder,
        files: CaseFiles,
        labels: Sequence[Sequence[float]],
        device: str | torch.device = "cpu",
        regions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.origin, self.files, self.regions = origin, files, regions
        self.outputs = [LOGITS]
        self.settings: dict[str, Any] = {}
        with _silent():
            self.predictor = _load_predictor(origin, torch.device(device))
        self.modalities: list[str] = origin.identity["modalities"]
        channels, heads = len(self.predictor.dataset_json["channel_names"]), self.predictor.label_manager
        self.sigmoid = bool(heads.has_regions)
        _require_same_outputs(origin.name, heads, labels, regions)
        if channels != len(self.modalities):
            raise ValueError(
                f"The nnU-Net of the teacher {origin.name} reads {channels} modalities, the teacher names "
                f"{', '.join(self.modalities)}. Name them in the order of its channel_names."
            )

    def check(self, cases: Sequence[Case]) -> None:
        """Raise a ValueError, before anything is written, if a case lacks a modality that the network reads."""
        for case in cases:
            for key in self.modalities:
                self.files.header(case, key)

    def predict(self, case: Case, image: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The logits of a case on the grid of its preprocessed volumes, ``C H W D``; see ``logits_on_grid``."""
        reference = self.files.header(case)
        volumes = np.stack([self._volume(case, key, reference) for key in self.modalities])
        spacing = np.linalg.norm(reference.affine[:3, :3], axis=0)[::-1].tolist()  # nnU-Net's arrays are z y x
        with _silent():
            _, probabilities = self.predictor.predict_single_npy_array(volumes, {"spacing": spacing}, None, None, True)
        on_reference = torch.from_numpy(np.asarray(probabilities, dtype=np.float32)).permute(0, 3, 2, 1)
        return logits_on_grid(
            on_reference, reference.affine, self.files.grid(case), self.files.patch, self.regions, self.sigmoid
        )

    def _volume(self, case: Case, key: str, reference: Header) -> np.ndarray:
        """A modality on the reference's grid, ``z y x``, float32."""
        matrix = np.linalg.solve(self.files.header(case, key).affine, reference.affine)
        return np.ascontiguousarray(resample(self.files.volume(case, key), matrix, reference.shape[:3]).T)


def _require_same_outputs(
    name: str, heads: Any, labels: Sequence[Sequence[float]], regions: Sequence[Sequence[int]] | None
) -> None:
    """Refuse a network with other outputs than the task, by nnU-Net's ``LabelManager``."""
    task = f"{len(labels)} classes" if regions is None else f"{len(labels)} classes and {len(regions)} regions"
    number, kind = heads.num_segmentation_heads, "regions" if heads.has_regions else "classes"
    if number != (len(regions or ()) if heads.has_regions else len(labels)):
        raise ValueError(
            f"The nnU-Net of the teacher {name} has {number} {kind}, this task has {task}. Use a network of this task."
        )
    values = [list(each) for each in labels]
    if not heads.has_regions and sorted(values) == [[index] for index in range(len(labels))] != values:
        raise ValueError(
            f"The nnU-Net of the teacher {name} answers with the values 0 to {len(labels) - 1} in this order, the "
            f"labels of this task are {values}. Name them in the order of their values."
        )
    if heads.has_regions and regions is not None:
        of_task = [sorted(value for index in members for value in labels[index]) for members in regions]
        of_network = [sorted(each) if isinstance(each, (list, tuple)) else [each] for each in heads.foreground_regions]
        if of_task != of_network:
            raise ValueError(
                f"The nnU-Net of the teacher {name} has the regions {of_network}, this task {of_task}, as values of "
                "labels. Name them in the same order."
            )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress nnU-Net's output, such as its warning about folders that are needed for training only."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _load_predictor(origin: NNUNetFolder, device: torch.device) -> Any:
    """nnU-Net's predictor with the weights of all folds; mirroring as it was trained."""
    try:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except ImportError as error:
        raise ValueError(
            f"The teacher {origin.name} is an nnU-Net, and nnunetv2 >= 2.8 is not installed: "
            'pip install -e ".[nnunet]".'
        ) from error
    names = ("dataset.json", "plans.json")
    dataset, plans = (read_json(origin.folder / name, f"{name} of a finished nnU-Net training") for name in names)
    checkpoints = [_read_checkpoint(path) for path in origin.paths]
    first, manager = checkpoints[0], PlansManager(plans)
    configuration = manager.get_configuration(first["init_args"]["configuration"])
    trainer = recursive_find_trainer_class_by_name(first["trainer_name"])
    outputs = manager.get_label_manager(dataset).num_segmentation_heads
    network = trainer.build_network_architecture(
        manager, configuration, len(dataset["channel_names"]), outputs, enable_deep_supervision=False
    )
    weights = [checkpoint["network_weights"] for checkpoint in checkpoints]
    for state in weights:
        network.load_state_dict(state)  # strict: every fold must fit
    predictor = nnUNetPredictor(
        use_mirroring=True, device=device, perform_everything_on_device=False, allow_tqdm=False, verbose=False
    )
    axes = first.get("inference_allowed_mirroring_axes")
    predictor.manual_initialization(network, manager, configuration, weights, dataset, first["trainer_name"], axes)
    return predictor


def _read_checkpoint(path: Path) -> Any:
    """A checkpoint of nnU-Net, without unpickling.

    Raises:
        ValueError: it holds other things than tensors and plain values, no weights, or weights that are not finite.
    """
    try:
        checkpoint = load_plain(path)
        weights = checkpoint["network_weights"]
        names = (checkpoint["trainer_name"], checkpoint["init_args"]["configuration"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of nnU-Net. Give the folder of a finished training.") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is no checkpoint of nnU-Net. Give the folder of a finished training.")
    require_finite(path, weights)
    return checkpoint
