"""From hidden states to the distribution that is sampled from and scored, in one place.

The sampler and the training head both go through here, so that a log-probability means the same
thing wherever it is computed: at the sampling temperature, over the same kept tokens, in fp32.

Shapes: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """What log-probs are taken under. Sampling and scoring share it, or they disagree.

    top_k 0 and top_p 1.0 keep every token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def project(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor | None = None) -> Tensor:
    """fp32 logits [N, V], into `out_NV` if given.

    Half-precision operands are accumulated and kept in fp32 on CUDA; a CPU has no such product and
    rounds its bf16 logits once.
    """
    if hidden_ND.dtype == torch.float32:
        return torch.mm(hidden_ND, weight_VD.t(), out=out_NV)
    if hidden_ND.is_cuda:
        return torch.mm(hidden_ND, weight_VD.t(), out_dtype=torch.float32)
    return torch.mm(hidden_ND, weight_VD.t()).float()


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
    kept = None if keep_N is None else logits_NV.gather(1, keep_N[:, None])
    k = min(top_k, logits_NV.shape[1]) if top_k > 0 else logits_NV.shape[1]
    # Sorted once; a stable order makes ties fall to the lower token id everywhere.
    values, order = logits_NV.sort(dim=1, descending=True, stable=True)
    values[:, k:] = -torch.inf
    if top_p < 1.0:
        probs = values.softmax(dim=1)
        mass_before = probs.cumsum(dim=1) - probs
        values[mass_before >= top_p] = -torch.inf
    logits_NV.scatter_(1, order, values)
    if kept is not None:
        logits_NV.scatter_(1, keep_N[:, None], kept)
    return logits_NV


def scaled_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    distribution: Distribution,
    keep_N: Tensor | None = None,
    out_NV: Tensor | None = None,
) -> Tensor:
    """fp32 logits [N, V] of the distribution: divided by its temperature, then truncated.

    Args:
        keep_N: see `truncate_`.
        out_NV: a buffer for the result. Without one, a large vocabulary pays for fresh pages at
            every call, which on a CPU costs as much as the product itself.
    """
    logits_NV = project(hidden_ND, weight_VD, out_NV)
    if distribution.temperature != 1.0:
        logits_NV.div_(distribution.temperature)
    return truncate_(logits_NV, distribution.top_k, distribution.top_p, keep_N)
