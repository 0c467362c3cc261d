"""Qwen3 (dense), on packed tokens.

Shapes: T packed tokens, D model width, H query heads, G key/value heads, K head size, V vocabulary.

Reference: Qwen3 Technical Report, arXiv 2505.09388. Pre-norm blocks, grouped-query attention with
RMSNorm of each query and key head *before* rotate-half RoPE, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opd_titan.distributed.tensor_parallel import local
from opd_titan.models import kernels
from opd_titan.models.attention import Attend
from opd_titan.models.kernels import CacheSlots
from opd_titan.models.layers import Embedding, Linear, RMSNorm, products
from opd_titan.models.qwen3.args import Qwen3Args

Rope = tuple[Tensor, Tensor]


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> Rope:
    """Return cosine and sine of each position's angles, fp32 [T, 1, K] each (1 for the heads)."""
    exponent = torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim
    angles = positions_T.float()[:, None] / theta**exponent
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    def __init__(self, args: Qwen3Args) -> None:
        super().__init__()
        self.head_dim, self.eps = args.head_dim, args.norm_eps
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.q_norm = RMSNorm(args.head_dim, eps=args.norm_eps)
        self.k_norm = RMSNorm(args.head_dim, eps=args.norm_eps)

    def forward(
        self, x_TD: Tensor, rope: Rope, slots: CacheSlots | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [T, H, K], keys and values [T, G, K].

        Args:
            slots: where the keys and values are also written.
        """
        # -1, because under tensor parallelism a rank has only some of the heads.
        q_THK, k_TGK, v_TGK = (
            x.unflatten(-1, (-1, self.head_dim)) for x in products(x_TD, self.wq, self.wk, self.wv)
        )
        q_weight, k_weight = local(self.q_norm.weight), local(self.k_norm.weight)
        q_THK, k_TGK = kernels.norm_rope(
            q_THK, k_TGK, v_TGK, q_weight, k_weight, self.eps, *rope, slots
        )
        return q_THK, k_TGK, v_TGK


class FeedForward(nn.Module):
    def __init__(self, args: Qwen3Args) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = products(x_TD, self.w1, self.w3)
        return self.w2(kernels.silu_mul(gate_TF, up_TF))


class Block(nn.Module):
    """One layer: two halves, and the attention between them.

    The halves are functions of tensors only, so that they can be compiled, and recomputed in the
    backward, for any `attend`. A block takes and returns two tensors instead of their sum, so that
    one kernel can compute the sum and the norm that follows it.
    """

    def __init__(self, args: Qwen3Args, layer: int) -> None:
        super().__init__()
        self.layer, self.eps = layer, args.norm_eps
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.feed_forward = FeedForward(args)

    def before_attention(
        self, x_TD: Tensor, added_TD: Tensor | None, rope: Rope, slots: CacheSlots | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sum x + added [T, D], then queries [T, H, K], keys and values [T, G, K]."""
        if added_TD is None:
            normed_TD = self.attention_norm(x_TD)
        else:
            weight_D = local(self.attention_norm.weight)
            x_TD, normed_TD = kernels.add_norm(x_TD, added_TD, weight_D, self.eps)
        return x_TD, *self.attention(normed_TD, rope, slots)

    def after_attention(self, x_TD: Tensor, mixed_THK: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors [T, D]; their sum is the block's output."""
        added_TD = self.attention.wo(mixed_THK.flatten(1))
        weight_D = local(self.ffn_norm.weight)
        h_TD, normed_TD = kernels.add_norm(x_TD, added_TD, weight_D, self.eps)
        return h_TD, self.feed_forward(normed_TD)

    def forward(
        self, x_TD: Tensor, added_TD: Tensor | None, rope: Rope, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        slots = attend.slots(self.layer)
        x_TD, q_THK, k_TGK, v_TGK = self.before_attention(x_TD, added_TD, rope, slots)
        return self.after_attention(x_TD, attend(q_THK, k_TGK, v_TGK, self.layer))


class Qwen3Model(nn.Module):
    """The decoder. Training, scoring, prefill and decoding use the same forward."""

    def __init__(self, args: Qwen3Args) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.lm_head = Linear(args.dim, args.vocab_size, bias=False)
        self.tie_weights()

    def layers_with_one_input(self) -> list[list[Linear]]:
        """Return groups of layers with the same input; see `layers.join`."""
        block: Any
        found: list[list[Linear]] = []
        for block in self.layers:
            attention, feed_forward = block.attention, block.feed_forward
            found.append([attention.wq, attention.wk, attention.wv])
            found.append([feed_forward.w1, feed_forward.w3])
        return found

    def tie_weights(self) -> None:
        """Make head and embedding one parameter, if the config says so."""
        if self.args.tied:
            self.lm_head.weight = self.tok_embeddings.weight

    def assert_tied(self) -> None:
        """Check that tied weights are one parameter. Some transforms replace parameters."""
        if self.args.tied:
            same = self.lm_head.weight is self.tok_embeddings.weight
            assert same, "a transform has untied head and embedding"

    def forward(
        self,
        tokens_T: Tensor,
        attend: Attend,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Run the decoder.

        Args:
            tokens_T: packed token ids.
            attend: the positions of the tokens, and the attention between them.
            head: called with the final hidden states [T, D] and the head's weight [V, D], or a
                rank's rows of it. It runs *inside* this forward, because FSDP has the weight
                gathered only here. It projects the hidden states that it needs in chunks, so that
                no tensor [T, V] is needed.

        Returns:
            The result of `head`, or the hidden states [T, D] without a head.
        """
        rope = rope_tables(attend.positions_T, self.args.head_dim, self.args.rope_theta)
        h_TD, added_TD = self.tok_embeddings(tokens_T), None
        for layer in self.layers:
            h_TD, added_TD = layer(h_TD, added_TD, rope, attend)
        h_TD = self.norm(h_TD + added_TD)
        return h_TD if head is None else head(h_TD, self.lm_head.weight)
