"""Errors that are told in one line: what a user can mend, and faults of the machine.

`train.main` prints them on stderr and exits with code 2 for a `UserError`, 1 for a `Fault`.
Anything else is a bug, keeps its traceback and exits with code 1.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What a terminal can show of one mistake; a list of columns or a path may be as long as it likes.
_LONGEST = 1000
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]*@")


class OneLineError(Exception):
    """What is said to the user in one line, without a traceback.

    Whatever names and values it quotes, the message is one printable line of bounded length, and
    shows no user name and password of a URL.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_one_line(without_credentials(str(message))))


class UserError(OneLineError):
    """The user's input is wrong. The message names the key or file and says what would be right."""


class ConfigError(UserError):
    """A TOML key or a command-line option is unknown, mistyped, out of range or contradictory."""


class DataError(UserError):
    """A data set cannot be read, or a row of it lacks what is needed."""


class ModelError(UserError):
    """A model folder, its config, weights or tokenizer cannot be used as asked."""


class CheckpointError(UserError):
    """A training checkpoint cannot be read, or does not belong to this run."""


class Fault(OneLineError):
    """The run cannot go on, for a reason that is known: exit code 1."""


class LostOthers(Fault):
    """Another rank has died or did not come to a collective in time: that one knows why."""


class StorageError(Fault):
    """Something could not be written: no space, no right to, a broken disk."""


def without_credentials(text: str) -> str:
    """The text with `***` for what stands between `://` and `@` in it."""
    return _CREDENTIALS.sub("***@", text)


def _one_line(text: str) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 4 :]}"


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or its class when it has none."""
    message = without_credentials(str(error))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """Why, in the operating system's words where it has some; without the file's name."""
    return getattr(error, "strerror", None) or first_line(error)


def tell(text: object) -> None:
    """One line on stderr, in one write: ranks share it, and Python may write a line's end apart."""
    sys.stderr.write(f"opd_titan: {text}\n")
    sys.stderr.flush()


@contextmanager
def for_a_pipe() -> Iterator[None]:
    """Print, and end without a word where nobody reads on, as after `| head` or a pager.

    Raises:
        SystemExit: nobody does; 141, as of what dies of SIGPIPE.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
