# SPDX-License-Identifier: Apache-2.0
"""Text from data never runs as Python: paths, ids and tables whose text MONAI's configs would interpret."""

from __future__ import annotations

import ast
import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from fire.parser import DefaultParseValue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from scripts.cli import bundle_run
from scripts.cli.bundle_run import Expression, interpreted, literal, protected, shell_word, trusted_classes
from scripts.cli.main import main
from scripts.networks import Student

ROOT = Path(__file__).parents[2]
FEATURES, NORM = [4, 8, 8, 8], ["group", {"num_groups": 4}]
CODE = "$open('RAN','w').write('x')"
NAMES = [
    "with space", "a#b", "a::b", "@home", "x@home", "x@::y", "$money", "100%", "%pre", "café ü", "it's", 'q"q', "a,b",
    "[x]", "{x}", "2024", "None", "back\\slash", "a&b;c", "-dash", CODE,
]  # fmt: skip
# What Linux takes as a name: anything but / and NUL. Names that could be options are written as ./-name by users.
ALPHABET = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
FILE_NAMES = st.text(ALPHABET | st.sampled_from("$@%#:'\"\\[]{}()&|;<>*?!~`= \t,."), min_size=1, max_size=30).filter(
    lambda name: name.strip(".") and not name.startswith("-") and len(name.encode()) < 200
)
IMAGES = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz", "mr": "MR_T1_image.nii.gz"}


def parsed(config: Any) -> Any:
    parser = ConfigParser({"imports": ["$import os"], "secret": "the secret", "value": protected(config)})
    return parser.get_parsed_content("value")


@pytest.mark.parametrize("text", [*NAMES, "@secret", "$@secret", "%secret", "$'a", "\\#", "\udce9#", ""])
def test_text_reaches_the_workflow_as_it_is(text: str) -> None:
    assert parsed(text) == text
    assert parsed([{"ct": text}, (text, 1)]) == [{"ct": text}, [text, 1]]


@given(st.text() | st.text("$@%#:'\"\\ax_"))
def test_any_text_reaches_the_workflow_as_it_is(text: str) -> None:
    assert parsed(text) == text
    assert DefaultParseValue(shlex.split(shell_word(literal(text)))[0]) == literal(text)


@given(st.recursive(st.text("$@%#'\"[],1") | st.integers() | st.booleans() | st.none(), st.lists))
def test_a_pasted_line_gives_the_same_values(value: Any) -> None:
    (word,) = shlex.split(shell_word(protected(value)))
    assert DefaultParseValue(word) == protected(value)


@pytest.mark.parametrize("value", [{"_target_": "os.getcwd"}, {"a": [{"_target_": "os.getcwd", "x": 1}]}])
def test_a_class_in_data_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"The settings hold the class 'os\.getcwd', which would run code"):
        protected(value)
    assert parsed(interpreted({"_target_": "str", "object": 3})) == "3"
    assert parsed(trusted_classes({"_target_": "str", "object": "@secret"})) == "@secret"
    with pytest.raises(ModuleNotFoundError, match=r"\$os\.getcwd"):
        parsed(trusted_classes({"_target_": "$os.getcwd"}))


def test_expressions_of_the_program_and_of_set_are_interpreted() -> None:
    assert parsed(Expression("@secret")) == "the secret"
    assert parsed(interpreted(["$1 + 1", {"a": "@secret"}, 3])) == [2, {"a": "the secret"}, 3]


