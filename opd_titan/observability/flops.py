"""Work and speed limits: what a forward costs, what a device can do, and the share that is used.

Only matrix products count, 2 FLOPs per multiply-add: the embedding look-up is none, a tied head
is one like any other. Nothing is added for recomputation, so that MFU stays comparable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Dense bf16 FLOP/s with fp32 accumulation, from the vendor's data sheets (the sparse figures
# halved). First match wins; a name that matches nothing has no MFU.
_PEAK_FLOPS: list[tuple[str, float]] = [
    (r"\bMIG\b", 0.0),  # a slice of a GPU: its share is not in the name
    (r"\bB200\b", 2.25e15),
    (r"\bH200 NVL\b", 835e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH[18]00 PCIe\b", 756e12),
    (r"\bH[18]00\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 5090$", 209.5e12),
    (r"\bRTX 4090$", 165.2e12),
]


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, by the name that `torch.cuda.get_device_name` gives it.

    None for a device that the table does not know, and for a slice of one: no MFU is better
    than one against a made-up peak.
    """
    for pattern, peak in _PEAK_FLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak or None
    return None


def mfu(flops: float, seconds: float, peak: float, world_size: int = 1) -> float:
    """Per cent of the peak that was used.

    Args:
        flops: of all ranks together.
        seconds: that they took, by the clock.
        peak: FLOP/s of one device.
    """
    return 100.0 * flops / (seconds * peak * world_size)


def transformer_forward_flops(
    *,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn_dim: int,
    vocab_size: int,
    seq_lens: Iterable[int],
    projected_tokens: int,
) -> float:
    """FLOPs of one forward of a dense gated transformer over causal sequences.

    Per token 2 for every parameter of Q, K, V, O and the three MLP matrices; per causal
    (query, key) pair 4 * head_dim per head and layer (Q.K and P.V), a sequence of s tokens having
    s (s + 1) / 2 pairs; per projected token 2 * dim * vocab_size for the head. With backward:
    three times as much. Same counting as PaLM (arXiv 2204.02311, appendix B), but with the true
    lengths and the causal half.

    Decoding with a KV cache costs the same as one forward over the finished sequences; the last
    sampled token of each is never fed in, so count one token less for each.

    Args:
        seq_lens: tokens of each sequence (prompt and response).
        projected_tokens: positions that go through the head; prompts do not.
    """
    attention_params = dim * head_dim * (2 * heads + 2 * kv_heads)
    matmul_params = layers * (attention_params + 3 * dim * ffn_dim)
    tokens = pairs = 0
    for length in seq_lens:
        tokens += length
        pairs += length * (length + 1) // 2
    attention = 4 * layers * heads * head_dim * pairs
    return float(2 * matmul_params * tokens + attention + 2 * dim * vocab_size * projected_tokens)
