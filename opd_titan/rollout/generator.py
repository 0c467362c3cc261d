"""The rollout engine: continuously batched sampling from the student's own weights.

The `scheduler` decides what to run, the `runner` runs it on pages of the `kv_cache`, and the
`sampler` turns hidden states into tokens. The generator connects them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from opd_titan.data.types import Sample
from opd_titan.distributed.collectives import min_integer
from opd_titan.distributed.transfer import Fetched
from opd_titan.distributed.world import ALONE, Axis
from opd_titan.models.kernels.paged import choose_paged_attention
from opd_titan.models.logits import VocabHead
from opd_titan.rollout.kv_cache import KVCache, bytes_per_token
from opd_titan.rollout.memory import free_bytes
from opd_titan.rollout.runner import Responses, Runner
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.scheduler import Request, Scheduler, SequenceState

Group = Sequence[Request]  # the samples of one prompt

# A cache that stays in use must have room for this share of the sequences of a new cache.
_ENOUGH = 0.75
# All ranks count their rollouts in the same order, so that a number names the same rollout.
_rollouts = count()


@dataclass
class RolloutStats:
    """Statistics of a rank's part of a rollout.

    Attributes:
        decode_forwards: forwards of one token per sequence; each reads all weights once.
        preempted: sequences that had to wait for memory.
        seconds: without waiting for other ranks.
    """

    decode_forwards: int = 0
    preempted: int = 0
    seconds: float = 0.0


class FinishedResponses:
    """Responses that ended, which become samples when they have arrived on the host.

    Args:
        stop_ids: tokens that end a response.

    Attributes:
        samples: by the index of the prompt and of the sample.
    """

    def __init__(self, stop_ids: set[int]) -> None:
        self.stop_ids = stop_ids
        self.samples: dict[tuple[int, int], Sample] = {}
        self._coming: list[tuple[list[SequenceState], Responses]] = []

    def fetch(self, runner: Runner, lengths: Mapping[SequenceState, int]) -> None:
        """Fetch the responses of sequences that ended; `lengths` are their numbers of tokens."""
        running = [s for s in lengths if s.slot >= 0]
        if running:
            slots, counts = [s.slot for s in running], [lengths[s] for s in running]
            self._coming.append((running, runner.responses(slots, counts)))
        for s in lengths.keys() - running:  # preempted before their stop token was known
            self._add(s, s.response, torch.tensor(s.logprobs))

    def collect(self) -> None:
        """Make samples of fetched responses. There is no wait if a later step has been launched."""
        for sequences, responses in self._coming:
            for s, (tokens, logprobs) in zip(sequences, responses.get(), strict=True):
                self._add(s, tokens, logprobs)
        self._coming = []

    def _add(self, s: SequenceState, tokens: list[int], logprobs: Tensor) -> None:
        self.samples[s.request.prompt.index, s.request.sample_index] = Sample(
            prompt=s.request.prompt,
            sample_index=s.request.sample_index,
            response_ids=tokens,
            finish_reason="stop" if tokens[-1] in self.stop_ids else "length",
            student_logprobs=logprobs,
        )


class Generator:
    """Sample responses with a model that has plain (not sharded) weights.

    Args:
        model: the decoder; its parameters are read, never written.
        eos_ids: each of these tokens ends a response.
        max_concurrent: sequences decoded at once; 0 for as many as fit into the free memory.
        max_prefill_tokens: prompt tokens of one forward.
        tp: the ranks that the model is split over. They sample the same responses together.
        page_size: tokens of a page of the cache; 0 for the device's default.
        max_pages: pages of the cache; 0 for as many as fit into the free memory.
        room: returns the bytes that may stay in use during other phases, or None if unknown.
        free: returns the free bytes of this rank's device; None to ask the device.
        runner: makes the runner, from the arguments of `Runner`.

    Attributes:
        stats: statistics of the last `generate`.
        use_cuda_graphs: whether to use CUDA graphs, if a kernel reads the cache.
    """

    use_cuda_graphs = True

    def __init__(
        self,
        model: nn.Module,
        eos_ids: set[int],
        max_concurrent: int = 0,
        max_prefill_tokens: int = 8192,
        tp: Axis = ALONE,
        page_size: int = 0,
        max_pages: int = 0,
        room: Callable[[], int | None] = lambda: None,
        free: Callable[[], int] | None = None,
        runner: Callable[..., Runner] = Runner,
    ) -> None:
        self.room, self.free, self.runner = room, free, runner
        self.model, self.eos_ids = model, eos_ids
        self._sizes = cast(Any, model.args)
        self.head = VocabHead(model.get_parameter("lm_head.weight"), tp)
        self.device, self.dtype = self.head.weight_vD.device, self.head.weight_vD.dtype
        self.max_concurrent, self.max_prefill_tokens = max_concurrent, max_prefill_tokens
        self.path = choose_paged_attention(self._sizes.head_dim, self.dtype, self.head.weight_vD)
        self.page_size = page_size or self.path.page_size
        self.max_pages = max_pages
        self.stats = RolloutStats()
        self._runner: Runner | None = None
        self._wanted = 0  # slots that the runner was asked to have

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_tokens: Callable[[int], None] = lambda n: None,
        dp: Axis = ALONE,
    ) -> list[Sample]:
        """Answer the requests.

        Args:
            requests: the same on all ranks. Adjacent samples of one prompt share its keys and
                values.
            on_tokens: called with the number of tokens just sampled. An exception from it ends the
                rollout; it must come on all tensor-parallel ranks at once.
            dp: the ranks that divide the requests among them.

        Returns:
            The samples of this rank, in the order of the requests.
        """
        begun = time.perf_counter()
        self.stats = RolloutStats()
        if not requests:
            return []
        runner, scheduler = self._prepare(requests, params, dp)
        finished = FinishedResponses(set() if params.ignore_eos else self.eos_ids)
        flags: deque[tuple[list[SequenceState], Fetched | None]] = deque()
        while (work := scheduler.schedule()) is not None:
            flags_N = runner.run(work)
            self.stats.preempted += len(work.preempted)
            if not work.running:
                continue  # a long prefix takes several steps
            flags.append((work.running, flags_N))
            self.stats.decode_forwards += 1
            on_tokens(len(work.running))
            finished.collect()
            stopped = _stopped(*flags.popleft()) if len(flags) > runner.lag else []
            finished.fetch(runner, scheduler.postprocess(stopped))
        finished.collect()
        # A capture that failed would fail again.
        self.use_cuda_graphs = self.use_cuda_graphs and runner.captures
        if not runner.static:
            self.release()
        self.stats.seconds = time.perf_counter() - begun
        keys = [(r.prompt.index, r.sample_index) for r in requests]
        return [finished.samples[key] for key in keys if key in finished.samples]

    # ------------------------------------------------------------------ memory

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache, and of all else that is kept from one `generate` to the next."""
        return 0 if self._runner is None else self._runner.num_bytes

    def release(self) -> None:
        """Free this memory until the next `generate`."""
        self._runner = None

    def _prepare(
        self, requests: Sequence[Request], params: SamplingParams, dp: Axis
    ) -> tuple[Runner, Scheduler]:
        """Return a scheduler, and a runner with room for the requests, the last one if possible."""
        limits = [r.max_new_tokens or params.max_new_tokens for r in requests]
        assert max(limits) <= params.max_new_tokens, "there is no room for longer responses"
        longest = max(len(r.prompt.token_ids) + n for r, n in zip(requests, limits, strict=True))
        width = -(-longest // self.page_size)
        groups = [list(group) for _, group in groupby(requests, key=lambda r: r.prompt.index)]
        # The largest part if the groups are divided evenly.
        wanted = sum(len(group) for group in groups[:: dp.size])
        wanted = min(wanted, self.max_concurrent or wanted)
        runner = self._runner
        if runner is None or not self._suits(runner, wanted, width, params):
            self.release()  # first, because the next runner is sized to the free memory
            del runner
            self._runner = runner = self.make_runner(wanted, width, params)
            self._wanted = wanted
        slots = min(runner.slots, self.max_concurrent or runner.slots)
        scheduler = Scheduler(
            divide_groups(groups, slots, dp, self.head.tp, self.device),
            slots,
            runner.cache.num_pages,
            self.page_size,
            params.max_new_tokens,
            self.max_prefill_tokens,
            params.max_tokens,
            runner.lag,
        )
        return runner, scheduler

    def _suits(self, last: Runner, wanted: int, width: int, params: SamplingParams) -> bool:
        """Return whether to reuse the last runner. One that memory limited is not replaced."""
        return (
            last.params == params
            and self._wanted >= wanted
            and last.table_BM.shape[1] >= width
            and last.weights_stay()
        )

    def make_runner(self, wanted: int, width: int, params: SamplingParams) -> Runner:
        """Return a runner for `wanted` sequences of `width` pages, or for as many as fit."""
        slots, pages = self.count_slots_and_pages(wanted, width, params)
        cache = KVCache(self._sizes, pages, self.page_size, self.path, self.dtype, self.device)
        return self.runner(
            self.model,
            self.head,
            cache,
            slots,
            width,
            self.eos_ids,
            params,
            self.use_cuda_graphs,
        )

    def count_slots_and_pages(
        self, wanted: int, width: int, params: SamplingParams
    ) -> tuple[int, int]:
        """Return the number of sequences to decode at once, and of pages for them.

        Few responses reach the longest length. So there are slots for as many sequences as
        could have half of their pages each; a sequence that finds no free page waits.
        """
        per_page = self.page_size * bytes_per_token(self._sizes, self.dtype)
        # Per row: its logits, exponentiated, and a chunk of them; or, with truncation, the whole
        # logits, their sort with its int64 order, the softmax, prefix sums and masks.
        copies = 8 if params.distribution.truncates else 3
        per_slot = 4 * copies * self.head.vocab_size
        per_sequence = per_slot + per_page * -(-width // 2)

        def slots_in(budget: int) -> int:
            return max(1, min(wanted, budget // per_sequence))

        budget, room = self.free_bytes() * 3 // 4, self.room()
        # A cache that stays costs no time in later steps, but must not be much smaller.
        if room is not None and slots_in(min(room, budget)) >= _ENOUGH * slots_in(budget):
            budget = min(room, budget)
        slots = slots_in(budget)
        pages = (budget - slots * per_slot) // per_page
        pages = max(width, min(slots * width, pages, self.max_pages or pages))
        return slots, pages

    def free_bytes(self) -> int:
        """Return the memory for a rollout, the same on all tensor-parallel ranks."""
        free = free_bytes(self.device) if self.free is None else self.free()
        return min_integer(free, self.device, self.head.tp)


def _stopped(sequences: Sequence[SequenceState], flags: Fetched | None) -> list[SequenceState]:
    """Return the sequences with a flag. Waits until the step is done."""
    if flags is None:
        return []
    return [s for s, flag in zip(sequences, flags.get().tolist(), strict=True) if flag]


def divide_groups(
    groups: Sequence[Group], slots: int, dp: Axis, tp: Axis, device: torch.device
) -> Iterator[Group]:
    """Yield this rank's groups, one by one, when it has free slots.

    At first each rank takes an even part, as many groups as it can run at once. Then a rank with a
    free slot takes the next of the rest, so that no rank waits long for another. A token depends
    only on its own sequence, but the batches, and with them the rounding of log-probs, then depend
    on the speed of the ranks. If torch has to be deterministic, the rest is divided evenly too.

    Args:
        groups: the same on all ranks. All ranks must read to the end.
        slots: sequences that this rank runs at once.
        dp: the ranks that divide the groups.
        tp: the ranks that answer the same groups together.
    """
    even = groups[dp.rank :: dp.size]
    if dp.size == 1 or torch.are_deterministic_algorithms_enabled():
        yield from even
        return
    name = f"opd_titan/rollout/{next(_rollouts)}"
    slots = min_integer(slots, device, dp)
    first = -(-slots // max(len(group) for group in groups))
    yield from even[:first]
    rest = groups[first * dp.size :]
    while rest:
        number = len(rest)
        if tp.rank == 0:
            number = _get_default_store().add(name, 1) - 1
        number = min_integer(number, device, tp)
        if number >= len(rest):
            return
        yield rest[number]
