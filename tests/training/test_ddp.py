# SPDX-License-Identifier: Apache-2.0
"""Two processes with one case each learn the same as one process with two cases (gloo, on the CPU)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.cli.main import main
from scripts.data.cohorts.phantom import write_phantoms
from scripts.report.curves import read_curves

ROOT = Path(__file__).parents[2]
CONFIGS = ["train", "data/phantom", "scale/small", "distill", "methods/hint"]
EPOCHS = 2

RECORDER = """
import os
import torch
from ignite.engine import Events


class Recorder:
    def __init__(self, folder, trained, evaluator):
        self.path = os.path.join(folder, f"rank{os.environ.get('RANK', '0')}.pt")
        self.trained, self.evaluator, self.seen, self.dice = trained, evaluator, [], []

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self.validate)
        engine.add_event_handler(Events.ITERATION_STARTED, self.add_cases)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def validate(self, engine):
        self.evaluator.run()  # before the first step: on the very same weights whatever the number of processes
        self.dice = self.evaluator.state.metrics["val_dice"]

    def add_cases(self, engine):
        self.seen.append((engine.state.epoch, list(engine.state.batch["case_id"])))

    def save(self, engine):
        state = {"student": self.trained.student.state_dict(), "adapters": self.trained.adapters.state_dict()}
        torch.save({**state, "seen": self.seen, "dice": self.dice}, self.path)
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, start_ranks: Any) -> dict[str, Any]:
    """The cases and weights of each process, in a run with two processes and in a run with one."""
    root = tmp_path_factory.mktemp("ddp")
    cases = [case["patient_id"] for case in write_phantoms(root / "data", cases=11, seed=3, progress=False)]
    (root / "splits.json").write_text(json.dumps({"seed": 0, "folds": [cases[:3], cases[3:]]}))
    (root / "recorder.py").write_text(RECORDER)
    (root / "overlay.json").write_text(
        json.dumps(
            {
                "optimizer": {
                    "_target_": "torch.optim.SGD", "params": "$[p for p in @trained.parameters() if p.requires_grad]",
                    "lr": 0.01,  # larger steps amplify rounding, which differs between batches of one and two
                },
                "teacher_specs": {
                    "dynunet": {"architecture": "dynunet", "modalities": ["ct", "pet", "mr"], "weights": None}
                },
                # An untrained student finds no lesion; the background's Dice differs from case to case.
                "validate#key_metric#val_dice#output_transform#regions": {"background": [0]},
                "+train#handlers": [
                    {
                        "_target_": "recorder.Recorder", "folder": "@output_dir", "trained": "@trained",
                        "evaluator": "@validate#evaluator",
                    }
                ],
            }
        )
    )  # fmt: skip
    found = {}
    for name, processes in (("two", 2), ("one", 1)):
        (root / name).mkdir()
        _run(root, name, processes, start_ranks)
        for rank in range(processes):
            found[f"{name}{rank}"] = torch.load(root / name / f"rank{rank}.pt", weights_only=True)
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def start_ranks(start_python: Any) -> Callable[..., str]:
    """``start_ranks(number, output, *arguments)``: run a command in processes with the variables that torchrun sets.

    Returns what they printed. The manifest in ``output`` shows that they succeeded: gloo may fail at exit, after
    everything is written.
    """

    def run(number: int, output: Path, *arguments: object, **env: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
        logs = [output.with_name(f"{output.name}_rank{rank}") for rank in range(number)]
        processes = [
            start_python(*arguments, output=log, **env, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.join(240)
        printed = "".join(log.with_suffix(".err").read_text() for log in logs)
        assert (output / "manifest.json").is_file(), printed[-3000:]
        return printed

    return run


def _run(root: Path, name: str, processes: int, start_ranks: Any) -> None:
    """``python -m monai.bundle run`` in one process or several."""
    configs = [*CONFIGS, *(["multi_gpu_train"] if processes > 1 else [])]
    files = [*(str(ROOT / "configs" / f"{config}.json") for config in configs), str(root / "overlay.json")]
    settings = {
        "dataset_dir": root / "data", "splits_file": root / "splits.json", "output_dir": root / name, "threads": 1,
        "batch_size": 2 // processes, "max_epochs": EPOCHS, "val_interval": 1, "spacing": [12, 12, 12],
        "patch": [32, 32, 32], "student_features": [4, 8, 8, 8], "student_norm": ["group", {"num_groups": 4}],
        "architectures": {"dynunet": {"filters": [2, 4, 4, 4, 4]}},
        "meta_file": ROOT / "configs/metadata.json", "logging_file": ROOT / "configs/logging.conf",
    }  # fmt: skip
    flags = [x for key, value in settings.items() for x in (f"--{key}", str(value).replace("'", '"'))]
    command = ["-m", "monai.bundle", "run", "--config_file", json.dumps(files), *flags]
    start_ranks(processes, root / name, *command, PYTHONPATH=str(root))


def test_student_and_adapters_are_identical_on_both_ranks(records: dict[str, Any]) -> None:
    for part in ("student", "adapters"):
        first, second = records["two0"][part], records["two1"][part]
        assert len(first) > 0
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_cases_of_both_ranks_together_are_one_epoch(records: dict[str, Any]) -> None:
    for epoch in range(1, EPOCHS + 1):
        ranks = [[c for e, cases in records[f"two{rank}"]["seen"] if e == epoch for c in cases] for rank in (0, 1)]
        together = sorted(ranks[0] + ranks[1])
        assert together == sorted(c for e, cases in records["one0"]["seen"] if e == epoch for c in cases)
        assert len(together) == len(set(together)) == 8
        assert len(ranks[0]) == len(ranks[1]) == 4


def test_two_ranks_learn_what_one_process_learns(records: dict[str, Any]) -> None:
    for part in ("student", "adapters"):
        for key, value in records["one0"][part].items():
            torch.testing.assert_close(records["two0"][part][key], value, atol=2e-5, rtol=1e-4, msg=key)


def test_validation_counts_an_uneven_number_of_cases_once_each(records: dict[str, Any]) -> None:
    # Three cases on two ranks.
    assert 0 < records["one0"]["dice"] < 1
    assert records["two0"]["dice"] == pytest.approx(records["one0"]["dice"], abs=1e-6)
    assert records["two1"]["dice"] == pytest.approx(records["one0"]["dice"], abs=1e-6)


def test_only_the_first_rank_writes(records: dict[str, Any]) -> None:
    expected = {path.name for path in records["one"].iterdir()}
    assert {path.name for path in records["two"].iterdir()} == expected | {"rank1.pt"}
    assert len(list((records["two"] / "tensorboard").iterdir())) == 1  # a file for each process that writes
    assert len((records["two"] / "curves.csv").read_text().splitlines()) == 1 + EPOCHS


def test_the_command_shares_preprocessing_among_ranks_reads_the_cache_and_resumes(
    records: dict[str, Any], start_ranks: Any, tmp_path: Path
) -> None:
    root = records["two"].parent
    common = [
        "--data", "phantom", "--dataset-dir", str(root / "data"), "--threads", "1", "--teacher", "dynunet=random",
        "--set", f"splits_file={root / 'splits.json'}", "--set", "spacing=[12,12,12]", "--set", "patch=[32,32,32]",
        "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]}}',
    ]  # fmt: skip
    assert main(["cache-teachers", *common, "--output-dir", str(tmp_path / "cache")]) == 0
    student = ["--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]']
    distill = [
        "distill", "--multi-gpu", *common, *student, "--method", "hinton", "--cache-dir", str(tmp_path / "cache"),
        "--volumes-dir", str(tmp_path / "volumes"), "--output-dir", str(tmp_path / "out"), "--epochs", "3",
        "--set", "batch_size=1", "--set", "save_interval=1",
    ]  # fmt: skip
    output = tmp_path / "out"
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "scripts", *distill], cwd=ROOT, text=True, capture_output=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert (output / "manifest.json").is_file(), (done.stdout + done.stderr)[-3000:]
    # Restore the state of a run that was killed after its second epoch.
    (output / "manifest.json").unlink()
    os.replace(output / "checkpoint.previous.pt", output / "checkpoint.pt")
    assert "resumed" in start_ranks(2, output, "-m", "scripts", *distill, "--resume")
    assert [row["epoch"] for row in read_curves(output / "curves.csv")] == [1, 2, 3]
    assert len(list((tmp_path / "volumes").iterdir())) == 8  # one complete file for each training case
