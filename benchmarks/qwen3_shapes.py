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
# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, tie_word_embeddings
_SIZES = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}
NAMES = tuple(_SIZES)
# Two layers, with the whole vocabulary: the model of the comparisons on a CPU.
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
# The same with a small vocabulary, which any CPU computes in seconds.
MINIATURE = SMALL | {"vocab_size": 1024, "eos_token_id": 1023, "pad_token_id": 1021}


def write_config(name: str, folder: Path, **changes: object) -> Path:
    """Write `folder/config.json` of one of `NAMES`, with these keys changed; return the folder."""
    width, layers, heads, ffn, tied = _SIZES[name]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    rest = {"intermediate_size": ffn, "tie_word_embeddings": tied}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.unlink(missing_ok=True)  # a copied one may be read-only
    config = {**_COMMON, **sizes, **rest, **changes}
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
