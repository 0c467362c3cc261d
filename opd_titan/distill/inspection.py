"""What people want to see of a response beyond its log-probs: ranks, and what else was likely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from opd_titan.data.types import Inspection, Sample
from opd_titan.distill.head import inspect_head
from opd_titan.distill.packing import STAND_IN, Minibatch, pack, plan_minibatches
from opd_titan.distributed.collectives import gather_lists
from opd_titan.distributed.world import World
from opd_titan.models.logits import Distribution

# The teacher's likeliest tokens that are kept of each place.
ALTERNATIVES = 5

# The rank of each response token, and the K likeliest tokens with their log-probs.
_Columns = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def inspect(
    models: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    max_tokens: int,
    dist: Distribution,
    world: World,
    on_sequences: Callable[[int], None] = lambda n: None,
) -> None:
    """One forward of each model over these samples; fills in each one's `inspection`.

    All ranks call, with the same samples; each computes its share, and all get everything.

    Args:
        models: by role ("student", "teacher", "reference"); FSDP-sharded, left resharded.
        max_tokens: budget of a forward pass on each rank.
        dist: ranks do not depend on what the student's samples were cut to, so all models are
            looked at untruncated; log-probs are at its temperature.
        on_sequences: called by all ranks with the number of sequences just done, per model.
    """
    if not samples:
        return
    (minibatch,) = plan_minibatches(samples, 1, max_tokens, world.dp)
    mine = [s for microbatch in minibatch.microbatches for s in microbatch]
    found = [Inspection() for _ in mine]
    for role, model in models.items():
        k = ALTERNATIVES if role == "teacher" else 0
        columns = _look(model, minibatch, dist.untruncated, world, k, on_sequences)
        for inspection, (ranks, ids, logprobs) in zip(found, columns, strict=True):
            setattr(inspection, f"{role}_ranks", ranks)
            if k:
                inspection.teacher_ids, inspection.teacher_logprobs = ids, logprobs
    keys = [(s.prompt.index, s.sample_index) for s in mine]
    by_key = dict(gather_lists(list(zip(keys, found, strict=True)), world.dp))
    for sample in samples:
        sample.inspection = by_key[sample.prompt.index, sample.sample_index]


def _look(
    model: nn.Module,
    minibatch: Minibatch,
    dist: Distribution,
    world: World,
    k: int,
    on_sequences: Callable[[int], None],
) -> list[_Columns]:
    """Of each of this rank's samples, in the order of the micro-batches, on the CPU."""
    found: list[_Columns] = []
    for microbatch in minibatch.microbatches:
        batch = pack(microbatch or STAND_IN, world)
        head = partial(
            inspect_head, predict_R=batch.predict_R, targets_R=batch.targets_R, dist=dist, k=k
        )
        columns = model(batch.tokens_T, batch.attend, head)
        if microbatch:
            lengths = [len(s.response_ids) for s in microbatch]
            found += zip(*(values.cpu().split(lengths) for values in columns), strict=True)
        on_sequences(len(microbatch))
    model.reshard()
    return found
