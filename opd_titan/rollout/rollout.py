"""Sampling a step's responses over all ranks, from prompts to gathered samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.collectives import gather_lists
from opd_titan.distributed.world import Axis
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.limit import cut
from opd_titan.rollout.sampler import SamplingParams, sequence_key
from opd_titan.rollout.scheduler import Request
from opd_titan.rollout.share import Share


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
        prompts: the same on every rank.
        stream: what the random numbers depend on besides prompt and sample: seed and step.
        dp: the ranks that share the prompts among them. All of them call.

    Returns:
        In the order of the prompts, then of the sample index, whatever the world size.
    """
    requests = [
        Request(p, i, sequence_key(*stream, p.index, i))
        for p in prompts
        for i in range(samples_per_prompt)
    ]
    share = Share(dp, generator.head.tp, generator.device)
    samples = gather_lists(generator.generate(requests, params, on_tokens, share), dp)
    samples = cut(samples, params.max_tokens)
    place = {p.index: i for i, p in enumerate(prompts)}
    return sorted(samples, key=lambda s: (place[s.prompt.index], s.sample_index))
