"""Name the file or the option at fault when storage fails."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from opd_titan.errors import ConfigError, reason

# How the libraries in Rust spell an OSError.
_OS_ERROR = re.compile(r"os error (\d+)")


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Before the run begins, what cannot be written was the user's choice of a folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"[job] dump_folder: {folder} cannot be written ({reason(error)}); choose a folder "
            f"that can"
        ) from error


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError from the body, however a library wraps it, names this file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        found = _os_error(error)
        if found is None:
            raise
        raise OSError(found.errno, reason(found), str(path)) from error


def _os_error(error: BaseException) -> OSError | None:
    """torch.save's writer complains about the file that it could not finish, not about why."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        number = _OS_ERROR.search(str(seen))
        if number and isinstance(seen, SafetensorError):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        seen = seen.__cause__ or seen.__context__
    return None
