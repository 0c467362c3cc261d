"""From hidden states to the distribution that is sampled from and scored, in one place.

The sampler and the training head both go through here, so that a log-probability means the same
thing wherever it is computed: at the sampling temperature, over the same kept tokens, in fp32.

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


@dataclass(frozen=True)
class Distribution:
    """What log-probs are taken under. Sampling and scoring share it, or they disagree.

    top_k 0 and top_p 1.0 keep every token.

    Attributes:
        vocab_size: only token ids below this take part; 0 for all. For models whose vocabularies
            are padded to different sizes.
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
        """What frozen models are scored under: what samples were cut to is the student's affair."""
        return replace(self, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class VocabHead:
    """The rows of the head's weight that this rank holds; all ranks hold equally many.

    Attributes:
        weight_vD: plain tensor; its gradient reaches the parameter.
        tp: the ranks that hold the other rows, in the order of token ids.
    """

    weight_vD: Tensor
    tp: Axis = ALONE

    @classmethod
    def of(cls, weight: Tensor) -> VocabHead:
        """Of a head's parameter as the model's forward has it."""
        if not isinstance(weight, DTensor):
            return cls(weight)
        mesh = weight.device_mesh
        return cls(local(weight), Axis(mesh.get_local_rank(), mesh.size(), mesh.get_group()))

    def first(self, vocab_size: int) -> VocabHead:
        """Without the rows of the token ids from `vocab_size` on; 0 keeps all."""
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

    def locate(self, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each token among this rank's, 0 where it has none, and whether it has one."""
        return locate_rows(tokens_N, self.tp.rank * self.rows, self.rows)

    def stack(self, local_values: Tensor) -> Tensor:
        """Every rank's tensor of this shape: [size, *shape]."""
        return concat_ranks(local_values[None], self.tp)


def project(hidden_ND: Tensor, weight_vD: Tensor, out_Nv: Tensor | None = None) -> Tensor:
    """fp32 logits [N, v], into `out_Nv` if given.

    Half-precision operands are accumulated and kept in fp32 on CUDA; a CPU has no such product and
    rounds its bf16 logits once.
    """
    if hidden_ND.dtype == torch.float32:
        return torch.mm(hidden_ND, weight_vD.t(), out=out_Nv)
    if hidden_ND.is_cuda:
        return torch.mm(hidden_ND, weight_vD.t(), out_dtype=torch.float32)
    return torch.mm(hidden_ND, weight_vD.t()).float()


def truncate_(logits_NV: Tensor, top_k: int, top_p: float, keep_N: Tensor | None = None) -> Tensor:
    """Set to -inf, in place, every logit outside the top k and outside the nucleus of mass top_p.

    The nucleus is the smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et
    al. 2020, arXiv 1904.09751), taken after the top-k cut. `top_k` 0 and `top_p` 1.0 cut nothing.

    Args:
        keep_N: tokens that are kept wherever they rank. A sampled token at the edge of the
            nucleus must not fall out of it when rounding differs between sampling and scoring.
    """
    if top_k <= 0 and top_p >= 1.0:
        return logits_NV
    keep_N1 = None if keep_N is None else keep_N[:, None]
    kept = None if keep_N1 is None else logits_NV.gather(1, keep_N1)
    threshold_N, ties_N = truncation_threshold(logits_NV, top_k, top_p)
    threshold_N1, ties_N1 = threshold_N[:, None], ties_N[:, None]
    # Ties fall to the lower token id everywhere.
    tied_NV = logits_NV == threshold_N1
    surplus_NV = tied_NV & (tied_NV.cumsum(dim=1, dtype=torch.int32) > ties_N1)
    logits_NV.masked_fill_((logits_NV < threshold_N1) | surplus_NV, -torch.inf)
    if keep_N1 is not None and kept is not None:
        logits_NV.scatter_(1, keep_N1, kept)
    return logits_NV


def _scaled(
    hidden_ND: Tensor, head: VocabHead, distribution: Distribution, out_Nv: Tensor | None
) -> Tensor:
    logits_Nv = project(hidden_ND, head.weight_vD, out_Nv)
    if distribution.temperature != 1.0:
        logits_Nv.div_(distribution.temperature)
    return logits_Nv


def whole_logits(
    hidden_ND: Tensor,
    head: VocabHead,
    distribution: Distribution,
    keep_N: Tensor | None = None,
    out_Nv: Tensor | None = None,
) -> Tensor:
    """fp32 logits [N, V] of the distribution, on every rank: divided by its temperature, truncated.

    Args:
        keep_N: see `truncate_`.
        out_Nv: a buffer for this rank's product. Without one, a large vocabulary pays for fresh
            pages at every call, which on a CPU costs as much as the product itself.
    """
    logits_Nv = _scaled(hidden_ND, head, distribution, out_Nv)
    if head.tp.size > 1:
        logits_Nv = head.stack(logits_Nv).transpose(0, 1).flatten(1)
    return truncate_(logits_Nv, distribution.top_k, distribution.top_p, keep_N)


def local_logits(
    hidden_ND: Tensor,
    head: VocabHead,
    distribution: Distribution,
    keep_N: Tensor | None = None,
    out_Nv: Tensor | None = None,
) -> Tensor:
    """This rank's columns [N, v] of `whole_logits`; see there."""
    if not distribution.truncates:
        return _scaled(hidden_ND, head, distribution, out_Nv)
    logits_NV = whole_logits(hidden_ND, head, distribution, keep_N, out_Nv)
    first = head.tp.rank * head.rows
    return logits_NV[:, first : first + head.rows]
