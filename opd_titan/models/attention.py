"""Causal attention over a packed batch: sequences one after another, without padding.

Shapes: T packed tokens, B sequences, S longest sequence of a group, H query heads, G key/value
heads, K head size.

The model only calls `attend(q_THK, k_TGK, v_TGK, layer)`. Training, scoring and prefill
(`PackedAttention`) and decoding (`rollout.kv_cache`) pass different `attend` objects.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_titan.distributed.transfer import send_numbers
from opd_titan.models.kernels import CacheSlots
from opd_titan.models.kernels.device import device_of, why_wrong_type

# A group of sequences has at most this number of padding tokens (about the cost of another group)
# plus this share of its tokens.
_PADDED_TOKENS, _PADDED_SHARE = 32, 1 / 32


@functools.cache
def varlen_attn() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """Return torch's packed attention and the names of its options, which depend on the version.

    It is imported at its first use, because it needs CUDA (Ampere or later) and imports the
    compiler.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def why_padded(dtype: torch.dtype, x: Tensor | torch.device) -> str:
    """Return why attention on the device of `x` pads packed sequences; empty if it does not."""
    if why := device_of(x).why_padded or why_wrong_type(dtype):
        return why
    return "" if varlen_attn()[0] else f"torch {torch.__version__} has no varlen_attn"


class Attend(Protocol):
    """The interface of attention: the position of each token, and the attention of a layer."""

    positions_T: Tensor

    def slots(self, layer: int) -> CacheSlots | None:
        """Return where the model writes keys and values before the call, or None."""

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor: ...


