"""Divide samples among ranks and micro-batches, and pack them with their index tensors.

Shapes: T packed tokens, R response tokens.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.transfer import send
from opd_titan.distributed.world import Axis, World
from opd_titan.models.attention import PackedAttention

# Runs on a rank that has no micro-batch left, because forward and backward are collective.
STAND_IN = (Sample(Prompt(-1, "", (0,)), 0, [0], "length"),)

T = TypeVar("T")
# Two prompts are the same if they have the same row in the source and the same tokens.
PromptKey = tuple[int, tuple[int, ...]]
# See `cost`.
REPEATED_PART = 8


@dataclass
class PackedBatch:
    """Packed sequences, and the positions that predict their response tokens.

    The last token of a sequence predicts nothing, so it is a target but not an input. The prompt's
    last position, which a group shares, predicts the first response token. The stop token is a
    target like any other. All of this follows from lengths alone, not from a pad id.

    Attributes:
        tokens_T: token ids.
        attend: the attention between the tokens.
        predict_R: the position that predicts each response token.
        targets_R: the ids of the response tokens.
    """

    tokens_T: Tensor
    attend: PackedAttention
    predict_R: Tensor
    targets_R: Tensor


def pack(samples: Sequence[Sample], world: World) -> PackedBatch:
    """Pack whole samples in order. A shared prompt is packed once, before its first sample.

    Tensor-parallel ranks take equal shares of the tokens. The tokens are padded to a multiple of
    the number of ranks, by a sequence at the end that predicts nothing.
    """
    uses = Counter(_prompt_of(s) for s in samples)
    layout = _Layout()
    shared: dict[PromptKey, int] = {}
    predict: list[int] = []
    for s in samples:
        prompt, key = s.prompt.token_ids, _prompt_of(s)
        # A response's last token is not an input.
        if uses[key] == 1:
            first = layout.add([*prompt, *s.response_ids[:-1]])
            predict.extend(range(first + len(prompt) - 1, len(layout.tokens)))
            continue
        if key not in shared:
            shared[key] = len(layout.lengths)
            layout.add(prompt)
        piece = shared[key]
        predict.append(layout.starts[piece] + len(prompt) - 1)
        if len(s.response_ids) > 1:
            first = layout.add(s.response_ids[:-1], piece)
            predict.extend(range(first, len(layout.tokens)))
    missing = -len(layout.tokens) % world.tp.size
    if missing:
        layout.add([0] * missing)
    targets = [t for s in samples for t in s.response_ids]
    attend = PackedAttention(
        layout.lengths, world.device, layout.continues, [layout.tokens, predict, targets]
    )
    tokens_T, predict_R, targets_R = attend.beside
    return PackedBatch(tokens_T, attend, predict_R, targets_R)


def prefetched(
    microbatches: Iterable[list[Sample]], make: Callable[[list[Sample]], T]
) -> Iterator[tuple[list[Sample], T]]:
    """Yield each micro-batch with the result of `make`, which is called one micro-batch ahead.

    The tensors of the next micro-batch are then on the device when the current one is done.
    """
    ready: list[tuple[list[Sample], T]] = []
    for samples in microbatches:
        ready.append((samples, make(samples)))
        if len(ready) > 1:
            yield ready.pop(0)
    yield from ready


class _Layout:
    """Pieces laid end to end, see `PackedAttention`."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.continues: list[int | None] = []

    def add(self, tokens: Sequence[int], continues: int | None = None) -> int:
        """Append a piece and return its first row."""
        self.starts.append(len(self.tokens))
        self.lengths.append(len(tokens))
        self.continues.append(continues)
        self.tokens.extend(tokens)
        return self.starts[-1]


