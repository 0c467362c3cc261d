"""Frozen models scoring responses, with the packing, model code and head of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from opd_titan.data.types import Sample
from opd_titan.distill.head import score_head
from opd_titan.distill.packing import STAND_IN, Minibatch, pack, unpack_values
from opd_titan.distributed.world import World
from opd_titan.models.logits import Distribution


@torch.no_grad()
def score(
    model: nn.Module,
    plan: Sequence[Minibatch],
    dist: Distribution,
    world: World,
    on_sequences: Callable[[int], None] = lambda n: None,
) -> list[tuple[Sample, Tensor]]:
    """Log-probs of every response token of this rank's share of the plan.

    Args:
        model: FSDP-sharded decoder; left resharded.
        dist: the distribution to score under; a teacher is scored whole, at the sampling
            temperature, whatever top-k and top-p the student sampled with.
        on_sequences: called with the number of sequences just done, for a progress bar.

    Returns:
        Each of this rank's samples with its log-probs, fp32 on the CPU.
    """
    scored: list[tuple[Sequence[Sample], Tensor]] = []
    for microbatch in (m for minibatch in plan for m in minibatch.microbatches):
        samples = microbatch or STAND_IN
        batch = pack(samples, world)
        head = partial(score_head, predict_R=batch.predict_R, targets_R=batch.targets_R, dist=dist)
        logprobs_R = model(batch.tokens_T, batch.attend, head)
        if microbatch:
            scored.append((samples, logprobs_R))
        on_sequences(len(microbatch))
    # FSDP keeps the root's weights gathered after a forward, which a frozen model need not.
    model.reshard()
    # Only now: a copy to the host waits for the device, which should be busy meanwhile.
    return [
        pair
        for samples, logprobs_R in scored
        for pair in zip(samples, unpack_values(logprobs_R, samples), strict=True)
    ]
