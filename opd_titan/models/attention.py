"""Causal attention over a packed batch: sequences laid end to end, no padding between them.

Shapes: T packed tokens, B sequences, S longest sequence of a group, H query heads, G key/value
heads, K head size.

The model only calls `attend(q_THK, k_TGK, v_TGK, layer)`. Training, scoring, prefill
(`PackedAttention`) and decoding (`rollout.kv_cache`) differ only in the object `attend`.
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

# Padding that a group of sequences may hold: about what starting another group costs (in tokens),
# and a share of its tokens.
_PADDED_TOKENS, _PADDED_SHARE = 32, 1 / 32


@functools.cache
def varlen_attn() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """torch's packed attention and the names of its options, which differ between versions.

    Imported at first use: it is for CUDA only (from Ampere on) and pulls in the compiler.
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
    """The interface of attention: the position of each token, and the mixing of values."""

    positions_T: Tensor

    def slots(self, layer: int) -> CacheSlots | None:
        """Return where keys and values are to be written before the call, if anywhere."""

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor: ...


class PackedAttention:
    """Each token attends to the earlier tokens of its own sequence, and to itself.

    Sequences may begin with the same tokens (the prompt of a group), which are packed once: then a
    sequence is two pieces, one of them shared.

    Args:
        seq_lens: length of each packed piece, in order; their sum is T.
        device: where the index tensors live.
        continues: for each piece the number of the one that it goes on with, which goes on with
            none itself, or None where a sequence begins; left out, every piece is a sequence.
        beside: other numbers that are wanted on the device, and travel in the same copy.

    Attributes:
        beside: these, as int64 tensors.
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
        # Where each piece begins in its sequence.
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
        """For each piece, the packed rows of its sequence up to its own end."""
        ends = [*accumulate(self.seq_lens)]
        own = [list(range(end - n, end)) for n, end in zip(self.seq_lens, ends, strict=True)]
        return [r if c is None else own[c] + r for c, r in zip(self.continues, own, strict=True)]

    @functools.cached_property
    def _starts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the queries and the keys of each piece begin, in the order of the packed kernel.

        And the packed row of each key, where some are seen from several sequences.
        """
        queries = [0, *accumulate(self.seq_lens)]
        if not any(self.offsets):
            (starts,) = send_numbers([queries], self.device)
            # Two tensors: of one, torch 2.15 would take cuDNN's kernel on Hopper, which wants
            # values without gaps between tokens, as products of joined weights do not give them.
            return starts.int(), starts.int(), None
        keys = [0, *accumulate(len(rows) for rows in self._rows)]
        parts = [queries, keys, list(chain.from_iterable(self._rows))]
        starts, key_starts, key_rows = send_numbers(parts, self.device)
        return starts.int(), key_starts.int(), key_rows

    @functools.cached_property
    def _padding(self) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
        # A piece that others go on with is computed as part of one of them.
        begun = {c for c in self.continues if c is not None}
        whole = [rows for i, rows in enumerate(self._rows) if i not in begun]
        shapes, *rows = _pad_plan(whole, sum(self.seq_lens))
        pad_N, unpad_T = send_numbers(rows, self.device)
        return shapes, pad_N, unpad_T

    def _varlen(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """A shared prompt's queries are computed once; its keys are repeated for each sequence."""
        attend, options = varlen_attn()
        assert attend is not None
        cu_q, cu_k, key_rows = self._starts
        if key_rows is not None:
            k_TGK, v_TGK = (x.index_select(0, key_rows) for x in (k_TGK, v_TGK))
        # torch 2.10 says is_causal, later ones say it with a window. Either lets the last query see
        # the last key where there are fewer queries than keys.
        causal = {"is_causal": True} if "is_causal" in options else {"window_size": (-1, 0)}
        # The kernel takes grouped heads as they are; from 2.12 on its wrapper wants to be asked.
        grouped = {"enable_gqa": True} if "enable_gqa" in options else {}
        longest = max(self.seq_lens)
        longest_keys = max(a + n for a, n in zip(self.offsets, self.seq_lens, strict=True))
        return attend(q_THK, k_TGK, v_TGK, cu_q, cu_k, longest, longest_keys, **causal, **grouped)

    def _padded(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Padding on the right needs no mask: causal attention never looks there."""
        shapes, pad_N, unpad_T = self._padding
        # Gathered and split for all groups at once: a backward per group would each take a whole T.
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
        sequences: packed rows of each; all of them together hold every row, some several times.

    Returns:
        The shape (B, S) of each group; for each token of the groups' flattened, concatenated
        inputs its packed row (padding repeats the sequence's first, which causality keeps unseen);
        and for each packed row where it stands there, or one such place.
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
    """Cut descending lengths so that padding costs no more than one group more would."""
    groups, start, padding, tokens = [], 0, 0, 0
    for i, n in enumerate(lengths):
        missing = lengths[start] - n
        if padding + missing > _PADDED_TOKENS + _PADDED_SHARE * (tokens + n):
            groups.append(range(start, i))
            start, padding, tokens, missing = i, 0, 0, 0
        padding, tokens = padding + missing, tokens + n
    return [*groups, range(start, len(lengths))]
