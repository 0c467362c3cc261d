"""What FSDP keeps between the passes of a phase: gathered weights, gradients not yet exchanged.

A model may have no FSDP groups at all (where nothing is sharded and nothing is trained); then these
functions do nothing.
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
    """Leave weights gathered after a forward and a backward, until `reshard`; or not."""
    for group in fsdp_groups(model):
        # The root's are needed again as soon as its forward has ended.
        group.set_reshard_after_forward(not keep and group is not model, recurse=False)
        group.set_reshard_after_backward(not keep, recurse=False)


def reshard(model: nn.Module) -> None:
    """Free all gathered weights."""
    for group in fsdp_groups(model):
        group.reshard()


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Reshard when the body ends, also by an exception: what follows may read the shards."""
    try:
        yield
    finally:
        reshard(model)


def exchange_gradients(model: nn.Module, last: bool, once: bool) -> None:
    """Say what the next backward does with its gradients.

    Copies of the shards (HSDP) sum theirs in the last backward of an update alone: what waits for
    that is a shard, and takes the place of the gradient itself.

    Args:
        last: of the update's backwards.
        once: the shards too are summed in the last one. Until then each rank holds the gradients of
            all that it has gathered, in fp32.
    """
    for group in fsdp_groups(model):
        group.set_requires_gradient_sync(last or not once, recurse=False)
        group.set_requires_all_reduce(last, recurse=False)


def drop_gradients(model: nn.Module) -> None:
    """Forget the gradients of an update that was left half-way, exchanged or not."""
    model.zero_grad(set_to_none=True)
    for parameters in _parameter_groups(model):
        parameters._partial_reduce_output = None
        for parameter in parameters.fsdp_params:
            parameter.sharded_param.grad = parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def gradient_bytes(model: nn.Module) -> int:
    """Return what the gradients of FSDP's parameters take, exchanged or not."""
    found: list[Tensor | None] = []
    for parameters in _parameter_groups(model):
        found.append(parameters._partial_reduce_output)
        for parameter in parameters.fsdp_params:
            found += [parameter.sharded_param.grad, parameter.unsharded_accumulated_grad]
            found.append(getattr(getattr(parameter, "_unsharded_param", None), "grad", None))
    return device_bytes(found)


def device_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return what this rank stores of the tensors: on a GPU, where there is one."""
    parts = [local(tensor.detach()) for tensor in tensors if tensor is not None]
    on_gpu = torch.cuda.is_available()
    return sum(part.nbytes for part in parts if part.is_cuda or not on_gpu)


def _parameter_groups(model: nn.Module) -> Iterator[Any]:
    # FSDP has no public list of a group's parameters, nor a public way to unexchanged gradients.
    for group in fsdp_groups(model):
        if (parameters := group._get_fsdp_state()._fsdp_param_group) is not None:
            yield parameters
