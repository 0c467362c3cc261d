"""Sample tokens from hidden states, with one uniform number per token.

The number depends only on (seed, step, prompt, sample, position). A counter-based generator makes
it, so there is no state to save, and batch layout, world size and resuming do not change it.

Shapes: N rows, D model width, V vocabulary, v a rank's part of it, C a chunk of that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd_titan.distributed.collectives import broadcast_tokens
from opd_titan.models.kernels import block_stats, block_totals, fused, invert_blocks, plain
from opd_titan.models.kernels.device import device_of
from opd_titan.models.kernels.plain import LOGITS_BLOCK, Blocks, invert
from opd_titan.models.logits import Distribution, VocabHead, project, whole_logits

_MASK = (1 << 64) - 1
# On a CPU a chunk's logits should still be in the cache when they are summed. A GPU needs few and
# large kernels.
CHUNK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        temperature: 0 is greedy, with the log-probs at temperature 1.
        max_tokens: the most tokens of all responses together, see `rollout.cut`; 0 for no limit.
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
        """The distribution that is sampled from, under which the student is also scored."""
        return Distribution(self.temperature, self.top_k, self.top_p, self.vocab_size)


class Sampler:
    """Draw the next tokens from the last hidden states, the same on all tensor-parallel ranks.

    Args:
        head: its weight is read at every call, so it may change in place.
        max_rows: the most rows. Their logits are always in the same buffer: a CUDA graph needs
            that, and on a CPU new memory at every call would cost as much as the product.
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
        # On a GPU prefix sums of the same numbers may round differently, so one rank decides.
        return broadcast_tokens(*chosen, self.head.tp)

    def _draw(self, hidden_ND: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result that `sample` has for the whole logits.

        Ranks exchange the maximum and the sum of each row, and then its token and log-prob.
        """
        n, rows, t = hidden_ND.shape[0], self.head.rows, self.params.temperature
        find_tokens: Callable[..., tuple[Tensor, Tensor]]
        if fused(hidden_ND):
            logits_Nv = self.values[: n * rows].view(n, rows)
            logits_Nv = project(hidden_ND, self.head.weight_vD, logits_Nv)
            stats = block_stats(logits_Nv, t)
            highest_N, total_N = block_totals(*stats)
            find_tokens = partial(invert_blocks, logits_Nv, *stats, temperature=t)
        else:
            blocks = self._blocks(hidden_ND)
            # The units of a chunk are expanded, which the fused operation does not take.
            highest_N, total_N = plain.block_totals(blocks.sums_NB, blocks.units_NB)
            find_tokens = blocks.invert
        mine_N, target_N, log_total_N = self._share(highest_N, total_N, uniforms_N)
        tokens_N, logs_N = find_tokens(highest_N, target_N)
        logprobs_N = (logs_N - log_total_N).float()
        if mine_N is None:
            return tokens_N, logprobs_N
        tokens_N = tokens_N + self.head.tp.rank * rows
        both = torch.stack((tokens_N.double(), logprobs_N.double()))
        both = self.head.stack(both.where(mine_N, 0.0)).sum(dim=0)
        return both[0].long(), both[1].float()

    def _blocks(self, hidden_ND: Tensor) -> Blocks:
        """Exponentiate each chunk of the vocabulary while it is in the CPU's cache."""
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
        units_NB = maxima[:, :, None].expand(sums.shape).flatten(1)
        row_N = torch.arange(n, device=values.device)
        blocks = values.unflatten(2, (-1, LOGITS_BLOCK))

        def weigh(block_N: Tensor, unit_N: Tensor) -> Tensor:
            return blocks[block_N // blocks.shape[2], row_N, block_N % blocks.shape[2]]

        return Blocks(sums.flatten(1), units_NB, weigh, self.head.rows)

    def _chunks(self, n: int) -> tuple[int, int]:
        """Return the width of a chunk, a multiple of 128, and the number of chunks."""
        rows, device = self.head.rows, device_of(self.head.weight_vD).type
        count = max(1, round(n * rows * 4 / CHUNK_BYTES[device]))
        width = -(-rows // count)
        width += -width % LOGITS_BLOCK
        return width, -(-rows // width)

    def _share(
        self, highest_N: Tensor, total_N: Tensor, uniforms_N: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Select the rank that holds each row's token.

        Returns:
            Whether this rank is selected, bool [N], or None without tensor parallelism; the
            remaining target in this rank's part; and the log of the sum over all ranks. The last
            two are fp64 [N] in units of exp(`highest_N`).
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


def _mix(x: int) -> int:
    """Apply SplitMix64's finaliser to an integer."""
    x = ((x ^ (x >> 30)) * plain.MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * plain.MIX_2) & _MASK
    return x ^ (x >> 31)


def sequence_key(*coordinates: int) -> int:
    """Return the int64 key of a sequence's random stream, e.g. of (seed, step, prompt, sample)."""
    key = 0
    for c in coordinates:
        key = _mix((key + plain.GOLDEN + (c & _MASK)) & _MASK)
    return plain.signed(key)


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
    blocks = block_stats(logits_NV, 1.0)
    highest_N, total_N = block_totals(*blocks)
    tokens_N, logs_N = invert_blocks(logits_NV, *blocks, highest_N, uniforms_N * total_N, 1.0)
    return tokens_N, (logs_N - total_N.log()).float()


def _exponentiate_(logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by exp(logits - maximum); return sums of blocks [N, C / 128], maxima [N]."""
    maxima_N = logits_NC.amax(dim=1)
    logits_NC.sub_(maxima_N[:, None]).exp_()
    # A product with ones is five times as fast as sum() on a CPU.
    return logits_NC.unflatten(1, (-1, LOGITS_BLOCK)) @ logits_NC.new_ones(LOGITS_BLOCK), maxima_N


def greedy(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely token of each row (the lowest id on ties), and its log-prob."""
    tokens = logits_NV.argmax(dim=1)
    chosen = logits_NV.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - logits_NV.logsumexp(dim=1)
