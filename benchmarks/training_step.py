# SPDX-License-Identifier: Apache-2.0
"""Time a training step: plain, with cached teachers, with online teachers, with every method, or in two precisions.

Each candidate runs the bundle's real trainer on real samples, in its own process and in interleaved rounds. Without
``--dataset-dir`` the samples are phantoms.

Example: python -m benchmarks training --threads 1
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.interleaved_timing import Candidate, StepTimer, compose, time_interleaved
from benchmarks.job_queue import use_own_progress_lock
from benchmarks.methods_plan import DEFAULT_TEACHERS, DUAL_TEACHERS
from benchmarks.options import add_data_options, add_json_option, add_output_options, add_training_options
from benchmarks.study_setting import GRID
from benchmarks.study_students import STUDENTS
from benchmarks.study_teachers import TEACHER_SCALE, TRIES, VIT_SMALL
from benchmarks.study_teachers import TEACHERS as TEACHERS_OF_STUDY
from scripts.cli.config import config_names, read_config
from scripts.cli.main import main
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table

WARM_UP_STEPS, STEPS_PER_ROUND = 3, 5
MIN_ROUNDS = 4  # 20 steps
TEACHERS = ("unetr", "hdenseformer", "swinunetr", "uxnet", "dynunet")
TEACHER_COUNTS = (1, 3, 5)  # the first one, three or five of TEACHERS
PLAIN = "plain"


def bare_trainer(candidate: Candidate, epochs: int) -> Any:
    """The bundle's trainer without its handlers, so that it neither validates nor writes, in a forked process."""
    use_own_progress_lock()
    parser = compose(candidate)
    parser["train#handlers"] = []
    parser["max_epochs"] = epochs
    parser["locked"] = ""  # no output folder is locked, because nothing is written
    parser.get_parsed_content("initialize")
    return parser.get_parsed_content("train#trainer")


def _train(candidate: Candidate, pipe: Connection) -> None:
    """Worker process: train, and time every step."""
    trainer = bare_trainer(candidate, epochs=10**6)
    StepTimer(pipe).attach(trainer)
    trainer.run()


def time_candidates(candidates: Sequence[Candidate], rounds: int) -> list[dict[str, Any]]:
    """Time the candidates in interleaved rounds of ``STEPS_PER_ROUND`` steps.

    Args:
        candidates: the others are compared with the first.
        rounds: rounds of each candidate.

    Returns:
        One row per candidate: ``{"side", "what", "median_s", "ratio", "peak_mib", "data_share", "steps"}``.

    Raises:
        RuntimeError: the process of a candidate has ended; it printed the reason.
    """
    counts = {candidate.name: rounds for candidate in candidates}
    timings = time_interleaved(candidates, _train, counts, STEPS_PER_ROUND, WARM_UP_STEPS)
    base = statistics.median(step for step, _ in timings[candidates[0].name].steps)
    return [_row(name, each.steps, base, each.peak_mib) for name, each in timings.items()]


def _row(name: str, steps: Sequence[tuple[float, float]], base: float, peak_mib: float) -> dict[str, Any]:
    median = statistics.median(step for step, _ in steps)
    return {
        "side": name,
        "what": "training step",
        "median_s": round(median, 4),
        "ratio": round(median / base, 3),
        "peak_mib": round(peak_mib),
        "data_share": round(sum(loading for _, loading in steps) / sum(step for step, _ in steps), 3),
        "steps": len(steps),
    }


