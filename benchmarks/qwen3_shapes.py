"""Sizes of the dense Qwen3 models, for benchmarks and plans that need no weights.

    python benchmarks/qwen3_shapes.py 8B OUT     # writes OUT/config.json

The values are those of the released config.json files (Qwen/Qwen3-0.6B to Qwen/Qwen3-32B).
"""

from __future__ import annotations

import argparse
import json
import shutil
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
_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "tie_word_embeddings",
)
_SIZES = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}
# What a CPU computes in seconds. The larger models are wider than the others, so that two differ.
_MINIATURE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
    "bos_token_id": 1021,
    "eos_token_id": 1023,
}
# Two layers below a full vocabulary: the model of the comparisons with TRL and vLLM on a CPU.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "pad_token_id": 151643,
}

NAMES = tuple(_SIZES)


def hf_config(name: str, *, miniature: bool = False) -> dict[str, Any]:
    """Return the config.json of one of `NAMES`, or of a tiny model in its place."""
    config = {**_COMMON, **dict(zip(_KEYS, _SIZES[name], strict=True))}
    if miniature:
        width = 128 if config["hidden_size"] > 2048 else 64
        config |= {**_MINIATURE, "hidden_size": width, "intermediate_size": 2 * width}
    return config


def write_config(name: str, folder: Path, *, miniature: bool = False, **changes: object) -> Path:
    """Write `folder/config.json`, with these keys changed, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**hf_config(name, miniature=miniature), **changes}
    path = folder / "config.json"
    path.unlink(missing_ok=True)  # a copied one may be read-only
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def write_model(name: str, folder: Path, tokenizer: Path, **changes: object) -> Path:
    """Write a model folder without weights: a tokenizer's files, and config.json as above."""
    without = shutil.ignore_patterns("*.safetensors*")
    shutil.copytree(tokenizer, folder, ignore=without, dirs_exist_ok=True)
    return write_config(name, folder, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=NAMES)
    parser.add_argument("out", type=Path, help="the folder that gets a config.json")
    a = parser.parse_args()
    print(write_config(a.size, a.out) / "config.json")


if __name__ == "__main__":
    main()
