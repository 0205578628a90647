# SPDX-License-Identifier: Apache-2.0
"""A compiled student learns the same. The captured graphs run uncompiled, so that no compiler is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import register_backend

from scripts.cli.main import main
from scripts.networks import Student
from scripts.report.curves import read_curves

CALLS: list[str] = []
TINY = [
    "--data", "phantom", "--threads", "1", "--device", "cpu", "--teacher", "dynunet=random", "--epochs", "2",
    "--set", "patch=[32,32,16]", "--set", "spacing=[12,12,12]", "--set", "student_features=[4,8,8,8]",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--set", 'architectures={"dynunet":{"filters":[2,4,4,4]}}',
    "--set", "val_interval=1",
]  # fmt: skip


@register_backend(name="counted")
def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Run a captured graph uncompiled, and record that it ran."""

    def run(*arguments: Any) -> Any:
        CALLS.append("train" if torch.is_grad_enabled() else "eval")
        return graph.forward(*arguments)

    return run


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    CALLS.clear()
    yield
    torch._dynamo.reset()


def distil(cohort: Path, output: Path, method: str, *more: str) -> int:
    folders = ["--dataset-dir", str(cohort), "--output-dir", str(output)]
    return main(["distill", *TINY, *folders, "--method", method, *more])


def test_a_compiled_student_learns_the_same_and_its_weights_fit_the_plain_one(cohort: Path, tmp_path: Path) -> None:
    compiled = ["--set", "compile=true", "--set", "compile_backend=counted"]
    assert distil(cohort, tmp_path / "compiled", "hinton", *compiled) == 0
    assert CALLS.count("train") == 4  # 2 epochs of 2 steps
    assert CALLS.count("eval") >= 4  # and of 2 cases to validate, of one window or more
    CALLS.clear()
    assert distil(cohort, tmp_path / "plain", "hinton") == 0
    assert not CALLS
    first, second = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("compiled", "plain"))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    Student(3, 2, (4, 8, 8, 8), norm=("group", {"num_groups": 4})).load_state_dict(first)
    rows, expected = (read_curves(tmp_path / name / "curves.csv") for name in ("compiled", "plain"))
    for name in ("loss", "val_dice"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-4), name


def test_taps_on_a_compiled_student_are_refused_in_one_sentence(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = ["--set", "compile=true", "--set", "compile_backend=counted"]
    assert distil(cohort, tmp_path, "hint", *compiled) == 1
    errors = re.findall(r"^.*?(error: .*)$", capsys.readouterr().err, re.MULTILINE)  # a progress bar may precede it
    assert errors == ["error: Taps do not work on a compiled student: train without compile, or use terms on logits."]
    assert not (tmp_path / "model.pt").exists()
