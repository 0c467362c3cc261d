"""Errors that are reported in one line: mistakes of the user, and faults of the machine.

The programs print them on stderr and exit with code 2 for a `UserError`, 1 for a `Fault`. Any other
exception is a bug: it keeps its traceback, and the exit code is 1.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# In characters. A message may quote a list of columns or a path of any length.
_LONGEST = 1000
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]*@")


class OneLineError(Exception):
    """An error that the user sees as one line, without a traceback.

    The message becomes one printable line of bounded length without the credentials of any URL.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_one_line(without_credentials(str(message))))


class UserError(OneLineError):
    """The user's input is wrong. The message names the key or file and says what would be right."""


class ConfigError(UserError):
    """A TOML key or a command-line option is unknown, mistyped, out of range or contradictory."""


class DataError(UserError):
    """A data set cannot be read, or one of its rows lacks a required value."""


class ModelError(UserError):
    """A model folder, its config, weights or tokenizer cannot be used as requested."""


class CheckpointError(UserError):
    """A training checkpoint cannot be read, or does not belong to this run."""


class Fault(OneLineError):
    """The run cannot continue, and the reason is known: exit code 1."""


class LostOthers(Fault):
    """Another rank has died or missed a collective; that rank reports the cause."""


class StorageError(Fault):
    """A file could not be written: no space, no permission, or a broken disk."""


def without_credentials(text: str) -> str:
    """Return the text with `***` in place of everything between `://` and `@`."""
    return _CREDENTIALS.sub("***@", text)


def _one_line(text: str) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 4 :]}"


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or its class if it has none."""
    message = without_credentials(str(error))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """Return the operating system's description of an error, else its first line; no file name."""
    return getattr(error, "strerror", None) or first_line(error)


def print_error(text: object) -> None:
    """Write one line on stderr in a single call, because several ranks write to it."""
    sys.stderr.write(f"opd_titan: {text}\n")
    sys.stderr.flush()


@contextmanager
def for_a_pipe() -> Iterator[None]:
    """Exit quietly if the reader of stdout has closed it, as `| head` and pagers do.

    Raises:
        SystemExit: with code 141, like a process that SIGPIPE ends.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again when it exits, and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
