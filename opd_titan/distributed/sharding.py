"""What FSDP keeps between the passes of a phase: gathered weights, gradients not yet exchanged.

A model may have no FSDP groups at all (where nothing is sharded and nothing is trained); then these
functions do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


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
    for group in fsdp_groups(model):
        # FSDP has no public way to them, nor a public list of a group's parameters.
        parameters = group._get_fsdp_state()._fsdp_param_group
        if parameters is None:
            continue
        parameters._partial_reduce_output = None
        for parameter in parameters.fsdp_params:
            parameter.sharded_param.grad = parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
