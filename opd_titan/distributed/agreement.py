"""Raise errors on all ranks together, so that no rank waits for one that has exited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from opd_titan.errors import OneLineError, StorageError, reason

T = TypeVar("T")


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on every rank the first error that any rank raises in the body.

    All ranks must enter. The body must not call collectives. Without a process group, only this
    rank takes part.

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
        found = [None] * dist.get_world_size()
        # Send it without its traceback and its cause.
        dist.all_gather_object(found, None if mine is None else type(mine)(*mine.args))
    for theirs in found:
        if theirs is not None:
            raise theirs from mine


def call_on_rank_0(function: Callable[[], T]) -> T:
    """Call the function on rank 0; return what it returned, or raise its error, on every rank.

    All ranks must call. The function must not call collectives. Without a process group, only
    this rank takes part.

    Raises:
        OneLineError, StorageError: as `raise_on_all_ranks`.
    """
    alone = not dist.is_initialized()
    found: list[Any] = [None]
    with raise_on_all_ranks():
        if alone or dist.get_rank() == 0:
            found = [function()]
    if not alone:
        dist.broadcast_object_list(found)
    return found[0]
