"""Simulate a rollout without data: the scheduler runs all steps, the model only the largest ones.

A rollout has thousands of decoding steps, too many even for tensors without data. The scheduler,
which is plain Python, runs all of them, and the runner only records them. Then the runner runs the
largest prefill and the largest decoding step, which represent the others.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from opd_titan.models.kernels.paged import PageParts
from opd_titan.rollout.runner import Runner, bucket
from opd_titan.rollout.scheduler import Chunk, SequenceState, Work


class PlannedRunner(Runner):
    """A runner that only records its work; `run_prefill` and `run_decode` run the largest parts.

    Args:
        response_tokens: the length of each response.

    Attributes:
        chunks: the chunks of all prefills, as (start, end) in their prefix.
        num_prefills: forwards of prefills.
        num_decodes: forwards of decoding steps.
        num_rows: rows of all decoding steps, idle ones included.
        graph_memory: takes as much memory as CUDA graphs keep; never read.
    """

    graph_memory: Tensor | None = None

    def __init__(self, *args: Any, response_tokens: int) -> None:
        super().__init__(*args)
        self.response_tokens = response_tokens
        self.chunks: list[tuple[int, int]] = []
        self.num_prefills = self.num_decodes = self.num_rows = 0
        self._prefill: Sequence[Chunk] = ()  # of the forward with the most tokens
        self._pages: list[list[int]] = []  # of each sequence in the decoding step with the most
        self._most = (0, 0)
        self._first: dict[SequenceState, int] = {}  # the step of each sequence's first token

    @property
    def num_prefilled(self) -> int:
        """Tokens of all prefills."""
        return sum(end - start for start, end in self.chunks)

    # ------------------------------------------------------------------ recording

    def run(self, work: Work) -> Any:
        for s, _, sampled in work.preempted:
            s.response, s.logprobs = [0] * sampled, array("f", bytes(4 * sampled))
        if work.chunks:
            self.num_prefills += 1
            self.chunks += [(c.start, c.start + len(c.tokens)) for c in work.chunks]
            self._prefill = max(self._prefill, work.chunks, key=_num_tokens)
        for s in work.started:
            self._first[s] = self.num_decodes - len(s.response)
        if not work.running:
            return None
        # What a kernel allocates does not depend on the pages that it reads.
        pages = 0 if self.static else sum(len(s.pages) for s in work.running)
        if (len(work.running), pages) > self._most:
            self._most = len(work.running), pages
            self._pages = [list(s.pages) for s in work.running]
        self.num_decodes += 1
        self.num_rows += self._num_rows(len(work.running))
        done = self.num_decodes - self.response_tokens
        return _Known(array("b", [self._first[s] == done for s in work.running]))

    def _num_rows(self, sequences: int) -> int:
        return bucket(sequences, self.slots) if self.static else sequences

    def responses(self, slots: Sequence[int], counts: Sequence[int]) -> Any:
        return _Known([([0] * n, array("f", bytes(4 * n))) for n in counts])

    # -------------------------------------------------------------------- running

    def run_prefill(self) -> int:
        """Run the prefill with the most tokens, and return their number."""
        if self._prefill:
            self.prefill(self._prefill)
        return _num_tokens(self._prefill)

    def run_decode(self) -> int:
        """Run the decoding step with the most rows, and return their number."""
        rows = self._num_rows(len(self._pages))
        self._step(rows)
        return rows

    def _plan_pages(self, n: int) -> PageParts | None:
        """Plan with real tensors, because the pages to read are data."""
        if self.static:
            return None
        with unset_fake_temporarily():
            table_NM = torch.full((n, self.table_BM.shape[1]), self.cache.idle_page)
            for row_M, pages in zip(table_NM, self._pages, strict=True):
                row_M[: len(pages)] = torch.tensor(pages)
            counts_N = torch.tensor([len(pages) for pages in self._pages])
            return PageParts(table_NM, counts_N, self.cache.page_size, self.cache.device)

    def _weight_addresses(self) -> list[int]:
        return []


class _Known:
    """A known value, in place of a tensor that is being copied to the host."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value


def _num_tokens(chunks: Sequence[Chunk]) -> int:
    return sum(len(c.tokens) for c in chunks)
