"""Layers that can hold a tensor-parallel rank's part of the weights.

They compute with plain tensors. FSDP2 and tensor parallelism store weights as DTensors; the
family's `parallelize` adds the communication between ranks.

Shapes: T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd_titan.distributed.tensor_parallel import local, locate_rows
from opd_titan.models import kernels


class Linear(nn.Linear):
    """A linear layer that can have a copy of its weight in a faster layout, without gradients.

    Attributes:
        packed: the weight in the layout of `kernels.pack_weight`; see `pack`.
        joined: this layer's weight followed by other layers' weights; see `join`.
    """

    packed: Tensor | None = None
    joined: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return kernels.packed_linear(x, self.packed)
        return F.linear(x, local(self.weight))

    def pack(self, weight: Tensor) -> None:
        """Use a packed copy of this weight instead of `self.weight`, without gradients."""
        self.packed = kernels.pack_weight(weight.detach())


def join(layers: Sequence[Linear]) -> Tensor:
    """Store the weights of layers with the same input in one tensor, and return it.

    Each layer's weight becomes a view of its rows. `products` then computes a single product.
    """
    first = layers[0]
    rows = [layer.weight.shape[0] for layer in layers]
    joined = first.weight.new_empty(sum(rows), first.weight.shape[1])
    for layer, part in zip(layers, joined.split(rows), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    first.joined = joined
    return joined


def products(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Return each layer's product with `x`; a single product if their weights are joined."""
    joined = layers[0].joined
    if joined is not None:
        return F.linear(x, joined).split([layer.weight.shape[0] for layer in layers], dim=-1)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Products.apply(x, *(local(layer.weight) for layer in layers))
    return tuple(layer(x) for layer in layers)


class _Products(torch.autograd.Function):
    """Compute several products of one input, and sum the input's gradient with `addmm_`.

    Autograd would store a gradient for each product and add them in extra passes.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, *weights)
        return tuple(F.linear(x_TD, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x_TD, *weights = ctx.saved_tensors
        d_x_TD = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            d_x_TD.addmm_(grad, weight)
        return d_x_TD, *(grad.t() @ x_TD for grad in grads)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None  # nn.RMSNorm also accepts None
        return kernels.norm(x, local(self.weight), self.eps)


class Embedding(nn.Embedding):
    """An embedding; this rank may hold only a part of its rows.

    Attributes:
        first_row: the token id of this rank's first row; None if it holds all rows.
    """

    first_row: int | None = None

    def forward(self, tokens_T: Tensor) -> Tensor:
        weight_VD = local(self.weight)
        if self.first_row is None:
            return F.embedding(tokens_T, weight_VD)
        # Zero if another rank has the row, so that the sum over ranks is the embedding.
        row_T, held_T = locate_rows(tokens_T, self.first_row, weight_VD.shape[0])
        return F.embedding(row_T, weight_VD) * held_T[:, None]
