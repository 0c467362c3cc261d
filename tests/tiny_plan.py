"""Small recipes to plan, and counts of their parameters by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_titan.config import JobConfig
from opd_titan.config.resolve import ResolvedJob, resolve
from opd_titan.plan.cluster import Cluster, GiB

H200 = Cluster(
    world_size=8,
    gpus_per_node=8,
    memory=139.8 * GiB,
    reserve=2.5 * GiB,
    flops=989e12,
    bandwidth=4.8e12,
    node_bandwidth=450e9,
    network_bandwidth=50e9,
)
# Nothing fits that need not be there: all is gathered anew for every micro-batch.
TIGHT = replace(H200, memory=GiB, reserve=0.0)
# D, L, H, G, K, F, V, tied: as in benchmarks/qwen3_shapes.py, and two that take no time.
SIZES = {
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "8B": (4096, 36, 32, 8, 128, 12288, 151936, False),
    "tiny": (128, 2, 8, 8, 32, 256, 1024, True),
    "tiny, a layer more": (128, 3, 8, 8, 32, 256, 1024, True),
    "wide": (256, 3, 8, 8, 32, 512, 1024, False),
    "shallow": (1024, 8, 16, 8, 128, 3072, 151936, True),
}


def write_configs(root: Path) -> None:
    """Of every size a folder with a config.json and nothing else."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings")
    for name, sizes in SIZES.items():
        config = dict(zip(keys, sizes, strict=True))
        config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        config |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "eos_token_id": 1}
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))


def recipe(folder: Path, student: str, teacher: str, *options: Any) -> list[str]:
    """A recipe of these models, as command-line arguments."""
    words = ["--student.hf_path", folder / student, "--teacher.hf_path", folder / teacher]
    words += ["--validation.enable", "false", "--rollout.prompts_per_step", 16]
    words += ["--rollout.group_size", 2, "--data.max_prompt_tokens", 32]
    words += ["--rollout.max_new_tokens", 32, *options]
    return [str(w) for w in words]


def resolved(config: JobConfig, cluster: Cluster) -> ResolvedJob:
    """Return the job of the recipe on the cluster."""
    return resolve(config, "cuda" if cluster.on_cuda else "cpu", cluster.world_size)


def tp(ranks: int) -> tuple[str, int]:
    return "--parallelism.tensor_parallel_degree", ranks


def parameters(size: str, tp: int = 1) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of one rank's share of the weights: of the root's group, and of one layer."""
    d, _, h, g, k, f, v, tied = SIZES[size]
    h, g, f, v = h // tp, g // tp, f // tp, v // tp
    layer = [(h * k, d), (g * k, d), (g * k, d), (d, h * k), (f, d), (f, d), (d, f)]
    head = [(v, d)] * (1 if tied else 2)
    return {"layer": [*layer, (d,), (d,), (k,), (k,)], "root": [*head, (d,)]}


def shard(shapes: list[tuple[int, ...]], ranks: int) -> int:
    """Elements of the first rank's shard, which is never smaller than the others'."""
    return sum(math.ceil(s[0] / ranks) * math.prod(s[1:]) for s in shapes)


def rank_share(size: str, ranks: int, tp: int = 1) -> int:
    parts = parameters(size, tp)
    return SIZES[size][1] * shard(parts["layer"], ranks // tp) + shard(parts["root"], ranks // tp)
