"""Raise errors on all ranks together, so that no rank waits for one that has exited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from opd_titan.errors import OneLineError, StorageError, reason

T = TypeVar("T")
_ARRIVED, _POLL_SECONDS = "opd_titan/arrived", 0.1


@contextmanager
def raise_on_all_ranks(wait: bool = False) -> Iterator[None]:
    """Raise on every rank the first error that any rank raises in the body.

    All ranks must enter. The body must not call collectives. Without a process group, only this
    rank takes part.

    Args:
        wait: let the slowest rank take longer than the timeout of a collective. The heartbeat
            still ends a rank that waits for too long.

    Raises:
        OneLineError: the error of the lowest rank that failed.
        StorageError: in place of an OSError of that rank.
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
        if wait:
            _wait_for_all_ranks()
        found = [None] * dist.get_world_size()
        # Send it without its traceback and its cause.
        dist.all_gather_object(found, None if mine is None else type(mine)(*mine.args))
    for theirs in found:
        if theirs is not None:
            raise theirs from mine


def _wait_for_all_ranks() -> None:
    """Return when all ranks have called this. It works once per process group."""
    store, ranks = _get_default_store(), dist.get_world_size()
    arrived = store.add(_ARRIVED, 1)
    while arrived < ranks:
        time.sleep(_POLL_SECONDS)
        arrived = store.add(_ARRIVED, 0)


def call_on_rank_0(function: Callable[[], T]) -> T:
    """Call the function on rank 0; return its result, or raise its error, on every rank.

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
