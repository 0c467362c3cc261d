"""Attention over the pages of the cache in plain PyTorch, for devices without a kernel for it.

Shapes: P pages, S tokens of a page, M pages of the longest sequence, N sequences being decoded, G
key/value heads, R query heads of one of them, K head size, E partial results: one for each page of
each sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