def pack_values(values: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Return the values of each sample's tokens as one [R] tensor; None if there are none."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    assert len(there) == len(values), "only some samples have values"
    whole = torch.cat(there)
    return whole if whole.device == device else send(whole, device)


def unpack_values(values_R: Tensor, samples: Sequence[Sample]) -> list[Tensor]:
    """Split an [R] tensor into one CPU tensor for each sample."""
    return list(values_R.cpu().split([len(s.response_ids) for s in samples]))


def split_minibatches(num_samples: int, minibatches: int) -> list[range]:
    """Divide a step's samples into updates of nearly equal size. The world size is irrelevant."""
    ends = [num_samples * (i + 1) // minibatches for i in range(minibatches)]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def cost(samples: Sequence[Sample]) -> int:
    """Return the cost of a micro-batch in tokens: its responses, and each prompt once.

    Each further sample of a prompt adds a part of the prompt, because attention repeats the
    prompt's keys and values (1/8 to 1/20 of what the layers of a Qwen3 keep for a token).
    """
    total, seen = 0, set()
    for s in samples:
        total += _cost(s, repeated=_prompt_of(s) in seen)
        seen.add(_prompt_of(s))
    return total


def _cost(sample: Sample, repeated: bool) -> int:
    prompt = len(sample.prompt.token_ids)
    return len(sample.response_ids) + (-(-prompt // REPEATED_PART) if repeated else prompt)


def _prompt_of(sample: Sample) -> PromptKey:
    return sample.prompt.index, sample.prompt.token_ids


def balance(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide items among ranks with about equal total costs.

    The most expensive item goes first to the rank with the lowest total (Graham 1969: at most 4/3
    of the best possible). Return the indices of each rank, ascending.
    """
    parts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, 0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, rank = loads[0]
        parts[rank].append(i)
        heapq.heapreplace(loads, (load + costs[i], count + 1, rank))
    return [sorted(p) for p in parts]


def place(samples: Sequence[Sample], ranks: int) -> list[list[int]]:
    """Divide samples among ranks with about equal work.

    Samples of one prompt cost less on the same rank. So groups are placed whole, or cut in 2, 4,
    ... down to single samples, whichever gives the busiest rank the least work. Return the indices
    of each rank, ascending.
    """
    groups = _by_prompt(samples)
    largest = max(len(g) for g in groups)
    best: tuple[int, list[list[int]]] | None = None
    cuts = 1
    while best is None or cuts < 2 * largest:
        units = [g[r.start : r.stop] for g in groups for r in split_minibatches(len(g), cuts) if r]
        parts = balance([cost([samples[i] for i in u]) for u in units], ranks)
        members = [sorted(i for u in part for i in units[u]) for part in parts]
        busiest = max(cost([samples[i] for i in m]) for m in members)
        if best is None or busiest < best[0]:
            best = busiest, members
        cuts *= 2
    return best[1]


def fill_microbatches(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """Divide samples into few micro-batches with a `cost` of at most `max_tokens` each.

    The most expensive group comes first, and in a group the longest response. Each sample joins
    others of its prompt if there is room, or else the first micro-batch with room. A sample that is
    longer than `max_tokens` gets its own micro-batch. Return the indices of each micro-batch,
    ascending.
    """
    groups = _by_prompt(samples)
    costs = [cost([samples[i] for i in g]) for g in groups]
    bins: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(groups)), key=lambda n: (-costs[n], n)):
        holds_prompt: list[int] = []
        for i in sorted(groups[number], key=lambda i: (-len(samples[i].response_ids), i)):
            again, alone = (_cost(samples[i], repeated) for repeated in (True, False))
            chosen = next((b for b in holds_prompt if free[b] >= again), None)
            price = alone if chosen is None else again
            if chosen is None:
                chosen = next((b for b, room in enumerate(free) if room >= alone), len(bins))
                holds_prompt.append(chosen)
            if chosen == len(bins):
                bins.append([])
                free.append(max_tokens)
            bins[chosen].append(i)
            free[chosen] -= price
    return [sorted(b) for b in bins]


def _by_prompt(samples: Sequence[Sample]) -> list[list[int]]:
    """Return the indices of the samples of each prompt."""
    groups: dict[PromptKey, list[int]] = {}
    for i, s in enumerate(samples):
        groups.setdefault(_prompt_of(s), []).append(i)
    return list(groups.values())


@dataclass(frozen=True)
class Minibatch:
    """One optimizer update as one rank sees it.

    Attributes:
        microbatches: this rank's samples, by micro-batch; padded with empty ones so that every
            rank has the same number, because each forward and backward is collective.
        response_tokens: of the whole update, over all ranks.
        teachers: the teacher of each micro-batch, the same on every rank; the micro-batches of one
            teacher follow each other.
    """

    microbatches: list[list[Sample]]
    response_tokens: int
    teachers: list[str]

    def by_teacher(self) -> Iterator[tuple[str, list[list[Sample]]]]:
        """Yield each teacher with its micro-batches."""
        pairs = zip(self.teachers, self.microbatches, strict=True)
        for teacher, part in groupby(pairs, key=itemgetter(0)):
            yield teacher, [microbatch for _, microbatch in part]


def plan_minibatches(
    samples: Sequence[Sample], minibatches: int, max_tokens: int, dp: Axis
) -> list[Minibatch]:
    """Return this rank's share of the updates. All ranks must pass the same samples."""
    plan = []
    for part in split_minibatches(len(samples), minibatches):
        chosen = [samples[i] for i in part]
        mine: list[list[Sample]] = []
        teachers: list[str] = []
        for teacher in dict.fromkeys(s.prompt.teacher for s in chosen):
            taught = [s for s in chosen if s.prompt.teacher == teacher]
            mine += _microbatches(taught, max_tokens, dp)
            teachers += [teacher] * (len(mine) - len(teachers))
        plan.append(Minibatch(mine, sum(len(s.response_ids) for s in chosen), teachers))
    return plan


def _microbatches(samples: Sequence[Sample], max_tokens: int, dp: Axis) -> list[list[Sample]]:
    """Return this rank's share of the samples, in the same number of micro-batches on all ranks."""
    bins_by_rank = []
    for members in place(samples, dp.size):
        share = [samples[i] for i in members]
        bins_by_rank.append([[share[i] for i in b] for b in fill_microbatches(share, max_tokens)])
    count, mine = max(len(bins) for bins in bins_by_rank), bins_by_rank[dp.rank]
    return mine + [[] for _ in range(count - len(mine))]


def minibatches_of(teacher: str, plan: Sequence[Minibatch]) -> list[Minibatch]:
    """Return the part of a plan that one teacher scores, for scoring only, not for an update."""
    parts = [part for minibatch in plan for part in minibatch.by_teacher()]
    return [Minibatch(own, 0, [name] * len(own)) for name, own in parts if name == teacher]
