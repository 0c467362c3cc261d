"""A limit on the response tokens of a rollout, all responses together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from opd_titan.data.types import Sample

UNLIMITED = 1 << 62


def common_length(lengths: Iterable[int], max_tokens: int) -> int:
    """The greatest length to which all responses can be cut to have so many tokens together.

    It depends on the responses alone, not on which of them were sampled first or together. Of
    responses that go on it says too much, never too little.
    """
    left, waiting = max_tokens, sorted(lengths, reverse=True)
    while waiting:
        if waiting[-1] * len(waiting) > left:
            return left // len(waiting)
        left -= waiting.pop()
    return UNLIMITED


def cut(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Samples without what is beyond their common length. max_tokens 0 cuts nothing."""

    def cut_one(s: Sample, limit: int) -> Sample:
        assert s.student_logprobs is not None
        ids, logprobs = s.response_ids[:limit], s.student_logprobs[:limit]
        return replace(s, response_ids=ids, student_logprobs=logprobs, finish_reason="length")

    limit = common_length((len(s.response_ids) for s in samples), max_tokens or UNLIMITED)
    return [s if len(s.response_ids) <= limit else cut_one(s, limit) for s in samples]
