"""Run a function on several gloo processes of this machine, and record collectives."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_titan.distributed.world import ALONE, World

TIMEOUT = timedelta(seconds=120)
# Ranks are forked from a process that has imported these, which takes seconds, once.
multiprocessing.set_forkserver_preload(
    ["pytest", "torch.distributed.fsdp", "transformers", "opd_titan.training.trainer"]
)


def lone_world(mesh: Any = None) -> World:
    """Return a world of one process on the CPU, which needs no mesh if nothing is sharded."""
    return World(torch.device("cpu"), mesh, ALONE, ALONE)


def start_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> mp.ProcessContext:
    """Start `fn(rank, *args)` in a process for each rank; `fn` must be importable."""
    work = (dict(os.environ), fn, args)
    return mp.start_processes(
        _enter, work, nprocs=world_size, join=False, start_method="forkserver"
    )


def _enter(rank: int, environment: dict[str, str], fn: Callable[..., Any], args: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    fn(rank, *args)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` on every rank of a fresh gloo world.

    `fn` must be importable (a function at the top of a test module); it finds its rank with
    `torch.distributed`.

    Returns:
        What each rank returned, by rank (pickled on the way).

    Raises:
        The first rank's own error, with its traceback as the cause.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks = start_ranks(_child, world_size, fn, world_size, folder, args)
            while not ranks.join():
                pass
        except mp.ProcessRaisedException as failure:
            errors = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            if not errors:  # an error that cannot be pickled
                raise
            raise pickle.loads(errors[0].read_bytes()) from failure
        return [pickle.loads(Path(folder, f"result-{r}").read_bytes()) for r in range(world_size)]


def _child(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: Any) -> None:
    store = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(fn(*args)))
        # gloo's threads abort if a peer exits while they say goodbye. A test may have closed the
        # group, or broken it on purpose.
        with contextlib.suppress(RuntimeError, ValueError):
            dist.barrier()
    except BaseException as error:
        partial = Path(folder, f"partial-{rank}")
        partial.write_bytes(pickle.dumps(error))
        partial.rename(Path(folder, f"error-{rank}"))
        raise
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Records the collectives that run inside it.

    Attributes:
        seen: name and elements of the larger buffer of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            sizes = [x.numel() for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
            name = func._schema.name.split("::")[1].strip("_")
            if sizes:
                self.seen.append((name, max(sizes)))
        return out

    def count(self, larger_than: int) -> Counter[str]:
        """Return how often each of c10d's collectives of more elements than this was called."""
        return Counter(name for name, size in self.seen if size > larger_than)
