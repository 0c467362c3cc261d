"""From samples to packed micro-batches: who computes what, and the index tensors to do it with.

Shapes: T packed tokens, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.world import Axis, World
from opd_titan.models.attention import PackedAttention

# Stands in where a rank has no micro-batch left: forward and backward are collective.
STAND_IN = (Sample(Prompt(-1, "", (0,)), 0, [0], "length"),)


@dataclass
class PackedBatch:
    """Sequences laid end to end, and where their response tokens are predicted from.

    A sequence's last token predicts nothing, so it is a target but never an input. The first
    response token is predicted from the prompt's last position; the stop token is a target like
    any other. All of this follows from lengths alone, whatever the pad id is.
    """

    tokens_T: Tensor
    attend: PackedAttention
    predict_R: Tensor
    targets_R: Tensor


def pack(samples: Sequence[Sample], world: World) -> PackedBatch:
    """Pack whole samples, in order.

    Tensor-parallel ranks take equal shares of the tokens: what is missing to a multiple of them is
    added at the end, as a sequence that predicts nothing.
    """
    tokens: list[int] = []
    predict: list[int] = []
    seq_lens: list[int] = []
    for s in samples:
        first = len(tokens) + len(s.prompt.token_ids) - 1
        predict.extend(range(first, first + len(s.response_ids)))
        tokens.extend(s.prompt.token_ids)
        tokens.extend(s.response_ids[:-1])
        seq_lens.append(s.num_tokens - 1)
    device, missing = world.device, -len(tokens) % world.tp.size
    if missing:
        tokens.extend([0] * missing)
        seq_lens.append(missing)
    return PackedBatch(
        tokens_T=torch.tensor(tokens, device=device),
        attend=PackedAttention(seq_lens, device),
        predict_R=torch.tensor(predict, device=device),
        targets_R=torch.tensor([t for s in samples for t in s.response_ids], device=device),
    )


def pack_values(values: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Per-token values of each sample [its tokens] as one [R] tensor; None where there are none."""
    if not values or values[0] is None:
        return None
    return torch.cat(list(values)).to(device)


def unpack_values(values_R: Tensor, samples: Sequence[Sample]) -> list[Tensor]:
    """One [R] tensor as a CPU tensor per sample."""
    return list(values_R.cpu().split([len(s.response_ids) for s in samples]))


def split_minibatches(num_samples: int, minibatches: int) -> list[range]:
    """Cut a step's samples into updates of nearly equal size, independently of the world size."""
    ends = [num_samples * (i + 1) // minibatches for i in range(minibatches)]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each rank sequences of about the same number of tokens in all.

    Longest first to the least loaded rank (Graham 1969: at most 4/3 of the best possible).
    Returns indices per rank, ascending.
    """
    loads = [0] * ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], len(parts[r]), r))
        loads[rank] += lengths[i]
        parts[rank].append(i)
    return [sorted(p) for p in parts]


def fill_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """As few micro-batches of at most `max_tokens` as first-fit-decreasing finds.

    A sequence that is longer than the budget gets one of its own.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((b for b, room in enumerate(free) if room >= lengths[i]), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            free.append(max_tokens)
        bins[fits].append(i)
        free[fits] -= lengths[i]
    return [sorted(b) for b in bins]


@dataclass(frozen=True)
class Minibatch:
    """One optimizer update as one rank sees it.

    Attributes:
        microbatches: this rank's samples, by micro-batch; padded with empty ones so that every
            rank has the same number, because each forward and backward is collective.
        response_tokens: of the whole update, over all ranks.
    """

    microbatches: list[list[Sample]]
    response_tokens: int


def plan_minibatches(
    samples: Sequence[Sample], minibatches: int, max_tokens: int, dp: Axis
) -> list[Minibatch]:
    """Every rank calls this with the same samples and takes its own share."""
    plan = []
    for part in split_minibatches(len(samples), minibatches):
        chosen = [samples[i] for i in part]
        lengths = [s.num_tokens for s in chosen]
        bins_by_rank = []
        for members in balance(lengths, dp.size):
            bins = fill_microbatches([lengths[i] for i in members], max_tokens)
            bins_by_rank.append([[chosen[members[i]] for i in b] for b in bins])
        count = max(len(bins) for bins in bins_by_rank)
        mine = bins_by_rank[dp.rank]
        plan.append(
            Minibatch(
                microbatches=mine + [[] for _ in range(count - len(mine))],
                response_tokens=sum(len(s.response_ids) for s in chosen),
            )
        )
    return plan