def random_teachers(architectures: Sequence[str], modalities: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Specs of teachers with random weights, which cost as much as trained ones."""
    return {name: {"architecture": name, "modalities": list(modalities), "weights": None} for name in architectures}


def teacher_candidates(
    base: Sequence[str], common: Mapping[str, Any], modalities: Sequence[str], cache: Path
) -> list[Candidate]:
    """The plain training, then one, three and five teachers, cached and online, all with soft predictions.

    Args:
        base: configs of every candidate.
        common: overrides of every candidate.
        modalities: of the data set.
        cache: folder of the cached teachers.
    """
    candidates = [Candidate(PLAIN, tuple(base), common)]
    soft_predictions = (*base, "distill", "methods/hinton")
    for count in TEACHER_COUNTS:
        overrides = {**common, "teacher_specs": random_teachers(TEACHERS[:count], modalities)}
        noun = "teacher" if count == 1 else "teachers"
        cached = {**overrides, "cache_dir": str(cache)}
        candidates.append(Candidate(f"{count} cached {noun}", (*soft_predictions, "cached"), cached))
        candidates.append(Candidate(f"{count} online {noun}", soft_predictions, overrides))
    return candidates


def method_candidates(
    base: Sequence[str], common: Mapping[str, Any], modalities: Sequence[str], methods: Sequence[str]
) -> list[Candidate]:
    """The plain training, then every method online, with the same teachers as in the comparison of all methods.

    Args:
        base: configs of every candidate.
        common: overrides of every candidate.
        modalities: of the data set.
        methods: names of the methods.
    """
    candidates = [Candidate(PLAIN, tuple(base), common)]
    for method in methods:
        architectures = DUAL_TEACHERS if method == "dual" else DEFAULT_TEACHERS
        overrides = {**common, "teacher_specs": random_teachers(architectures, modalities)}
        if method == "dual":
            overrides["selective_fusion"] = True
        if method == "gkd":
            overrides["headers_dir"] = None  # untrained headers cost as much as trained ones
        candidates.append(Candidate(method, (*base, "distill", f"methods/{method}"), overrides))
    return candidates


def precision_groups(data: str, common: Mapping[str, Any]) -> list[list[Candidate]]:
    """The student (0.9 M) and the Transformers of the study on its grid, each in float32 and in bfloat16.

    Args:
        data: name of the data set.
        common: overrides of every candidate.
    """
    grid = {**common, "num_workers": 0, "patch": GRID["patch"], "spacing": GRID["spacing"]}
    base = ("train", f"data/{data}", f"scale/{TEACHER_SCALE}")
    networks = {"student": (base, {"student_features": STUDENTS["0.9M"]})}
    for name in TRIES[0][1]:
        architecture = TEACHERS_OF_STUDY[name]["architecture"]
        sizes = {"architectures": {architecture: VIT_SMALL}} if architecture == "unetr" else {}
        networks[architecture] = ((*base, "teacher"), {"architecture": architecture, **sizes})
    return [
        [
            Candidate(f"{name}, {precision}", configs, {**grid, **overrides, "precision": precision})
            for precision in ("float32", "bfloat16")
        ]
        for name, (configs, overrides) in networks.items()
    ]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ("candidate", "median s per step", "ratio to the first", "data share", "peak MiB", "steps")
    cells = [
        (
            *(row["side"], f"{row['median_s']:.3f}", f"{row['ratio']:.2f}", f"{row['data_share']:.0%}"),
            *(row["peak_mib"], row["steps"]),
        )
        for row in rows
    ]
    return markdown_table(head, cells)


def cache_teachers(folder: Path, options: Sequence[str], architectures: Sequence[str] = TEACHERS) -> None:
    """Cache the predictions of teachers with random weights, in a separate process. An existing cache is kept.

    Args:
        folder: of the cache.
        options: options of ``python -m scripts cache-teachers``.
        architectures: of the teachers.
    """
    weights = [word for name in architectures for word in ("--teacher", f"{name}=random")]
    command = ["cache-teachers", *options, *weights, "--output-dir", str(folder)]
    process = multiprocessing.get_context("fork").Process(target=lambda: exit(main(command)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("The teachers could not be cached. See the error message above.")


def training_data(args: argparse.Namespace) -> tuple[str, str]:
    """Name and folder of the data set to train on; phantoms are written if none was given."""
    if args.dataset_dir:
        return args.data, args.dataset_dir
    folder = args.output_dir / "phantoms"
    if not folder.is_dir() and not args.dry_run:
        main(["phantom", "--cases", "10", "--output-dir", str(folder)])
    return "phantom", str(folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    add_training_options(parser, scale="small")
    add_output_options(parser, "runs/benchmark")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a candidate (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"rounds of {STEPS_PER_ROUND} steps, at least {MIN_ROUNDS} (default 5)"
    )
    parser.add_argument(
        "--precisions", action="store_true", help="instead: the networks of the study in float32 and in bfloat16"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Time all candidates and return the table."""
    data, folder = training_data(args)
    base = ("train", f"data/{data}", f"scale/{args.scale}")
    unused = str(args.output_dir / "unused")
    common = {"dataset_dir": folder, "threads": args.threads, "output_dir": unused, "fold": args.fold}
    cache = args.output_dir / f"cache_{data}_{args.scale}"
    modalities = read_config(f"data/{data}")["modalities"]
    if args.precisions:
        groups = precision_groups(data, common)
    else:
        methods = config_names("methods")
        groups = [
            teacher_candidates(base, common, modalities, cache),
            method_candidates(base, common, modalities, methods),
        ]
    if args.dry_run:
        return "\n".join(f"{each.name}: {', '.join(each.configs)}" for group in groups for each in group)
    options = ("--data", data, "--dataset-dir", folder, "--scale", args.scale, "--threads", str(args.threads))
    if not args.precisions:
        cache_teachers(cache, (*options, "--fold", str(args.fold), "--set", "overlap=0"))
    rows = [row for group in groups for row in time_candidates(group, max(args.rounds, MIN_ROUNDS))]
    write_json(rows, args.json or args.output_dir / ("precisions.json" if args.precisions else "training.json"))
    return format_table(rows)
