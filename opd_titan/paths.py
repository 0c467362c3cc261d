"""Names of files: the one that every folder of results has, and those that others wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The recipe as it was run, in a dump folder and beside an evaluation's results.
RECIPE_FILE = "config.resolved.toml"


def is_plain_name(name: Any) -> bool:
    """Whether this is the name of a file in a folder and cannot lead out of it.

    An index, a manifest or a data set is data, and must not point anywhere else.
    """
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