@pytest.mark.parametrize("named", [{"classes": None}, {}], ids=["null", "a record of 0.9"])
def test_classes_that_the_weights_were_trained_without_are_none(
    named: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their record wins over the data set that stands in for theirs; MONAI would drop an override that is None."""
    record = {"cohort": "files", "modalities": ["t1"], "labels": [[0], [1], [2]], **named}
    (tmp_path / "own.task.json").write_text(json.dumps(record))
    command = ["segment", "--weights", str(tmp_path / "own.pt"), "--t1", "t1.nii.gz", "--output", "mask.nii.gz"]
    assert main([*command, "--dry-run"]) == 0
    assert "--classes '$None'" in capsys.readouterr().out
    assert parsed({"classes": None, "regions": interpreted(None)}) == {"classes": None, "regions": None}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``segment`` by a tiny student with random weights."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(Student(3, 2, FEATURES, norm=NORM).state_dict(), path)
    tiny = ["--set", "patch=[16,16,16]", "--set", "spacing=[12,12,12]", "--set", f"student_features={FEATURES}"]
    tiny += ["--set", 'student_norm=["group",{"num_groups":4}]', "--engine", "torch", "--threads", "1"]
    return ["segment", "--data", "phantom", *tiny, "--weights", str(path)]


@pytest.fixture(scope="module")
def expected(arguments: list[str], cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The mask of the first phantom, from plain paths."""
    output = tmp_path_factory.mktemp("plain") / "mask.nii.gz"
    assert main([*arguments, *images(cohort / "PHANTOM_001"), "--output", str(output)]) == 0
    return np.asarray(nib.load(output).dataobj)


def images(folder: Path) -> list[str]:
    return [word for key, name in IMAGES.items() for word in (f"--{key}", f"{folder}/{name}")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in NAMES if name != "-dash"])
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_any_folder_may_contain_the_images_the_weights_and_the_mask(
    name: str, absolute: bool, arguments: list[str], expected: Any, cohort: Path, here: Path
) -> None:
    shutil.copytree(cohort / "PHANTOM_001", here / name)
    shutil.copy(arguments[-1], here / name / "w.pt")
    folder = here / name if absolute else Path(name)
    mask = folder / "m.nii.gz"
    assert main([*arguments[:-1], str(folder / "w.pt"), *images(folder), "--output", str(mask)]) == 0
    np.testing.assert_array_equal(nib.load(mask).dataobj, expected)
    assert sorted(path.name for path in here.iterdir()) == [name]  # no other folder, no file RAN


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=FILE_NAMES, other=FILE_NAMES)
def test_any_name_that_the_file_system_takes_works(
    name: str, other: str, arguments: list[str], expected: Any, cohort: Path, here: Path
) -> None:
    """Images in a folder of one name, the mask in a folder of another, both relative."""
    source, target = here / "in" / name, here / "out" / other
    shutil.rmtree(here / "in", ignore_errors=True)
    shutil.rmtree(here / "out", ignore_errors=True)
    shutil.copytree(cohort / "PHANTOM_001", source)
    output = Path("out") / other / f"{name[:100]}.nii.gz"
    command = [*arguments, *images(Path("in") / name), "--output", str(output)]
    assert main(command) == 0
    np.testing.assert_array_equal(nib.load(output).dataobj, expected)
    assert {path.name for path in (here / "out").iterdir()} == {other}
    assert {path.name for path in here.iterdir()} == {"in", "out"}
    assert target.is_dir()


def test_a_mask_may_have_any_name(arguments: list[str], expected: Any, cohort: Path, here: Path) -> None:
    assert main([*arguments, *images(cohort / "PHANTOM_001"), "--output", f"{CODE.replace('/', '')} #1.nii.gz"]) == 0
    (mask,) = here.glob("*.nii.gz")
    assert mask.name == f"{CODE} #1.nii.gz"
    np.testing.assert_array_equal(nib.load(mask).dataobj, expected)
    assert not (here / "RAN").exists()


def test_the_printed_line_of_strange_paths_does_the_same(
    arguments: list[str], expected: Any, cohort: Path, here: Path, run_python: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / f"{CODE} #1 it's"
    shutil.copytree(cohort / "PHANTOM_001", folder)
    command = [*arguments, *images(folder), "--output", str(folder / "m.nii.gz"), "--dry-run"]
    assert main(command) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "monai.bundle" in line]
    run_python(*shlex.split(line)[1:], cwd=here).check_returncode()
    np.testing.assert_array_equal(nib.load(folder / "m.nii.gz").dataobj, expected)
    assert not (here / "RAN").exists()


def write_table(path: Path, row: list[str]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["case_id", "patient_id", "image", *IMAGES], row])


