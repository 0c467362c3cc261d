"""The rollout engine: continuously batched sampling from the student's own weights.

What to run is the `scheduler`'s part, running it the `runner`'s, on pages of the `kv_cache`; the
`sampler` turns hidden states into tokens. Here they meet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn

from opd_titan.data.types import Sample
from opd_titan.distributed.collectives import min_integer
from opd_titan.distributed.transfer import Fetched
from opd_titan.distributed.world import ALONE, Axis
from opd_titan.models.logits import VocabHead
from opd_titan.rollout.attention_path import choose_path
from opd_titan.rollout.kv_cache import KVCache, bytes_per_token
from opd_titan.rollout.limit import common_length
from opd_titan.rollout.memory import free_bytes
from opd_titan.rollout.runner import Responses, Runner
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.scheduler import Request, RunningSequence, Scheduler
from opd_titan.rollout.share import Share

# A cache that is made once may hold this share of the sequences that one made every step would.
_ENOUGH = 0.75


@dataclass
class RolloutStats:
    """What a rank's part of a rollout took.

    Attributes:
        decode_forwards: one-token forwards; each reads all weights once.
        preempted: sequences that had to wait for memory.
        seconds: without waiting for other ranks.
    """

    decode_forwards: int = 0
    preempted: int = 0
    seconds: float = 0.0


class Answers:
    """Responses of sequences that ended, which become samples once the host has them.

    Args:
        stop_ids: tokens that end a response.

    Attributes:
        samples: by prompt's and sample's index.
        lengths: of all responses, also of those that are on their way.
    """

    def __init__(self, stop_ids: set[int]) -> None:
        self.stop_ids = stop_ids
        self.samples: dict[tuple[int, int], Sample] = {}
        self.lengths: list[int] = []
        self._coming: list[tuple[list[RunningSequence], Responses]] = []

    def expect(self, runner: Runner, counts: Mapping[RunningSequence, int]) -> None:
        """Fetch the responses of these sequences, of so many tokens each."""
        if counts:
            slots = [s.slot for s in counts]
            self._coming.append(([*counts], runner.responses(slots, [*counts.values()])))
            self.lengths += counts.values()

    def collect(self) -> None:
        """Make samples of what was fetched. Best after the next step was launched: no wait then."""
        for sequences, responses in self._coming:
            for sequence, (tokens, logprobs) in zip(sequences, responses.get(), strict=True):
                request = sequence.request
                self.samples[request.prompt.index, request.sample_index] = Sample(
                    prompt=request.prompt,
                    sample_index=request.sample_index,
                    response_ids=tokens,
                    finish_reason="stop" if tokens[-1] in self.stop_ids else "length",
                    student_logprobs=logprobs,
                )
        self._coming = []


class Generator:
    """Samples responses with a model that holds plain (not sharded) weights.

    Args:
        model: the decoder; its parameters are read, never written.
        eos_ids: each of these tokens ends a response.
        max_concurrent: sequences decoded at once; 0 takes what fits into the free memory.
        max_prefill_tokens: prompt tokens that go through one forward.
        tp: the ranks that the model is split over. They sample the same responses: each adds its
            part of every sum and sees the same tokens.
        page_size: tokens in a page of the cache; 0 takes what suits the device.
        max_pages: of the cache; 0 takes what fits into the free memory.
        room: bytes that may be kept while other phases run; None while nobody knows.

    Attributes:
        stats: of the last `generate`.
        use_cuda_graphs: on CUDA, where there is a kernel for the cache.
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
    ) -> None:
        self.room = room
        self.model, self.eos_ids = model, eos_ids
        self._sizes = cast(Any, model.args)
        self.head = VocabHead(model.get_parameter("lm_head.weight"), tp)
        self.device, self.dtype = self.head.weight_vD.device, self.head.weight_vD.dtype
        self.max_concurrent, self.max_prefill_tokens = max_concurrent, max_prefill_tokens
        self.path = choose_path(self._sizes.head_dim, self.dtype, self.device)
        self.page_size = page_size or self.path.page_size
        self.max_pages = max_pages
        self.stats = RolloutStats()
        self._runner: Runner | None = None
        self._asked = 0  # sequences that it was to have slots for
        # Steps that the host has not looked at: which of these sequences got a stop token.
        self._flags: deque[tuple[list[RunningSequence], Fetched | None]] = deque()

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_tokens: Callable[[int], None] = lambda n: None,
        share: Share | None = None,
    ) -> list[Sample]:
        """Answer every request.

        Args:
            requests: samples of one prompt that stand together share its keys and values.
            on_tokens: called with the number of tokens just sampled. What it raises ends the
                rollout; not before this rank has read its share.
            share: which of the requests this rank answers. Without it, all of them.

        Returns:
            One sample per request that was answered, in the order of the requests.
        """
        start = time.perf_counter()
        self.stats = RolloutStats()
        if not requests:
            return []
        runner, scheduler = self._prepare(requests, params, share)
        answers, sampled = Answers(set() if params.ignore_eos else self.eos_ids), 0
        self._flags.clear()
        while scheduler.has_work:
            self.begin_round(runner, scheduler, answers)
            n = len(scheduler.running)
            if n == 0:
                continue  # a prefix takes several rounds
            runner.decode(n)
            self._flags.append(([*scheduler.running], runner.stop_flags(n)))
            self.stats.decode_forwards += 1
            on_tokens(n)
            sampled += n
            answers.collect()
            ended = self._ended(runner, scheduler)
            if params.max_tokens and sampled > params.max_tokens:
                ended = {**self._beyond_limit(runner, scheduler, answers, params), **ended}
            answers.expect(runner, ended)
            if ended:
                slots = [s.slot for s in ended]
                runner.move(*scheduler.release(slots), len(scheduler.running))
        answers.collect()
        # A capture that failed would fail again.
        self.use_cuda_graphs = self.use_cuda_graphs and runner.captures
        if not runner.static:
            self.release()
        self.stats.seconds = time.perf_counter() - start
        keys = [(r.prompt.index, r.sample_index) for r in requests]
        return [answers.samples[key] for key in keys if key in answers.samples]

    def begin_round(self, runner: Runner, scheduler: Scheduler, answers: Answers) -> None:
        """All that comes before a decoding step: prefills, starts, new pages, preemptions."""
        chunks = scheduler.prefill(self.max_prefill_tokens)
        if chunks:
            runner.prefill(chunks)
        runner.start(*scheduler.admit())
        growth = scheduler.grow()
        runner.grow(growth)
        if growth.preempted:
            self._preempt(growth.preempted, runner, scheduler, answers)

    def _preempt(
        self,
        sequences: Sequence[RunningSequence],
        runner: Runner,
        scheduler: Scheduler,
        answers: Answers,
    ) -> None:
        """Put sequences that lost their pages back in line, unless they got their stop token."""
        stopped = {s for step in self._flags for s in _stopped(*step)}
        counts = {s: scheduler.num_tokens(s) for s in sequences}
        answers.expect(runner, {s: n for s, n in counts.items() if s in stopped})
        again = {s: n for s, n in counts.items() if s not in stopped}
        found = runner.responses([s.slot for s in again], [*again.values()]).get() if again else []
        for sequence, (tokens, logprobs) in zip(again, found, strict=True):
            scheduler.requeue(sequence, tokens, logprobs.tolist())
        self.stats.preempted += len(again)
        moves = scheduler.release([s.slot for s in sequences], ended=len(again) < len(counts))
        runner.move(*moves, len(scheduler.running))

    def _ended(self, runner: Runner, scheduler: Scheduler) -> dict[RunningSequence, int]:
        """Count a step. The sequences that ended, as far as the host knows, and their tokens."""
        slots = scheduler.advance()
        ended = {s: scheduler.num_tokens(s) for s in (scheduler.running[slot] for slot in slots)}
        while len(self._flags) > runner.lag:
            step = self._flags.popleft()
            late = len(self._flags)  # tokens that came after the stop token, and do not count
            for s in _stopped(*step):
                if s.pages:  # else it has ended before
                    ended[s] = scheduler.num_tokens(s) - late
        return ended

    @staticmethod
    def _beyond_limit(
        runner: Runner, scheduler: Scheduler, answers: Answers, params: SamplingParams
    ) -> dict[RunningSequence, int]:
        """Sequences that will be cut to what they have already, or to less."""
        # The tokens of the last steps count only if there was no stop token before them.
        known = {s: scheduler.num_tokens(s) - runner.lag for s in scheduler.running}
        limit = common_length([*answers.lengths, *known.values()], params.max_tokens)
        return {s: n for s, n in known.items() if n >= limit}

    # ------------------------------------------------------------------ memory

    @property
    def num_bytes(self) -> int:
        """Of the cache, and what else is kept from one `generate` to the next."""
        return 0 if self._runner is None else self._runner.num_bytes

    def release(self) -> None:
        """Give this memory back until the next `generate`."""
        self._runner = None

    def _prepare(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        share: Share | None,
    ) -> tuple[Runner, Scheduler]:
        """A runner with room for these requests, the last one if it has that."""
        limits = [r.max_new_tokens or params.max_new_tokens for r in requests]
        assert max(limits) <= params.max_new_tokens, "there is no room for longer responses"
        longest = max(len(r.prompt.token_ids) + n for r, n in zip(requests, limits, strict=True))
        width = -(-longest // self.page_size)
        groups: Sequence[Sequence[Request]]
        groups = [list(group) for _, group in groupby(requests, key=lambda r: r.prompt.index)]
        wanted = len(requests) if share is None else share.count_even(groups)
        wanted = min(wanted, self.max_concurrent or wanted)
        runner = self._runner
        if runner is None or not self._suits(runner, wanted, width, params):
            self.release()  # first: the next one's size is what is then free
            del runner
            self._runner = runner = self.make_runner(wanted, width, params)
            self._asked = wanted
        slots = min(runner.slots, self.max_concurrent or runner.slots)
        mine = groups if share is None else share.read(groups, slots)
        pages, limit = runner.cache.num_pages, params.max_new_tokens
        return runner, Scheduler(mine, slots, pages, self.page_size, limit)

    def _suits(self, last: Runner, wanted: int, width: int, params: SamplingParams) -> bool:
        """Whether the last runner will do. One that memory kept small would be no larger now."""
        return (
            last.params == params
            and self._asked >= wanted
            and last.table_BM.shape[1] >= width
            and last.weights_stay()
        )

    def make_runner(self, wanted: int, width: int, params: SamplingParams) -> Runner:
        """A runner for so many sequences of so many pages, as far as memory for them is there."""
        slots, pages = self.count_slots_and_pages(wanted, width, params)
        cache = KVCache(self._sizes, pages, self.page_size, self.path, self.dtype, self.device)
        static = self.path.kernel is not None
        return Runner(
            self.model,
            self.head,
            cache,
            slots,
            width,
            self.eos_ids,
            params,
            static,
            self.use_cuda_graphs,
        )

    def count_slots_and_pages(
        self, wanted: int, width: int, params: SamplingParams
    ) -> tuple[int, int]:
        """Sequences to decode at once and pages for them.

        Responses are seldom as long as they may be: there are slots as long as each could have half
        of its pages, and who needs more than there are waits.
        """
        per_page = self.page_size * bytes_per_token(self._sizes, self.dtype)
        # Per row: its logits, exponentiated, and a chunk of them beside; or whole logits, and where
        # they are truncated their sort with its int64 order, softmax, prefix sums and masks.
        copies = 8 if params.distribution.truncates else 3
        per_slot = 4 * copies * self.head.vocab_size
        per_sequence = per_slot + per_page * -(-width // 2)

        def slots_in(budget: int) -> int:
            return max(1, min(wanted, budget // per_sequence))

        budget, room = self.free_bytes() * 3 // 4, self.room()
        # A cache that can stay costs no step its time; but not where it holds far fewer sequences.
        if room is not None and slots_in(min(room, budget)) >= _ENOUGH * slots_in(budget):
            budget = min(room, budget)
        slots = slots_in(budget)
        pages = (budget - slots * per_slot) // per_page
        pages = max(width, min(slots * width, pages, self.max_pages or pages))
        return slots, pages

    def free_bytes(self) -> int:
        """Memory that a rollout may count on, the same on ranks that must schedule alike."""
        return min_integer(free_bytes(self.device), self.device, self.head.tp)


def _stopped(sequences: Sequence[RunningSequence], flags: Fetched | None) -> list[RunningSequence]:
    """Those with a flag. Waits until the step has been done."""
    if flags is None:
        return []
    return [s for s, flag in zip(sequences, flags.get().tolist(), strict=True) if flag]
