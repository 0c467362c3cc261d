"""Memory and traffic of code that runs on tensors without data.

Under `FakeTensorMode` every operation knows the shapes of its results and computes nothing. This
mode sees each operation, adds up the storages that are alive, and notes what the collectives move.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Collectives that move data, and how often their larger buffer crosses a ring of n ranks,
# (n - 1) / n of it each time.
_PASSES = {
    "allgather": 1,
    "_allgather_base": 1,
    "allgather_into_tensor_coalesced": 1,
    "reduce_scatter": 1,
    "_reduce_scatter_base": 1,
    "reduce_scatter_tensor_coalesced": 1,
    "allreduce": 2,
    "broadcast": 1,
    # Functional ones, which DTensor calls.
    "all_reduce": 2,
    "all_gather_into_tensor": 1,
    "reduce_scatter_tensor": 1,
}


class Tracker(TorchDispatchMode):
    """Counts bytes of live tensors, their peak, operations, and bytes that collectives move.

    Attributes:
        live: bytes. `reset` starts the others anew:
        peak: the most that was alive.
        sent, collectives: bytes that this rank sends, and in how many, by the name of the group.
        operations: how many that compute something.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # guarding each operation against the compiler costs a tenth of the plan

    def __init__(self, gloo: bool) -> None:
        """
        Args:
            gloo: collectives are gloo's, which copies the larger of their buffers meanwhile.
        """
        super().__init__()
        self.live, self.gloo = 0, gloo
        self._sizes: dict[int, int] = {}
        self.reset()

    def reset(self) -> None:
        self.peak, self.operations = self.live, 0
        self.sent: dict[str, float] = defaultdict(float)
        self.collectives: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Half of all calls only ask where a tensor is.
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note_traffic(func, args, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, DTensor):  # what it did inside is out of this mode's sight
                leaf = leaf._local_tensor
            if isinstance(leaf, FakeTensor) and not leaf.is_meta:
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
        self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _note_traffic(self, func: Any, args: tuple, out: Any) -> None:
        name = func._schema.name.partition("::")[2].rstrip("_")
        if name not in _PASSES:
            return
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
        sizes = [t.numel() * t.element_size() for t in tensors]
        group = next(g for g in map(_process_group, reversed(args)) if g is not None)
        ranks = group.size()
        if self.gloo and _PASSES[name] == 1:
            self.peak = max(self.peak, self.live + max(sizes))
        self.sent[group.group_name] += _PASSES[name] * max(sizes) * (ranks - 1) / ranks
        self.collectives[group.group_name] += ranks > 1

    @contextmanager
    def watch(self) -> Iterator[Tracker]:
        """See the storages that FSDP frees, and fills again, by resizing them."""
        resize = torch.UntypedStorage.resize_
        kind: Any = torch.UntypedStorage  # mypy: a class's methods are not to be replaced

        def tracked(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._resize(storage._cdata, size)
            return result

        kind.resize_ = tracked
        try:
            yield self
        finally:
            kind.resize_ = resize


def _process_group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, str):
        known = dist.distributed_c10d._world.pg_names.items()
        return next((group for group, name in known if name == argument), None)
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):  # a reduction's operator is a script object too
        return None
