"""Control what FSDP keeps between the passes of a phase: gathered weights, unreduced gradients.

A model that is neither sharded nor trained has no FSDP groups; then these functions do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from opd_titan.distributed.tensor_parallel import local


def fsdp_groups(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP gathers together, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def keep_gathered(model: nn.Module, keep: bool = True) -> None:
    """Set whether weights stay gathered after a forward and a backward, until `resharding` ends."""
    for group in fsdp_groups(model):
        # The root's weights are needed again as soon as its forward has ended.
        group.set_reshard_after_forward(not keep and group is not model, recurse=False)
        group.set_reshard_after_backward(not keep, recurse=False)


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Free all gathered weights when the body ends or fails. Later code may read the shards."""
    try:
        yield
    finally:
        for group in fsdp_groups(model):
            group.reshard()


def exchange_gradients(model: nn.Module, last: bool, once: bool) -> None:
    """Set whether the next backward reduces its gradients.

    The all-reduce over copies of the shards (HSDP) always happens only in the last backward of an
    update. Until then, each rank keeps the reduced gradient of its own shard.

    Args:
        last: the next backward is the last one of the update.
        once: the reduce-scatter over shards also happens only in the last backward. Until then,
            each rank keeps the gradients of all weights that it has gathered, in fp32.
    """
    for group in fsdp_groups(model):
        group.set_requires_gradient_sync(last or not once, recurse=False)
        group.set_requires_all_reduce(last, recurse=False)


def drop_gradients(model: nn.Module) -> None:
    """Drop the gradients, reduced or not, of an update that was stopped before its end."""
    model.zero_grad(set_to_none=True)
    for parameters in _parameter_groups(model):
        parameters._partial_reduce_output = None
        for parameter in parameters.fsdp_params:
            parameter.sharded_param.grad = parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of the gradients of FSDP's parameters, reduced or not."""
    found: list[Tensor | None] = []
    for parameters in _parameter_groups(model):
        found.append(parameters._partial_reduce_output)
        for parameter in parameters.fsdp_params:
            found += [parameter.sharded_param.grad, parameter.unsharded_accumulated_grad]
            found.append(getattr(getattr(parameter, "_unsharded_param", None), "grad", None))
    return device_bytes(found)


def device_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the tensors that this rank stores (on its GPU, if it has one)."""
    parts = [local(tensor.detach()) for tensor in tensors if tensor is not None]
    on_gpu = torch.cuda.is_available()
    return sum(part.nbytes for part in parts if part.is_cuda or not on_gpu)


def _parameter_groups(model: nn.Module) -> Iterator[Any]:
    # FSDP has no public list of a group's parameters, nor public access to unreduced gradients.
    for group in fsdp_groups(model):
        if (parameters := group._get_fsdp_state()._fsdp_param_group) is not None:
            yield parameters
