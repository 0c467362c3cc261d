"""Keys and values in pages, and what attends to them.

Shapes: P pages, S tokens of a page, M pages of the longest sequence, N sequences, T tokens, H query
heads, G key/value heads, K head size.

Which page is whose is the scheduler's part. A sequence's row in a *table* [N, M] lists its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_titan.distributed.transfer import send, send_numbers
from opd_titan.models.attention import Attend, PackedAttention
from opd_titan.models.kernels import CacheSlots, plain
from opd_titan.rollout.attention_path import AttentionPath
from opd_titan.rollout.page_parts import PageParts
from opd_titan.rollout.scheduler import Chunk


class KVCache:
    """A tensor [P, S, G, K] of keys and one of values for each layer.

    Args:
        args: the model's sizes: `n_layers`, `n_kv_heads`, `head_dim`.
        num_pages: those the scheduler gives out. There is one more, at the end, for rows of a
            batch that no sequence is in.
        path: what reads the pages.
    """

    def __init__(
        self,
        args: Any,
        num_pages: int,
        page_size: int,
        path: AttentionPath,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size, self.num_pages, self.idle_page = page_size, num_pages, num_pages
        self.path, self.device, self.dtype = path, device, dtype
        by_head = path.kernel is None  # a head's keys side by side, as products of a head want them
        shape = (num_pages + 1, page_size, args.n_kv_heads, args.head_dim)
        if by_head:
            shape = (shape[0], shape[2], shape[1], shape[3])

        def pages() -> Tensor:
            # Zeros, not empty: masked positions are multiplied by 0, and 0 x NaN is NaN.
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            return zeros.transpose(1, 2) if by_head else zeros

        # One tensor a layer: pieces of this size find room between what else is allocated.
        self.keys = [pages() for _ in range(args.n_layers)]
        self.values = [pages() for _ in range(args.n_layers)]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to) in all layers."""
        sources, targets = send(torch.tensor(copies), self.device).unbind(1)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))


def bytes_per_token(args: Any, dtype: torch.dtype) -> int:
    """Return the cache bytes that one token of one sequence takes."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * dtype.itemsize


class _Writing:
    """Attention that begins with writing new tokens' keys and values into the cache.

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


class PrefillAttention(_Writing):
    """Causal attention of chunks of prefixes, whose keys and values also go into the cache.

    Args:
        chunks: those that begin their prefix are packed as in training. Only the first may go on
            with one.
    """

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        device = cache.device
        places = [(c, p) for c in chunks for p in range(c.start, c.start + len(c.tokens))]
        pages = [c.pages[p // cache.page_size] for c, p in places]
        positions = [p for _, p in places]
        super().__init__(cache, *send(torch.tensor([positions, pages]), device))
        # Masks and indices are made here, once for all layers.
        goes_on, begin = [c for c in chunks[:1] if c.start], [c for c in chunks if not c.start]
        assert [*goes_on, *begin] == list(chunks)
        self.parts: list[Attend] = [ContinuedAttention(cache, c) for c in goes_on]
        if begin:
            self.parts.append(PackedAttention([len(c.tokens) for c in begin], device))
        self.lengths = [part.positions_T.numel() for part in self.parts]

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        self.write(layer, k_TGK, v_TGK)
        split = (x.split(self.lengths) for x in (q_THK, k_TGK, v_TGK))
        outs = [part(*qkv, layer) for part, *qkv in zip(self.parts, *split, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class ContinuedAttention:
    """A chunk that goes on with its prefix attends to what is in the cache, itself included."""

    def __init__(self, cache: KVCache, chunk: Chunk) -> None:
        self.cache, self.num_tokens = cache, len(chunk.tokens)
        end = chunk.start + self.num_tokens
        self.positions_T = torch.arange(chunk.start, end, device=cache.device)

        numbers = send_numbers([chunk.pages, [end], [0, self.num_tokens]], cache.device)
        self.pages, self.used, self.starts = (x.int() for x in numbers)
        if cache.path.kernel is None:
            seen = torch.ones(self.num_tokens, end, dtype=torch.bool, device=cache.device)
            self.seen = seen.tril(chunk.start)

    def slots(self, layer: int) -> CacheSlots | None:
        return None

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        keys, values, kernel = (
            self.cache.keys[layer],
            self.cache.values[layer],
            self.cache.path.kernel,
        )
        if kernel is not None:
            table_1M = self.pages[None]
            return kernel(q_THK, keys, values, table_1M, self.used, self.starts, self.num_tokens)
        # Repeated here: with a mask and fewer key/value heads, CUDA has no kernel that keeps the
        # scores out of memory.
        end, repeats = self.seen.shape[1], q_THK.shape[1] // k_TGK.shape[1]
        k, v = (
            x.index_select(0, self.pages).flatten(0, 1)[:end].repeat_interleave(repeats, dim=1)
            for x in (keys, values)
        )
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)
        return out[0].transpose(0, 1)


class DecodeAttention(_Writing):
    """One new token per sequence, attending to all that came before it.

    Args:
        positions_N: of each sequence's new token.
        table_NM: pages of each sequence, int32.
        parts: how to go over the pages where no kernel takes the table; see there.
    """

    def __init__(
        self,
        cache: KVCache,
        positions_N: Tensor,
        table_NM: Tensor,
        parts: PageParts | None = None,
    ) -> None:
        number_N1 = (positions_N // cache.page_size)[:, None]
        super().__init__(cache, positions_N, table_NM.gather(1, number_N1).squeeze(1).long())
        self.table_NM = table_NM
        if cache.path.kernel is None:
            assert parts is not None
            self.parts, self.masks = parts, parts.masks(positions_N, cache.dtype)
        else:
            n, device = positions_N.numel(), positions_N.device
            self.starts_N1 = torch.arange(n + 1, dtype=torch.int32, device=device)
            self.used_N = (positions_N + 1).to(torch.int32)

    def __call__(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layer: int) -> Tensor:
        self.write(layer, k_NGK, v_NGK)
        keys, values, kernel = (
            self.cache.keys[layer],
            self.cache.values[layer],
            self.cache.path.kernel,
        )
        if kernel is not None:
            return kernel(q_NHK, keys, values, self.table_NM, self.used_N, self.starts_N1, 1)
        q_NGRK = q_NHK.unflatten(1, (k_NGK.shape[1], -1))
        return self.parts.attend(q_NGRK, keys, values, self.masks).flatten(1, 2)
