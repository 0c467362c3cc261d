"""How a Qwen3 is spread over the mesh. The model itself knows nothing of this."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from opd_titan.models.qwen3.model import Qwen3Model


def parallelize_qwen3(model: Qwen3Model, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard every parameter over the data-parallel mesh with FSDP2, in place.

    Also at world size 1: FSDP is then just the mixed-precision boundary (sharded parameters in
    their own dtype, compute in `compute_dtype`, gradients reduced in fp32).

    The embedding, the final norm and the head stay in the root's group. Tied weights must share a
    group, and the root's stay gathered from the embedding's look-up to the end of the chunked
    head's backward, so that the head is gathered once however many chunks there are.
    """
    # RoPE tables are inputs of every block and must stay fp32, hence cast_forward_inputs=False.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert_tied(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are already divided by the global number of tokens: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                # gloo has no pre-multiplied sum, which is what a factor of 1.0 would use.
                module.set_force_sum_reduction_for_comms(True)


def assert_tied(model: Qwen3Model) -> None:
    """Several transforms silently replace parameters; a tie that breaks trains two heads."""
    if model.args.tied:
        head: nn.Parameter = model.lm_head.weight
        assert head is model.tok_embeddings.weight, "a transform has untied head and embedding"
