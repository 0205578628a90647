# SPDX-License-Identifier: Apache-2.0
"""nnU-Net v2's inference as a candidate of the benchmark: files to mask with its own reader, windows and writer.

The network is the standard 3D one that its planner lays out for the window. It is untrained, because the weights do not
change the time. nnU-Net needs all modalities of a case on one grid: other grids are resampled beforehand.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813
import torch
from ignite.engine import Engine

logger = logging.getLogger(__name__)
# Plausible statistics of the foreground of a CT in HU. nnU-Net normalises only CT by the statistics of a data set.
FOREGROUND = {"mean": 40.0, "std": 150.0, "median": 50.0, "min": -1024.0, "max": 3071.0}
FOREGROUND |= {"percentile_00_5": -900.0, "percentile_99_5": 1000.0}
MAX_FEATURES, FIRST_FEATURES = 320, 32  # of nnU-Net's 3D networks
CONFIGURATION = "3d_fullres"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress nnU-Net's output, such as its warning about folders that are not set, which are not needed here."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _architecture(spacing: Sequence[float], patch: Sequence[int]) -> dict[str, Any]:
    """The network that nnU-Net's default planner lays out for a window, with spacing in mm, both as z, y, x."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, size, _ = get_pool_and_conv_props(list(spacing), list(patch), 4, 999999)
    if list(size) != list(patch):
        raise ValueError(f"nnU-Net changes the window {list(patch)} to {list(size)}. Use that one.")
    stages = len(strides)
    arguments = {
        "n_stages": stages,
        "features_per_stage": [min(MAX_FEATURES, FIRST_FEATURES * 2**stage) for stage in range(stages)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(map(int, kernel)) for kernel in kernels],
        "strides": [list(map(int, stride)) for stride in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(modalities: Sequence[str], spacing: Sequence[float], patch: Sequence[int]) -> dict[str, Any]:
    """nnU-Net's plans for a spacing in mm and a window, both as x, y, z. In the plans they are z, y, x."""
    spacing, patch = [float(mm) for mm in reversed(spacing)], [int(size) for size in reversed(patch)]
    resample = {"order_z": 0, "force_separate_z": None}
    names = ("data", "seg", "probabilities")
    orders = {"data": (False, 3), "seg": (True, 1), "probabilities": (False, 1)}
    resampling: dict[str, Any] = {f"resampling_fn_{name}": "resample_data_or_seg_to_shape" for name in names}
    for name, (labels, order) in orders.items():
        resampling[f"resampling_fn_{name}_kwargs"] = {"is_seg": labels, "order": order, **resample}
    configuration = {
        "data_identifier": f"benchmark_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": spacing,
        "normalization_schemes": [
            "CTNormalization" if key == "ct" else "ZScoreNormalization" for key in modalities
        ],
        "use_mask_for_norm": [False] * len(modalities),
        "architecture": _architecture(spacing, patch),
        **resampling,
    }  # fmt: skip
    return {
        "dataset_name": "Dataset001_Benchmark",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": patch,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): dict(FOREGROUND) for i in range(len(modalities))},
    }


def make_predictor(
    modalities: Sequence[str], classes: int, spacing: Sequence[float], patch: Sequence[int], overlap: float
) -> Any:
    """nnU-Net's predictor with random weights, on the CPU and without mirroring."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(make_plans(modalities, spacing, patch))
    configuration = plans.get_configuration(CONFIGURATION)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        len(modalities),
        classes,
        deep_supervision=False,
    )
    dataset = {
        "channel_names": {str(i): key.upper() for i, key in enumerate(modalities)},
        "labels": {"background": 0, **{f"class{i}": i for i in range(1, classes)}},
        "file_ending": ".nii.gz",
    }
    predictor = nnUNetPredictor(
        tile_step_size=1 - overlap, use_gaussian=True, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False
    )
    weights = [network.state_dict()]
    predictor.manual_initialization(network, plans, configuration, weights, dataset, "nnUNetTrainer", None)
    return predictor


def _read_image(path: Path) -> sitk.Image:
    if path.is_dir():
        return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
    return sitk.ReadImage(str(path))


def _grid(path: Path) -> tuple[Any, ...]:
    """Size, spacing, origin and direction of an image, from its header."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    geometry = (*reader.GetSpacing(), *reader.GetOrigin(), *reader.GetDirection())
    return (*reader.GetSize(), *(round(number, 3) for number in geometry))


def resample_to_one_grid(files: Mapping[str, Path], reference: str, folder: Path) -> list[Path]:
    """Resample the images of a case to one grid, as nnU-Net needs them.

    Args:
        files: modality -> file or DICOM folder, in the order of the network's channels.
        reference: the modality that has the target grid.
        folder: folder for resampled files.

    Returns:
        The original files if they are NIfTI files on one grid, otherwise the resampled files.
    """
    all_nifti = all(path.name.endswith(".nii.gz") for path in files.values())
    if all_nifti and len({_grid(path) for path in files.values()}) == 1:
        return list(files.values())
    logger.info(
        "nnU-Net needs one grid: all modalities are resampled to that of %s before the timing starts.", reference
    )
    folder.mkdir(parents=True, exist_ok=True)
    fixed, written = _read_image(files[reference]), []
    for index, (key, path) in enumerate(files.items()):
        image = fixed if key == reference else _read_image(path)
        lowest = float(sitk.GetArrayViewFromImage(image).min())
        written.append(folder / f"case_{index:04d}.nii.gz")
        sitk.WriteImage(sitk.Resample(image, fixed, sitk.Transform(), sitk.sitkLinear, lowest), str(written[-1]))
    return written


class NNUNetEvaluator(Engine):
    """Engine that segments one case per iteration, from its files to its written mask.

    Args:
        cases: data list; each item has a file for every modality.
        modalities: channels of the network.
        reference: the modality that has the grid of the mask.
        labels: one entry per class.
        spacing: of the network's grid, in mm.
        patch: size of the window in voxels.
        overlap: of neighbouring windows, from 0 to 1.
        output_dir: folder of the masks ``<case_id>.nii.gz``.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        modalities: Sequence[str],
        reference: str,
        labels: Sequence[Any],
        spacing: Sequence[float],
        patch: Sequence[int],
        overlap: float,
        output_dir: str,
    ) -> None:
        super().__init__(self._segment)
        os.environ.setdefault(
            "nnUNet_def_n_proc", str(torch.get_num_threads())
        )  # its number of threads, which it reads on import
        self.folder = Path(output_dir)
        prepared: dict[str, list[str]] = {}
        for case in cases:
            name = str(case["case_id"])
            if name not in prepared:
                files = {key: Path(case[key]) for key in modalities}
                resampled = resample_to_one_grid(files, reference, self.folder / "one_grid" / name)
                prepared[name] = [str(path) for path in resampled]
        self.cases = [(str(case["case_id"]), prepared[str(case["case_id"])]) for case in cases]
        with _silent():
            self.predictor = make_predictor(modalities, len(labels), spacing, patch, overlap)

    def run(self) -> Any:  # type: ignore[override]
        """Segment all cases once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return super().run(self.cases, max_epochs=1)

    def _segment(self, engine: Engine, batch: tuple[str, list[str]]) -> None:
        name, files = batch
        # Its parallel variant starts processes for reading and writing in every call, which is slower for one case.
        predict: Callable[..., Any] = self.predictor.predict_from_files_sequential
        with _silent():
            predict([files], [str(self.folder / name)])


def write_model_and_case(case: str, folder: str) -> None:
    """Write what the command ``nnUNetv2_predict`` needs: an untrained network, and a case of STS on one grid.

    Args:
        case: folder of the case.
        folder: gets ``nnUNet_results`` and ``images``.
    """
    import json

    modalities = ("ct", "pet", "mr")
    names = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz", "mr": "MR_T1_image.nii.gz"}
    root = Path(folder)
    files = {key: Path(case) / name for key, name in names.items()}
    (root / "images").mkdir(parents=True, exist_ok=True)
    on_grid = resample_to_one_grid(files, "ct", root / "resampled")
    for channel, path in enumerate(on_grid):
        (root / "images" / f"case_{channel:04d}.nii.gz").write_bytes(Path(path).read_bytes())
    reference = _read_image(files["ct"])
    predictor = make_predictor(modalities, 2, reference.GetSpacing(), (96, 96, 64), 0.5)
    target = root / "nnUNet_results" / "Dataset001_Benchmark" / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    (target / "fold_0").mkdir(parents=True, exist_ok=True)
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        (root / name).mkdir(exist_ok=True)
    (target / "plans.json").write_text(json.dumps(predictor.plans_manager.plans))
    (target / "dataset.json").write_text(json.dumps(predictor.dataset_json))
    content = {
        "network_weights": predictor.network.state_dict(),
        "init_args": {"configuration": CONFIGURATION},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, target / "fold_0" / "checkpoint_final.pth")
