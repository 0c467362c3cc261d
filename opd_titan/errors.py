"""Errors that a user can cause and mend.

`train.main` prints one of these as a single line on stderr and exits with code 2. Anything else
is a bug or a fault: it keeps its traceback and exits with code 1.
"""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong. The message names the key or file and says what would be right."""


class ConfigError(UserError):
    """A TOML key or a command-line option is unknown, mistyped, out of range or contradictory."""


class DataError(UserError):
    """A data set cannot be read, or a row of it lacks what is needed."""


class ModelError(UserError):
    """A model folder, its config, weights or tokenizer cannot be used as asked."""


class CheckpointError(UserError):
    """A training checkpoint cannot be read, or does not belong to this run."""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or its class when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
