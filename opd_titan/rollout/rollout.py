"""Sample a step's responses over all ranks, from prompts to gathered samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.collectives import gather_lists
from opd_titan.distributed.stopping import Stopped
from opd_titan.distributed.world import Axis
from opd_titan.models.kernels import uniforms
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.sampler import SamplingParams, sequence_key
from opd_titan.rollout.scheduler import UNLIMITED, Request, common_length

# Stands for the sample's index in the key of a prompt's draw. No sample has this index.
_CHOICE = -1


def split_on_policy(
    prompts: Sequence[Prompt], on_policy_fraction: float, stream: tuple[int, ...]
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts that the student answers, and the prompts with the data set's response.

    The mixture of generalised knowledge distillation (arXiv 2306.13649), drawn for each prompt: the
    student answers it with probability `on_policy_fraction`.

    Args:
        stream: seed and step. The draws depend only on these and on the prompt, so that all ranks
            of any world agree, also after a resume.
    """
    keys = [sequence_key(*stream, p.index, _CHOICE) for p in prompts]
    keys_N = torch.tensor(keys, dtype=torch.int64)
    ours_N = uniforms(keys_N, torch.zeros_like(keys_N)) < on_policy_fraction
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt, ours in zip(prompts, ours_N.tolist(), strict=True):
        parts[0 if ours else 1].append(prompt)
    return parts


def in_order(samples: Sequence[Sample], prompts: Sequence[Prompt]) -> list[Sample]:
    """Return the samples in the order of the prompts, then of the sample index."""
    place = {p.index: i for i, p in enumerate(prompts)}
    return sorted(samples, key=lambda s: (place[s.prompt.index], s.sample_index))


def cut(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Return the samples cut to the common length at which they have at most `max_tokens` together.

    Args:
        max_tokens: 0 cuts nothing.
    """

    def cut_one(s: Sample, limit: int) -> Sample:
        assert s.student_logprobs is not None
        ids, logprobs = s.response_ids[:limit], s.student_logprobs[:limit]
        return replace(s, response_ids=ids, student_logprobs=logprobs, finish_reason="length")

    limit = common_length((len(s.response_ids) for s in samples), max_tokens or UNLIMITED)
    return [s if len(s.response_ids) <= limit else cut_one(s, limit) for s in samples]


def sample_responses(
    generator: Generator,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    params: SamplingParams,
    stream: tuple[int, ...],
    dp: Axis,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """Sample each prompt's responses on one of the ranks, and return all of them on all ranks.

    Tensor-parallel ranks sample the same responses together.

    Args:
        prompts: the same on all ranks; there may be none.
        stream: seed and step. The random numbers depend on these, the prompt and the sample.
        dp: the ranks that divide the prompts among them. All of them must call.
        on_tokens: called with the number of tokens just sampled. It may raise Stopped, on all
            tensor-parallel ranks at once.

    Returns:
        Samples in the order of the prompts, then of the sample index, for any world size.

    Raises:
        Stopped: on all ranks, if it was raised on one.
    """
    requests = [
        Request(p, i, sequence_key(*stream, p.index, i))
        for p in prompts
        for i in range(samples_per_prompt)
    ]
    own: list[Sample] | list[None]
    try:
        own = generator.generate(requests, params, on_tokens, dp)
    except Stopped:
        own = [None]  # the other ranks wait for an answer
    gathered: list[Sample | None] = gather_lists([*own], dp)
    samples = [s for s in gathered if s is not None]
    if len(samples) < len(gathered):
        raise Stopped
    return in_order(cut(samples, params.max_tokens), prompts)
