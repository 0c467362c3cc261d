"""Name the file or the option at fault when storage fails."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from opd_titan.errors import ConfigError, reason


@contextmanager
def config_error_if_unwritable(folder: Path) -> Iterator[None]:
    """Raise ConfigError, naming `job.dump_folder`, for an OSError of the body.

    Before the run begins, a folder that cannot be written is the user's mistake.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"[job] dump_folder: {folder} cannot be written ({reason(error)}); choose a folder "
            f"that can"
        ) from error


@contextmanager
def name_file_in_errors(path: Path | str) -> Iterator[None]:
    """Make an OSError of the body, also one that safetensors wraps, name this file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, reason(error), str(path)) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
