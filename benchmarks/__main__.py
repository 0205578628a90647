# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark: ``python -m benchmarks NAME [options]``.

Each instrument is a module with two functions: ``add_options(parser)`` declares its options, and ``run(args)`` runs it
and returns the text to print. ``python -m benchmarks NAME --help`` lists the options of one instrument.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence

from scripts.utils.errors import EXPECTED_ERRORS, error_sentence

INSTRUMENTS = {  # name -> module, summary
    "methods": ("methods", "train and score every distillation method under one recipe"),
    "study": ("study", "does a teacher add anything, and how small may the student be?"),
    "missing": ("missing_modalities", "score students on every subset of the modalities"),
    "training": ("training_step", "time a training step with cached and online teachers, and with every method"),
    "gpu": ("gpu_check", "check one GPU: training steps, cached teachers, memory, the mask against the CPU's"),
    "scaling": ("multi_process", "time a training step in one and in two processes"),
    "inference": ("inference_speed", "time inference from files to a written mask"),
    "cold": ("cold_start", "time whole commands, process start included, and their memory"),
    "metrics": ("metrics_speed", "time Dice, HD95 and ASSD of several packages"),
    "networks": ("network_speed", "time the forward pass of the student and the teachers"),
    "check": ("cohort_check_speed", "time the validation of a data set"),
    "fuzz": ("fuzz_readers", "give damaged image files to the readers"),
}


def build_parser(instrument: str | None = None) -> argparse.ArgumentParser:
    """Build the command line.

    Args:
        instrument: the instrument whose options are added. Only its module is imported, because importing all of them
            takes about 10 s.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run a benchmark.", allow_abbrev=False)
    instruments = parser.add_subparsers(dest="instrument", required=True, metavar="NAME")
    for name, (module_name, summary) in INSTRUMENTS.items():
        options = instruments.add_parser(name, help=summary, allow_abbrev=False)
        if name == instrument:
            module = importlib.import_module(f"benchmarks.{module_name}")
            options.description = module.__doc__
            options.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_options(options)
            options.add_argument("--debug", action="store_true", help="show the traceback of an error")
            options.set_defaults(run=module.run)
    return parser


def _fuzz(arguments: Sequence[str]) -> int:
    """Run the fuzzer, which has a command line of its own."""
    from benchmarks import fuzz_readers

    sys.argv = ["python -m benchmarks fuzz", *arguments]
    return fuzz_readers.main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one instrument and print its result.

    Args:
        arguments: the command line, by default that of this process.

    Returns:
        0, or 1 after an error, which is printed to stderr in one line. Wrong options end the process with exit code 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["fuzz"]:
        return _fuzz(arguments[1:])
    args = build_parser(arguments[0] if arguments else None).parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        print(args.run(args))
    except EXPECTED_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {error_sentence(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
