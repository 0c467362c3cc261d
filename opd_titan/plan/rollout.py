"""Simulate a rollout without data: the scheduler runs all steps, the model only the largest ones.

A rollout has thousands of decoding steps, which are too many even for tensors without data. The
scheduler, which is plain Python, goes through all of them, and the runner only records them. Then
the runner runs the fullest prefill and the widest decoding step, which represent the others.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from opd_titan.models.kernels.paged import PageParts
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.runner import Runner, bucket
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.scheduler import Chunk, Request, SequenceState, Work


class PlannedGenerator(Generator):
    """A generator with the memory of the cluster, not of the machine that runs the planner.

    Attributes:
        budget: bytes.
        response_tokens: of every response.
    """

    budget: int = 0
    response_tokens: int = 0

    def free_bytes(self) -> int:
        return max(0, self.budget)

    def plan(self, requests: Sequence[Request], params: SamplingParams) -> PlannedRunner:
        """Answer the requests with a runner that notes what it takes."""
        self.generate(requests, params)
        return self.runner

    def make_runner(self, wanted: int, width: int, params: SamplingParams) -> PlannedRunner:
        with patch("opd_titan.rollout.generator.Runner", PlannedRunner):
            runner = super().make_runner(wanted, width, params)
        assert isinstance(runner, PlannedRunner)
        runner.response_tokens = self.response_tokens
        self.runner = runner
        return runner


class PlannedRunner(Runner):
    """A runner that only records its work; `run_fullest` and `run_widest` run the largest parts.

    Attributes:
        chunks: of all prefills, as (start, end) in their prefix.
        num_prefills: forwards that they took.
        fullest: the chunks of the forward with the most tokens.
        num_decodes: forwards of one token per sequence; their `num_rows` are idle ones, too.
        widest: the pages of each sequence in the one with the most.
        memory_of_graphs: what stays with what is captured; only held, not looked at.
        response_tokens: the length of each response.
    """

    memory_of_graphs: Tensor | None = None
    response_tokens = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.chunks: list[tuple[int, int]] = []
        self.num_prefills = self.num_decodes = self.num_rows = 0
        self.fullest: Sequence[Chunk] = ()
        self.widest: list[list[int]] = []
        self._most = (0, 0)
        self._first: dict[SequenceState, int] = {}  # the step of each sequence's first token

    @property
    def num_prefilled(self) -> int:
        """Tokens of all prefills."""
        return sum(end - start for start, end in self.chunks)

    # ------------------------------------------------------------------- notes

    def run(self, work: Work) -> Any:
        for s, _, sampled in work.preempted:
            s.response, s.logprobs = [0] * sampled, array("f", bytes(4 * sampled))
        if work.chunks:
            self.num_prefills += 1
            self.chunks += [(c.start, c.start + len(c.tokens)) for c in work.chunks]
            self.fullest = max(self.fullest, work.chunks, key=_num_tokens)
        for s in work.started:
            self._first[s] = self.num_decodes - len(s.response)
        if not work.running:
            return None
        # What a kernel takes does not depend on the pages that it reads.
        pages = 0 if self.static else sum(len(s.pages) for s in work.running)
        if (len(work.running), pages) > self._most:
            self._most = len(work.running), pages
            self.widest = [list(s.pages) for s in work.running]
        self.num_decodes += 1
        self.num_rows += self._width(len(work.running))
        done = self.num_decodes - self.response_tokens
        return _Known(array("b", [self._first[s] == done for s in work.running]))

    def _width(self, n: int) -> int:
        return bucket(n, self.slots) if self.static else n

    def responses(self, slots: Sequence[int], counts: Sequence[int]) -> Any:
        return _Known([([0] * n, array("f", bytes(4 * n))) for n in counts])

    # ------------------------------------------------------------- what it runs

    def run_fullest(self) -> int:
        """Returns its tokens."""
        if self.fullest:
            self.prefill(self.fullest)
        return _num_tokens(self.fullest)

    def run_widest(self) -> int:
        """What would be captured where there are graphs. Returns the rows."""
        rows = self._width(len(self.widest))
        self._step(rows)
        return rows

    def _plan_pages(self, n: int) -> PageParts | None:
        """Which pages to read is data, which tensors here do not have: planned beside them."""
        if self.static:
            return None
        with unset_fake_temporarily():
            table_NM = torch.full((n, self.table_BM.shape[1]), self.cache.idle_page)
            for row_M, pages in zip(table_NM, self.widest, strict=True):
                row_M[: len(pages)] = torch.tensor(pages)
            counts_N = torch.tensor([len(pages) for pages in self.widest])
            parts = PageParts(table_NM, counts_N, self.cache.page_size, self.cache.device)
        for name, value in vars(parts).items():
            if isinstance(value, Tensor):
                setattr(parts, name, torch.empty_like(value))
        return parts

    def _weight_addresses(self) -> list[int]:
        return []


class _Known:
    """Stands for what a run would fetch from its device."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value


def _num_tokens(chunks: Sequence[Chunk]) -> int:
    return sum(len(c.tokens) for c in chunks)
