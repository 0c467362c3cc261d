"""What people want to see of a response beyond its log-probs: ranks, and what else was likely.

Samples whose `inspection` is a dict, empty at first, are looked at: by the frozen models while they
are scored, by the student in a forward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from opd_titan.data.types import Sample, Standing
from opd_titan.distill.head import inspect_head
from opd_titan.distill.packing import STAND_IN, PackedBatch, pack, plan_minibatches
from opd_titan.distributed.collectives import gather_lists
from opd_titan.distributed.sharding import resharding
from opd_titan.distributed.world import World
from opd_titan.models.logits import Distribution

# By role, the likeliest tokens that are kept of each place.
ALTERNATIVES = {"teacher": 5}

# What `inspect_head` returns for several samples' tokens.
Columns = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def inspect_student(
    model: nn.Module,
    samples: Sequence[Sample],
    max_tokens: int,
    dist: Distribution,
    world: World,
    on_sequences: Callable[[int], None] = lambda n: None,
) -> None:
    """One forward over these samples, which notes the student's part of each one's `inspection`.

    All ranks call, with the same samples; each computes its share, and all get everything.

    Args:
        model: FSDP-sharded, left resharded.
        max_tokens: budget of a forward pass on each rank.
        dist: as the samples were drawn from. What that was cut to does not change ranks.
        on_sequences: called by all ranks with the number of sequences just done.
    """
    if not samples:
        return
    (minibatch,) = plan_minibatches(samples, 1, max_tokens, world.dp)
    mine: list[tuple[tuple[int, int], Standing]] = []
    with resharding(model):
        for microbatch in minibatch.microbatches:
            batch = pack(microbatch or STAND_IN, world)
            columns = model(batch.tokens_T, batch.attend, _head(batch, dist, 0))
            mine += [(_key(s), standing) for s, standing in standings(microbatch, columns)]
            on_sequences(len(microbatch))
    by_key = dict(gather_lists(mine, world.dp))
    for sample in samples:
        assert sample.inspection is not None
        sample.inspection["student"] = by_key[_key(sample)]


def watching(
    head: Callable[[Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    batch: PackedBatch,
    dist: Distribution,
    role: str,
) -> tuple[list[Sample], Callable[[Tensor, Tensor], tuple[Tensor, Columns | None]]]:
    """The samples to look at, and a head that returns their columns beside what `head` does."""
    watched = [s for s in samples if role and s.inspection is not None]
    if not watched:
        return [], lambda hidden_TD, weight: (head(hidden_TD, weight), None)
    lengths = torch.tensor([len(s.response_ids) for s in samples])
    chosen = torch.tensor([s.inspection is not None for s in samples])
    rows = chosen.repeat_interleave(lengths).nonzero().view(-1).to(batch.targets_R.device)
    look = _head(batch, dist, ALTERNATIVES.get(role, 0), rows)
    return watched, lambda hidden_TD, weight: (head(hidden_TD, weight), look(hidden_TD, weight))


def standings(samples: Sequence[Sample], columns: Columns) -> list[tuple[Sample, Standing]]:
    """The columns' part of each sample, on the CPU."""
    lengths = [len(s.response_ids) for s in samples]
    if not lengths:
        return []
    parts = zip(*(values.cpu().split(lengths) for values in columns), strict=True)
    return [(s, Standing(*part)) for s, part in zip(samples, parts, strict=True)]


def _head(
    batch: PackedBatch, dist: Distribution, k: int, rows: Tensor | slice = slice(None)
) -> Callable[[Tensor, Tensor], Columns]:
    return partial(
        inspect_head,
        predict_R=batch.predict_R[rows],
        targets_R=batch.targets_R[rows],
        dist=dist.untruncated,
        k=k,
    )


def _key(sample: Sample) -> tuple[int, int]:
    return sample.prompt.index, sample.sample_index
