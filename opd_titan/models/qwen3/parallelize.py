"""How a Qwen3 is spread over the mesh. The model itself knows nothing of this."""

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

# The dimension of each weight that tensor parallelism splits; the norms' are whole on every rank.
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
    """Split every layer over `tp`, recompute, compile, shard over the other axes; in place.

    Args:
        activation_checkpoint: see `transforms.apply_activation_checkpointing`.
        cpu_offload: the sharded parameters live on the host; FSDP brings each layer to the GPU,
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
    """Sizes of one rank's share under tensor parallelism: a narrower model of the same depth.

    Raises:
        ModelError: something cannot be split evenly over so many ranks.
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
    """Register what the ranks of a split model send each other.

    Column-parallel products (Q, K, V, the MLP's inner two, the head) need all tokens; row-parallel
    ones (the embedding, O, the MLP's last) leave a sum over ranks to be made.

    Args:
        sequence_parallel: between layers each rank holds its share of the tokens, and the sum is
            made and scattered in one collective. Otherwise every rank holds all of them.
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

    A trained model also at world size 1: FSDP is then just the mixed-precision boundary (sharded
    parameters in their own dtype, compute in `compute_dtype`, gradients reduced in fp32). A frozen
    one that every rank stores whole and as it computes needs none, and FSDP would copy each layer
    in every forward.

    The embedding, the final norm and the head stay in the root's group. Tied weights must share a
    group, and the root's stay gathered from the embedding's look-up to the end of the chunked
    head's backward, so that the head is gathered once however many chunks there are.
    """
    # RoPE tables are inputs of every block and must stay fp32, hence cast_forward_inputs=False.
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
            # Losses are already divided by the global number of tokens: gradients are summed.
            if mesh.size() > 1:  # alone, a factor would only cost a pass over the gradients
                module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                # gloo has no pre-multiplied sum, which is what a factor of 1.0 would use.
                module.set_force_sum_reduction_for_comms(True)
