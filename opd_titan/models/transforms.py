"""Activation checkpointing and torch.compile of a decoder's blocks, in place and without renaming.

A block consists of two functions of tensors, `before_attention(x, added, rope)` and
`after_attention(x, mixed)`, and the attention between them. The attention is never compiled,
because its index tensors have other shapes in every batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

HALVES = ("before_attention", "after_attention")
# Graphs of a half: for each role and its sizes, with and without gradients, one token and many. For
# a CPU, the compiler makes other code for weight gradients beyond 1024, 2048 and 4096 tokens.
RECOMPILE_LIMIT = 32
# Selective checkpointing keeps products, which are expensive to recompute. Norms, rotations and
# activations are recomputed. Compiled halves use it too, because the compiler alone keeps a quarter
# more (benchmarks/README.md).
_KEPT = [torch.ops.aten.mm.default]


def apply_activation_checkpointing(blocks: Iterable[nn.Module], mode: str) -> None:
    """Save memory by recomputing activations in the backward.

    Args:
        mode: "none"; "selective" keeps products and the results of attention; "full" keeps only
            the inputs of blocks.
    """
    for block in blocks:
        if mode == "full":
            block.forward = _sum_first(partial(_recomputed, block.forward))
        elif mode == "selective":
            for half in HALVES:
                kept = partial(create_selective_checkpoint_contexts, _KEPT)
                setattr(block, half, partial(_recomputed, getattr(block, half), context_fn=kept))


def _recomputed(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    # The blocks use no random numbers, so the generator's state need not be saved.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _sum_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` called with the sum of its first two arguments, and None as the second.

    Checkpointing then saves one tensor instead of two, and torch.compile makes one graph for all
    blocks, although the first block has nothing to add. The first block's input is cloned because
    FSDP passes a view, for which torch.compile would make another graph.
    """

    def call(x_TD: Tensor, added_TD: Tensor | None, *args: Any) -> Any:
        return function(x_TD.clone() if added_TD is None else x_TD + added_TD, None, *args)

    return call


def apply_compile(blocks: Iterable[nn.Module]) -> None:
    """Compile both halves of every block, once for all lengths of a batch.

    Raises (when a block runs):
        RuntimeError: one half would need more than RECOMPILE_LIMIT graphs.
    """
    # Recompiling for every batch would be slower than not compiling, so raise an error instead.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Do not assume that two sizes are always equal because they are equal in the first batch.
    torch.fx.experimental._config.use_duck_shape = False
    # This logger warns of in-place operations under selective checkpointing; the blocks have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    block: Any
    for block in blocks:
        for half in HALVES:
            compiled = torch.compile(getattr(block, half), dynamic=True, fullgraph=True)
            setattr(block, half, partial(_bounded, compiled))
        block.before_attention = _sum_first(block.before_attention)


def _bounded(compiled: Callable[..., Any], *args: Any) -> Any:
    try:
        return compiled(*args)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise RuntimeError(
            f"[compile] enable: a layer has been compiled {torch._dynamo.config.recompile_limit} "
            'times, and this batch needs another compilation; set it to "off", and report what '
            "TORCH_LOGS=recompiles prints"
        ) from error


def has_cpp_compiler() -> bool:
    """Return whether a C++ compiler is available, which torch.compile needs on a CPU."""
    from torch._inductor import cpp_builder, exc  # slow to import

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return False


def num_compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
