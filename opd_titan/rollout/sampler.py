"""One uniform number per token turns logits into tokens.

The number depends on nothing but (seed, step, prompt, sample, position): a counter-based generator
has no state to save, and no batch layout, world size or resume can shift it.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 128


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
    bits = _mix(keys_N + (positions_N + 1) * _signed(_GOLDEN))
    return _shift(bits, 11).double() * 2.0**-53


def sample(logits_NV: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Probabilities are added in blocks of 128, then over blocks in float64: exact to fp32 rounding at
    any vocabulary, and the [N, V] values are touched only by one softmax and one product.

    Args:
        logits_NV: fp32 logits of the distribution to sample from; -inf is never drawn.
        uniforms_N: float64 in [0, 1).

    Returns:
        Tokens [N] int64 and their log-probabilities [N] fp32.
    """
    n, vocab = logits_NV.shape
    probs = logits_NV.softmax(dim=1)
    if vocab % _BLOCK:
        probs = F.pad(probs, (0, -vocab % _BLOCK))
    probs = probs.view(n, -1, _BLOCK)
    # A product with ones is five times as fast as sum() on a CPU.
    blocks = (probs @ probs.new_ones(_BLOCK)).double()
    block, rest = _invert(blocks, uniforms_N * blocks.sum(dim=1))
    within = probs[torch.arange(n, device=block.device), block].double()
    offset, _ = _invert(within, rest)
    chosen = within.gather(1, offset[:, None]).squeeze(1)
    return block * _BLOCK + offset, chosen.log().float()


def _invert(weights: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight exceeds the target, and what is left of the target.

    The target is kept strictly below the total, so the index found always has a weight above 0.
    """
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1]
    target = torch.minimum(target_N, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    index = index.clamp_(max=weights.shape[1] - 1)  # NaN weights must not index out of bounds
    before = cumulative.gather(1, index[:, None]) - weights.gather(1, index[:, None])
    return index, (target - before.squeeze(1)).clamp_(min=0.0)


def greedy(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, the lowest id among equals, and its log-probability."""
    tokens = logits_NV.argmax(dim=1)
    chosen = logits_NV.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - logits_NV.logsumexp(dim=1)
