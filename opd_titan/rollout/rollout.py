"""Sampling a step's responses over all ranks, from prompts to gathered samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.collectives import gather_lists
from opd_titan.distributed.stopping import Stopped
from opd_titan.distributed.world import Axis
from opd_titan.models.kernels import uniforms
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.limit import cut
from opd_titan.rollout.sampler import SamplingParams, sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.rollout.share import Share

# Stands for a sample's index in the key of a prompt's choice: no sample has it.
_CHOICE = -1


def divide(
    prompts: Sequence[Prompt], on_policy_fraction: float, stream: tuple[int, ...]
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that the student answers, and those that the data set's own response answers.

    The mixture of generalised knowledge distillation (arXiv 2306.13649), drawn for each prompt:
    with probability `on_policy_fraction` the student answers it.

    Args:
        stream: what the draws depend on besides the prompt: seed and step. Nothing else, so that
            all ranks of any world agree, after a resume too.
    """
    keys = [sequence_key(*stream, p.index, _CHOICE) for p in prompts]
    keys_N = torch.tensor(keys, dtype=torch.int64)
    ours_N = uniforms(keys_N, torch.zeros_like(keys_N)) < on_policy_fraction
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt, ours in zip(prompts, ours_N.tolist(), strict=True):
        parts[0 if ours else 1].append(prompt)
    return parts


def in_order(samples: Sequence[Sample], prompts: Sequence[Prompt]) -> list[Sample]:
    """The samples in the order of the prompts, then of the sample index."""
    place = {p.index: i for i, p in enumerate(prompts)}
    return sorted(samples, key=lambda s: (place[s.prompt.index], s.sample_index))


def sample_responses(
    generator: Generator,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    params: SamplingParams,
    stream: tuple[int, ...],
    dp: Axis,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """Sample every prompt's responses, each rank its share, and give all of them to every rank.

    Tensor-parallel ranks sample the same responses together.

    Args:
        prompts: the same on every rank; there may be none.
        stream: what the random numbers depend on besides prompt and sample: seed and step.
        dp: the ranks that share the prompts among them. All of them call.
        on_tokens: called with the number of tokens just sampled. It may raise Stopped, on all
            tensor-parallel ranks at once.

    Returns:
        In the order of the prompts, then of the sample index, whatever the world size.

    Raises:
        Stopped: on every rank, when one has met it.
    """
    requests = [
        Request(p, i, sequence_key(*stream, p.index, i))
        for p in prompts
        for i in range(samples_per_prompt)
    ]
    share = Share(dp, generator.head.tp, generator.device)
    own: list[Sample] | list[None]
    try:
        own = generator.generate(requests, params, on_tokens, share)
    except Stopped:
        own = [None]  # the others wait for an answer
    everybodys: list[Sample | None] = gather_lists([*own], dp)
    samples = [s for s in everybodys if s is not None]
    if len(samples) < len(everybodys):
        raise Stopped
    return in_order(cut(samples, params.max_tokens), prompts)
