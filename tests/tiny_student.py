"""A tiny Qwen3, samples for it, and plain arithmetic over full logits to compare the head with.

Nothing here uses `opd_titan.distill` or `models.logits`, which are what is compared.

Shapes: T tokens, R response tokens, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_titan.data.types import Prompt, Sample
from opd_titan.models.attention import PackedAttention
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.models.qwen3.model import Qwen3Model

CPU = torch.device("cpu")
ARGS = Qwen3Args(
    vocab_size=61,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied=False,
    max_seq_len=128,
    init_std=0.02,
)


def tiny_qwen3(vocab: int = 11, *, tied: bool = True, seed: int = 0, dim: int = 16) -> Qwen3Model:
    """Return a model of two layers with grouped queries, fp32, and fairly peaked distributions."""
    args = replace(ARGS, vocab_size=vocab, dim=dim, ffn_dim=24, tied=tied)
    torch.manual_seed(seed)
    model = Qwen3Model(args)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.normal_(0.0, 1.2 / dim**0.5)
    return model


def make_sample(
    prompt_ids: Sequence[int], response_ids: Sequence[int], index: int = 0, **fields: Any
) -> Sample:
    prompt = Prompt(index, "", tuple(prompt_ids))
    return Sample(prompt, 0, list(response_ids), "length", **fields)


def random_samples(
    lengths: Sequence[tuple[int, int]], vocab: int = 11, seed: int = 0, noise: float = 0.3
) -> list[Sample]:
    """Return samples of (prompt, response) lengths, with random log-probs of every model."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i, (prompt, response) in enumerate(lengths):
        ids = torch.randint(vocab, (prompt + response,), generator=generator).tolist()
        s = make_sample(ids[:prompt], ids[prompt:], i)
        rows = torch.randn(3, response, generator=generator) * noise - 2.0
        s.student_logprobs, s.teacher_logprobs, s.reference_logprobs = rows.unbind()
        samples.append(s)
    return samples


def response_logits(model: Qwen3Model, sample: Sample) -> Tensor:
    """Return the full logits [R, V] that predict the response, from one unpacked forward."""
    ids = [*sample.prompt.token_ids, *sample.response_ids]
    logits_TV = model(
        torch.tensor(ids), PackedAttention([len(ids)], CPU), lambda h_TD, w_VD: h_TD @ w_VD.t()
    )
    return logits_TV[len(sample.prompt.token_ids) - 1 : -1]


def naive_logprobs(model: Qwen3Model, sample: Sample, temperature: float = 1.0) -> Tensor:
    """Return the log-probs [R] of the response by log_softmax over full logits."""
    logprobs_RV = (response_logits(model, sample) / temperature).log_softmax(1)
    return logprobs_RV[torch.arange(len(sample.response_ids)), torch.tensor(sample.response_ids)]


def with_rollout_logprobs(model: Qwen3Model, samples: list[Sample]) -> list[Sample]:
    """Return the samples as if `model` had just sampled them at temperature 1."""
    with torch.no_grad():
        for s in samples:
            s.student_logprobs = naive_logprobs(model, s)
    return samples


def naive_kept(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return which tokens [N, V] top-k, then top-p keep, by a loop over each sorted row."""
    kept_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
    for row, kept_V in zip(logits_NV.detach().double(), kept_NV, strict=True):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))  # noqa: B023
        ranked = ranked[: top_k or len(ranked)]
        probs = row[ranked].softmax(0).tolist()
        mass = 0.0
        for token, p in zip(ranked, probs, strict=True):
            if mass >= top_p:
                break
            kept_V[token] = True
            mass += p
    return kept_NV


def all_responses(vocab: int, stop: int, max_new_tokens: int) -> list[tuple[int, ...]]:
    """Return all responses: each ends with the stop token, or at the length limit."""
    responses = []
    for n in range(1, max_new_tokens + 1):
        for ids in product(range(vocab), repeat=n):
            ended = ids[-1] == stop or n == max_new_tokens
            if ended and stop not in ids[:-1]:
                responses.append(ids)
    return responses


@contextmanager
def one_process_group() -> Iterator[None]:
    """Enter a process group of one process, for collectives of the code under test."""
    if dist.is_initialized():
        assert dist.get_world_size() == 1
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation inside it returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out
