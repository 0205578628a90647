# SPDX-License-Identifier: Apache-2.0
"""The command line: help, exit codes, and what a verb prints."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from scripts.cli import main as program
from scripts.cli.main import TOOLS, VERBS, main, parse_arguments
from scripts.utils.errors import error_sentence

ROOT = Path(__file__).parents[2]


def test_the_overview_names_every_verb_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for group, verbs in VERBS.items():
        assert f"\n{group}:\n" in text
        for verb, module in verbs.items():
            assert f"  {verb:<15} {module.__doc__}" in text
    assert all(f"  {tool:<15} " in text for tool in TOOLS)


@pytest.mark.parametrize("verb", [verb for group in VERBS.values() for verb in group])
def test_every_verb_has_an_example_that_it_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    module = next(group[verb] for group in VERBS.values() if verb in group)
    assert text.count("python -m scripts") >= 2
    for line in module.EXAMPLE.splitlines():
        assert f"  {line}" in text
        parse_arguments(line.split()[3:])


def test_help_and_bad_options_import_neither_torch_nor_monai() -> None:
    code = (
        "import sys\n"
        "from scripts.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    print('exit', end.code)\n"
        "print([name for name in ('torch', 'monai', 'numpy') if name in sys.modules])"
    )
    for arguments, end in (
        (["segment", "--help"], "exit 0"),
        (["segment", "--wrong"], "exit 2"),
        (["train", "--set", "x"], ""),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"
        assert end in done.stdout


@pytest.mark.parametrize("arguments", [["train", "--ep", "3"], ["segment", "--out", "x"], ["fly"], []])
def test_abbreviated_and_unknown_options_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_debug_shows_the_traceback_and_otherwise_one_sentence_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["segment", "--ct", "/nowhere/ct.nii.gz", "--output", "/tmp/never/mask.nii"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    named = "--output /tmp/never/mask.nii is no name of a mask. Use one that ends in .nii.gz, such as mask.nii.gz."
    assert printed.err == f"error: {named}\n"
    with pytest.raises(ValueError, match="is no name of a mask"):
        main([*command, "--debug"])


def test_the_sentence_of_a_wrapped_error_is_that_of_its_cause() -> None:
    def fail() -> None:
        try:
            try:
                raise ValueError("two\n  lines")
            except ValueError as cause:
                raise RuntimeError("component x") from cause
        except RuntimeError as error:
            raise RuntimeError("workflow") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert error_sentence(caught.value) == "two lines"
    assert error_sentence(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("option", "definition", "words"),
    [
        ("--network", {"_target_": "UNet", "spatial_dims": 3}, "monai.networks.nets.unet.UNet cannot be built: "),
        ("--segmentation-loss", {"_target_": "DiceLoss", "reduction": "x"}, "monai.losses.dice.DiceLoss"),
    ],
)
def test_an_own_class_that_cannot_be_built_is_named(
    option: str, definition: dict[str, Any], words: str, cohort: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(definition))
    command = ["train", "--data", "phantom", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "out")]
    assert main([*command, option, str(path), "--device", "cpu"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert error.endswith(". Correct its arguments where it is named.")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "0", "cuda:x"])
def test_a_device_that_does_not_exist_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--device", name])
    assert f"{name} is no device, use cpu, cuda" in capsys.readouterr().err


def test_the_console_entry_point_is_the_same_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"distill3d": "scripts.cli.main:main"}


def test_the_old_verb_benchmark_runs_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(program.runpy, "run_module", lambda name, **_: seen.append((name, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["scripts", "benchmark", "methods"])
    assert main(["benchmark", "methods", "--table"]) == 0
    assert seen == [("benchmarks", ["methods", "--table"])]


def test_the_old_verb_benchmark_explains_that_the_release_has_no_benchmarks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    assert main(["benchmark", "methods"]) == 1
    assert capsys.readouterr().err.endswith("Run python -m benchmarks in a clone of the repository.\n")


def test_a_count_that_is_no_number_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["phantom", "--cases", "many"])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: python -m scripts phantom [options]"
    assert error == "python -m scripts phantom: error: argument --cases: many is not a whole number"
