"""One uniform number per token turns hidden states into tokens.

The number depends on nothing but (seed, step, prompt, sample, position): a counter-based generator
has no state to save, and no batch layout, world size or resume can shift it.

Shapes: N rows, D model width, V vocabulary, v a rank's part of it, C a chunk of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_titan.distributed.collectives import broadcast_tokens
from opd_titan.models.kernels import block_stats, block_totals, fused, invert_blocks
from opd_titan.models.kernels.plain import LOGITS_BLOCK, Blocks, invert
from opd_titan.models.logits import Distribution, VocabHead, project, whole_logits

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# Logits of a chunk are still in the cache of the core that made them when they are summed; a GPU
# wants few and large kernels instead.
CHUNK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; its log-probs are those at temperature 1.

    Attributes:
        max_tokens: of all responses together, see `limit`; 0 for no limit.
        vocab_size: see `Distribution`.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    ignore_eos: bool = False
    max_tokens: int = 0
    vocab_size: int = 0

    @property
    def distribution(self) -> Distribution:
        """What is sampled from, and therefore what the student is scored under."""
        return Distribution(self.temperature, self.top_k, self.top_p, self.vocab_size)


class Sampler:
    """From the last hidden states to the next tokens, the same on tensor-parallel ranks.

    Args:
        head: its weight is read at every call, so it may change in place.
        max_rows: rows at most. Their logits have one place for good, as a CUDA graph wants it; on a
            CPU fresh pages at every call would cost as much as the product.
    """

    def __init__(self, head: VocabHead, params: SamplingParams, max_rows: int) -> None:
        self.head, self.params = head.first(params.vocab_size), params
        _, count = self._chunks(max_rows)
        size = max_rows * (self.head.rows + count * 2 * LOGITS_BLOCK)  # every chunk is rounded up
        drawn = params.temperature > 0.0 and not params.distribution.truncates
        self.values = torch.empty(size if drawn else 0, device=head.weight_vD.device)

    def __call__(self, hidden_ND: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token for each row.

        Args:
            uniforms_N: float64 in [0, 1).

        Returns:
            Tokens [N] int64 and their log-probabilities [N] fp32.
        """
        if self.params.temperature == 0.0:
            chosen = greedy(whole_logits(hidden_ND, self.head, Distribution()))
        elif self.params.distribution.truncates:
            logits_NV = whole_logits(hidden_ND, self.head, self.params.distribution)
            chosen = sample(logits_NV, uniforms_N)
        else:
            chosen = self._draw(hidden_ND, uniforms_N)
        # From the same numbers a GPU's prefix sums may round differently: one rank decides.
        return broadcast_tokens(*chosen, self.head.tp)

    def _draw(self, hidden_ND: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
        """`sample` of the whole logits. Ranks exchange a maximum and a sum for each row."""
        draw = self._draw_fused if fused(hidden_ND) else self._draw_plain
        tokens_N, logprobs_N, mine_N = draw(hidden_ND, uniforms_N)
        if mine_N is None:
            return tokens_N, logprobs_N
        tokens_N = tokens_N + self.head.tp.rank * self.head.rows
        both = torch.stack((tokens_N.double(), logprobs_N.double()))
        both = self.head.stack(both.where(mine_N, 0.0)).sum(dim=0)
        return both[0].long(), both[1].float()

    def _draw_fused(
        self, hidden_ND: Tensor, uniforms_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the logits once for their blocks, and once more where a token is drawn."""
        n, t = hidden_ND.shape[0], self.params.temperature
        logits_Nv = self.values[: n * self.head.rows].view(n, self.head.rows)
        logits_Nv = project(hidden_ND, self.head.weight_vD, logits_Nv)
        blocks = block_stats(logits_Nv, t)
        highest_N, total_N = block_totals(*blocks)
        mine_N, target_N, log_total_N = self._share(highest_N, total_N, uniforms_N)
        tokens_N, logs_N = invert_blocks(logits_Nv, *blocks, highest_N, target_N, t)
        return tokens_N, (logs_N - log_total_N).float(), mine_N

    def _draw_plain(
        self, hidden_ND: Tensor, uniforms_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        blocks = self._blocks(hidden_ND)
        highest_N = blocks.units_NB.amax(dim=1)
        weights_NB = blocks.weights(highest_N)
        mine_N, target_N, log_total_N = self._share(highest_N, weights_NB.sum(dim=1), uniforms_N)
        tokens_N, logs_N = blocks.invert(weights_NB, highest_N, target_N)
        # Numbers that are not finite must not make a token that there is not.
        tokens_N = tokens_N.clamp(max=self.head.rows - 1)
        return tokens_N, (logs_N - log_total_N).float(), mine_N

    def _blocks(self, hidden_ND: Tensor) -> Blocks:
        """Exponentiate each chunk of the vocabulary while it is in the cache of the core."""
        n = hidden_ND.shape[0]
        width, count = self._chunks(n)
        values = self.values[: count * n * width].view(count, n, width)
        parts = []
        for values_NC, rows_CD in zip(values, self.head.weight_vD.split(width), strict=True):
            end = rows_CD.shape[0]
            values_NC[:, end:] = -torch.inf
            values_NC[:, :end] = project(hidden_ND, rows_CD)
            if self.params.temperature != 1.0:
                values_NC.div_(self.params.temperature)
            parts.append(_exponentiate_(values_NC))
        sums, maxima = (torch.stack(x, dim=1) for x in zip(*parts, strict=True))
        return _exponentiated(values, sums, maxima)

    def _chunks(self, n: int) -> tuple[int, int]:
        """Width of a chunk, in whole blocks, and how many there are."""
        rows, device = self.head.rows, self.head.weight_vD.device.type
        count = max(1, round(n * rows * 4 / CHUNK_BYTES[device]))
        width = -(-rows // count)
        width += -width % LOGITS_BLOCK
        return width, -(-rows // width)

    def _share(
        self, highest_N: Tensor, total_N: Tensor, uniforms_N: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Whose part of the vocabulary each row's token is in.

        Returns:
            Whether it is in this rank's, None where that is all of it; what is left of the target
            in it, and the logarithm of the sum over all ranks, both in the unit of this rank's
            `total_N`, exp(`highest_N`).
        """
        if self.head.tp.size == 1:
            return None, uniforms_N * total_N, total_N.log()
        highest_RN, total_RN = self.head.stack(torch.stack((highest_N.double(), total_N))).unbind(1)
        shift_RN = highest_RN - highest_RN.amax(dim=0)
        weights_NR = (total_RN * shift_RN.exp()).t()
        sum_N = weights_NR.sum(dim=1)
        rank_N, rest_N = invert(weights_NR, uniforms_N * sum_N)
        shift_N = shift_RN[self.head.tp.rank]
        mine_N = rank_N == self.head.tp.rank
        return mine_N, rest_N / shift_N.exp(), sum_N.log() - shift_N


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix_int(x: int) -> int:
    """SplitMix64's finaliser on an integer (Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    """`_mix_int` on int64 tensors: products wrap, shifts must be made logical."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sequence_key(*coordinates: int) -> int:
    """An int64 that stands for one sequence's stream, e.g. of (seed, step, prompt, sample)."""
    key = 0
    for c in coordinates:
        key = _mix_int((key + _GOLDEN + (c & _MASK)) & _MASK)
    return _signed(key)


def uniforms(keys_N: Tensor, positions_N: Tensor) -> Tensor:
    """float64 numbers in [0, 1), one per (key, position): SplitMix64 in counter mode, 53 bits."""
    if fused(keys_N, (torch.int64,)):
        return torch.ops.opd_titan.uniforms(keys_N, positions_N)
    bits = _mix(keys_N + (positions_N + 1) * _signed(_GOLDEN))
    return _shift(bits, 11).double() * 2.0**-53


def sample(logits_NV: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Probabilities are added in blocks of 128, then over blocks in float64: exact to fp32 rounding at
    any vocabulary.

    Args:
        logits_NV: fp32 logits of the distribution to sample from; -inf is never drawn.
        uniforms_N: float64 in [0, 1).

    Returns:
        Tokens [N] int64 and their log-probabilities [N] fp32.
    """
    vocab = logits_NV.shape[1]
    values_NV = F.pad(logits_NV, (0, -vocab % LOGITS_BLOCK), value=-torch.inf)
    sums_NB, maxima_N = _exponentiate_(values_NV)
    blocks = _exponentiated(values_NV[None], sums_NB[:, None], maxima_N[:, None])
    weights_NB = blocks.weights(maxima_N)
    total_N = weights_NB.sum(dim=1)
    tokens_N, logs_N = blocks.invert(weights_NB, maxima_N, uniforms_N * total_N)
    return tokens_N.clamp(max=vocab - 1), (logs_N - total_N.log()).float()


def _exponentiate_(logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Become exp(logits - maximum of the row); sums of blocks [N, C / 128], and the maxima [N]."""
    maxima_N = logits_NC.amax(dim=1)
    logits_NC.sub_(maxima_N[:, None]).exp_()
    # A product with ones is five times as fast as sum() on a CPU.
    return logits_NC.unflatten(1, (-1, LOGITS_BLOCK)) @ logits_NC.new_ones(LOGITS_BLOCK), maxima_N


def _exponentiated(values: Tensor, sums: Tensor, maxima_NX: Tensor) -> Blocks:
    """Blocks of weights that are there.

    Args:
        values: weights [X, N, C] of X chunks of the vocabulary, in units of their maxima.
        sums: of their blocks, [N, X, C / 128].
    """
    units_NB = maxima_NX[:, :, None].expand(sums.shape).flatten(1)
    row_N = torch.arange(values.shape[1], device=values.device)
    blocks = values.unflatten(2, (-1, LOGITS_BLOCK))

    def weigh(block_N: Tensor, unit_N: Tensor) -> Tensor:
        return blocks[block_N // blocks.shape[2], row_N, block_N % blocks.shape[2]]

    return Blocks(sums.flatten(1), units_NB, weigh)


def greedy(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, the lowest id among equals, and its log-probability."""
    tokens = logits_NV.argmax(dim=1)
    chosen = logits_NV.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - logits_NV.logsumexp(dim=1)
