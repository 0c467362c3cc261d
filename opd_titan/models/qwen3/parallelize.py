"""Distribute a Qwen3 over the device mesh. The model's own code does not depend on this."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from opd_titan.distributed.tensor_parallel import (
    gather_tokens,
    local,
    scatter_tokens,
    sum_ranks,
)
from opd_titan.distributed.world import Axis, World
from opd_titan.errors import ModelError
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.models.transforms import apply_activation_checkpointing, apply_compile

# The dimension of each weight that tensor parallelism splits. Norms are whole on every rank.
_TP_DIM = {
    "tok_embeddings": 0,
    "lm_head": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w3": 0,
    "w2": 1,
}


def parallelize_qwen3(
    model: Qwen3Model,
    world: World,
    compute_dtype: torch.dtype,
    *,
    activation_checkpoint: str = "none",
    compile: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Apply tensor parallelism, activation checkpointing, torch.compile and FSDP2, in place.

    Args:
        activation_checkpoint: see `transforms.apply_activation_checkpointing`.
        cpu_offload: store the sharded parameters on the host. FSDP copies each layer to the GPU,
            and its gradients back.
    """
    if world.tp.size > 1:
        _split_weights(model, world)
        join_ranks(model, world.tp, sequence_parallel=True)
    apply_activation_checkpointing(model.layers, activation_checkpoint)
    model.assert_tied()
    if compile:
        apply_compile(model.layers)
        model.assert_tied()
    _shard(model, world, compute_dtype, cpu_offload)


def rank_args(args: Qwen3Args, ranks: int, where: str) -> Qwen3Args:
    """Return the sizes of one rank's part under tensor parallelism.

    Raises:
        ModelError: a size is not divisible by the number of ranks.
    """
    split = {
        "num_key_value_heads": args.n_kv_heads,
        "num_attention_heads": args.n_heads,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
    }
    for key, size in split.items():
        if size % ranks:
            sizes = ", ".join(map(str, split.values()))
            raise ModelError(
                f"[parallelism] tensor_parallel_degree: {ranks} does not divide {key} {size} of "
                f"{where}; wanted a common divisor of {sizes}"
            )
    return replace(
        args,
        n_heads=args.n_heads // ranks,
        n_kv_heads=args.n_kv_heads // ranks,
        ffn_dim=args.ffn_dim // ranks,
        vocab_size=args.vocab_size // ranks,
    )


def _split_weights(model: Qwen3Model, world: World) -> None:
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            dim = _TP_DIM.get(name.rpartition(".")[2])
            placement = Replicate() if dim is None else Shard(dim)
            split = distribute_tensor(parameter.detach(), world.tp_mesh, [placement])
            setattr(module, key, nn.Parameter(split))
    model.tie_weights()
    model.assert_tied()


def join_ranks(model: Qwen3Model, tp: Axis, *, sequence_parallel: bool) -> None:
    """Register the collectives between the ranks of a split model.

    Column-parallel products (Q, K, V, the MLP's first two, the head) need all tokens. The results
    of row-parallel products (the embedding, O, the MLP's last) are summed over the ranks.

    Args:
        sequence_parallel: whether each rank holds only its share of the tokens between layers. Then
            one collective computes and scatters the sum.
    """

    def gather(out_TD: torch.Tensor) -> torch.Tensor:
        return gather_tokens(out_TD, tp)

    def gather_input(_module: nn.Module, args: Any) -> tuple[Any, ...]:
        return gather(args[0]), *args[1:]

    def reduce(_module: nn.Module, _args: Any, out_TD: torch.Tensor) -> torch.Tensor:
        return scatter_tokens(out_TD, tp) if sequence_parallel else sum_ranks(out_TD, tp)

    block: Any
    for block in model.layers:
        if sequence_parallel:
            block.attention.register_forward_pre_hook(gather_input)
            block.feed_forward.register_forward_pre_hook(gather_input)
        block.attention.wo.register_forward_hook(reduce)
        block.feed_forward.w2.register_forward_hook(reduce)
    model.tok_embeddings.register_forward_hook(reduce)
    if sequence_parallel:
        model.norm.register_forward_hook(lambda _module, _args, out_TD: gather(out_TD))
    model.tok_embeddings.first_row = tp.rank * local(model.tok_embeddings.weight).shape[0]


def _shard(model: Qwen3Model, world: World, compute_dtype: torch.dtype, cpu_offload: bool) -> None:
    """Shard every parameter over the data-parallel axes with FSDP2.

    A trained model uses FSDP at world size 1, too, for mixed precision: parameters in their own
    dtype, compute in `compute_dtype`, gradients reduced in fp32. A frozen model that every rank
    stores whole in its compute dtype does not, because FSDP would copy each layer in every forward.

    The embedding, the final norm and the head are in the root's group. Tied weights must be in one
    group, and the root's group stays gathered from the embedding to the end of the chunked head's
    backward, so that the head is gathered once for all chunks.
    """
    # cast_forward_inputs=False, because blocks have RoPE tables as inputs, which must stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = world.fsdp_mesh
    frozen = all(not p.requires_grad and p.dtype == compute_dtype for p in model.parameters())
    if frozen and mesh.shape[-1] == 1 and not cpu_offload:
        return
    pinned = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    offload = pinned if cpu_offload else OffloadPolicy()
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    model.assert_tied()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are already divided by the global number of tokens, so gradients are summed.
            if mesh.size() > 1:  # on one rank, a factor would cost a pass over the gradients
                module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                # gloo has no pre-multiplied sum, which a factor of 1.0 would use.
                module.set_force_sum_reduction_for_comms(True)
