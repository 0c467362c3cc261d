"""Runs what the scheduler says: prefills, and decoding steps over the slots.

Shapes: B slots, N rows of a decoding step (the sequences in slots 0 to N-1, and maybe idle ones),
M pages of the longest sequence, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opd_titan.models.logits import VocabHead
from opd_titan.rollout.kv_cache import DecodeAttention, KVCache, PageParts, PrefillAttention
from opd_titan.rollout.sampler import Sampler, SamplingParams, uniforms
from opd_titan.rollout.scheduler import Chunk, Growth, RunningSequence


class Runner:
    """The model, the cache, and what is known of each slot, in tensors that stay where they are.

    A decoding step reads and writes nothing else, so that a CUDA graph of it can be replayed; and
    no row of it is touched by Python.

    Args:
        model: the decoder; its parameters are read, never written.
        slots: rows at most.
        max_pages: of the longest sequence.
        eos_ids: each of these tokens ends a response.
        static: a step has one of few numbers of rows, and each of them is captured as a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        head: VocabHead,
        cache: KVCache,
        slots: int,
        max_pages: int,
        eos_ids: set[int],
        params: SamplingParams,
        static: bool = False,
    ) -> None:
        self.model, self.cache, self.slots, self.params = model, cache, slots, params
        self.sampler = Sampler(head, params, slots)
        device = cache.device
        eos = () if params.ignore_eos else sorted(eos_ids)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)

        def per_slot(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.token_B = per_slot()
        self.position_B = per_slot()
        self.count_B = per_slot()
        self.key_B = per_slot()
        self.runs_B = per_slot()  # 1, or 0 where no sequence is
        self.done_B = per_slot(dtype=torch.bool)
        self.table_BM = per_slot(max_pages, dtype=torch.int32).fill_(cache.idle_page)
        self.tokens_BR = per_slot(params.max_new_tokens)
        self.logprobs_BR = per_slot(params.max_new_tokens, dtype=torch.float32)
        self.slot_B = torch.arange(slots, device=device)
        # What attention by parts is planned from, on the host.
        self._host_table_BM = torch.full((slots, max_pages), cache.idle_page, dtype=torch.int32)
        self._num_pages_B = torch.zeros(slots, dtype=torch.int64)
        self._parts: PageParts | None = None
        self.static = static
        self._addresses = self._weight_addresses()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graph_memory: Any = None  # the pool that all graphs share

    @property
    def num_bytes(self) -> int:
        """Of the cache, the responses and the logits."""
        own = (self.tokens_BR, self.logprobs_BR, self.sampler.values)
        return self.cache.num_bytes + sum(t.numel() * t.element_size() for t in own)

    # ------------------------------------------------------------ what changes

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Put the keys and values of prefixes into the cache."""
        tokens = [t for chunk in chunks for t in chunk.tokens]
        tokens_T = torch.tensor(tokens, device=self.cache.device)
        self.model(tokens_T, PrefillAttention(self.cache, chunks))

    def start(
        self, sequences: Sequence[RunningSequence], copies: Sequence[tuple[int, int]]
    ) -> None:
        """Fill the slots of sequences that the scheduler has admitted."""
        if copies:
            self.cache.copy_pages(copies)
        if not sequences:
            return
        rows = slice(sequences[0].slot, sequences[-1].slot + 1)

        def fill(tensor_B: Tensor, values: list[int]) -> None:
            tensor_B[rows] = torch.tensor(values, dtype=tensor_B.dtype).to(tensor_B.device)

        fill(self.token_B, [s.tokens[-1] for s in sequences])
        fill(self.position_B, [s.start_position for s in sequences])
        fill(self.count_B, [len(s.response) for s in sequences])
        fill(self.key_B, [s.request.key for s in sequences])
        self.runs_B[rows] = 1
        for s in sequences:
            self._host_table_BM[s.slot, : len(s.pages)] = torch.tensor(s.pages, dtype=torch.int32)
            self._num_pages_B[s.slot] = len(s.pages)
            if s.response:  # it was preempted: what it had comes back
                had = len(s.response)
                self.tokens_BR[s.slot, :had] = torch.tensor(s.response)
                self.logprobs_BR[s.slot, :had] = torch.tensor(s.logprobs)
        self._send_table(rows)

    def grow(self, growth: Growth) -> None:
        for slot, number, page in growth.pages:
            self._host_table_BM[slot, number] = page
            self._num_pages_B[slot] = number + 1
        if growth.pages:
            slots = [slot for slot, _, _ in growth.pages]
            self._send_table(slice(min(slots), max(slots) + 1))

    def move(self, sources: Sequence[int], targets: Sequence[int], running: int) -> None:
        """Move slots' contents, and leave those from `running` on idle."""
        if sources:
            for tensor in (
                self.token_B,
                self.position_B,
                self.count_B,
                self.key_B,
                self.tokens_BR,
                self.logprobs_BR,
                self._host_table_BM,
                self._num_pages_B,
            ):
                tensor[targets] = tensor[sources]
        self.runs_B[running:] = 0
        self.position_B[running:] = 0
        self.count_B[running:] = 0
        self._host_table_BM[running:] = self.cache.idle_page
        self._num_pages_B[running:] = 0
        self._send_table(slice(0, self.slots))

    def _send_table(self, rows: slice) -> None:
        self.table_BM[rows] = self._host_table_BM[rows].to(self.table_BM.device)
        self._parts = None

    # ----------------------------------------------------------------- a step

    def decode(self, n: int) -> None:
        """Give every sequence in slots 0 to n-1 its next token."""
        if not self.static:
            self._step(n)
            return
        n = bucket(n, self.slots)
        if n not in self._graphs:
            self._graphs[n] = self._capture(n)
        self._graphs[n].replay()

    def _step(self, n: int) -> None:
        count_N = self.count_B[:n]
        attend = DecodeAttention(
            self.cache, self.position_B[:n].clone(), self.table_BM[:n], self._page_parts(n)
        )
        hidden_ND = self.model(self.token_B[:n], attend)
        tokens_N, logprobs_N = self.sampler(hidden_ND, uniforms(self.key_B[:n], count_N))
        self.tokens_BR[self.slot_B[:n], count_N] = tokens_N
        self.logprobs_BR[self.slot_B[:n], count_N] = logprobs_N
        self.token_B[:n] = tokens_N
        self.done_B[:n] = (tokens_N[:, None] == self.eos).any(dim=1)
        count_N += self.runs_B[:n]
        self.position_B[:n] += self.runs_B[:n]

    def _page_parts(self, n: int) -> PageParts | None:
        if self.cache.kernel is not None:
            return None
        if self._parts is None or self._parts.result_NM.shape[0] != n:
            # An idle row attends to the page that is there for it.
            counts_N = self._num_pages_B[:n].clamp(min=1)
            self._parts = PageParts(
                self._host_table_BM[:n], counts_N, self.cache.page_size, self.cache.device
            )
        return self._parts

    def weights_stay(self) -> bool:
        """Whether they are where they were when this runner was made: a graph reads addresses."""
        return self._addresses == self._weight_addresses()

    def _weight_addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.model.parameters()]

    def _capture(self, n: int) -> torch.cuda.CUDAGraph:
        """Record a step of n rows. Running it for that, as CUDA wants, changes no sequence."""
        state = (self.token_B, self.position_B, self.count_B, self.done_B)
        kept = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(n)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a checkpoint being written) may use CUDA meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode=mode):
            self._step(n)
        self._graph_memory = graph.pool()
        return graph

    # ---------------------------------------------------------------- results

    def ended(self, n: int) -> list[int]:
        """Slots whose last token was a stop token: the one wait of a step, unless none can be."""
        if not self.eos.numel():
            return []
        return self.done_B[:n].cpu().nonzero().squeeze(1).tolist()

    def response(self, slot: int, count: int) -> tuple[list[int], Tensor]:
        """The first `count` tokens of this slot's response, and their log-probs."""
        return self.tokens_BR[slot, :count].tolist(), self.logprobs_BR[slot, :count].cpu().clone()


def bucket(n: int, slots: int) -> int:
    """The number of rows that n sequences are decoded with: few graphs, and few idle rows."""
    size = 1 << (n - 1).bit_length() if n <= 16 else n + -n % 16
    return min(size, slots)
