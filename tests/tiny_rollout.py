"""A small Qwen3 with prompts for it, and a model with known responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from tiny_student import ARGS, CPU
from torch import Tensor, nn

from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.world import World
from opd_titan.models import FAMILIES
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.rollout.kv_cache import DecodeAttention
from opd_titan.rollout.sampler import sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.rollout.weights import GeneratorWeights

FAMILY = FAMILIES["qwen3"]
EOS = {3, 17, 40}
# 1 to 40 tokens, so that there are several groups in the padded attention.
LENGTHS = [1, 40, 2, 7, 33, 3, 16, 8, 25, 1, 12, 5]


def tiny(seed: int = 0, **sizes: Any) -> Qwen3Model:
    """Return a model with weights so large that each part of it changes the logits."""
    model = Qwen3Model(replace(ARGS, **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0.0, 0.2, generator=generator)
    return model.requires_grad_(False)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(ARGS.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    # Indices are rows of a source: neither dense nor in order.
    return [Prompt(97 - 5 * i, "", tuple(t)) for i, t in enumerate(ids)]


def requests(some: Sequence[Prompt], samples: int, stream: tuple[int, ...] = (9, 4)) -> list:
    return [Request(p, i, sequence_key(*stream, p.index, i)) for p in some for i in range(samples)]


def summary(samples: Sequence[Sample]) -> list[tuple[int, int, list[int], str]]:
    return [(s.prompt.index, s.sample_index, s.response_ids, s.finish_reason) for s in samples]


def sharded(world: World, dtype: torch.dtype = torch.float32, **sizes: Any) -> Qwen3Model:
    model = tiny(**sizes).requires_grad_(True)
    FAMILY.parallelize(model, world, dtype)
    return model


def follow(
    source: Qwen3Model, dtype: torch.dtype = torch.float32, pack: bool = True
) -> GeneratorWeights:
    weights = GeneratorWeights(source, lambda: Qwen3Model(source.args), dtype, CPU, pack)
    weights.sync()
    return weights


def held(weights: GeneratorWeights, name: str) -> Tensor:
    """Return the weight that the generator computes with."""
    layer = weights.model.get_submodule(name.removesuffix(".weight"))
    packed = getattr(layer, "packed", None)
    return layer.weight if packed is None else packed.to_dense()


class Script(nn.Module):
    """A model with one fixed successor per token: after n comes n - 1, and after 0 again 0."""

    def __init__(self, vocab: int = 100, successors: dict[int, int] | None = None) -> None:
        super().__init__()
        self.args = SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=2)
        table = [(successors or {}).get(n, max(n - 1, 0)) for n in range(vocab)]
        self.next_V = torch.tensor(table)
        self.lm_head = nn.Linear(vocab, vocab, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.decoded: list[int] = []  # rows of each decoding step

    def forward(self, tokens_T: Tensor, attend: Any) -> Tensor:
        if isinstance(attend, DecodeAttention):
            self.decoded.append(tokens_T.numel())
        return 100.0 * nn.functional.one_hot(self.next_V[tokens_T], len(self.next_V)).float()
