# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: its instruments, exit codes and dry runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import INSTRUMENTS, main
from benchmarks.missing_modalities import ROWS


def test_help_lists_every_instrument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert set(INSTRUMENTS) <= {line.split()[0] for line in printed.splitlines() if line.startswith("    ")}


@pytest.mark.parametrize("name", [name for name in INSTRUMENTS if name != "fuzz"])
def test_every_instrument_has_options_and_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--json FILE" in printed or name in ("missing", "study")  # they time nothing
    assert f"Example: python -m benchmarks {name}" in printed


def test_the_fuzzer_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr("benchmarks.fuzz_readers.main", lambda: int(sys.argv[2]))
    assert main(["fuzz", "--mutations", "7"]) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "NAME"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["methods"], "--dataset-dir"),
        (["methods", "--dataset-dir", "DATA", "--workers", "0"], "argument --workers: 0 is too small"),
        (["training", "--thread", "1"], "unrecognized arguments: --thread"),  # no abbreviations
    ],
)
def test_wrong_arguments_end_with_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--only", "nothing", "--output-dir", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: Unknown candidate nothing. Choose from ours, ")
    assert printed.err.count("\n") == 1


def test_debug_raises_the_error() -> None:
    with pytest.raises(ValueError, match="Unknown candidate nothing"):
        main(["metrics", "--only", "nothing", "--debug"])


def test_a_dry_run_of_the_methods_prints_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--dataset-dir", "DATA", "--dry-run", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python -m scripts ") for line in lines)
    assert sum("--method cwd" in line for line in lines) == 2  # with trained and with random teachers


def test_a_dry_run_of_the_missing_modalities_prints_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["missing", "--dataset-dir", "DATA", "--dry-run", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python -m scripts ") for line in lines)
    assert sum("evaluate" in line for line in lines) == len(ROWS) * 7


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("training", "1 cached teacher: train, data/phantom, scale/small, distill, methods/hinton, cached"),
        ("scaling", "2 processes, batch 1 each"),
        ("metrics", "MONAI"),
        ("inference", "student, torch fp32: inference, data/sts, scale/small"),
    ],
)
def test_a_dry_run_lists_the_candidates_and_writes_nothing(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--dry-run", "--output-dir", str(tmp_path / "output")]) == 0
    assert words in capsys.readouterr().out
    assert not (tmp_path / "output").exists()


def test_the_inference_benchmark_refuses_other_modalities(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inference", "--data", "hecktor21", "--dry-run"]) == 1
    assert "the shipped weights, which need ct, pet, mr. Leave out --data." in capsys.readouterr().err


@pytest.mark.benchmarks
def test_the_benchmark_of_check_writes_its_rows(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", "phantom", "--dataset-dir", str(cohort), "--cases", "1", "--rounds", "1"]
    assert main(["check", *options, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["side"] for row in rows] == ["read once", "check"]
    assert all(list(row) == ["side", "what", "median_s", "ratio", "peak_mib"] for row in rows)
    assert rows[0]["ratio"] == 1.0
    assert "| check |" in capsys.readouterr().out
