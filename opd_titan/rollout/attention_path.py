"""How rollouts attend to the pages of the cache: which kernel reads them on this device.

Shapes: T query tokens of N sequences, H query heads, G key/value heads, K head size, P pages of a
layer's cache, S tokens of a page, M pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_titan.models import kernels
from opd_titan.models.attention import varlen_attn, why_padded

# (q_THK, keys_PSGK, values_PSGK, table_NM, used_N, starts_N1, max_queries) -> [T, H, K]; see
# `kernels.plain.paged_attention`.
PagedKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class AttentionPath:
    """One way to read the pages.

    Attributes:
        name: "triton" (our kernels), "varlen" (torch's flash kernel), or "pages" (page by page in
            plain PyTorch).
        page_size: tokens in a page that suit it.
        kernel: None for "pages".
        why: what the faster paths lack; empty for the fastest, and on a CPU.
    """

    name: str
    page_size: int
    kernel: PagedKernel | None = None
    why: str = ""

    @property
    def writes_early(self) -> bool:
        """Whether keys and values are written with the rotary embedding, in one kernel."""
        return self.name == "triton"

    def __str__(self) -> str:
        names = {
            "triton": "Triton kernels",
            "varlen": "torch's paged flash kernel",
            "pages": "PyTorch, page by page",
        }
        slow = f" (slow: {self.why})" if self.why else ""
        return f"attention by {names[self.name]}, pages of {self.page_size} tokens{slow}"


def choose_path(head_dim: int, dtype: torch.dtype, device: torch.device) -> AttentionPath:
    """Return the fastest path that this device, type and version of torch have.

    Until measurements on a GPU say otherwise, our kernels come before torch's, which wants pages
    of a multiple of 256 tokens.
    """
    if device.type == "cpu":
        return AttentionPath("pages", 64)
    why = kernels.why_unavailable(device) or kernels.why_wrong_type(dtype)
    if not why and head_dim not in kernels.HEAD_SIZES:
        sizes = ", ".join(map(str, kernels.HEAD_SIZES))
        why = f"the Triton kernels take head sizes {sizes}, not {head_dim}"
    if not why:
        return AttentionPath("triton", 64, _triton)
    varlen, without = _varlen(dtype, device)
    if varlen is not None:
        return AttentionPath("varlen", 256, varlen, why)
    return AttentionPath("pages", 256, None, f"{why}; {without}")


def _triton(
    q_THK: Tensor,
    keys_PSGK: Tensor,
    values_PSGK: Tensor,
    table_NM: Tensor,
    used_N: Tensor,
    starts_N1: Tensor,
    max_queries: int,
) -> Tensor:
    cache = keys_PSGK, values_PSGK, table_NM, used_N
    if max_queries == 1:
        return torch.ops.opd_titan.paged_decode(q_THK, *cache)
    return torch.ops.opd_titan.paged_prefill(q_THK, *cache, starts_N1, max_queries)


def _varlen(dtype: torch.dtype, device: torch.device) -> tuple[PagedKernel | None, str]:
    """Return torch's kernel, from 2.12 on, or why there is none."""
    if kernels.why_wrong_type(dtype) or kernels.why_wrong_device(device):
        return None, "torch's paged kernel does not take it either"
    if why := why_padded(dtype, device):
        return None, why
    attend, known = varlen_attn()
    assert attend is not None
    if "block_table" not in known:
        return None, f"torch {torch.__version__} has no paged kernel, which came with 2.12"
    # One split: what a sequence gets must not depend on how many others there are.
    one_split: dict[str, Any] = {"num_splits": 1} if "num_splits" in known else {}

    def kernel(
        q_THK: Tensor,
        keys_PSGK: Tensor,
        values_PSGK: Tensor,
        table_NM: Tensor,
        used_N: Tensor,
        starts_N1: Tensor,
        max_queries: int,
    ) -> Tensor:
        return attend(
            q_THK,
            keys_PSGK,
            values_PSGK,
            starts_N1,
            F.pad(used_N.cumsum(0, dtype=torch.int32), (1, 0)),
            max_queries,
            table_NM.shape[1] * keys_PSGK.shape[1],
            window_size=(-1, 0),  # causal: the last query sees the last key
            seqused_k=used_N,
            block_table=table_NM,
            enable_gqa=True,
            **one_split,
        )

    return kernel, ""
