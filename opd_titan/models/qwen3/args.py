"""Sizes of a dense Qwen3, read from the checkpoint's `config.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from opd_titan.errors import ModelError


@dataclass(frozen=True)
class Qwen3Args:
    """The sizes of a model. The names in `config.json` are in `_HF_KEYS`."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    tied: bool
    max_seq_len: int
    init_std: float

    @classmethod
    def from_hf_config(cls, config: dict[str, Any], where: str) -> Qwen3Args:
        """Read a Hugging Face config.

        Args:
            config: the parsed `config.json`.
            where: the file's name, for error messages.

        Raises:
            ModelError: a size is missing or impossible, or the config has a setting that this
                implementation does not support.
        """
        _refuse_unsupported(config, where)
        values = {"rope_theta": _rope_theta(config, where)}
        for name, (key, default) in _HF_KEYS.items():
            values[name] = config.get(key, default)
        for f in fields(cls):
            kind, wanted = _KINDS[str(f.type)]
            value = values[f.name]
            right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            if not right or (kind is not bool and not 0 < value < inf):  # also refuses NaN
                key = _HF_KEYS.get(f.name, (f.name,))[0]
                raise ModelError(f"{where}: {key} is {value!r}; expected {wanted}")
        args = cls(**values)
        if args.n_heads % args.n_kv_heads:
            raise ModelError(
                f"{where}: num_attention_heads {args.n_heads} is not a multiple of "
                f"num_key_value_heads {args.n_kv_heads}"
            )
        if args.head_dim % 2:
            raise ModelError(f"{where}: head_dim {args.head_dim} is odd; RoPE needs pairs")
        return args

    def forward_flops(self, seq_lens: Iterable[int], projected_tokens: int) -> float:
        """Return the FLOPs of a forward over causal sequences; an update takes three times as many.

        A token takes 2 for every parameter of Q, K, V, O and the three MLP matrices. A causal
        (query, key) pair takes 4 * head_dim for each head and layer (Q.K and P.V); a sequence of s
        tokens has s (s + 1) / 2 pairs. A projected token takes 2 * dim * vocab_size for the head,
        tied or not. This is the count of PaLM (arXiv 2204.02311, appendix B), but with true lengths
        and causal pairs only.

        Args:
            seq_lens: the number of tokens of each sequence that the model processes.
            projected_tokens: the number of positions that the head projects; it does not project
                prompts.
        """
        tokens = pairs = 0
        for length in seq_lens:
            tokens += length
            pairs += length * (length + 1) // 2
        mixing = 4 * self.n_layers * self.n_heads * self.head_dim * pairs
        head = 2 * self.dim * self.vocab_size * projected_tokens
        return float(2 * self._layer_weights * tokens + mixing + head)

    def decode_bytes(self, forwards: int, cached_tokens: int, dtype_bytes: int) -> float:
        """Return the bytes that decoding with a KV cache reads from memory, which limit its speed.

        A forward reads every matrix of the layers and the head once, tied or not, for any number of
        sequences; norms (1e-4 of a 0.6B's bytes) and the embedding's rows are not counted. In each
        layer a token reads the key and the value of every token that it attends to, including
        itself. This is the count of arXiv 2211.05102, section 2, and of gpt-fast's model-bandwidth
        utilisation, but with true lengths.

        Args:
            forwards: the number of forwards of one token of each running sequence.
            cached_tokens: the number of tokens attended to, summed over forwards and sequences.
            dtype_bytes: the size of a weight, key or value.
        """
        weights = self._layer_weights + self.dim * self.vocab_size
        kv = 2 * self.n_layers * self.n_kv_heads * self.head_dim
        return float(dtype_bytes * (weights * forwards + kv * cached_tokens))

    def activation_bytes(self, tokens: int, mode: str, dtype_bytes: int, ranks: int) -> float:
        """Return an upper bound of the bytes that a forward keeps for its backward on one rank.

        It depends only on the sizes, so that all ranks make the same decisions from it. It is up to
        a quarter more than the planner finds by running the layers on tensors without data, which
        leaves room for keys and values that are repeated for each head (before torch 2.12). One
        additional layer covers recomputed and short-lived tensors.

        Args:
            tokens: the number of tokens of the packed batch.
            mode: the mode of activation checkpointing.
            dtype_bytes: the size of an element of a hidden state.
            ranks: the number of ranks that each layer is split over. Two of a layer's inputs are
                whole on every rank.
        """
        sizes = (
            self.dim,
            self.ffn_dim,
            self.n_heads * self.head_dim,
            self.n_kv_heads * self.head_dim,
        )

        def of_a_layer(mode: str) -> float:
            whole = min(2, _KEPT[mode][0]) * self.dim
            kept = sum(n * size for n, size in zip(_KEPT[mode], sizes, strict=True))
            return whole + (kept - whole) / ranks

        return dtype_bytes * tokens * (self.n_layers * of_a_layer(mode) + of_a_layer("none"))

    @property
    def _layer_weights(self) -> int:
        """The number of parameters of Q, K, V, O and the three MLP matrices of all layers."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.dim * self.ffn_dim)


# By mode of activation checkpointing: the number of tensors that a layer keeps with the width of
# the model, of the MLP, of all queries, and of all keys.
_KEPT = {"none": (5, 4, 5, 4), "selective": (4, 2, 4, 5), "full": (1, 0, 0, 0)}

# The types that a field's value may have in config.json (1 is accepted for 1.0), and their names.
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a positive int"),
    "float": ((int, float), "a positive, finite float"),
    "bool": (bool, "true or false"),
}
# field: (config.json key, default of Hugging Face's Qwen3Config for files without the key)
_HF_KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "dim": ("hidden_size", None),
    "n_layers": ("num_hidden_layers", None),
    "n_heads": ("num_attention_heads", None),
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", 128),
    "ffn_dim": ("intermediate_size", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
    "max_seq_len": ("max_position_embeddings", 32768),
    "init_std": ("initializer_range", 0.02),
}


# transformers 4 writes the first key (null for plain RoPE), transformers 5 the second.
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


def _rope_theta(config: dict[str, Any], where: str) -> Any:
    """Return rope_theta from any of its places, which depend on the version of transformers."""
    tables = [config, *(config.get(key) or {} for key in _ROPE_KEYS)]
    found = [table["rope_theta"] for table in tables if table.get("rope_theta") is not None]
    if not found:
        raise ModelError(f"{where}: rope_theta is missing (also from rope_parameters)")
    if any(theta != found[0] for theta in found[1:]):
        raise ModelError(
            f"{where}: rope_theta is given as {' and as '.join(map(repr, found))}; give one value"
        )
    return found[0]


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    """Raise if the config has a setting that changes results and is not implemented."""
    layer_types = config.get("layer_types") or ["full_attention"]
    checks = {
        "model_type": (config.get("model_type") == "qwen3", "'qwen3'"),
        "use_sliding_window": (not config.get("use_sliding_window"), "false"),
        "layer_types": (
            isinstance(layer_types, list) and all(t == "full_attention" for t in layer_types),
            "a list of 'full_attention' only",
        ),
        "attention_bias": (not config.get("attention_bias"), "false"),
        "attention_dropout": (not config.get("attention_dropout"), "0.0"),
        "hidden_act": (config.get("hidden_act", "silu") == "silu", "'silu'"),
        "quantization_config": (not config.get("quantization_config"), "no quantization"),
        "partial_rotary_factor": (config.get("partial_rotary_factor") in (None, 1.0), "1.0"),
        **{key: (_is_plain_rope(config.get(key)), "plain RoPE") for key in _ROPE_KEYS},
    }
    for key, (supported, what_is) in checks.items():
        if not supported:
            raise ModelError(
                f"{where}: {key} is {config.get(key)!r}, which the native Qwen3 does not "
                f"implement; it supports {what_is}"
            )


def _is_plain_rope(rope: Any) -> bool:
    if not rope:
        return True
    if not isinstance(rope, dict):
        return False
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    return rope_type == "default" and rope.get("partial_rotary_factor") in (None, 1.0)
