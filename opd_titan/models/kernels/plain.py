"""The plain PyTorch twins of the fused kernels, for all devices and with gradients.

Shapes: see the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_BLOCK = 128
# SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195).
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class CacheSlots(NamedTuple):
    """Where the keys and values of T tokens are written in one layer's cache.

    Attributes:
        keys_PSGK, values_PSGK: the layer's cache; K is contiguous.
        page_T, offset_T: int64, the page of each token and its position in the page.
    """

    keys_PSGK: Tensor
    values_PSGK: Tensor
    page_T: Tensor
    offset_T: Tensor


class PageTable(NamedTuple):
    """The pages and the queries of N sequences in paged attention.

    The last query of a sequence attends to all of its tokens; an earlier one does not attend to the
    tokens of later queries.

    Attributes:
        table_NM: int32, the pages of each sequence, in order.
        used_N: int32, the number of tokens of each sequence, including its queries' tokens.
        starts_N1: int32 [N + 1], where each sequence's queries begin among all queries.
        max_queries: the largest number of queries of a sequence, or more.
    """

    table_NM: Tensor
    used_N: Tensor
    starts_N1: Tensor
    max_queries: int


def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return F.silu(gate_TF) * up_TF


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + y_TD
    return sum_TD, norm(sum_TD, weight_D, eps)


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate each pair (i, i + K/2) by its position's angle, in fp32; return x's dtype."""
    x = x_THK.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos_T1K + torch.cat((-second, first), dim=-1) * sin_T1K).to(x_THK.dtype)


def norm_rope(
    q_THK: Tensor,
    k_TGK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    eps: float,
    cos_T1K: Tensor,
    sin_T1K: Tensor,
) -> tuple[Tensor, Tensor]:
    q_THK, k_TGK = norm(q_THK, q_weight_K, eps), norm(k_TGK, k_weight_K, eps)
    return rotate(q_THK, cos_T1K, sin_T1K), rotate(k_TGK, cos_T1K, sin_T1K)


def write(slots: CacheSlots, k_TGK: Tensor, v_TGK: Tensor) -> None:
    """Write the keys and values of tokens into a layer's cache."""
    slots.keys_PSGK[slots.page_T, slots.offset_T] = k_TGK
    slots.values_PSGK[slots.page_T, slots.offset_T] = v_TGK


def paged_attention(
    q_THK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor, pages: PageTable
) -> Tensor:
    """Return causal attention over pages, [T, H, K]. It is slow, for tests only."""
    repeats = q_THK.shape[1] // keys_PSGK.shape[2]
    outs = []
    lengths, bounds = pages.used_N.tolist(), pages.starts_N1.tolist()
    for row_M, used, start, end in zip(pages.table_NM, lengths, bounds, bounds[1:], strict=False):
        k, v = (
            x[row_M.long()].flatten(0, 1)[:used].float().repeat_interleave(repeats, dim=1)
            for x in (keys_PSGK, values_PSGK)
        )
        q = q_THK[start:end].float()
        seen = torch.ones(end - start, used, dtype=torch.bool, device=q.device)
        seen = seen.tril(used - (end - start))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1))
    return torch.cat(outs).to(q_THK.dtype)


