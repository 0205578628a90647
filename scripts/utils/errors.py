# SPDX-License-Identifier: Apache-2.0
"""Errors that a user sees: one sentence, an exit code, no traceback."""

from __future__ import annotations

# Bad input, a file that cannot be read or written, a config that cannot be built or names no class. Anything else is a
# bug of the program and keeps its traceback.
EXPECTED_ERRORS = (ValueError, OSError, RuntimeError, KeyError, ImportError)


def root_error(error: BaseException) -> BaseException:
    """The error below those of MONAI: it wraps errors in RuntimeErrors that only name the config item or transform.

    The cause of an error of another process is its traceback as text, which is no error of its own.
    """
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        if type(error.__cause__).__name__ == "_RemoteTraceback":
            break
        error = error.__cause__
    return error


def error_sentence(error: BaseException) -> str:
    """The message of the ``root_error`` in one line."""
    error = root_error(error)
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # a sentence of this program; str() would put the system's number before it
        if error.filename is not None:
            text = f"{error.filename} cannot be used ({error.strerror}). Check the path and its permissions."
    return " ".join(text.split()) or type(error).__name__
