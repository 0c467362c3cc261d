"""Sizes of the dense Qwen3 models, for benchmarks and plans that need no weights.

    python benchmarks/qwen3_shapes.py 8B OUT     # writes OUT/config.json

The values are those of the released config.json files (Qwen/Qwen3-0.6B ... Qwen/Qwen3-32B).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "use_sliding_window": False,
    "max_position_embeddings": 40960,
    "initializer_range": 0.02,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, tie_word_embeddings
_SIZES: dict[str, tuple[int, int, int, int, bool]] = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}
_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "tie_word_embeddings",
)
# Widths, depth and vocabulary that a CPU gets through in seconds, for the program's paths alone.
_MINIATURE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 1024,
    "bos_token_id": 1021,
    "eos_token_id": 1023,
}

NAMES = tuple(_SIZES)


def hf_config(name: str, *, miniature: bool = False) -> dict[str, Any]:
    """The config.json of one of `NAMES`.

    Args:
        miniature: tiny, with nothing left of the model but whether its embeddings are tied (and
            for a large one twice the width, so that two models differ).
    """
    config = {**_COMMON, **dict(zip(_KEYS, _SIZES[name], strict=True))}
    if miniature:
        wide = config["hidden_size"] > 2048
        config |= _MINIATURE
        if wide:
            config |= {"hidden_size": 128, "intermediate_size": 256}
    return config


def write_config(name: str, folder: Path, *, miniature: bool = False) -> Path:
    """Write `folder/config.json`, making the folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(hf_config(name, miniature=miniature), indent=2) + "\n"
    path = folder / "config.json"
    path.unlink(missing_ok=True)  # a copied one may be read-only
    path.write_text(text, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=NAMES)
    parser.add_argument("out", type=Path, help="the folder that gets a config.json")
    a = parser.parse_args()
    print(write_config(a.size, a.out) / "config.json")


if __name__ == "__main__":
    main()
