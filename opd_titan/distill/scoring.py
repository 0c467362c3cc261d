"""Score responses with frozen models, with the packing, model code and head of the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from opd_titan.data.types import Sample
from opd_titan.distill.head import FrozenHeads, hidden_head, score_head
from opd_titan.distill.inspection import Columns, record_ranks, watch_samples
from opd_titan.distill.packing import STAND_IN, Minibatch, pack, prefetched
from opd_titan.distributed.sharding import resharding
from opd_titan.distributed.world import World
from opd_titan.models.logits import Distribution, VocabHead


@torch.no_grad()
def score(
    model: nn.Module,
    plan: Sequence[Minibatch],
    dist: Distribution,
    world: World,
    on_sequences: Callable[[int], None] = lambda n: None,
    keep_hidden: bool = False,
    role: str = "teacher",
) -> list[tuple[Sample, Tensor]]:
    """Return the log-probs, or the hidden states, of the response tokens of this rank's share.

    Args:
        model: the decoder; it is resharded at the end.
        dist: the distribution to score under. For a teacher it is the one that the student samples
            from, without top-k and top-p.
        on_sequences: called with the number of sequences just done, for a progress bar.
        keep_hidden: return hidden states, for an update that needs whole distributions.
        role: "teacher" or "reference". Samples to be inspected record ranks under this name, unless
            hidden states are kept; then the update records them.

    Returns:
        Each of this rank's samples with its log-probs, fp32 on the CPU; or with the hidden states
        [response tokens, E] that predict its tokens, on the device.
    """
    scored: list[tuple[Sequence[Sample], Tensor]] = []
    seen: list[tuple[Sequence[Sample], Columns]] = []
    microbatches = [m for minibatch in plan for m in minibatch.microbatches]
    with resharding(model):
        for samples, batch in prefetched(microbatches, lambda m: pack(m or STAND_IN, world)):
            head: Callable[..., Any] = partial(hidden_head, predict_R=batch.predict_R)
            watch = None if keep_hidden else watch_samples(samples or STAND_IN, role)
            if not keep_hidden:
                where = {"predict_R": batch.predict_R, "targets_R": batch.targets_R}
                head = partial(score_head, **where, dist=dist, watch=watch)
            values_R = model(batch.tokens_T, batch.attend, head)
            if samples:
                scored.append((samples, values_R))
            if watch is not None:
                seen.append((samples, watch.columns))
            on_sequences(len(samples))
    pairs: list[tuple[Sample, Tensor]] = []
    for those, values_R in scored:
        # Copied only now: a copy to the host waits for the device, which should stay busy.
        values = values_R if keep_hidden else values_R.cpu()
        pairs += zip(those, values.split([len(s.response_ids) for s in those]), strict=True)
    for those, columns in seen:
        record_ranks(those, role, columns)
    return pairs


@contextmanager
def gathered_heads(models: Mapping[str, nn.Module]) -> Iterator[FrozenHeads]:
    """Gather the heads of frozen models, by role ("teacher", "reference"). All ranks must enter.

    Under tensor parallelism a rank has its part of them. FSDP gathers a head together with the
    embedding, which it may be tied to.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(resharding(model))
            if isinstance(model, FSDPModule):
                model.unshard()
        weights = {role: m.get_parameter("lm_head.weight") for role, m in models.items()}
        yield FrozenHeads(**{role: VocabHead.of(weight) for role, weight in weights.items()})
