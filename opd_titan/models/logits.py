"""Compute the logits of the sampled and scored distribution from hidden states.

The sampler and the training head use the same functions, so that a log-probability means the same
thing everywhere: at the sampling temperature, over the same kept tokens, in fp32.

Shapes: N rows, D model width, V vocabulary, v the part of it that this rank projects onto (all of
it without tensor parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd_titan.distributed.tensor_parallel import concat_ranks, local, locate_rows
from opd_titan.distributed.world import ALONE, Axis
from opd_titan.models.kernels import truncation_threshold
from opd_titan.models.kernels.device import device_of


@dataclass(frozen=True)
class Distribution:
    """The distribution that log-probs refer to. Sampling and scoring must use the same one.

    top_k 0 and top_p 1.0 keep every token.

    Attributes:
        vocab_size: only token ids below this are included; 0 includes all. It is needed for models
            with vocabularies that are padded to different sizes.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab_size: int = 0

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def untruncated(self) -> Distribution:
        """The distribution of frozen models, which are scored without truncation."""
        return replace(self, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class VocabHead:
    """The rows of the head's weight that this rank holds. All ranks hold the same number of rows.

    Attributes:
        weight_vD: a plain tensor; its gradient reaches the parameter.
        tp: the ranks that hold the other rows, in the order of token ids.
    """

    weight_vD: Tensor
    tp: Axis = ALONE

    @classmethod
    def of(cls, weight: Tensor) -> VocabHead:
        """Return the head of a parameter, as the model's forward passes it."""
        if not isinstance(weight, DTensor):
            return cls(weight)
        mesh = weight.device_mesh
        return cls(local(weight), Axis(mesh.get_local_rank(), mesh.size(), mesh.get_group()))

    def first(self, vocab_size: int) -> VocabHead:
        """Return the head of the token ids below `vocab_size`; 0 means all."""
        if vocab_size in (0, self.vocab_size):
            return self
        assert self.tp.size == 1, "ranks would hold unequal parts"
        return VocabHead(self.weight_vD[:vocab_size])

    @property
    def rows(self) -> int:
        return self.weight_vD.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.rows * self.tp.size

    @property
    def start(self) -> int:
        """The token id of this rank's first row."""
        return self.tp.rank * self.rows

    def locate(self, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's row, and whether this rank holds it; the row is 0 if not.

        Both results have the shape of the tokens.
        """
        return locate_rows(tokens_N, self.start, self.rows)

    def stack(self, local_values: Tensor) -> Tensor:
        """Return every rank's tensor of this shape, [ranks, *shape]."""
        return concat_ranks(local_values[None], self.tp)


def projects_in_place(weight_vD: Tensor) -> bool:
    """Return whether `project` can write its fp32 product into an existing tensor."""
    if weight_vD.dtype == torch.float32:
        return True
    return device_of(weight_vD).type == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads()


def project(hidden_ND: Tensor, weight_vD: Tensor, out_Nv: Tensor | None = None) -> Tensor:
    """Return fp32 logits [N, v], written into `out_Nv` if given; see `projects_in_place`.

    On CUDA, products of half-precision operands are accumulated and stored in fp32. A CPU has no
    such product and rounds bf16 logits once.
    """
    if hidden_ND.dtype == torch.float32:
        return torch.mm(hidden_ND, weight_vD.t(), out=out_Nv)
    if device_of(hidden_ND).type == "cuda":
        into = {} if out_Nv is None else {"out": out_Nv}
        return torch.mm(hidden_ND, weight_vD.t(), out_dtype=torch.float32, **into)
    return torch.mm(hidden_ND, weight_vD.t()).float()


def truncate_(logits_NV: Tensor, top_k: int, top_p: float, keep_N: Tensor | None = None) -> Tensor:
    """Set every logit outside the top k or outside the nucleus of mass top_p to -inf, in place.

    The nucleus is the smallest set of most likely tokens with a total probability of at least
    `top_p` (Holtzman et al. 2020, arXiv 1904.09751), chosen after the top-k cut. `top_k` 0 and
    `top_p` 1.0 cut nothing. Among equal logits, lower token ids are kept first.

    Args:
        keep_N: one token of each row that is always kept. A sampled token at the edge of the
            nucleus must not be cut because rounding differs between sampling and scoring.
    """
    if top_k <= 0 and top_p >= 1.0:
        return logits_NV
    keep_N1 = None if keep_N is None else keep_N[:, None]
    kept = None if keep_N1 is None else logits_NV.gather(1, keep_N1)
    threshold_N, ties_N = truncation_threshold(logits_NV, top_k, top_p)
    threshold_N1, ties_N1 = threshold_N[:, None], ties_N[:, None]
    tied_NV = logits_NV == threshold_N1
    surplus_NV = tied_NV & (tied_NV.cumsum(dim=1, dtype=torch.int32) > ties_N1)
    logits_NV.masked_fill_((logits_NV < threshold_N1) | surplus_NV, -torch.inf)
    if keep_N1 is not None and kept is not None:
        logits_NV.scatter_(1, keep_N1, kept)
    return logits_NV


def scaled_logits(
    hidden_ND: Tensor, head: VocabHead, distribution: Distribution, out_Nv: Tensor | None = None
) -> Tensor:
    """Return this rank's fp32 logits [N, v], divided by the temperature, before truncation.

    Args:
        out_Nv: a buffer for the product; see `projects_in_place`.
    """
    logits_Nv = project(hidden_ND, head.weight_vD, out_Nv)
    if distribution.temperature != 1.0:
        logits_Nv.div_(distribution.temperature)
    return logits_Nv


def _whole(
    logits_Nv: Tensor, head: VocabHead, distribution: Distribution, keep_N: Tensor | None
) -> Tensor:
    """Return the truncated logits of all ranks [N, V]; in place if there is one rank."""
    if head.tp.size > 1:
        logits_Nv = head.stack(logits_Nv).transpose(0, 1).flatten(1)
    return truncate_(logits_Nv, distribution.top_k, distribution.top_p, keep_N)


def whole_logits(hidden_ND: Tensor, head: VocabHead, distribution: Distribution) -> Tensor:
    """Return the distribution's fp32 logits [N, V] on every rank: scaled, then truncated."""
    return _whole(scaled_logits(hidden_ND, head, distribution), head, distribution, None)


def truncated_logits(
    logits_Nv: Tensor, head: VocabHead, distribution: Distribution, keep_N: Tensor
) -> Tensor:
    """Return this rank's columns [N, v] of `whole_logits` from its own scaled ones.

    Args:
        logits_Nv: the result of `scaled_logits`; overwritten if there is one rank.
        keep_N: see `truncate_`.
    """
    if not distribution.truncates:
        return logits_Nv
    whole_NV = _whole(logits_Nv, head, distribution, keep_N)
    return whole_NV[:, head.start : head.start + head.rows]
