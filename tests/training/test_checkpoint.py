# SPDX-License-Identifier: Apache-2.0
"""Atomic writing, resuming a MONAI trainer, and checksums."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripts.training.checkpoint import TrainingCheckpoint
from scripts.utils.tensor_files import is_whole, load_plain, write_atomically

ITERATIONS = 3


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randn(2, 1, 4, 4, generator=generator), "label": torch.randn(2, 1, 4, 4, generator=generator)}
        for _ in range(ITERATIONS)
    ]


class Run:
    """A training of a two-layer network, whose initial weights come from ``seed``."""

    def __init__(
        self, folder: Path, epochs: int, seed: int = 0, resume: bool = False, decay: float = 0.0, **options: Any
    ) -> None:
        torch.manual_seed(seed)
        self.folder = folder
        self.network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=4, power=0.9)
        objects = {"model": self.network, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        if decay:
            options["average"] = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(decay))
        checkpoint, weights = str(folder / "checkpoint.pt"), str(folder / "model.pt")
        options = {"interval": 2, "resume": resume, **options}
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            train_data_loader=batches(),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            decollate=False,
            train_handlers=[
                LrScheduleHandler(self.scheduler, print_lr=False),
                TrainingCheckpoint(checkpoint, weights, objects, **options),
            ],
        )
        self.epochs: list[int] = []
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.epochs.append(engine.state.epoch))

    def start(self) -> Run:
        self.trainer.run()
        return self

    def saved(self) -> dict[str, Any]:
        return torch.load(self.folder / "checkpoint.pt", weights_only=True)


def leaves(x: Any, path: str = "") -> dict[str, Any]:
    """Every tensor and number of nested dicts and lists, by its path."""
    if isinstance(x, dict):
        items: Any = x.items()
    elif isinstance(x, (list, tuple)):
        items = enumerate(x)
    else:
        return {path: x}
    return {k: v for name, item in items for k, v in leaves(item, f"{path}/{name}").items()}


def assert_identical(first: Any, second: Any) -> None:
    a, b = leaves(first), leaves(second)
    assert list(a) == list(b)
    different = [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k])]
    assert different == []


def crash_in_epoch_three(engine: Engine) -> None:
    if engine.state.epoch == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("end", ["regular", "crash"])
def test_two_epochs_and_a_resumed_run_equal_four_epochs_bit_by_bit(end, decay, tmp_path):
    whole = Run(tmp_path / "whole", 4, decay=decay).start()
    first = Run(tmp_path / "parts", 2 if end == "regular" else 4, decay=decay)
    if end == "crash":
        first.trainer.add_event_handler(Events.ITERATION_COMPLETED, crash_in_epoch_three)
        with pytest.raises(KeyboardInterrupt):
            first.start()
        assert not (tmp_path / "parts" / "model.pt").exists()
    else:
        first.start()
    second = Run(tmp_path / "parts", 4, seed=9, resume=True, decay=decay).start()
    assert whole.epochs == [1, 2, 3, 4]
    assert second.epochs == [3, 4]
    assert (second.trainer.state.epoch, second.trainer.state.iteration) == (4, 4 * ITERATIONS)
    assert_identical(second.saved(), whole.saved())
    weights = [torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("whole", "parts")]
    assert_identical(*weights)


def test_the_final_weights_are_the_moving_average_of_the_weights_after_every_step(tmp_path):
    run = Run(tmp_path, 2, decay=0.75)
    expected, steps = [p.detach().clone() for p in run.network.parameters()], []

    def average(engine: Engine) -> None:
        steps.append(engine.state.iteration)
        for mean, parameter in zip(expected, run.network.parameters(), strict=True):  # it starts after the first step
            mean.copy_(parameter.detach() if len(steps) == 1 else 0.75 * mean + 0.25 * parameter.detach())

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, average)
    run.start()
    assert len(steps) == 2 * ITERATIONS
    names = [name for name, _ in run.network.named_parameters()]
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, mean, parameter in zip(names, expected, run.network.parameters(), strict=True):
        torch.testing.assert_close(saved[name], mean)
        assert not torch.equal(saved[name], parameter)


def test_the_state_is_saved_every_interval_and_at_the_end(tmp_path):
    run, found = Run(tmp_path, 3), []
    path = tmp_path / "checkpoint.pt"
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: found.append(run.saved()["trainer"]["iteration"] if path.is_file() else None)
    )
    run.start()
    assert [*found, run.saved()["trainer"]["iteration"]] == [None, 2 * ITERATIONS, 2 * ITERATIONS, 3 * ITERATIONS]


def test_a_finished_training_can_be_extended_and_otherwise_stays_unchanged(tmp_path):
    first = Run(tmp_path, 2).start()
    again = Run(tmp_path, 2, seed=9, resume=True).start()
    assert again.epochs == []
    assert_identical(again.network.state_dict(), first.network.state_dict())
    assert_identical(torch.load(tmp_path / "model.pt", weights_only=True), first.network.state_dict())
    assert Run(tmp_path, 3, seed=9, resume=True).start().epochs == [3]  # its schedule is for four epochs


def test_resuming_with_a_longer_schedule_is_refused(tmp_path):
    Run(tmp_path, 2).start()
    longer = Run(tmp_path, 6, resume=True)
    longer.scheduler.total_iters = 6
    with pytest.raises(ValueError, match="is from a run of 4 epochs, this run has 6: resume with 4 epochs, or"):
        longer.start()


def test_a_new_run_does_not_fall_back_to_the_states_of_an_earlier_one(tmp_path):
    Run(tmp_path, 4).start()
    assert (tmp_path / "checkpoint.previous.pt").is_file()
    fresh = Run(tmp_path, 2, overwrite=True)
    found = []
    fresh.trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda engine: found.append(sorted(path.name for path in tmp_path.glob("checkpoint*")))
    )
    fresh.start()
    assert found == [[], []]
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint.pt"]


def test_the_saved_state_holds_tensors_and_plain_values_only(tmp_path):
    run = Run(tmp_path, 2).start()
    state = run.saved()
    assert list(state) == ["model", "optimizer", "lr_scheduler", "trainer", "seed", "record"]
    kinds = {type(value) for value in leaves(state).values()}
    assert kinds <= {Tensor, int, float, bool, str, type(None)}
    assert state["trainer"]["iteration"] == 2 * ITERATIONS


def test_the_final_weights_are_a_plain_state_dict_of_the_last_epoch(tmp_path):
    run = Run(tmp_path, 3).start()
    assert_identical(torch.load(tmp_path / "model.pt", weights_only=True), run.network.state_dict())


@pytest.mark.parametrize("lost", ["", "checkpoint.pt", "checkpoint.previous.pt"])
def test_without_resume_checkpoints_of_an_earlier_run_are_refused_and_kept(lost, tmp_path):
    Run(tmp_path, 4).start()
    if lost:
        (tmp_path / lost).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run, epoch = Run(tmp_path, 1, seed=9), 2 if lost == "checkpoint.pt" else 4
    with pytest.raises(
        ValueError, match=rf"already contains a checkpoint \(epoch {epoch}\)\. Use --resume to continue"
    ):
        run.start()
    assert run.epochs == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_resume_unreadable_checkpoints_and_those_without_an_epoch_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read: remove it to start a new run"):
        Run(tmp_path, 1).start()
    assert path.read_bytes() == b"PK cut off"
    write_atomically({"model": {}}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt already contains a checkpoint\. Use --resume"):
        Run(tmp_path, 1).start()


def test_resume_takes_precedence_over_overwrite(tmp_path):
    Run(tmp_path, 2).start()
    assert Run(tmp_path, 4, seed=9, resume=True, overwrite=True).start().epochs == [3, 4]


def test_resuming_without_a_file_warns_and_starts_at_epoch_one(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = Run(tmp_path, 1, resume=True).start()
    assert run.epochs == [1]
    assert f"No checkpoint at {tmp_path / 'checkpoint.pt'}" in caplog.text


def test_a_state_of_another_kind_of_run_is_refused_by_name(tmp_path):
    state = Run(tmp_path, 1).start().saved()
    del state["lr_scheduler"]
    write_atomically(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt contains no state of lr_scheduler"):
        Run(tmp_path, 2, resume=True).start()


def test_a_state_that_holds_more_than_this_run_uses_is_refused_by_name(tmp_path):
    state = Run(tmp_path, 1, decay=0.9).start().saved()
    write_atomically({**state, "scaler": {}}, tmp_path / "checkpoint.pt")  # of float16, which a CPU may go on without
    with pytest.raises(ValueError, match=r"checkpoint\.pt contains a state of average, which this run does not use\."):
        Run(tmp_path, 2, resume=True).start()
    assert Run(tmp_path, 2, resume=True, decay=0.9).start().epochs == [2]


def test_objects_without_the_network_are_refused():
    with pytest.raises(ValueError, match=r"must contain the network as 'model', got \['optimizer'\]"):
        TrainingCheckpoint("a.pt", "b.pt", {"optimizer": nn.Identity()})


def test_writing_replaces_the_file_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new" / "state.pt"
    for value in (1.0, 2.0):
        write_atomically({"model": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["model"].item() == value
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", ["full disk", "unpicklable", "rename"])
def test_a_failed_write_leaves_the_old_file_and_no_other(failure, tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_atomically({"model": torch.ones(3)}, path)
    before = path.read_bytes()
    state: dict[str, Any] = {"model": torch.zeros(3)}
    if failure == "unpicklable":
        state["trap"] = lambda: None
    elif failure == "rename":
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no rename")))
    else:
        monkeypatch.setattr("torch.save", lambda state, file: (file.write(b"half"), 1 / 0))
    with pytest.raises((OSError, AttributeError, ZeroDivisionError, RuntimeError)):
        write_atomically(state, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_with_a_flipped_bit_is_accepted_with_other_values(tmp_path: Path) -> None:
    path, values = tmp_path / "x.pt", torch.arange(1.0, 257.0)
    write_atomically({"values": values, "name": "abc"}, path)
    content = path.read_bytes()
    assert is_whole(path)
    directory = content.index(b"PK\x01\x02")
    tensor = content.index(b"PK\x01\x02", content.rindex(b"/data/0") - 60)  # the tensor's line of the directory
    bits = {*range(0, 8 * directory, 97), *range(8 * directory, 8 * len(content), 13)}
    passed = 0
    for bit in sorted(bits | set(range(8 * tensor, 8 * tensor + 8 * 46))):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        if is_whole(path):  # some bits, as those of a date, say nothing
            found, passed = load_plain(path), passed + 1
            assert torch.equal(found["values"], values), bit
            assert found["name"] == "abc"
    assert 0 < passed < len(bits)
    path.write_bytes(content[:-1])
    assert not is_whole(path)
    assert not is_whole(tmp_path / "nowhere.pt")
