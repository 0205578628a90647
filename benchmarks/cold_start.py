# SPDX-License-Identifier: Apache-2.0
"""Time whole commands from the shell to the written mask: each process starts anew, in turns, and its memory is read.

The first round is not counted: it fills the disk's cache. With --nnunet-python the command of nnU-Net segments the same
case, and that of TotalSegmentator its CT, where they are installed: with networks as their planner lays them out,
untrained, since weights do not change the time.

Example: python -m benchmarks cold --dataset-dir STS --rounds 7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from benchmarks.options import add_json_option, add_output_options
from scripts import bundle_root
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table

FILES = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz", "mr": "MR_T1_image.nii.gz"}
BASE, BUNDLE, RUNTIME = "segment --no-measures", "monai.bundle run", "runtime folder"  # all write the mask only
BUNDLE_REQUIREMENTS = ("requirements.txt", "requirements-fast.txt", "requirements-dicom.txt")
BATCH = 20
LARGE = (256, 256, 192)
Command = Sequence[str]


class Run(NamedTuple):
    """One process: seconds from its start to its end, and its peak memory in MiB (of its largest process)."""

    seconds: float
    peak_mib: float


# A small process that starts the command: Linux hands the peak memory of the starting process on to the new one.
LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), time.perf_counter() - began, usage.ru_maxrss / 1024], file)
"""


def run_process(command: Command, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command, whose first word is the path of a program, to its end.

    Raises:
        ValueError: it fails; the message ends with what it printed.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, result.name, *command]
        printed = subprocess.run(
            launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=bundle_root(), check=True,
            env={**os.environ, **(environment or {})},
        ).stdout  # fmt: skip
        code, seconds, peak_mib = json.load(result)
    if code:
        raise ValueError(f"{shlex.join(command)} failed: {printed[-2000:]}")
    return Run(seconds, peak_mib)


def time_in_turns(commands: Mapping[str, Command], rounds: int) -> dict[str, list[Run]]:
    """Run all commands one after the other, ``rounds`` times and once before that is not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            run = run_process(command)
            print(f"round {number}: {name} {run.seconds:.2f} s", file=sys.stderr, flush=True)
            if number:
                runs[name].append(run)
    return runs


def installed_mib(requirements: Sequence[str]) -> float:
    """Size of packages with all that they require, as installed here, in MiB.

    Args:
        requirements: such as ``numpy>=2``; those that are not installed are left out.
    """
    names, waiting = set(), [Requirement(text) for text in requirements]
    size = 0
    while waiting:
        requirement = waiting.pop()
        if requirement.name.lower() in names:
            continue
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        names.add(requirement.name.lower())
        size += sum(path.stat().st_size for file in package.files or () if (path := Path(str(file.locate()))).is_file())
        for text in package.requires or ():
            needed = Requirement(text)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(each) for each in extras):
                waiting.append(needed)
    return size / 2**20


def requirement_lines(path: Path) -> list[str]:
    """The requirements of a file, without comments."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


def describe_machine() -> str:
    """The processor and the instructions that matter here."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|avx512_vnni|amx_bf16)\b", text))
    name = model[1] if model else platform.processor() or "unknown processor"
    return f"{name}, {os.cpu_count()} cores, {' '.join(sorted(flags)) or 'no AVX2'}"


def program(*words: str) -> list[str]:
    """A command of the bundle."""
    return [sys.executable, "-W", "ignore", "-m", "scripts", *words]


def bundle_command(words: Sequence[str]) -> list[str]:
    """The ``monai.bundle run`` command that a command of the bundle stands for."""
    printed = subprocess.run(
        program(*words, "--dry-run"), capture_output=True, text=True, check=True, cwd=bundle_root()
    ).stdout
    line = next(line for line in printed.splitlines() if "-m monai.bundle run" in line)
    return [sys.executable, "-W", "ignore", *shlex.split(line)[1:]]


def images(folder: Path, names: Mapping[str, str] = FILES) -> list[str]:
    """The options of a case's images."""
    return [word for key, name in names.items() for word in (f"--{key}", str(folder / name))]


