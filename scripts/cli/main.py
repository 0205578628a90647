# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts VERB``, or ``distill3d VERB``."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import runpy
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from scripts.cli import (
    cache_teachers,
    check,
    dicom,
    distill,
    evaluate,
    export,
    phantom,
    plan,
    report,
    segment,
    teacher,
    teachers,
    train,
)
from scripts.cli.options import Parser
from scripts.cli.segment import take_images
from scripts.utils.errors import EXPECTED_ERRORS, error_sentence

# Every verb is a module with ``add_options(parser)``, ``run(args)``, an ``EXAMPLE``, and its help as docstring.
VERBS: dict[str, dict[str, ModuleType]] = {
    "data": {"phantom": phantom, "check": check, "plan": plan},
    "training": {
        "train": train,
        "teacher": teacher,
        "distill": distill,
        "cache-teachers": cache_teachers,
        "teachers": teachers,
    },
    "inference": {"segment": segment, "dicom": dicom, "export": export},
    "evaluation": {"evaluate": evaluate, "report": report},
}
TOOLS = {"benchmark": "Moved: use `python -m benchmarks NAME`."}


def build_parser() -> Parser:
    """The parser of all verbs."""
    parser = Parser(
        prog="distill3d" if Path(sys.argv[0]).name == "distill3d" else "python -m scripts",
        usage="%(prog)s VERB [options]",
        description=_overview(),
        epilog="%(prog)s VERB --help explains a verb.\n"
        "Exit codes: 0 done, 1 bad input or some case failed, 2 wrong options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", help=argparse.SUPPRESS)
    for group in VERBS.values():
        for name, module in group.items():
            verb = verbs.add_parser(
                name,
                prog=f"{parser.prog} {name}",
                usage=f"{parser.prog} {name} [options]",
                description=module.__doc__,
                epilog=f"example:\n  {module.EXAMPLE.replace(chr(10), chr(10) + '  ')}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
            module.add_options(verb)
            verb.set_defaults(run=module.run)
    return parser


def _overview() -> str:
    """The verbs by group, one line each."""
    lines = ["Distil, segment and evaluate. See docs/README.md.", ""]
    groups = {name: {verb: module.__doc__ or "" for verb, module in group.items()} for name, group in VERBS.items()}
    for group, verbs in {**groups, "tools": TOOLS}.items():
        lines += [f"{group}:", *(f"  {verb:<15} {text}" for verb, text in verbs.items()), ""]
    return "\n".join(lines).rstrip()


class ConsoleHandler(logging.Handler):
    """Print log messages on stderr, above an open progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message; warnings and errors with their level."""
        text = record.getMessage() if record.levelno <= logging.INFO else f"{record.levelname}: {record.getMessage()}"
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options of a verb. The options of a task's images are known only when the task is."""
    parser = build_parser()
    args, others = parser.parse_known_args(arguments)
    unknown, sentence = take_images(args, others) if others else ([], "")
    if unknown:
        parser.error(". ".join(filter(None, (f"unrecognized arguments: {' '.join(unknown)}", sentence))))
    return args


def configure_logging(verbose: bool, debug: bool) -> None:
    """Print the bundle's own messages and warnings; MONAI's log with ``verbose``, ignite's with ``debug``."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[ConsoleHandler()])
    logging.getLogger("scripts").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        logging.getLogger("monai").setLevel(logging.ERROR)
    if not debug:
        logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it repeats every error with a traceback


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0, or 1 after an error (one sentence on stderr). Wrong options exit with 2. Ctrl-C ends the
        program.
    """
    is_program = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["benchmark"]:
        return _forward_benchmark(arguments[1:])
    try:
        args = parse_arguments(arguments)
    except EXPECTED_ERRORS as error:  # of a task's file, whose modalities are options
        if "--debug" in arguments:
            raise
        print(f"error: {error_sentence(error)}", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore")
    configure_logging(args.verbose, args.debug)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)  # so that no lock and no part of a file stay
    try:
        args.run(args)
    except EXPECTED_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {error_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if args.debug or not is_program:
            raise
        print("interrupted", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that a loop of the shell ends, too
        os.kill(os.getpid(), signal.SIGINT)
    return 0


def _end(number: int, frame: object) -> None:
    """End the process as by an interruption, with the exit code of a signal."""
    raise SystemExit(128 + number)


def _forward_benchmark(arguments: list[str]) -> int:
    """Run ``python -m benchmarks``; the verb ``benchmark`` will be removed in the next release."""
    print("`benchmark` has moved: use python -m benchmarks", file=sys.stderr)
    if importlib.util.find_spec("benchmarks") is None:
        print(
            "error: The released bundle has no benchmarks. Run python -m benchmarks in a clone of the repository.",
            file=sys.stderr,
        )
        return 1
    sys.argv[1:] = arguments
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
    return 0
