"""Keys and values in pages, and attention over them.

Shapes: L layers, P pages, S tokens of a page, M pages of the longest sequence, N sequences being
decoded, T tokens of a prefill, H query heads, G key/value heads, R query heads of one of them, K
head size, E partial results: one for each page of each sequence.

Which page is whose is the scheduler's part. A sequence's row in a *table* [N, M] lists its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_titan.models.attention import Attend, PackedAttention, paged_varlen_attn
from opd_titan.rollout.scheduler import Chunk


class KVCache:
    """One [P, S, G, K] tensor of keys and one of values per layer.

    Args:
        args: the model's sizes: `n_layers`, `n_kv_heads`, `head_dim`.
        num_pages: those the scheduler gives out. There is one more, at the end, for rows of a
            batch that no sequence is in.
    """

    def __init__(
        self, args: Any, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size, self.num_pages, self.idle_page = page_size, num_pages, num_pages
        self.kernel = paged_varlen_attn(dtype, device, page_size)
        shape = (args.n_layers, num_pages + 1, page_size, args.n_kv_heads, args.head_dim)
        if self.kernel is None:  # a head's keys side by side, as products of a head want them
            shape = (*shape[:2], shape[3], shape[2], shape[4])
        # Zeros, not empty: masked positions are multiplied by 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        if self.kernel is None:
            self.keys, self.values = self.keys.transpose(2, 3), self.values.transpose(2, 3)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def write(
        self, layer: int, page_T: Tensor, offset_T: Tensor, k_TGK: Tensor, v_TGK: Tensor
    ) -> None:
        self.keys[layer][page_T, offset_T] = k_TGK
        self.values[layer][page_T, offset_T] = v_TGK

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to) in all layers."""
        sources, targets = (list(pages) for pages in zip(*copies, strict=True))
        for tensor in (self.keys, self.values):
            tensor[:, targets] = tensor[:, sources]


