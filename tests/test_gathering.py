"""What the planner foresees of what stays gathered between micro-batches, and what decides it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_plan import H200, SIZES, TIGHT, parameters, shard, tp

from opd_titan.plan.cluster import Cluster
from opd_titan.training.gathering import USABLE

# Collectives of an update beside those of FSDP, over all ranks: the norm, and two of diagnostics.
SCALARS = 3


@pytest.mark.parametrize("cluster", [TIGHT, H200], ids=["anew", "kept"])
def test_traffic_of_sharding(planned: Any, cluster: Cluster) -> None:
    _, simulation, _ = planned("wide", "tiny", cluster=cluster)
    kept = simulation.kept
    assert kept.weights == kept.gradients == ("teacher" in kept.frozen) == (cluster is H200)
    parts, ranks, layers = parameters("wide"), 8, SIZES["wide"][1]
    layer, root = (ranks * shard(parts[name], ranks) for name in ("layer", "root"))
    passes = (ranks - 1) / ranks
    sent = {name: phase.sent["dp_shard"] for name, phase in simulation.phases.items()}
    # bf16 weights in forward and backward, the root's once; fp32 gradients.
    times = 1 if kept.weights else 2
    expected = passes * (2 * (times * layers * layer + root) + 4 * (layers * layer + root))
    assert expected < sent["update"] < expected + 64 * SCALARS
    assert sent["sync"] == passes * 2 * (layers * layer + root)
    parts, layers = parameters("tiny"), SIZES["tiny"][1]
    layer, root = (ranks * shard(parts[name], ranks) for name in ("layer", "root"))
    assert sent["teacher"] == passes * 2 * (layers * layer + root)
    assert sent["rollout"] == 0
    collectives = simulation.phases["update"].collectives["dp_shard"]
    assert collectives == (1 + times) * SIZES["wide"][1] + 2 + SCALARS


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [TIGHT, H200], ids=["anew", "kept"])
@pytest.mark.parametrize("degrees", [(1, 8), (4, 2)], ids=["fsdp", "hsdp"])
def test_what_further_microbatches_send(
    planned: Any, cluster: Cluster, degrees: tuple[int, int]
) -> None:
    copies = ("--parallelism.data_parallel_replicate_degree", degrees[0])
    _, once, _ = planned("wide", "tiny", *copies, cluster=cluster)
    budget = ("--training.max_tokens_per_microbatch", 64)
    _, often, _ = planned("wide", "tiny", *copies, *budget, cluster=cluster)
    assert [len(s.microbatches("teacher")) for s in (once, often)] == [1, 4]
    again = 3 if cluster is TIGHT else 0
    # The root of the teacher stays gathered in any case.
    root = 2 * degrees[1] * shard(parameters("tiny")["root"], degrees[1])
    once_only = {
        "sync": (0.0, 0),
        "teacher": ((1 - 1 / degrees[1]) * root, 1),
        "update": (0.0, SCALARS if degrees[0] == 1 else 0),
    }
    for name, (size, number) in once_only.items():
        first, every = (s.phases[name] for s in (once, often))
        times = again if name != "sync" else 0
        more = every.sent["dp_shard"] - first.sent["dp_shard"]
        assert more == pytest.approx(times * (first.sent["dp_shard"] - size), rel=1e-4)
        more = every.collectives["dp_shard"] - first.collectives["dp_shard"]
        assert more == times * (first.collectives["dp_shard"] - number)
        assert first.sent["dp_shard"] > size
        for count in ("sent", "collectives"):
            copies = (getattr(phase, count).get("dp_replicate") for phase in (first, every))
            assert len(set(copies)) == 1


@pytest.mark.slow
def test_weights_may_stay_where_gradients_do_not_fit(planned: Any) -> None:
    budget = ("--training.max_tokens_per_microbatch", 64)
    _, simulation, _ = planned("wide", "tiny", *budget)
    short = replace(H200, memory=(simulation.kept.needed - 1) / USABLE, reserve=0.0)
    _, found, _ = planned("wide", "tiny", *budget, cluster=short)
    assert found.kept.weights and not found.kept.gradients
    (_, anew, _), (_, both, _) = (
        planned("wide", "tiny", *budget, cluster=cluster) for cluster in (TIGHT, H200)
    )
    sent = [s.phases["update"].sent["dp_shard"] for s in (anew, found, both)]
    once = planned("wide", "tiny")[1].phases["update"].sent["dp_shard"]
    assert sent[0] > sent[1] > sent[2] == once
    peaks = [s.phases["update"].peak for s in (anew, found, both)]
    assert peaks[0] < peaks[1] < peaks[2]


ESTIMATED = {
    "none": (),
    "selective": ("--activation_checkpoint.mode", "selective"),
    "full": ("--activation_checkpoint.mode", "full"),
    "fsdp": ("--parallelism.data_parallel_shard_degree", 8),
    "tp": tp(2),
    "fsdp x tp": (*tp(2), "--parallelism.data_parallel_shard_degree", 4),
    "exact": ("--distill.objective", "reverse_kl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ESTIMATED)
def test_what_is_decided_on_covers_what_the_update_takes(planned: Any, case: str) -> None:
    """The sizes that decide are no less than what the layers keep when they run, nor twice that."""
    ranks = {"fsdp": 8, "tp": 2, "fsdp x tp": 8}.get(case, 1)
    tokens = 128 * ranks // (2 if "tp" in case else 1)
    options = (*ESTIMATED[case], "--rollout.prompts_per_step", tokens, "--rollout.group_size", 1)
    options += ("--training.max_tokens_per_microbatch", 4096, "--rollout.max_concurrent", 8)
    cluster = replace(H200, world_size=ranks)
    _, simulation, _ = planned("shallow", "shallow", *options, cluster=cluster)
    assert simulation.kept.weights and simulation.kept.gradients
    peak = simulation.phases["update"].peak
    assert peak < simulation.kept.needed < 1.7 * peak