class PackedAttention:
    """Each token attends to itself and to the earlier tokens of its own sequence.

    Tokens that several sequences begin with (the prompt of a group) are packed once. Such a
    sequence consists of two pieces; the first piece is shared.

    Args:
        seq_lens: the length of each packed piece, in order; their sum is T.
        device: the device of the index tensors.
        continues: for each piece the index of the piece that it continues, or None if it begins a
            sequence. A piece that is continued begins a sequence. By default all pieces do.
        beside: further lists of integers to send to the device in the same copy.

    Attributes:
        beside: these lists as int64 tensors.
    """

    def __init__(
        self,
        seq_lens: Sequence[int],
        device: torch.device,
        continues: Sequence[int | None] | None = None,
        beside: Sequence[Sequence[int]] = (),
    ) -> None:
        self.seq_lens, self.device = list(seq_lens), device
        self.continues = list(continues) if continues else [None] * len(self.seq_lens)
        # The position of each piece's first token in its sequence.
        self.offsets = [0 if c is None else self.seq_lens[c] for c in self.continues]
        spans = zip(self.offsets, self.seq_lens, strict=True)
        positions = [p for a, n in spans for p in range(a, a + n)]
        self.positions_T, *self.beside = send_numbers([positions, *beside], device)

    def slots(self, layer: int) -> CacheSlots | None:
        return None

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        if self._has_packed_kernel(q_THK):
            return self._varlen(q_THK, k_TGK, v_TGK)
        return self._padded(q_THK, k_TGK, v_TGK)

    @staticmethod
    def _has_packed_kernel(q_THK: Tensor) -> bool:
        return not why_padded(q_THK.dtype, q_THK)

    @functools.cached_property
    def _rows(self) -> list[list[int]]:
        """For each piece, the packed rows of its sequence up to the piece's end."""
        ends = [*accumulate(self.seq_lens)]
        own = [list(range(end - n, end)) for n, end in zip(self.seq_lens, ends, strict=True)]
        return [r if c is None else own[c] + r for c, r in zip(self.continues, own, strict=True)]

    @functools.cached_property
    def _starts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the queries and the keys of each piece begin, in the order of the packed kernel.

        The third is the packed row of each key, or None if no piece is shared.
        """
        queries = [0, *accumulate(self.seq_lens)]
        if not any(self.offsets):
            (starts,) = send_numbers([queries], self.device)
            # Two tensors. If both arguments were one tensor, torch 2.15 would use cuDNN's kernel on
            # Hopper. It needs values without gaps between tokens, but products of joined weights
            # have gaps.
            return starts.int(), starts.int(), None
        keys = [0, *accumulate(len(rows) for rows in self._rows)]
        parts = [queries, keys, list(chain.from_iterable(self._rows))]
        starts, key_starts, key_rows = send_numbers(parts, self.device)
        return starts.int(), key_starts.int(), key_rows

    @functools.cached_property
    def _padding(self) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
        # A piece that others continue is computed as a part of one of them.
        begun = {c for c in self.continues if c is not None}
        whole = [rows for i, rows in enumerate(self._rows) if i not in begun]
        shapes, *rows = _pad_plan(whole, sum(self.seq_lens))
        pad_N, unpad_T = send_numbers(rows, self.device)
        return shapes, pad_N, unpad_T

    def _varlen(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Compute a shared prompt's queries once. Its keys are repeated for each sequence."""
        attend, options = varlen_attn()
        assert attend is not None
        cu_q, cu_k, key_rows = self._starts
        if key_rows is not None:
            k_TGK, v_TGK = (x.index_select(0, key_rows) for x in (k_TGK, v_TGK))
        # torch 2.10 has is_causal, later versions have a window. With both, the last query sees the
        # last key if there are fewer queries than keys.
        causal = {"is_causal": True} if "is_causal" in options else {"window_size": (-1, 0)}
        # The kernel supports grouped heads; from 2.12 on its wrapper needs an option for it.
        grouped = {"enable_gqa": True} if "enable_gqa" in options else {}
        longest = max(self.seq_lens)
        longest_keys = max(a + n for a, n in zip(self.offsets, self.seq_lens, strict=True))
        return attend(q_THK, k_TGK, v_TGK, cu_q, cu_k, longest, longest_keys, **causal, **grouped)

    def _padded(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Pad on the right, which needs no mask because causal attention does not see it."""
        shapes, pad_N, unpad_T = self._padding
        # Gather and split all groups at once. The backward of a gather per group would allocate T
        # tokens for each group.
        sizes = [b * s for b, s in shapes]
        padded = [x.index_select(0, pad_N).split(sizes) for x in (q_THK, k_TGK, v_TGK)]
        outs = []
        for shape, *qkv in zip(shapes, *padded, strict=True):
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
            out_BHSK = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
            outs.append(out_BHSK.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, unpad_T)


def _pad_plan(
    sequences: list[list[int]], num_tokens: int
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Group sequences of similar lengths, so that there is little padding and few groups.

    Args:
        sequences: the packed rows of each sequence. Every row is in at least one of them.

    Returns:
        The shape (B, S) of each group; for each token of the flattened and concatenated groups its
        packed row (padding repeats the sequence's first row, which causal attention does not see);
        and for each packed row one of its places among these tokens.
    """
    ordered = sorted(sequences, key=len, reverse=True)
    shapes: list[tuple[int, int]] = []
    pad: list[int] = []
    unpad = [0] * num_tokens
    for members in _group([len(rows) for rows in ordered]):
        longest = len(ordered[members.start])
        shapes.append((len(members), longest))
        for rows in ordered[members.start : members.stop]:
            for place, row in enumerate(rows, len(pad)):
                unpad[row] = place
            pad += rows + [rows[0]] * (longest - len(rows))
    return shapes, pad, unpad


def _group(lengths: list[int]) -> list[range]:
    """Cut descending lengths into groups with padding that costs less than another group."""
    groups, start, padding, tokens = [], 0, 0, 0
    for i, n in enumerate(lengths):
        missing = lengths[start] - n
        if padding + missing > _PADDED_TOKENS + _PADDED_SHARE * (tokens + n):
            groups.append(range(start, i))
            start, padding, tokens, missing = i, 0, 0, 0
        padding, tokens = padding + missing, tokens + n
    return [*groups, range(start, len(lengths))]