def block_stats(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    padding = -logits_NV.shape[1] % LOGITS_BLOCK
    scaled_NV = F.pad(logits_NV / temperature, (0, padding), value=-torch.inf)
    scaled_NBC = scaled_NV.unflatten(1, (-1, LOGITS_BLOCK))
    maxima_NB = scaled_NBC.amax(dim=2)
    # -inf - (-inf) is NaN, so a block with only -inf is shifted by 0.
    shift_NB = maxima_NB.masked_fill(maxima_NB == -torch.inf, 0.0)
    weights_NBC = (scaled_NBC - shift_NB[..., None]).exp()
    # On a CPU, a product with ones is five times as fast as sum().
    return weights_NBC @ weights_NBC.new_ones(LOGITS_BLOCK), maxima_NB


def invert(weights: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index at which the running sum exceeds the target, and the remainder.

    The remainder is the target less the sum before the index. The target is clamped below the
    total, so that the weight at the index is above 0.
    """
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1]
    target = torch.minimum(target_N, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    index = index.clamp_(max=weights.shape[1] - 1)  # NaN weights must not index out of bounds
    before = cumulative.gather(1, index[:, None]) - weights.gather(1, index[:, None])
    return index, (target - before.squeeze(1)).clamp_(min=0.0)


@dataclass(frozen=True)
class Blocks:
    """Weights of tokens, exp(logit), in blocks of 128 tokens.

    Attributes:
        sums_NB: fp32, the sum of each block's weights in units of exp(`units_NB`).
        units_NB: fp32.
        weigh: called with one block of each row and its unit; returns the weights [N, 128].
        num_tokens: the size of the vocabulary.
    """

    sums_NB: Tensor
    units_NB: Tensor
    weigh: Callable[[Tensor, Tensor], Tensor]
    num_tokens: int

    def invert(self, unit_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens at which running sums exceed the targets, and their log-weights.

        Targets and log-weights are in units of exp(`unit_N`).
        """
        weights_NB = _block_weights(self.sums_NB, self.units_NB, unit_N)
        block_N, rest_N = invert(weights_NB, target_N)
        own_N = self.units_NB.gather(1, block_N[:, None]).squeeze(1)
        shift_N = (own_N - unit_N).double()
        within_NC = self.weigh(block_N, own_N).double()
        offset_N, _ = invert(within_NC, rest_N / shift_N.exp())
        log_N = within_NC.gather(1, offset_N[:, None]).squeeze(1).log()
        tokens_N = block_N * LOGITS_BLOCK + offset_N
        # Logits that are NaN or infinite must still give a token of the vocabulary.
        return tokens_N.clamp(max=self.num_tokens - 1), log_N + shift_N


def _block_weights(sums_NB: Tensor, maxima_NB: Tensor, unit_N: Tensor) -> Tensor:
    """Return the sums of blocks in units of exp(`unit_N`), fp64 [N, B]."""
    # The unit of a block without tokens that can be drawn is exp(-inf).
    return sums_NB.double() * (maxima_NB - unit_N[:, None]).double().exp()


def block_totals(sums_NB: Tensor, maxima_NB: Tensor) -> tuple[Tensor, Tensor]:
    highest_N = maxima_NB.amax(dim=1)
    return highest_N, _block_weights(sums_NB, maxima_NB, highest_N).sum(dim=1)


def invert_blocks(
    logits_NV: Tensor,
    sums_NB: Tensor,
    maxima_NB: Tensor,
    highest_N: Tensor,
    target_N: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    vocab = logits_NV.shape[1]

    def weigh(block_N: Tensor, unit_N: Tensor) -> Tensor:
        column_NC = block_N[:, None] * LOGITS_BLOCK
        column_NC = column_NC + torch.arange(LOGITS_BLOCK, device=logits_NV.device)
        inside_NC = column_NC < vocab
        logits_NC = logits_NV.gather(1, column_NC.clamp(max=vocab - 1))
        return (logits_NC / temperature - unit_N[:, None]).exp() * inside_NC

    return Blocks(sums_NB, maxima_NB, weigh, vocab).invert(highest_N, target_N)


def uniforms(keys_N: Tensor, positions_N: Tensor) -> Tensor:
    bits = _mix(keys_N + (positions_N + 1) * signed(GOLDEN))
    return _shift(bits, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to int64. Products wrap; `_shift` shifts logically."""
    x = (x ^ _shift(x, 30)) * signed(MIX_1)
    x = (x ^ _shift(x, 27)) * signed(MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x: int) -> int:
    """Return the int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def truncation_threshold(logits_NV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    vocab = logits_NV.shape[1]
    k = top_k if 0 < top_k < vocab else vocab
    if k < vocab:
        values_Nk = logits_NV.topk(k, dim=1).values
    else:
        values_Nk = logits_NV.sort(dim=1, descending=True).values
    count_N1 = torch.full_like(values_Nk[:, :1], k, dtype=torch.int64)
    if top_p < 1.0:
        probs_Nk = values_Nk.softmax(dim=1)
        count_N1 = (probs_Nk.cumsum(dim=1) - probs_Nk < top_p).sum(dim=1, keepdim=True)
        count_N1.clamp_(min=1)  # 0 where a logit is NaN
    threshold_N1 = values_Nk.gather(1, count_N1 - 1)
    kept_Nk = torch.arange(k, device=logits_NV.device) < count_N1
    return threshold_N1[:, 0], (kept_Nk & (values_Nk == threshold_N1)).sum(dim=1)
