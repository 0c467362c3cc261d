"""Attention to keys and values in the pages of a cache, with the implementations for each device.

Shapes: T query tokens of N sequences, H query heads, G key/value heads, R query heads of one of
them, K head size, P pages of a layer's cache, S tokens of a page, M pages of the longest sequence,
E partial results, one for each page of each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_titan.distributed.transfer import send_numbers
from opd_titan.models import kernels
from opd_titan.models.attention import varlen_attn, why_padded
from opd_titan.models.kernels.device import device_of, why_wrong_type
from opd_titan.models.kernels.plain import PageTable

# (q_THK, keys_PSGK, values_PSGK) of a layer -> [T, H, K]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# (q_THK, keys_PSGK, values_PSGK, pages) -> [T, H, K]; see `kernels.plain.paged_attention`.
PagedKernel = Callable[[Tensor, Tensor, Tensor, PageTable], Tensor]


class PagedAttention:
    """An implementation of attention to the pages of a cache.

    Attributes:
        name: "triton" (our kernels), "varlen" (torch's flash kernel) or "pages" (plain PyTorch).
        page_size: the number of tokens of a page that it works best with.
        why: why a faster implementation is not available; empty for the fastest one, and on a CPU.
        static: whether decoding runs the same operations for all pages. Then a step can be captured
            as a CUDA graph.
        writes_early: whether the kernel of the rotary embedding also writes keys and values.
    """

    static = writes_early = False

    def __init__(self, name: str, page_size: int, why: str = "") -> None:
        self.name, self.page_size, self.why = name, page_size, why

    def __str__(self) -> str:
        names = {
            "triton": "Triton kernels",
            "varlen": "torch's paged flash kernel",
            "pages": "PyTorch, page by page",
        }
        slow = f" (slow: {self.why})" if self.why else ""
        return f"attention by {names[self.name]}, pages of {self.page_size} tokens{slow}"

    def allocate(self, *shape_PSGK: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the pages of a layer's keys or values, set to zero.

        Uninitialised memory may hold NaN. Masked positions are multiplied by 0, and 0 * NaN is NaN.
        """
        return torch.zeros(shape_PSGK, dtype=dtype, device=device)

    def plan(
        self, table_NM: Tensor, counts_N: Tensor, page_size: int, device: torch.device
    ) -> PageParts | None:
        """Return data on the host that decoding uses until the pages change, or None.

        Args:
            table_NM: the pages of each sequence, on the host.
            counts_N: the number of pages in use of each sequence, at least 1, on the host.
        """
        return None

    def decode(self, positions_N: Tensor, table_NM: Tensor, plan: PageParts | None) -> Attention:
        """Return the attention of one token per sequence to itself and all tokens before it.

        Args:
            positions_N: int64, the position of each token.
            table_NM: int32, the pages of each sequence.
            plan: the result of `plan` for these pages.
        """
        raise NotImplementedError

    def resume(self, pages: Sequence[int], start: int, end: int, device: torch.device) -> Attention:
        """Return the causal attention of the tokens from `start` to `end` of one sequence.

        Args:
            pages: the sequence's pages up to `end`.
        """
        raise NotImplementedError


def choose_paged_attention(
    head_dim: int, dtype: torch.dtype, x: Tensor | torch.device
) -> PagedAttention:
    """Return the fastest implementation for the device of `x`, the dtype and torch's version.

    Our kernels come before torch's, which takes only pages of a multiple of 256 tokens.
    """
    device = device_of(x)
    if device.type == "cpu":
        return PageByPage(64, dtype)
    why = device.why_plain or why_wrong_type(dtype)
    if not why and head_dim not in kernels.HEAD_SIZES:
        sizes = ", ".join(map(str, kernels.HEAD_SIZES))
        why = f"the Triton kernels take head sizes {sizes}, not {head_dim}"
    if not why:
        return TableAttention("triton", 64, _triton)
    varlen, without = _varlen(dtype, x)
    if varlen is not None:
        return TableAttention("varlen", 256, varlen, why)
    return PageByPage(256, dtype, f"{why}; {without}")


# ------------------------------------------------------------- through a table


class TableAttention(PagedAttention):
    """Attention by a kernel that finds each sequence's pages in a table."""

    static = True

    def __init__(self, name: str, page_size: int, kernel: PagedKernel, why: str = "") -> None:
        super().__init__(name, page_size, why)
        self.kernel, self.writes_early = kernel, name == "triton"

    def decode(self, positions_N: Tensor, table_NM: Tensor, plan: PageParts | None) -> Attention:
        n, device = positions_N.numel(), positions_N.device
        starts_N1 = torch.arange(n + 1, dtype=torch.int32, device=device)
        pages = PageTable(table_NM, (positions_N + 1).to(torch.int32), starts_N1, 1)
        return lambda q, k, v: self.kernel(q, k, v, pages)

    def resume(self, pages: Sequence[int], start: int, end: int, device: torch.device) -> Attention:
        numbers = send_numbers([pages, [end], [0, end - start]], device)
        pages_M, used_1, starts_2 = (x.int() for x in numbers)
        table = PageTable(pages_M[None], used_1, starts_2, end - start)
        return lambda q, k, v: self.kernel(q, k, v, table)


def _triton(q_THK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor, pages: PageTable) -> Tensor:
    operands = q_THK, keys_PSGK, values_PSGK
    if pages.max_queries == 1:
        return torch.ops.opd_titan.paged_decode(*operands, pages.table_NM, pages.used_N)
    return torch.ops.opd_titan.paged_prefill(*operands, *pages)


def _varlen(dtype: torch.dtype, x: Tensor | torch.device) -> tuple[PagedKernel | None, str]:
    """Return torch's kernel, which came with torch 2.12, or None and the reason."""
    if why_wrong_type(dtype) or device_of(x).why_padded:
        return None, "torch's paged kernel does not take it either"
    if why := why_padded(dtype, x):
        return None, why
    attend, known = varlen_attn()
    assert attend is not None
    if "block_table" not in known:
        return None, f"torch {torch.__version__} has no paged kernel, which came with 2.12"
    # One split, so that a sequence's result does not depend on the number of sequences.
    one_split: dict[str, Any] = {"num_splits": 1} if "num_splits" in known else {}

    def kernel(q_THK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor, pages: PageTable) -> Tensor:
        return attend(
            q_THK,
            keys_PSGK,
            values_PSGK,
            pages.starts_N1,
            F.pad(pages.used_N.cumsum(0, dtype=torch.int32), (1, 0)),
            pages.max_queries,
            pages.table_NM.shape[1] * keys_PSGK.shape[1],
            window_size=(-1, 0),  # causal: the last query sees the last key
            seqused_k=pages.used_N,
            block_table=pages.table_NM,
            enable_gqa=True,
            **one_split,
        )

    return kernel, ""


# ------------------------------------------------------------------ page by page


class PageByPage(PagedAttention):
    """Attention in plain PyTorch, for all devices and types."""

    def __init__(self, page_size: int, dtype: torch.dtype, why: str = "") -> None:
        super().__init__("pages", page_size, why)
        self.dtype = dtype

    def allocate(self, *shape_PSGK: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        # The keys of a head are stored together, because products are computed per head.
        p, s, g, k = shape_PSGK
        return torch.zeros(p, g, s, k, dtype=dtype, device=device).transpose(1, 2)

    def plan(
        self, table_NM: Tensor, counts_N: Tensor, page_size: int, device: torch.device
    ) -> PageParts:
        return PageParts(table_NM, counts_N, page_size, device)

    def decode(self, positions_N: Tensor, table_NM: Tensor, plan: PageParts | None) -> Attention:
        assert plan is not None
        masks_E11S = plan.masks(positions_N, self.dtype)  # once for all layers
        return lambda q, k, v: plan.attend(q, k, v, masks_E11S)

    def resume(self, pages: Sequence[int], start: int, end: int, device: torch.device) -> Attention:
        (pages_M,) = send_numbers([pages], device)
        seen = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start)

        def attend(q_THK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor) -> Tensor:
            # Heads are repeated: with a mask and fewer key/value heads, CUDA has no kernel that
            # keeps the scores out of memory.
            repeats = q_THK.shape[1] // keys_PSGK.shape[2]
            k, v = (
                x.index_select(0, pages_M).flatten(0, 1)[:end].repeat_interleave(repeats, dim=1)
                for x in (keys_PSGK, values_PSGK)
            )
            q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return out[0].transpose(0, 1)

        return attend


class PageParts:
    """Decoding attention that combines the results of single pages.

    The softmax over a sequence is computed from the softmaxes over its pages and their normalisers
    (Milakov and Gimelshein 2018, arXiv 1805.02867). A page in use is read in place with the query
    of one sequence. If several sequences share a page, the others read copies of it.

    Args:
        table_NM: the pages of each sequence, on the host.
        counts_N: the number of pages in use of each sequence, on the host.
    """

    def __init__(
        self, table_NM: Tensor, counts_N: Tensor, page_size: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        used_NM = torch.arange(int(counts_N.max())) < counts_N[:, None]
        row_E, number_E = used_NM.nonzero(as_tuple=True)
        page_E = table_NM[row_E, number_E].long()
        self.in_place = int(page_E.max()) + 1
        # The last of the sequences that share a page reads it in place.
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
        # The row and first position of each result. A page in place that belongs to no sequence
        # is computed with the first row.
        self.row_E = torch.cat((row_E[owner_P], row_E[copied])).to(device)
        self.first_E = torch.cat((number_E[owner_P], number_E[copied])).to(device) * page_size
        self.copied_E = page_E[copied].to(device)

    def masks(self, positions_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the summand of the scores of each result, 0 or -inf: [E, 1, 1, S]."""
        column_S = torch.arange(self.page_size, device=positions_N.device)
        left_E = positions_N[self.row_E] - self.first_E
        hidden_ES = column_S > left_E[:, None]
        masks_ES = torch.zeros(hidden_ES.shape, dtype=dtype, device=positions_N.device)
        return masks_ES.masked_fill_(hidden_ES, -torch.inf)[:, None, None, :]

    def attend(
        self, q_NHK: Tensor, keys_PSGK: Tensor, values_PSGK: Tensor, masks_E11S: Tensor
    ) -> Tensor:
        """Return the attention's output [N, H, K]."""
        q_NGRK, n = q_NHK.unflatten(1, (keys_PSGK.shape[2], -1)), self.in_place
        q_EGRK = q_NGRK.index_select(0, self.row_E)
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
        # A page that no sequence reads may hold NaN, and 0 * NaN is NaN.
        out_NMGRK = out_NMGRK.masked_fill(self.unused_NM[:, :, None, None, None], 0.0)
        return (out_NMGRK * share_NMGR1).sum(dim=1).to(q_NHK.dtype).flatten(1, 2)


def _attend_page(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax attention [E, G, R, K] and its log-normaliser [E, G, R], in fp32."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    lse = scores.logsumexp(dim=3)
    return (scores - lse[..., None]).exp() @ v.float(), lse
