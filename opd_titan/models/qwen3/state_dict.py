"""Names of Qwen3's parameters: Hugging Face's on the left, ours on the right."""

from __future__ import annotations

_GLOBAL_KEYS = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER_KEYS = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}
# With tied weights: a name that a file may contain in addition, and the name of the same tensor.
TIED_HF_KEYS = {"lm_head.weight": "model.embed_tokens.weight"}


def hf_to_native(n_layers: int, tied: bool) -> dict[str, str]:
    """Return our parameter names by the Hugging Face keys of a checkpoint.

    A tied head is left out, because it is the same parameter as the embedding.
    """
    table = dict(_GLOBAL_KEYS)
    if tied:
        for hf in TIED_HF_KEYS:
            del table[hf]
    for i in range(n_layers):
        for hf, native in _LAYER_KEYS.items():
            table[f"model.layers.{i}.{hf}"] = f"layers.{i}.{native}"
    return table
