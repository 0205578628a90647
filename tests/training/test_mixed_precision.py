# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on the CPU, in trainings of the bundle: the precision of the networks, and the scaling of float16."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from scripts.cli.main import main
from scripts.losses import SegmentationLoss, SoftPredictionLoss
from scripts.report.curves import read_curves
from scripts.training.mixed_precision import AutocastInferer

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
INITIAL = 2.0**16  # of the scale
TINY = [
    "--data", "phantom", "--threads", "1", "--device", "cpu", "--method", "hinton", "--teacher", "dynunet=random",
    "--set", "patch=[32,32,16]", "--set", "spacing=[12,12,12]", "--set", "student_features=[4,8,8,8]",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--set", 'architectures={"dynunet":{"filters":[2,4,4,4]}}',
    "--set", "val_interval=100", "--epochs", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def epochs(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One epoch of a distillation in every precision: its loss, the types of convolution outputs and loss inputs."""
    found: dict[str, dict[str, Any]] = {}
    for precision in ("float32", *HALVES):
        seen: dict[str, set[torch.dtype]] = {"convolutions": set(), "losses": set()}

        def note(module: nn.Module, inputs: Any, output: Any, seen: Any = seen) -> None:
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                seen["convolutions"].add(output.dtype)
            elif isinstance(module, SegmentationLoss | SoftPredictionLoss):
                seen["losses"] |= {x.dtype for x in inputs if x.shape[1] == 2}  # logits, not labels

        output = tmp_path_factory.mktemp(precision)
        arguments = ["distill", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(output)]
        if precision == "bfloat16":
            arguments += ["--set", "patch=[48,48,48]"]  # no convolution gets fewer than 3 x 3 x 3 cells
        run = SupervisedTrainer.run

        def start(trainer: Any, seen: Any = seen, run: Any = run) -> Any:
            seen["convolutions"].clear()  # before, the networks are checked with a patch of zeros, in float32
            return run(trainer)

        handle = register_module_forward_hook(note)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SupervisedTrainer, "run", start)
                assert main([*arguments, "--set", f"precision={precision}"]) == 0
        finally:
            handle.remove()
        (row,) = read_curves(output / "curves.csv")
        weights = torch.load(output / "model.pt", weights_only=True)
        found[precision] = {**seen, "row": row, "weights": weights}
    return found


@pytest.mark.parametrize("precision", ["float32", *HALVES])
def test_networks_run_in_the_chosen_precision_and_losses_get_float32(
    epochs: dict[str, dict[str, Any]], precision: str
) -> None:
    assert epochs[precision]["convolutions"] == {HALVES.get(precision, torch.float32)}
    assert epochs[precision]["losses"] == {torch.float32}
    assert {value.dtype for value in epochs[precision]["weights"].values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "bits"), [("float16", 11)])
def test_the_loss_of_the_first_epoch_is_that_of_float32_within_rounding(
    epochs: dict[str, dict[str, Any]], precision: str, bits: int
) -> None:
    # A rounding errs by at most 2^-bits of a value. Some twenty layers, normalised again and again, one after the
    # other: their errors add like random ones, to sqrt(20) 2^-bits of logits that are about 1. Cross-entropy and Dice
    # together change by at most about twice that.
    tolerance = 2 * 20**0.5 * 2.0**-bits
    for name in ("loss", "loss/segmentation", "loss/hinton"):
        half, full = epochs[precision]["row"][name], epochs["float32"]["row"][name]
        assert np.isfinite(half)
        assert half != full
        assert half == pytest.approx(full, abs=tolerance)


def trainer_of(parser: ConfigParser) -> Any:
    """The trainer of a bundle."""
    return parser.get_parsed_content("train#trainer")


def test_an_overflow_is_skipped_and_a_resumed_run_keeps_the_scale(
    tiny_bundle: Callable[..., ConfigParser], tmp_path: Path
) -> None:
    recipe = {"precision": "float16", "save_interval": 1, "lr_scheduler#total_iters": 2}
    parser = tiny_bundle(tmp_path, **recipe)
    trainer = trainer_of(parser)
    weights: list[list[Tensor]] = [[p.detach().clone() for p in trainer.network.parameters()]]
    scales: list[float] = []

    @trainer.on(IterationEvents.BACKWARD_COMPLETED)
    def overflow(engine: Any) -> None:
        if engine.state.iteration == 1:
            next(engine.network.parameters()).grad[0, 0, 0, 0, 0] = float("inf")

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Any) -> None:
        weights.append([p.detach().clone() for p in engine.network.parameters()])
        scales.append(engine.scaler.get_scale())

    parser.get_parsed_content("run")
    before, skipped, done = weights
    assert all(torch.equal(a, b) for a, b in zip(before, skipped, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(skipped, done, strict=True))
    assert all(bool(w.isfinite().all()) for w in done)
    assert scales == [INITIAL / 2, INITIAL / 2]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (INITIAL / 2, 1)  # one step without an overflow

    resumed = tiny_bundle(tmp_path, **recipe, resume=True, max_epochs=2)
    trainer, found = trainer_of(resumed), []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: found.append(engine.scaler.state_dict()))
    resumed.get_parsed_content("run")
    assert found == [state]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (INITIAL / 2, 3)


def test_dicts_are_returned_in_float32_and_masks_unchanged() -> None:
    outputs = AutocastInferer("cpu", "float16")(
        torch.ones(2, 3), lambda x: {"logits": x @ x.T, "available": torch.ones(2, 1, dtype=torch.bool)}
    )
    assert {name: value.dtype for name, value in outputs.items()} == {"logits": torch.float32, "available": torch.bool}


def test_an_unknown_precision_is_refused_in_one_sentence(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["distill", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(tmp_path)]
    assert main([*arguments, "--set", "precision=half"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert errors == ['error: precision is "half". Give float32 or bfloat16 or float16.']


def test_a_training_in_bfloat16_on_the_cpu_is_refused_where_its_gradients_would_be_wrong(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patches of 32 x 32 x 16 voxels leave fewer than 3 cells on an axis."""
    arguments = ["distill", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(tmp_path)]
    assert main([*arguments, "--set", "precision=bfloat16"]) == 1
    errors = re.findall(r"^.*?(error: .*)$", capsys.readouterr().err, re.MULTILINE)
    assert errors == [
        "error: bfloat16 gives wrong gradients on the CPU where a convolution of 3 x 3 x 3 gets 4 x 4 x 2 cells. "
        "Train in float32, with larger patches, or on a GPU."
    ]


@pytest.mark.parametrize(("kernel", "cells", "right"), [(3, 2, False), (3, 3, True), (5, 4, False), (5, 5, True)])
def test_gradients_in_bfloat16_are_right_where_the_kernel_fits_the_grid(kernel: int, cells: int, right: bool) -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(16, 32, kernel, padding=kernel // 2)
    image, upstream = torch.randn(2, 16, cells, cells, cells), torch.randn(2, 32, cells, cells, cells)
    AutocastInferer("cpu")(image, network).backward(upstream)
    expected = network.weight.grad
    network.zero_grad(set_to_none=True)
    inferer = AutocastInferer("cpu", "bfloat16")
    if not right:
        with pytest.raises(ValueError, match=f"a convolution of {kernel} x {kernel} x {kernel} gets {cells} x"):
            inferer(image, network)
        with torch.no_grad():  # answers are right
            inferer(image, network)
        return
    inferer(image, network).backward(upstream)
    assert expected is not None
    assert network.weight.grad is not None
    assert float((network.weight.grad - expected).norm() / expected.norm()) < 0.01


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1}, "without padding": {"kernel_size": 3}, "of 5": {"kernel_size": 5},
    "with stride": {"kernel_size": 3, "stride": 2, "padding": 1}, "patches": {"kernel_size": 2, "stride": 2},
    "in a plane": {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "along an axis": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)}, "depthwise": {"kernel_size": 3, "groups": 16},
    "of 1": {"kernel_size": 1},
}  # fmt: skip
GRIDS = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (3, 3, 3), (3, 4, 5), (5, 5, 5), (6, 6, 3), (8, 6, 6)]


