"""Keys and values of the running sequences, one slot each, and attention over them.

Shapes: L layers, B slots in use, S cache length, T packed tokens, H query heads, G key/value
heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_titan.models.attention import PackedAttention


class KVCache:
    """One [slots, G, S, K] tensor of keys and one of values per layer.

    Args:
        args: the model's sizes: `n_layers`, `n_kv_heads`, `head_dim`.
    """

    def __init__(
        self, args: Any, slots: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (args.n_layers, slots, args.n_kv_heads, max_len, args.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of each source slot to its target slot."""
        for tensor in (self.keys, self.values):
            tensor[:, targets, :, :length] = tensor[:, sources, :, :length]


def bytes_per_token(args: Any, dtype: torch.dtype) -> int:
    """Cache bytes that one token of one sequence takes."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * dtype.itemsize


class PrefillAttention(PackedAttention):
    """Packed attention over whole prompts that also leaves their keys and values in the cache."""

    def __init__(self, cache: KVCache, slots: Sequence[int], seq_lens: Sequence[int]) -> None:
        super().__init__(seq_lens, cache.keys.device)
        self.cache = cache
        device = cache.keys.device
        slot_B = torch.tensor(slots, device=device)
        lens_B = torch.tensor(seq_lens, device=device)
        # With its size given, the host need not wait for the device to add it up.
        self.slot_T = slot_B.repeat_interleave(lens_B, output_size=sum(seq_lens))

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        self.cache.keys[layer][self.slot_T, :, self.positions_T] = k_TGK
        self.cache.values[layer][self.slot_T, :, self.positions_T] = v_TGK
        return super().__call__(q_THK, k_TGK, v_TGK, layer)


class DecodeAttention:
    """One new token per running sequence (T = B), attending to all that came before it.

    Args:
        positions_B: position of each slot's new token; slots 0 to B-1.
        longest: an upper bound on those positions, plus one.
    """

    def __init__(self, cache: KVCache, positions_B: Tensor, longest: int) -> None:
        self.cache = cache
        self.positions_T = positions_B
        self.slot_B = torch.arange(positions_B.numel(), device=positions_B.device)
        self.longest = longest
        column_S = torch.arange(longest, device=positions_B.device)
        self.mask_B11S = (column_S <= positions_B[:, None])[:, None, None, :]

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, layer: int) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slot_B, :, self.positions_T] = k_TGK
        values[self.slot_B, :, self.positions_T] = v_TGK
        n, groups = k_TGK.shape[:2]
        # The query heads of one key/value head stand in for query positions: no key is repeated.
        out = F.scaled_dot_product_attention(
            q_THK.unflatten(1, (groups, -1)),
            keys[:n, :, : self.longest],
            values[:n, :, : self.longest],
            attn_mask=self.mask_B11S,
        )
        return out.flatten(1, 2)
