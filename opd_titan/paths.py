"""Names of files that others wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def is_plain_name(name: Any) -> bool:
    """Whether this is the name of a file in a folder and cannot lead out of it.

    An index, a manifest or a data set is data, and must not point anywhere else.
    """
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
