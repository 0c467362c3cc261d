"""The rollout engine: KV-cached, continuously batched sampling from the student's own weights.

Shapes: N rows being sampled, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn

from opd_titan.data.types import Sample
from opd_titan.distributed.collectives import broadcast_tokens, min_integer
from opd_titan.distributed.world import ALONE, Axis
from opd_titan.models.logits import Distribution, VocabHead, whole_logits
from opd_titan.rollout.kv_cache import DecodeAttention, KVCache, PrefillAttention, bytes_per_token
from opd_titan.rollout.memory import free_bytes
from opd_titan.rollout.sampler import greedy, sample, uniforms
from opd_titan.rollout.scheduler import Request, Scheduler


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; its log-probs are those at temperature 1."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    ignore_eos: bool = False

    @property
    def distribution(self) -> Distribution:
        """What is sampled from, and therefore what the student is scored under."""
        return Distribution(self.temperature, self.top_k, self.top_p)


class Generator:
    """Samples responses with a model that holds plain (not sharded) weights.

    Args:
        model: the decoder; its parameters are read, never written.
        eos_ids: each of these tokens ends a response.
        max_concurrent: sequences decoded at once; 0 takes what fits in half of the free memory.
        max_prefill_tokens: prompt tokens that go through one forward.
        tp: the ranks that the model is split over. They sample the same responses: each adds its
            part of every sum and sees the same logits.

    Attributes:
        decode_forwards: one-token forwards of the last `generate`; each reads all weights once.
    """

    def __init__(
        self,
        model: nn.Module,
        eos_ids: set[int],
        max_concurrent: int = 0,
        max_prefill_tokens: int = 8192,
        tp: Axis = ALONE,
    ) -> None:
        self.model = model
        self.head = VocabHead(model.lm_head.weight, tp)
        self.device, self.dtype = self.head.weight_vD.device, self.head.weight_vD.dtype
        self.eos_N = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=self.device)
        self.max_concurrent = max_concurrent
        self.max_prefill_tokens = max_prefill_tokens
        self.decode_forwards = 0

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_tokens: Callable[[int], None] = lambda n: None,
    ) -> list[Sample]:
        """Answer every request.

        Args:
            on_tokens: called with the number of tokens just sampled, for a progress bar.

        Returns:
            One sample per request, in the order of the requests.
        """
        self.decode_forwards = 0
        if not requests:
            return []
        max_len = max(len(r.prompt.token_ids) for r in requests) + params.max_new_tokens
        scheduler = Scheduler(requests, self.count_slots(len(requests), max_len))
        args = self.model.args
        cache = KVCache(args, scheduler.slots, max_len, self.dtype, self.device)
        eos_N = self.eos_N[:0] if params.ignore_eos else self.eos_N
        state = SlotState(scheduler.slots, params.max_new_tokens, eos_N)
        answers: dict[tuple[int, int], Sample] = {}
        while scheduler.has_work:
            admitted = scheduler.admit(self.max_prefill_tokens)
            if admitted:
                first = len(scheduler.running) - len(admitted)
                state.start(first, admitted)
                hidden_ND = self.prefill(cache, first, admitted)
            else:
                first = 0
                hidden_ND = self.decode(cache, state, len(scheduler.running))
            rows = slice(first, len(scheduler.running))
            state.append(rows, *self.choose(hidden_ND, state, rows, params))
            on_tokens(rows.stop - rows.start)
            finished = state.finished(rows)
            for slot in finished:
                request = scheduler.running[slot]
                answers[request.prompt.index, request.sample_index] = state.sample_of(slot, request)
            if finished:
                sources, targets = scheduler.release(finished)
                cache.copy_slots(sources, targets, state.longest)
                state.move(sources, targets)
                state.shrink(len(scheduler.running))
        return [answers[r.prompt.index, r.sample_index] for r in requests]

    def count_slots(self, wanted: int, max_len: int) -> int:
        """Sequences to decode at once: what is wanted, as far as memory for them is there."""
        args = self.model.args
        per_token = bytes_per_token(args, self.dtype)
        # Per row of logits: themselves, their softmax, and room for a truncated sort.
        per_slot = per_token * max_len + 4 * 4 * self.head.vocab_size
        fit = self.free_bytes() // 2 // per_slot
        return max(1, min(wanted, self.max_concurrent or wanted, fit))

    def free_bytes(self) -> int:
        """Memory that a rollout may count on, the same on ranks that must schedule alike."""
        return min_integer(free_bytes(self.device), self.device, self.head.tp)

    def prefill(self, cache: KVCache, first: int, admitted: list[Request]) -> Tensor:
        """Run each distinct prompt once; every sample of its group gets a copy of its cache."""
        groups = [list(g) for _, g in groupby(admitted, key=lambda r: r.prompt.index)]
        seq_lens = [len(g[0].prompt.token_ids) for g in groups]
        slots = [first + n for n in accumulate((len(g) for g in groups[:-1]), initial=0)]
        group_N = [i for i, g in enumerate(groups) for _ in g]
        tokens_T = torch.tensor(
            [t for g in groups for t in g[0].prompt.token_ids], device=self.device
        )
        hidden_TD = self.model(tokens_T, PrefillAttention(cache, slots, seq_lens))
        targets = sorted(set(range(first, first + len(admitted))).difference(slots))
        sources = [slots[group_N[n - first]] for n in targets]
        cache.copy_slots(sources, targets, length=max(seq_lens))
        ends = list(accumulate(seq_lens))
        return hidden_TD[torch.tensor([ends[i] - 1 for i in group_N], device=self.device)]

    def decode(self, cache: KVCache, state: SlotState, n: int) -> Tensor:
        attend = DecodeAttention(cache, state.position_B[:n].clone(), state.longest)
        state.longest += 1
        self.decode_forwards += 1
        return self.model(state.token_B[:n], attend)

    def choose(
        self, hidden_ND: Tensor, state: SlotState, rows: slice, params: SamplingParams
    ) -> tuple[Tensor, Tensor]:
        """The next token of each row [N] and its log-prob, the same on tensor-parallel ranks."""
        if params.temperature == 0.0:
            chosen = greedy(whole_logits(hidden_ND, self.head, Distribution()))
        else:
            logits_NV = whole_logits(hidden_ND, self.head, params.distribution)
            chosen = sample(logits_NV, uniforms(state.key_B[rows], state.count_B[rows]))
        # From the same logits a GPU's prefix sums may round differently: one rank decides.
        return broadcast_tokens(*chosen, self.head.tp)


class SlotState:
    """What the generator remembers of each slot, as tensors: no per-row Python while decoding."""

    def __init__(self, slots: int, max_new_tokens: int, eos_N: Tensor) -> None:
        device = eos_N.device
        self.eos_N, self.stop_ids = eos_N, set(eos_N.tolist())
        self.token_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.position_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.count_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.key_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.tokens_BR = torch.zeros(slots, max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs_BR = torch.zeros(slots, max_new_tokens, device=device)
        self.slot_B = torch.arange(slots, device=device)
        self.longest = 0  # the largest position in use, plus one; known without asking the device

    def start(self, first: int, admitted: list[Request]) -> None:
        rows = slice(first, first + len(admitted))
        lengths = [len(r.prompt.token_ids) for r in admitted]
        # `append` moves the position on, to where the first response token will stand.
        self.position_B[rows] = torch.tensor(lengths, device=self.position_B.device) - 1
        self.key_B[rows] = torch.tensor([r.key for r in admitted], device=self.key_B.device)
        self.count_B[rows] = 0
        self.longest = max(self.longest, max(lengths) + 1)

    def append(self, rows: slice, tokens_N: Tensor, logprobs_N: Tensor) -> None:
        slots, counts = self.slot_B[rows], self.count_B[rows]
        self.tokens_BR[slots, counts] = tokens_N
        self.logprobs_BR[slots, counts] = logprobs_N
        self.token_B[rows] = tokens_N
        self.count_B[rows] += 1
        self.position_B[rows] += 1

    def finished(self, rows: slice) -> list[int]:
        """Slots that reached a stop token or the length limit: the one host sync per token."""
        done = self.count_B[rows] == self.tokens_BR.shape[1]
        done |= torch.isin(self.token_B[rows], self.eos_N)
        return (done.nonzero().squeeze(1) + rows.start).tolist()

    def sample_of(self, slot: int, request: Request) -> Sample:
        n = int(self.count_B[slot])
        response_ids = self.tokens_BR[slot, :n].tolist()
        return Sample(
            prompt=request.prompt,
            sample_index=request.sample_index,
            response_ids=response_ids,
            finish_reason="stop" if response_ids[-1] in self.stop_ids else "length",
            student_logprobs=self.logprobs_BR[slot, :n].cpu().clone(),
        )

    def shrink(self, running: int) -> None:
        """Long sequences that ended need not be attended over any more."""
        self.longest = int(self.position_B[:running].max()) + 1 if running else 0

    def move(self, sources: list[int], targets: list[int]) -> None:
        for tensor in (
            self.token_B,
            self.position_B,
            self.count_B,
            self.key_B,
            self.tokens_BR,
            self.logprobs_BR,
        ):
            tensor[targets] = tensor[sources]
