"""Run what the scheduler decides: prefills, and decoding steps over the slots.

Shapes: B slots, N rows of a decoding step (the sequences in slots 0 to N - 1, and possibly idle
rows), M pages of the longest sequence, R response tokens, E sequences that are fetched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opd_titan.distributed.collectives import min_integer
from opd_titan.distributed.transfer import Fetched, send
from opd_titan.models.kernels import uniforms
from opd_titan.models.kernels.device import device_of
from opd_titan.models.kernels.paged import PageParts
from opd_titan.models.logits import VocabHead
from opd_titan.rollout.kv_cache import DecodeAttention, KVCache, PrefillAttention
from opd_titan.rollout.sampler import Sampler, SamplingParams
from opd_titan.rollout.scheduler import Chunk, SequenceState, Work

logger = logging.getLogger("opd_titan")

# The host reads the stop flags of a step after it has launched this many more, so that a GPU does
# not wait for the host.
LAG = {"cpu": 0, "cuda": 1}
# Columns of the tensor that the host sends before a decoding step, with a row for each slot.
_SOURCE, _TOKEN, _POSITION, _COUNT, _KEY, _RUNS, _PAGES = range(7)


class Runner:
    """The model, the cache, and the state of each slot in tensors that stay in place.

    A decoding step reads and writes only these tensors, so that a CUDA graph of it can be replayed,
    and Python does not touch single rows. Changes between two steps are made on the host and sent
    to the device in one copy before the next step.

    Args:
        model: the decoder; its parameters are read, never written.
        slots: the most rows.
        max_pages: pages of the longest sequence.
        eos_ids: each of these tokens ends a response.
        captures: capture steps as CUDA graphs, if the attention allows that.
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
        captures: bool = True,
    ) -> None:
        self.model, self.cache, self.slots, self.params = model, cache, slots, params
        self.device, self.lag = cache.device, LAG[device_of(head.weight_vD).type]
        self.sampler = Sampler(head, params, slots)
        eos = () if params.ignore_eos else sorted(eos_ids)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=self.device)

        def per_slot(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=self.device)

        self.token_B = per_slot()
        self.position_B = per_slot()
        self.count_B = per_slot()
        self.key_B = per_slot()
        self.runs_B = per_slot()  # 0 in idle rows, and after a stop token; else 1
        self.done_B = per_slot(dtype=torch.bool)
        self.table_BM = per_slot(max_pages, dtype=torch.int32).fill_(cache.idle_page)
        # Tokens, and the bits of their log-probs: one copy brings both to the host.
        self.answers_B2R = per_slot(2, params.max_new_tokens, dtype=torch.int32)
        self.tokens_BR = self.answers_B2R[:, 0]
        self.logprobs_BR = self.answers_B2R.view(torch.float32)[:, 1]
        self.slot_B = torch.arange(slots, device=self.device)
        # For each slot: the slot from which its contents come, or -1 and the state of a sequence
        # that starts; then its pages.
        self._host_BX = torch.zeros(slots, _PAGES + max_pages, dtype=torch.int64)
        self._host_BX[:, _SOURCE] = torch.arange(slots)
        self._host_table_BM = self._host_BX[:, _PAGES:].fill_(cache.idle_page)
        self._num_pages_B = torch.zeros(slots, dtype=torch.int64)
        self._changed: set[str] = set()
        self._resumed: list[SequenceState] = []
        self._rows = 0  # sequences in the slots
        self._plan: tuple[int, PageParts | None] | None = None
        self.static = cache.path.static
        self.captures = self.static and captures
        self._addresses = self._weight_addresses()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graph_memory: Any = None  # the pool that all graphs share

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache, the responses, the logits and the graphs."""
        own = (self.answers_B2R, self.sampler.values)
        tensors = sum(t.numel() * t.element_size() for t in own)
        return self.cache.num_bytes + tensors + self._graph_bytes()

    def _graph_bytes(self) -> int:
        if self._graph_memory is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        mine = [s for s in segments if s.get("segment_pool_id") == self._graph_memory]
        return sum(s["total_size"] for s in mine)

    def run(self, work: Work) -> Fetched | None:
        """Do a step.

        Returns:
            Flags that are being copied to the host: which of `work.running` got a stop token. None
            if there is no stop token, or nothing to decode.
        """
        self._save(work.preempted)
        self._move(work.moves, len(work.running) - len(work.started))
        self._add_pages(work.new_pages)
        if work.chunks:
            self.prefill(work.chunks)
        if work.copies:
            self.cache.copy_pages(work.copies)
        self._fill(work.started)
        self._rows = len(work.running)
        if not work.running:
            return None
        self.decode(self._rows)
        return Fetched(self.done_B[: self._rows]) if self.eos.numel() else None

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Compute the keys and values of parts of prefixes."""
        tokens = [t for chunk in chunks for t in chunk.tokens]
        tokens_T = send(torch.tensor(tokens), self.device)
        self.model(tokens_T, PrefillAttention(self.cache, chunks))

    def decode(self, n: int) -> None:
        """Sample the next token of each sequence in slots 0 to n - 1."""
        self._send_changes()
        rows = bucket(n, self.slots) if self.static else n
        if self.captures and rows not in self._graphs:
            self._try_capture(rows)
        if self.captures:
            self._graphs[rows].replay()
        else:
            self._step(rows)

    def responses(self, slots: Sequence[int], counts: Sequence[int]) -> Responses:
        """Fetch the first `counts` tokens of these slots' responses, and their log-probs."""
        rows = [self.answers_B2R[slot, :, : max(counts)] for slot in slots]
        return Responses(Fetched(torch.stack(rows)), counts)

    # ---------------------------------------------------------- changes of slots

    def _save(self, preempted: Sequence[tuple[SequenceState, int, int]]) -> None:
        """Keep the responses of preempted sequences. Wait for the device."""
        if preempted:
            sequences, slots, counts = zip(*preempted, strict=True)
            found = self.responses(slots, counts).get()
            for s, (tokens, logprobs) in zip(sequences, found, strict=True):
                s.response, s.logprobs = tokens, logprobs.tolist()

    def _move(self, moves: Sequence[tuple[int, int]], kept: int) -> None:
        """Move slots' contents, and make the rows from `kept` on idle."""
        if moves:
            sources, targets = map(list, zip(*moves, strict=True))
            self._host_BX[targets] = self._host_BX[sources]
            self._num_pages_B[targets] = self._num_pages_B[sources]
            self._changed.add("answers")
        if kept < self._rows:
            self._host_BX[kept:, :_PAGES] = 0
            self._host_BX[kept:, _SOURCE] = -1
            self._host_table_BM[kept:] = self.cache.idle_page
            self._num_pages_B[kept:] = 0
            self._changed.add("slots")

    def _add_pages(self, new_pages: Sequence[tuple[int, int, int]]) -> None:
        for slot, number, page in new_pages:
            self._host_table_BM[slot, number] = page
            self._num_pages_B[slot] = number + 1
            self._changed.add("pages")

    def _fill(self, started: Sequence[SequenceState]) -> None:
        """Fill the slots of sequences that start."""
        for s in started:
            begin = (-1, s.tokens[-1], s.start_position, len(s.response), s.request.key, 1)
            self._host_BX[s.slot, : _PAGES + len(s.pages)] = torch.tensor([*begin, *s.pages])
            self._num_pages_B[s.slot] = len(s.pages)
            self._changed.add("slots")
            if s.response:  # it was preempted, so its tokens must be sent back
                self._resumed.append(s)

    def _send_changes(self) -> None:
        """Bring the slots on the device up to date, in one copy."""
        changed, self._changed = self._changed, set()
        if not changed:
            return
        self._plan = None
        if changed == {"pages"}:
            self.table_BM.copy_(send(self._host_table_BM, self.device))
            return
        sent_BX = send(self._host_BX, self.device)
        self._host_BX[:, _SOURCE] = torch.arange(self.slots)
        source_B = sent_BX[:, _SOURCE]
        kept_B, starts_B = source_B.clamp(min=0), source_B < 0
        columns = {
            _TOKEN: self.token_B,
            _POSITION: self.position_B,
            _COUNT: self.count_B,
            _KEY: self.key_B,
            _RUNS: self.runs_B,
        }
        for column, tensor_B in columns.items():
            tensor_B.copy_(torch.where(starts_B, sent_BX[:, column], tensor_B[kept_B]))
        self.table_BM.copy_(sent_BX[:, _PAGES:])
        if "answers" in changed:
            self.answers_B2R.copy_(self.answers_B2R[kept_B])
        for s in self._resumed:
            had = len(s.response)
            self.tokens_BR[s.slot, :had] = torch.tensor(s.response, dtype=torch.int32)
            self.logprobs_BR[s.slot, :had] = torch.tensor(s.logprobs)
        self._resumed = []

    # ------------------------------------------------------------ a decoding step

    def _step(self, n: int) -> None:
        count_N, runs_N = self.count_B[:n], self.runs_B[:n]
        attend = DecodeAttention(
            self.cache, self.position_B[:n].clone(), self.table_BM[:n], self._plan_pages(n)
        )
        hidden_ND = self.model(self.token_B[:n], attend)
        tokens_N, logprobs_N = self.sampler(hidden_ND, uniforms(self.key_B[:n], count_N))
        self.tokens_BR[self.slot_B[:n], count_N] = tokens_N.int()
        self.logprobs_BR[self.slot_B[:n], count_N] = logprobs_N
        self.token_B[:n] = tokens_N
        done_N = (tokens_N[:, None] == self.eos).any(dim=1)
        self.done_B[:n] = done_N
        count_N += runs_N
        self.position_B[:n] += runs_N
        # A sequence that is done stays in place until the host knows.
        runs_N *= ~done_N

    def _plan_pages(self, n: int) -> PageParts | None:
        """Return the attention's plan for the pages of n rows. Changes need a new plan."""
        if self._plan is None or self._plan[0] != n:
            # An idle row attends to the idle page.
            table_NM, counts_N = self._host_table_BM[:n], self._num_pages_B[:n].clamp(min=1)
            page_size = self.cache.page_size
            self._plan = n, self.cache.path.plan(table_NM, counts_N, page_size, self.device)
        return self._plan[1]

    def weights_stay(self) -> bool:
        """Return whether the weights are still at the addresses that the graphs read."""
        return self._addresses == self._weight_addresses()

    def _weight_addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.model.parameters()]

    def _try_capture(self, n: int) -> None:
        """Capture a step of n rows. If that fails, warn once and continue without graphs."""
        state = (self.token_B, self.position_B, self.count_B, self.runs_B, self.done_B)
        kept = [tensor.clone() for tensor in state]
        self._warm_up(n)
        try:
            self._graphs[n] = self._capture(n)
        except RuntimeError as error:
            # The error at the end of a capture hides the error inside it.
            cause = str(error.__context__ or error).split("\n", 1)[0]
            logger.warning(
                "Rollouts: could not capture a CUDA graph, continuing without (slower): %s", cause
            )
        # Tensor-parallel ranks must run the same steps.
        if not min_integer(int(n in self._graphs), self.device, self.sampler.head.tp):
            self.captures = False
            self._graphs.clear()
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)

    def _warm_up(self, n: int) -> None:
        """Run a step on the stream of captures, as CUDA requires, which compiles the kernels."""
        side, current = _capture_stream(self.device), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._step(n)
        current.wait_stream(side)

    def _capture(self, n: int) -> torch.cuda.CUDAGraph:
        side, current = _capture_stream(self.device), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that writes a checkpoint, may use CUDA at the same time.
        mode = "thread_local"
        try:
            with torch.cuda.graph(
                graph, pool=self._graph_memory, stream=side, capture_error_mode=mode
            ):
                self._step(n)
        finally:
            # Before torch 2.15 a failed capture leaves its own stream the current one.
            torch.cuda.set_stream(current)
        self._graph_memory = graph.pool()
        return graph


class Responses:
    """Tokens and log-probs of several sequences, which are being copied to the host."""

    def __init__(self, fetched: Fetched, counts: Sequence[int]) -> None:
        self._fetched, self._counts = fetched, counts

    def get(self) -> list[tuple[list[int], Tensor]]:
        """Wait for the copy. Return each response's tokens and log-probs, fp32 [R]."""
        answers_E2R = self._fetched.get()
        tokens, logprobs = answers_E2R[:, 0], answers_E2R.view(torch.float32)[:, 1]
        return [
            (tokens[i, :n].tolist(), logprobs[i, :n].clone()) for i, n in enumerate(self._counts)
        ]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for captures, because cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


def bucket(n: int, slots: int) -> int:
    """Return the rows of a step for n sequences, so that graphs and idle rows are few."""
    size = 1 << (n - 1).bit_length() if n <= 16 else n + -n % 16
    return min(size, slots)
