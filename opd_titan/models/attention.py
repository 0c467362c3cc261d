"""Causal attention over a packed batch: sequences laid end to end, no padding between them.

Shapes: T packed tokens, B sequences, S longest sequence of a group, H query heads, G key/value
heads, K head size.

The model calls `attend(q_THK, k_TGK, v_TGK, layer)` and knows no more. Training, scoring, prefill
(`PackedAttention`) and decoding (`rollout.kv_cache`) differ only in the object behind that call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _varlen_attn() -> tuple[Callable[..., Tensor] | None, frozenset[str]]:
    """torch's packed attention and the names of its options, which differ between versions.

    Imported at first use: it is for CUDA only (from Ampere on) and pulls in the compiler.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def paged_varlen_attn(
    dtype: torch.dtype, device: torch.device, page_size: int
) -> Callable[..., Tensor] | None:
    """torch's packed attention over pages of keys and values, from 2.12 on; None where it is not.

    Its flash kernel takes pages of a multiple of 256 tokens.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or page_size % 256:
        return None
    kernel, options = _varlen_attn()
    if torch.cuda.get_device_capability(device) < (8, 0) or "block_table" not in options:
        return None
    return functools.partial(kernel, enable_gqa=True)


class Attend(Protocol):
    """What a model needs to know of attention: where each token stands, and how to mix values."""

    positions_T: Tensor

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor: ...


class PackedAttention:
    """Each token attends to the earlier tokens of its own sequence, and to itself.

    Args:
        seq_lens: length of each packed sequence, in order; their sum is T.
        device: where the index tensors live.
    """

    def __init__(self, seq_lens: Sequence[int], device: torch.device) -> None:
        self.seq_lens, self.device = list(seq_lens), device
        self.positions_T = torch.cat([torch.arange(n) for n in self.seq_lens]).to(device)

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        if self._has_packed_kernel(q_THK):
            return self._varlen(q_THK, k_TGK, v_TGK)
        return self._padded(q_THK, k_TGK, v_TGK)

    @staticmethod
    def _has_packed_kernel(q_THK: Tensor) -> bool:
        half = q_THK.dtype in (torch.bfloat16, torch.float16)
        capable = q_THK.is_cuda and torch.cuda.get_device_capability() >= (8, 0)
        return half and capable and _varlen_attn()[0] is not None

    @functools.cached_property
    def _cu_seqlens(self) -> Tensor:
        ends = [0, *accumulate(self.seq_lens)]
        return torch.tensor(ends, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def _padding(self) -> tuple[list[Tensor], Tensor]:
        return _pad_plan(self.seq_lens, self.device)

    def _varlen(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        varlen_attn, options = _varlen_attn()
        # torch 2.10 says is_causal, later ones say it with a window; 2.12 brought grouped heads.
        causal = {"is_causal": True} if "is_causal" in options else {"window_size": (-1, 0)}
        grouped = {}
        if q_THK.shape[1] != k_TGK.shape[1]:
            if "enable_gqa" in options:
                grouped = {"enable_gqa": True}
            else:
                repeats = q_THK.shape[1] // k_TGK.shape[1]
                k_TGK = k_TGK.repeat_interleave(repeats, dim=1)
                v_TGK = v_TGK.repeat_interleave(repeats, dim=1)
        longest = max(self.seq_lens)
        cu = self._cu_seqlens
        return varlen_attn(q_THK, k_TGK, v_TGK, cu, cu, longest, longest, **causal, **grouped)

    def _padded(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Padding on the right needs no mask: causal attention never looks there."""
        groups, unpad_T = self._padding
        outs = []
        for index_BS in groups:
            q, k, v = (
                x.index_select(0, index_BS.flatten()).unflatten(0, index_BS.shape).transpose(1, 2)
                for x in (q_THK, k_TGK, v_TGK)
            )
            out_BHSK = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
            outs.append(out_BHSK.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, unpad_T)


def _pad_plan(seq_lens: list[int], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Group sequences whose lengths share a power of two, so that padding stays under half.

    Returns one index [B, S] into the packed tokens per group (padding points at the sequence's
    first token; causality keeps it unseen), and for each packed token its row in the groups'
    flattened, concatenated outputs.
    """
    starts = [0, *accumulate(seq_lens)]
    buckets: dict[int, list[int]] = {}
    for i, n in enumerate(seq_lens):
        buckets.setdefault((n - 1).bit_length(), []).append(i)
    groups, rows, offset = [], [0] * starts[-1], 0
    for members in buckets.values():
        longest = max(seq_lens[i] for i in members)
        index = []
        for i in members:
            start, n = starts[i], seq_lens[i]
            index.append([*range(start, start + n), *[start] * (longest - n)])
            rows[start : start + n] = range(offset, offset + n)
            offset += longest
        groups.append(torch.tensor(index, device=device))
    return groups, torch.tensor(rows, device=device)