def bytes_per_token(args: Any, dtype: torch.dtype) -> int:
    """Cache bytes that one token of one sequence takes."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * dtype.itemsize


class PrefillAttention:
    """Causal attention of chunks of prefixes, whose keys and values also go into the cache.

    Args:
        chunks: those that begin their prefix are packed as in training. Only the first may go on
            with one.
    """

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        self.cache, device = cache, cache.device
        places = [(c, p) for c in chunks for p in range(c.start, c.start + len(c.tokens))]
        self.positions_T = torch.tensor([p for _, p in places], device=device)
        pages = [c.pages[p // cache.page_size] for c, p in places]
        self.page_T = torch.tensor(pages, device=device)
        self.offset_T = self.positions_T % cache.page_size
        # Masks and indices are made here, once for all layers.
        goes_on, begin = [c for c in chunks[:1] if c.start], [c for c in chunks if not c.start]
        assert [*goes_on, *begin] == list(chunks)
        self.parts: list[Attend] = [ContinuedAttention(cache, c) for c in goes_on]
        if begin:
            self.parts.append(PackedAttention([len(c.tokens) for c in begin], device))
        self.lengths = [part.positions_T.numel() for part in self.parts]

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        self.cache.write(layer, self.page_T, self.offset_T, k_TGK, v_TGK)
        split = (x.split(self.lengths) for x in (q_THK, k_TGK, v_TGK))
        outs = [part(*qkv, layer) for part, *qkv in zip(self.parts, *split, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class ContinuedAttention:
    """A chunk that goes on with its prefix attends to what is in the cache, itself included."""

    def __init__(self, cache: KVCache, chunk: Chunk) -> None:
        self.cache, n, end = cache, len(chunk.tokens), chunk.start + len(chunk.tokens)
        self.positions_T = torch.arange(chunk.start, end, device=cache.device)

        def int32(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=cache.device)

        self.pages = int32(*chunk.pages)
        if cache.kernel is None:
            self.seen = torch.ones(n, end, dtype=torch.bool, device=cache.device).tril(chunk.start)
        else:
            self.lengths = int32(0, n), int32(0, end), n, end
            self.used = int32(end)

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.cache.kernel is not None:
            return self.cache.kernel(
                q_THK,
                keys,
                values,
                *self.lengths,
                window_size=(-1, 0),  # causal: the last query sees the last key
                seqused_k=self.used,
                block_table=self.pages[None],
            )
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


class DecodeAttention:
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
        self.cache, self.positions_T, self.table_NM = cache, positions_N, table_NM
        number_N = positions_N // cache.page_size
        self.page_T = table_NM.gather(1, number_N[:, None]).squeeze(1).long()
        self.offset_T = positions_N % cache.page_size
        if cache.kernel is None:
            assert parts is not None
            self.parts, self.masks = parts, parts.masks(positions_N, cache.keys.dtype)
        else:
            n = positions_N.numel()
            self.cu_q = torch.arange(n + 1, dtype=torch.int32, device=positions_N.device)
            self.used_N = (positions_N + 1).to(torch.int32)
            self.cu_k = F.pad(self.used_N.cumsum(0, dtype=torch.int32), (1, 0))

    def __call__(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, layer: int) -> Tensor:
        self.cache.write(layer, self.page_T, self.offset_T, k_NGK, v_NGK)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.cache.kernel is None:
            q_NGRK = q_NHK.unflatten(1, (k_NGK.shape[1], -1))
            return self.parts.attend(q_NGRK, keys, values, self.masks).flatten(1, 2)
        longest = self.table_NM.shape[1] * self.cache.page_size
        return self.cache.kernel(
            q_NHK,
            keys,
            values,
            self.cu_q,
            self.cu_k,
            1,
            longest,
            seqused_k=self.used_N,
            block_table=self.table_NM,
        )


class PageParts:
    """Attention page by page, for devices without a kernel that reads through a table.

    A softmax over a sequence is put together from softmaxes over its pages and their normalisers
    (Milakov and Gimelshein 2018, arXiv 1805.02867). The pages in use are read where they are, each
    with the query of one sequence that has it; where several share a page, the others read a copy.

    Args:
        table_NM: pages of each sequence, on the host.
        counts_N: how many of them are in use, on the host.
        page_size: tokens in a page.
    """

    def __init__(
        self, table_NM: Tensor, counts_N: Tensor, page_size: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        used_NM = torch.arange(int(counts_N.max())) < counts_N[:, None]
        row_E, number_E = used_NM.nonzero(as_tuple=True)
        page_E = table_NM[row_E, number_E].long()
        self.in_place = int(page_E.max()) + 1
        # Of the sequences that share a page, the last one reads it where it is.
        entry_E = torch.arange(page_E.numel())
        owner_P = torch.zeros(self.in_place, dtype=torch.int64)
        owner_P.scatter_reduce_(0, page_E, entry_E, "amax")
        copied = owner_P[page_E] != entry_E
        result_E = page_E.clone()
        result_E[copied] = self.in_place + torch.arange(int(copied.sum()))
        result_NM = torch.zeros(used_NM.shape, dtype=torch.int64)
        result_NM[used_NM] = result_E
        self.result_NM = result_NM.to(device)
        self.unused_NM = (~used_NM).to(device)
        # What each result is about: pages in place that nobody has stand for the first sequence.
        self.row_E = torch.cat((row_E[owner_P], row_E[copied])).to(device)
        self.first_E = torch.cat((number_E[owner_P], number_E[copied])).to(device) * page_size
        self.copied_E = page_E[copied].to(device)

    def masks(self, positions_N: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of each result: [E, 1, 1, S], 0 or -inf."""
        column_S = torch.arange(self.page_size, device=positions_N.device)
        left_E = positions_N[self.row_E] - self.first_E
        hidden_ES = column_S > left_E[:, None]
        masks_ES = torch.zeros(hidden_ES.shape, dtype=dtype, device=positions_N.device)
        return masks_ES.masked_fill_(hidden_ES, -torch.inf)[:, None, None, :]

    def attend(
        self, q_NGRK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor, masks_E11S: Tensor
    ) -> Tensor:
        """The attention's output [N, G, R, K]."""
        q_EGRK, n = q_NGRK.index_select(0, self.row_E), self.in_place
        keys, values = keys_PSGK.transpose(1, 2), values_PSGK.transpose(1, 2)
        out_EGRK, lse_EGR = _attend_page(q_EGRK[:n], keys[:n], values[:n], masks_E11S[:n])
        if self.copied_E.numel():
            k, v = (x.index_select(0, self.copied_E) for x in (keys, values))
            more_out, more_lse = _attend_page(q_EGRK[n:], k, v, masks_E11S[n:])
            out_EGRK, lse_EGR = torch.cat((out_EGRK, more_out)), torch.cat((lse_EGR, more_lse))
        shape = self.result_NM.shape
        lse_NMGR = lse_EGR.index_select(0, self.result_NM.flatten()).unflatten(0, shape)
        lse_NMGR.masked_fill_(self.unused_NM[:, :, None, None], -torch.inf)
        out_NMGRK = out_EGRK.index_select(0, self.result_NM.flatten()).unflatten(0, shape)
        share_NMGR1 = lse_NMGR.softmax(dim=1)[..., None]
        # A page that nobody reads may hold NaN, and 0 x NaN is NaN.
        out_NMGRK = out_NMGRK.masked_fill(self.unused_NM[:, :, None, None, None], 0.0)
        return (out_NMGRK * share_NMGR1).sum(dim=1).to(q_NGRK.dtype)


def _attend_page(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention [E, G, R, K] and the logarithm of its normaliser [E, G, R], in fp32."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    lse = scores.logsumexp(dim=3)
    return (scores - lse[..., None]).exp() @ v.float(), lse