def test_a_cell_of_a_table_is_a_path_and_nothing_else(
    arguments: list[str], cohort: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ct, _, mr = (str(cohort / "PHANTOM_001" / name) for name in IMAGES.values())
    write_table(here / "cases.csv", ["one", "one", ct, ct, CODE, mr])
    assert main([*arguments, "--data-list", "cases.csv", "--allow-outside", "--output-dir", "out"]) == 1
    assert not list(here.rglob("RAN"))
    assert "RAN" in capsys.readouterr().err  # the file that is missing is named


def test_a_case_id_that_is_no_name_is_refused(
    arguments: list[str], cohort: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(cohort / "PHANTOM_001" / name) for name in IMAGES.values()]
    write_table(here / "cases.csv", [CODE, "@one", files[0], *files])
    assert main([*arguments, "--data-list", "cases.csv", "--allow-outside", "--output-dir", "out"]) == 1
    assert "cannot be a file name" in capsys.readouterr().err
    assert not list(here.rglob("RAN"))


def test_every_override_is_protected_unless_it_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    """Whatever verb is typed, a hostile folder, name or list never begins a value that MONAI interprets."""
    commands: list[list[str]] = [
        ["train", "--volumes-dir", CODE, "--pretrained", CODE],
        ["teacher", "--architecture", "unetr", "--modalities", "ct"],
        ["distill", "--teachers-dir", CODE, "--cache-dir", CODE],
        ["distill", "--teacher", f"unetr:ct={CODE}"],
        ["cache-teachers", "--teachers-dir", CODE],
        ["evaluate", "--predictions", CODE, "--name", CODE, "--curves", CODE],
        ["evaluate", "--weights", CODE],
        ["export", "--weights", CODE],
    ]
    for command in commands:
        shared = ["--dataset-dir", CODE, "--output-dir", CODE, "--data-list", CODE, "--series-uid", CODE]
        assert main([*command, *shared, "--device", "cpu", "--dry-run"]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert "open(" in line
        assert CODE not in line
    assert not (here / "RAN").exists()


def test_no_override_is_built_from_text_of_data() -> None:
    """Overrides reach MONAI only through ``run_bundle``, and only constants are marked as expressions."""
    calls = []
    for path in (ROOT / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] == "Expression":
                calls.append((path.name, ast.unparse(node.args[0])))
            if isinstance(node, ast.ImportFrom) and node.module == "monai.bundle":
                names = {alias.name for alias in node.names}
                assert "run" not in names or path.name == "bundle_run.py"
    marked = [argument for _, argument in calls if not argument.startswith(("'", '"'))]
    # The value of --set, which is the user's own; the device and the name of a class, as literals.
    assert sorted(marked) == ["f'$torch.device({args.device!r})'", "literal(str(value[TARGET]))", "value"]


TRAININGS = {
    "train": (["train"], "runs/student"),
    "teacher": (["teacher", "--modalities", "ct", "mr"], "runs/teacher_ct_mr"),
    "distill": (["distill", "--teacher", "dynunet=random"], "runs/distilled"),
}


@pytest.mark.parametrize(("command", "folder"), TRAININGS.values(), ids=TRAININGS)
def test_a_training_says_where_its_weights_are(
    command: list[str], folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundle_run, "run_bundle", lambda *_: None)
    assert main(command) == 0
    assert capsys.readouterr().out == f"weights: {Path(__file__).parents[2] / folder / 'model.pt'}\n"
    assert main([*command, "--output-dir", "RUNS/a $b"]) == 0
    assert capsys.readouterr().out == "weights: RUNS/a $b/model.pt\n"
    with pytest.raises(SystemExit):
        main([command[0], "--help"])
    default = folder.replace("ct_mr", "MODALITIES")
    assert f"folder for all results (default: {default} in" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("of_task", [True, False])
def test_a_class_in_a_task_or_in_the_record_of_weights_does_not_run(
    of_task: bool, arguments: list[str], cohort: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = {"codes": {"_target_": "os.mkdir", "path": str(here / "RAN")}}
    if of_task:
        task = {"cohort": "phantom", "modalities": ["ct"], "labels": [[0], [1]], "intensity": {"ct": [-200, 300]}}
        (here / "task.json").write_text(json.dumps({**task, "spacing": [12, 12, 12], "patch": [16, 16, 16], **code}))
        command = ["train", "--data", "task.json", "--dataset-dir", str(cohort), "--output-dir", "out"]
    else:
        shutil.copy(arguments[-1], here / "w.pt")
        (here / "w.task.json").write_text(json.dumps(code))
        command = [arguments[0], *arguments[3:-1], "w.pt", *images(cohort / "PHANTOM_001"), "--output", "m.nii.gz"]
    assert main(command) == 1
    assert "hold the class 'os.mkdir', which would run code" in capsys.readouterr().err
    assert not (here / "RAN").exists()
