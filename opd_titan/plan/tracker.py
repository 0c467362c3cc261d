"""Memory and traffic of code that runs on tensors without data.

Under `TensorsWithoutData` every operation knows the shapes of its results and computes nothing. The
`Tracker` sees each operation, adds up the live storages, and counts the bytes of collectives.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_titan.distributed.world import axes
from opd_titan.models.kernels.device import Device

# Collectives that move data, and how often (n - 1) / n of their larger buffer passes each link of a
# ring of n ranks.
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


class TensorsWithoutData(FakeTensorMode):
    """Make tensors without data, which are CPU tensors to torch.

    Args:
        stands_for: the device whose implementations run, see `device_of`.
    """

    def __init__(self, stands_for: Device) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.stands_for = stands_for


@dataclass
class Phase:
    """What one phase of a step costs one rank.

    Attributes:
        peak: the most bytes alive on the device, everything resident included.
        sent: bytes that the rank sends in the whole step, by axis of the mesh.
        collectives: number of collectives in the whole step, by axis.
        operations: number of operations of one decoding forward (rollout only).
    """

    peak: int = 0
    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: int = 0


class Tracker(TorchDispatchMode):
    """Count bytes of live tensors, operations, and bytes that collectives move, by phase.

    Args:
        mesh: the phases' traffic is counted along its axes.
        gloo: the backend is gloo, which copies the larger buffer of a collective.

    Attributes:
        live: bytes that are alive.
        peak: the most bytes that were alive since the last `reset`.
        operations: the number of operations since then, without views.
        on_host: the bytes among `live` that the planned rank stores on its host.
        phases: by name.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # guarding each operation against the compiler costs a tenth of the plan

    def __init__(self, mesh: DeviceMesh, gloo: bool) -> None:
        super().__init__()
        self.gloo = gloo
        self.live = self.on_host = 0
        self.phases: dict[str, Phase] = {}
        self._groups = {axis: mesh.get_group(axis).group_name for axis in axes(mesh)}
        self._sizes: dict[int, int] = {}
        self.reset()

    def reset(self) -> None:
        """Restart the counts of operations and traffic, and the peak from the live bytes."""
        self.peak, self.operations = self.live, 0
        self._sent: dict[str, float] = defaultdict(float)
        self._collectives: dict[str, int] = defaultdict(int)

    def note(self, name: str, times: float = 1.0, calls: float | None = None) -> None:
        """Add the counts since the last reset to a phase, and reset.

        Args:
            times: how often a step does it.
            calls: how often a step calls its collectives, if not `times`.
        """
        phase = self.phases.setdefault(name, Phase())
        phase.peak = max(phase.peak, self.peak - self.on_host)
        for axis, group in self._groups.items():
            phase.sent[axis] += self._sent[group] * times
            calls_here = times if calls is None else calls
            phase.collectives[axis] += self._collectives[group] * calls_here
        self.reset()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Half of all calls only ask for a tensor's device.
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        # An unknown number is 0, for example the norm of the gradients.
        if func is torch.ops.aten._local_scalar_dense.default and _is_unknown(args[0]):
            return 0.0 if args[0].is_floating_point() else 0
        if func.namespace in ("c10d", "_c10d_functional"):
            out = self._communicate(func, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        for leaf in tree_leaves(out):
            if isinstance(leaf, DTensor):  # this mode does not see the operations inside
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

    def _communicate(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Call a collective, but keep the numbers that this rank knows."""
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, FakeTensor)]
        known = [tensor.constant for tensor in tensors]
        out = func(*args, **kwargs)
        for tensor, number in zip(tensors, known, strict=True):
            tensor.constant = number
        self._note_traffic(func, args, out)
        return out

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
        self._sent[group.group_name] += _PASSES[name] * max(sizes) * (ranks - 1) / ranks
        self._collectives[group.group_name] += ranks > 1

    @contextmanager
    def watch(self) -> Iterator[Tracker]:
        """Count storages that FSDP frees and allocates again by resizing."""
        resize = torch.UntypedStorage.resize_
        kind: Any = torch.UntypedStorage  # mypy forbids replacing a class's method

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


def _is_unknown(tensor: Tensor) -> bool:
    """Return whether a tensor has no data and was not made from one known number."""
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def define_collectives() -> None:
    """Register collectives for tensors without data, which older versions of torch lack."""
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    if not known("c10d::_allgather_base_", "Meta"):
        from torch.distributed._tools import fake_collectives  # noqa: F401 - registers them


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