@pytest.mark.parametrize("kind", [*KINDS, "transposed"])
def test_no_gradient_is_wrong_in_bfloat16_where_the_kernel_fits(kind: str) -> None:
    """Against float32, with freed memory filled with NaN before: wrong gradients come from memory that is not set."""
    compared = 0
    for grid in GRIDS:
        torch.manual_seed(0)
        transposed = nn.ConvTranspose3d(16, 32, 2, stride=2)
        network = transposed if kind == "transposed" else nn.Conv3d(16, 32, **KINDS[kind])
        image = torch.randn(2, 16, *grid)
        try:
            upstream = torch.randn_like(AutocastInferer("cpu")(image, network))
            gradients = []
            for precision in ("float32", "bfloat16"):
                freed = [torch.full((size,), float("nan")) for size in (10**3, 10**4, 10**5, 10**6) for _ in range(3)]
                del freed
                network.zero_grad(set_to_none=True)
                own = image.clone().requires_grad_()
                AutocastInferer("cpu", precision)(own, network).backward(upstream)
                gradients.append([own.grad, *(parameter.grad for parameter in network.parameters())])
        except (RuntimeError, ValueError):  # smaller than the kernel
            continue
        compared += 1
        for exact, rounded in zip(*gradients, strict=True):
            assert float((rounded - exact).norm() / exact.norm()) < 0.02, grid
    assert compared >= 2
