"""Keys and values in pages, and the attention of prefill and decoding, which writes and reads them.

Shapes: P pages, S tokens of a page, M pages of the longest sequence, N sequences, T tokens, H query
heads, G key/value heads, K head size.

The scheduler decides which sequence has which page. A row of a *table* [N, M] lists the pages of a
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_titan.distributed.transfer import send
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels import CacheSlots, plain
from opd_titan.models.kernels.paged import PagedAttention, PageParts
from opd_titan.rollout.scheduler import Chunk


class KVCache:
    """The pages of all layers: for each layer a tensor [P, S, G, K] of keys and one of values.

    Args:
        args: the model's sizes: `n_layers`, `n_kv_heads`, `head_dim`.
        num_pages: pages for the scheduler. One more page, at the end, is for rows of a batch
            without a sequence.
        path: how the pages are read.
    """

    def __init__(
        self,
        args: Any,
        num_pages: int,
        page_size: int,
        path: PagedAttention,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size, self.num_pages, self.idle_page = page_size, num_pages, num_pages
        self.path, self.device = path, device
        # One tensor per layer, because smaller allocations fit between others.
        shape = num_pages + 1, page_size, args.n_kv_heads, args.head_dim
        self.keys, self.values = (
            [path.allocate(*shape, dtype=dtype, device=device) for _ in range(args.n_layers)]
            for _ in range(2)
        )

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to) in all layers."""
        sources, targets = send(torch.tensor(copies), self.device).unbind(1)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))


def bytes_per_token(args: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token of one sequence in the cache."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * dtype.itemsize


class _CachedAttention:
    """Attention that first writes the keys and values of its tokens into the cache.

    Args:
        page_T: int64, the page of each token.
    """

    def __init__(self, cache: KVCache, positions_T: Tensor, page_T: Tensor) -> None:
        self.cache, self.positions_T = cache, positions_T
        self.page_T, self.offset_T = page_T, positions_T % cache.page_size

    def _slots(self, layer: int) -> CacheSlots:
        cache = self.cache
        return CacheSlots(cache.keys[layer], cache.values[layer], self.page_T, self.offset_T)

    def slots(self, layer: int) -> CacheSlots | None:
        return self._slots(layer) if self.cache.path.writes_early else None

    def write(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        if not self.cache.path.writes_early:
            plain.write(self._slots(layer), k_TGK, v_TGK)


class PrefillAttention(_CachedAttention):
    """Causal attention of chunks of prefixes.

    Args:
        chunks: only the first may continue a prefix, and attends to the cache. The others begin
            theirs and are packed, as in training.
    """

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        device = cache.device
        places = [(c, p) for c in chunks for p in range(c.start, c.start + len(c.tokens))]
        pages = [c.pages[p // cache.page_size] for c, p in places]
        positions = [p for _, p in places]
        super().__init__(cache, *send(torch.tensor([positions, pages]), device))
        # Masks and indices are made here, once for all layers.
        first, self.continued = chunks[0], 0
        if first.start:
            self.continued = len(first.tokens)
            end = first.start + self.continued
            self.resume = cache.path.resume(first.pages, first.start, end, device)
        begin = [len(c.tokens) for c in chunks[bool(first.start) :]]
        assert not any(c.start for c in chunks[1:])
        self.packed = PackedAttention(begin, device) if begin else None

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        self.write(layer, k_TGK, v_TGK)
        n, outs = self.continued, []
        if n:
            outs.append(self.resume(q_THK[:n], self.cache.keys[layer], self.cache.values[layer]))
        if self.packed is not None:
            outs.append(self.packed(q_THK[n:], k_TGK[n:], v_TGK[n:], layer))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class DecodeAttention(_CachedAttention):
    """Attention of one new token per sequence to itself and all tokens before it.

    Args:
        positions_N: the position of each sequence's new token.
        table_NM: int32, the pages of each sequence.
        plan: the result of `PagedAttention.plan` for these pages.
    """

    def __init__(
        self,
        cache: KVCache,
        positions_N: Tensor,
        table_NM: Tensor,
        plan: PageParts | None,
    ) -> None:
        number_N1 = (positions_N // cache.page_size)[:, None]
        super().__init__(cache, positions_N, table_NM.gather(1, number_N1).squeeze(1).long())
        self.attend = cache.path.decode(positions_N, table_NM, plan)

    def __call__(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layer: int) -> Tensor:
        self.write(layer, k_NGK, v_NGK)
        return self.attend(q_NHK, self.cache.keys[layer], self.cache.values[layer])
