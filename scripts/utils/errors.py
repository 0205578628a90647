# SPDX-License-Identifier: Apache-2.0
"""Errors that a user sees: one sentence, an exit code, no traceback."""

from __future__ import annotations

import re

# Bad input, a file that cannot be read or written, a config that cannot be built or names no class. Anything else is a
# bug of the program and keeps its traceback.
EXPECTED_ERRORS = (ValueError, OSError, RuntimeError, KeyError, ImportError)

# MONAI's error about a config item; the functions of this program name what is wrong themselves.
_NOT_BUILT = re.compile(r"Failed to instantiate component '(?!scripts\.)([\w.]+)'")


def root_error(error: BaseException) -> BaseException:
    """The error below those of MONAI: it wraps errors in RuntimeErrors that only name the config item or transform.

    The cause of an error of another process is its traceback as text, which is no error of its own.
    """
    return _chain(error)[-1]


def _chain(error: BaseException) -> list[BaseException]:
    """The wrapped errors, the outermost first."""
    chain = [error]
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        if type(error.__cause__).__name__ == "_RemoteTraceback":
            break
        error = error.__cause__
        chain.append(error)
    return chain


def error_sentence(error: BaseException) -> str:
    """The message of the ``root_error`` in one line.

    A message of other code does not say which class of the config it is about: the class is added.
    """
    wrapper, error = [error, *_chain(error)][-2:]
    text = str(error)
    not_built = _NOT_BUILT.match(str(wrapper))
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # a sentence of this program; str() would put the system's number before it
        if error.filename is not None:
            text = f"{error.filename} cannot be used ({error.strerror}). Check the path and its permissions."
    elif not_built and not _is_of_this_program(error):
        text = f"{not_built[1]} cannot be built: {text.strip().rstrip('.')}. Correct its arguments where it is named."
    return " ".join(text.split()) or type(error).__name__


def _is_of_this_program(error: BaseException) -> bool:
    """Whether the code of this program raised an error."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return module.partition(".")[0] in ("scripts", "benchmarks")
