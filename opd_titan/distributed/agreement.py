"""Errors that all ranks raise together, so that none waits for one that has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from opd_titan.errors import OneLineError, StorageError, reason


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise on every rank the first error that any rank raises in the body.

    All ranks of the group enter. The body must have no collectives. Without a process group this
    rank is alone.

    Raises:
        OneLineError: as the first rank that failed raised it.
        StorageError: an OSError of the first rank that failed.
    """
    mine: OneLineError | None = None
    try:
        yield
    except OneLineError as error:
        mine = error
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        mine = StorageError(file + reason(error))
        mine.__cause__ = error
    found: list[Any] = [mine]
    if dist.is_initialized():
        found = [None] * dist.get_world_size(group)
        # Without its traceback, and whatever it was raised from.
        dist.all_gather_object(found, None if mine is None else type(mine)(*mine.args), group)
    for theirs in found:
        if theirs is not None:
            raise theirs from mine
