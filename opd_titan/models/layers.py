"""Layers whose weights may be a rank's part of the whole.

They compute with plain tensors: FSDP2 and tensor parallelism store weights as DTensors, and what
has to be sent between ranks is said once, in the family's `parallelize`.

Shapes: T packed tokens, D model width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from opd_titan.distributed.tensor_parallel import local, locate_rows


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, local(self.weight), self.eps)


class Embedding(nn.Embedding):
    """`first_row`: of the rows that this rank holds; None where it holds all of them."""

    first_row: int | None = None

    def forward(self, tokens_T: Tensor) -> Tensor:
        weight_VD = local(self.weight)
        if self.first_row is None:
            return F.embedding(tokens_T, weight_VD)
        # Zero where another rank has the row: the sum over ranks is the embedding.
        row_T, held_T = locate_rows(tokens_T, self.first_row, weight_VD.shape[0])
        return F.embedding(row_T, weight_VD) * held_T[:, None]