def prepare_nnunet(python: str, case: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write an untrained nnU-Net and the case on one grid; nnU-Net's command for it and its environment."""
    code = "from benchmarks.nnunet_inference import write_model_and_case as w; import sys; w(*sys.argv[1:])"
    run_process([python, "-W", "ignore", "-c", code, str(case), str(folder)])
    command = [
        str(Path(python).with_name("nnUNetv2_predict")), "-i", str(folder / "images"), "-o", str(folder / "masks"),
        "-d", "1", "-c", "3d_fullres", "-f", "0", "-device", "cpu", "--disable_progress_bar",
    ]  # fmt: skip
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    return command, {name: str(folder / name) for name in names}


def prepare_totalsegmentator(python: str, case: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write an untrained network for TotalSegmentator; its command for the CT and its environment."""
    code = "from benchmarks.nnunet_inference import write_totalsegmentator as w; import sys; w(*sys.argv[1:])"
    folder.mkdir(parents=True, exist_ok=True)
    run_process([python, "-W", "ignore", "-c", code, str(folder)])
    command = [
        str(Path(python).with_name("TotalSegmentator")), "-i", str(case / FILES["ct"]), "-o", str(folder / "masks"),
        "--fast", "--device", "cpu", "--ml", "-q",
    ]  # fmt: skip
    return command, {"TOTALSEG_HOME_DIR": str(folder)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--dataset-dir", required=True, type=Path, help="folder of the STS data set")
    parser.add_argument("--weights", default=None, help="weights (default: models/model.pt)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one to warm up (default %(default)s)")
    parser.add_argument("--nnunet-python", metavar="FILE", help="Python of an environment with nnunetv2")
    add_output_options(parser, "runs/cold")
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Run all comparisons; the tables."""
    output = args.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)
    case = sorted(path for path in args.dataset_dir.resolve().iterdir() if (path / FILES["ct"]).is_file())[0]
    weights = ["--weights", args.weights] if args.weights else []
    mask = ["--output", str(output / "mask.nii.gz")]
    segment = ["segment", *weights, *images(case), *mask]
    run_process(program(*segment))  # the first run exports the weights
    run_process(program("export", *weights, "--runtime", str(output / "runtime")))
    commands: dict[str, Command] = {
        BASE: program(*segment, "--no-measures"),
        "segment, with measures": program(*segment),
        RUNTIME: [sys.executable, str(output / "runtime" / "segment.pyz"), *images(case), *mask],
        BUNDLE: bundle_command(["segment", *weights, *images(case), "--output", str(output / "bundle.nii.gz")]),
        "--help": program("--help"),
        "check of one case": program("check", *_table([case], output / "one.csv")),
    }
    if args.nnunet_python:
        command, environment = prepare_nnunet(args.nnunet_python, case, output / "nnunet")
        os.environ.update(environment)
        commands["nnUNetv2_predict"] = command
        if Path(args.nnunet_python).with_name("TotalSegmentator").is_file():
            command, environment = prepare_totalsegmentator(args.nnunet_python, case, output / "totalsegmentator")
            os.environ.update(environment)
            commands["TotalSegmentator --fast"] = command
    if args.dry_run:
        return "\n".join(f"{name}: {shlex.join(command)}" for name, command in commands.items())
    runs = time_in_turns(commands, args.rounds)
    network = _network_seconds(output / "mask.manifest.json")
    rows = [_row(name, each, runs[BASE]) for name, each in runs.items()]
    rows += [_batch_row(args, weights, output), *_large_rows(args, weights, output)]
    sizes = _sizes(output / "runtime")
    if args.json:
        write_json(
            {"machine": describe_machine(), "network_s": network, "rows": rows, "installed_mib": sizes}, args.json
        )
    table = markdown_table(
        ["what", "median s", f"times `{BASE}`", "peak MiB"],
        [[row["what"], row["median_s"], row["ratio"], row["peak_mib"]] for row in rows],
    )
    listed = "\n".join(f"- {name}: {mib:.0f} MiB" for name, mib in sizes.items())
    return (
        f"{describe_machine()}; {args.rounds} rounds in turns, {case.name}\n\n{table}\n\n"
        f"The network alone: {network:.2f} s a case. Installed:\n\n{listed}"
    )


def _row(name: str, runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    return {
        "side": name,
        "what": name,
        "median_s": round(statistics.median(run.seconds for run in runs), 2),
        "ratio": round(statistics.median(a.seconds / b.seconds for a, b in zip(runs, base, strict=True)), 2),
        "peak_mib": round(statistics.median(run.peak_mib for run in runs)),
    }


def _table(cases: Sequence[Path], path: Path) -> list[str]:
    """Write a table of cases, and return the options that name it."""
    rows = [",".join([case.name, *(str(case / name) for name in FILES.values())]) for case in cases]
    path.write_text("\n".join([",".join(["case_id", *FILES]), *rows]) + "\n", encoding="utf-8")
    return ["--data-list", str(path), "--allow-outside"]


def _network_seconds(manifest: Path) -> float:
    config = json.loads(manifest.read_text(encoding="utf-8"))["config"]
    return float(config["stage_seconds"]["network"])


def _batch_row(args: argparse.Namespace, weights: Sequence[str], output: Path) -> dict[str, Any]:
    """Seconds per case of a batch, relative to those of the network when it has all cores for one case at a time."""
    cases = sorted(path for path in args.dataset_dir.resolve().iterdir() if (path / FILES["ct"]).is_file())[:BATCH]
    table, seconds, network = _table(cases, output / "batch.csv"), [], []
    for _ in range(args.rounds + 1):
        by_workers = {}
        for name, options in (("default", []), ("one", ["--workers", "1"])):
            folder = output / f"batch_{name}"
            for mask in folder.glob("*.nii.gz"):
                mask.unlink()
            by_workers[name] = run_process(program("segment", *weights, *table, *options, "--output-dir", str(folder)))
        seconds.append(by_workers["default"].seconds / len(cases))
        manifests = sorted((output / "batch_one").glob("*.manifest.json"))
        network.append(statistics.fmean(map(_network_seconds, manifests)))
    per_case, own = statistics.median(seconds[1:]), statistics.median(network[1:])  # the first reads from the disk
    what = f"a batch of {len(cases)}, per case (the network alone: {own:.2f} s, ratio to it)"
    return {
        "side": "batch",
        "what": what,
        "median_s": round(per_case, 2),
        "ratio": round(per_case / own, 2),
        "peak_mib": None,
    }


def _large_rows(args: argparse.Namespace, weights: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Memory and time of a large case."""
    code = "from benchmarks.synthetic_body import write_case; from pathlib import Path; import sys; "
    code += "write_case(Path(sys.argv[1]), [int(n) for n in sys.argv[2:]])"
    folder = output / "large"
    run_process([sys.executable, "-W", "ignore", "-c", code, str(folder), *map(str, LARGE)])
    files = images(folder, {key: f"{key}.nii.gz" for key in FILES})
    command = program("segment", *weights, *files, "--output", str(output / "large.nii.gz"))
    runs = [run_process(command) for _ in range(args.rounds + 1)][1:]
    what = f"segment, {' x '.join(map(str, LARGE))}, three modalities"
    return [
        {
            "side": "large",
            "what": what,
            "median_s": round(statistics.median(run.seconds for run in runs), 2),
            "ratio": None,
            "peak_mib": round(max(run.peak_mib for run in runs)),
        }
    ]


def _sizes(runtime: Path) -> dict[str, float]:
    """Installed sizes of the runtime and of the bundle without development tools, packages and programs."""
    root = Path(bundle_root())
    of_bundle = [line for name in BUNDLE_REQUIREMENTS for line in requirement_lines(root / name)]
    own = sum(path.stat().st_size for path in runtime.rglob("*") if path.is_file()) / 2**20
    return {
        "runtime folder with its packages": own + installed_mib(requirement_lines(runtime / "requirements.txt")),
        "the bundle's packages without development tools": installed_mib(of_bundle),
    }
