"""Two processes make the same updates as one in any layout; the collectives that they use.

One start of the processes serves all tests of this file: `on_two_ranks` computes everything, the
tests compare. `test_tensor_parallel` has worlds of four.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import Collectives, run_distributed
from tiny_head import (
    BASELINES,
    DIVERGENCES,
    REF,
    SAMPLED,
    SPLIT,
    Case,
    set_chunk_rows,
    split_problem,
    split_results,
)
from tiny_head import V as HEAD_VOCAB
from tiny_rollout import (
    ARGS,
    CPU,
    EOS,
    FAMILY,
    follow,
    held,
    prompts,
    sharded,
    summary,
    tiny,
)
from tiny_student import one_process_group, random_samples
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_titan.data.loader import PromptLoader
from opd_titan.data.types import Sample
from opd_titan.distill import head as head_module
from opd_titan.distill.head import PROBE_EVERY, PROBE_TOP_K, probed
from opd_titan.distill.objectives import ObjectiveSettings, policy_gradient
from opd_titan.distill.packing import Minibatch, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distributed.collectives import gather_lists, gather_vector, max_scalar, sum_scalars
from opd_titan.distributed.sharding import keep_gathered
from opd_titan.distributed.stopping import Stopped
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import Axis, World, build_world, set_timeout
from opd_titan.models.attention import PackedAttention
from opd_titan.models.logits import Distribution
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses

Results = dict[str, Any]
# data_parallel_replicate_degree, data_parallel_shard_degree, tensor_parallel_degree
LAYOUTS = {"fsdp": (1, 2, 1), "tp": (1, 1, 2), "ddp": (2, 1, 1)}


def on_two_ranks() -> Results:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "CHUNK_BYTES", {"cpu": 5 * 4 * 64})  # a few rows
        found: Results = {
            "updates": [one_step(build_world(CPU, *LAYOUTS[n]), c, 1 << 10) for n, c in UPDATES]
        }
    tp = build_world(CPU, *LAYOUTS["tp"])
    found["head"] = [split_results(tp, *case) for case in SPLIT]
    found["exchanges"] = [exchanges(tp, case) for case in EXCHANGING]
    found["checkpointing"] = checkpointed_gradients(tp)
    found["kept"] = [sent_and_moved(*case) for case in KEPT]
    found["left"] = [left_half_way(*case) for case in KEPT[1:]]
    found["scored"] = [gathers_of_a_teacher(keep) for keep in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # as if each process was on a node of its own
        found["rollout"] = [roll_out(lengths) for lengths in BATCHES]
    found["followed"] = gathered_weights_are_whole()
    found["collectives"] = collectives()
    found["waited"] = waited_for_the_other_rank()  # last, since it breaks the groups
    return found


@pytest.fixture(scope="module")
def ranks() -> list[Results]:
    return run_distributed(on_two_ranks, 2)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------- updates by every objective

OBJECTIVES = [
    Case("policy_gradient", {"true_ratio": True, **REF}),
    Case("policy_gradient", {"baseline": "kl", **REF}),
    Case("policy_gradient", {"baseline": "top_k", "true_ratio": True}),
    Case("reverse_kl", REF),
    Case("jsd", {"beta": 0.3, **REF}),
    Case("top_k_forward_kl"),
]
# Each objective on one of the layouts, and the first on two: `test_layouts` has more of them.
UPDATES = [("fsdp", OBJECTIVES[i]) for i in (0, 1, 3, 5)]
UPDATES += [("tp", OBJECTIVES[i]) for i in (0, 2, 4)]
UPDATES += [("ddp", OBJECTIVES[3])]
SIZES: dict[str, dict[str, Any]] = {
    "student": dict(vocab_size=64, tied=True),
    "teacher": dict(seed=1, vocab_size=64, dim=48, n_layers=3),
    "reference": dict(seed=2, vocab_size=64, tied=True),
}
TEMPERATURE = Distribution(0.9)


def some_samples() -> list[Sample]:
    lengths = [(3, 5), (1, 9), (6, 12), (4, 1), (2, 17)]
    samples = random_samples(lengths, vocab=60, noise=0.5)
    for s in samples:
        s.student_logprobs = s.student_logprobs - 2.0
        s.teacher_logprobs = s.reference_logprobs = None
    return samples


def one_step(world: World, case: Case, max_tokens: int, **sizes: Any) -> Results:
    """Make three updates from the scores of two models, and return what this rank has then."""
    roles = ["student", "teacher"] + ["reference"] * case.has_reference
    models = {role: tiny(**{**SIZES[role], **sizes}) for role in roles}
    models["student"].requires_grad_(True)
    for model in models.values():
        FAMILY.parallelize(model, world, torch.float32)
    student, samples = models.pop("student"), some_samples()
    plan = plan_minibatches(samples, 3, max_tokens, world.dp)
    mine = [s for minibatch in plan for m in minibatch.microbatches for s in m]
    scored = {}
    for role, model in models.items():
        for s, logprobs in score(model, plan, TEMPERATURE, world):
            scored[s.prompt.index, role] = logprobs
        for s, values in score(model, plan, TEMPERATURE, world, keep_hidden=case.exact):
            setattr(s, f"{role}_hidden" if case.exact else f"{role}_logprobs", values)
    rule = UpdateRule(case.objective, case.how, TEMPERATURE, max_grad_norm=5.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    frozen = models if case.exact else {}
    metrics = update(student, optimizer, plan, rule, world, frozen=frozen).scalars
    return {
        "weights": {n: whole(p.detach()).clone() for n, p in student.named_parameters()},
        # Tensor-parallel ranks hold copies of the norms.
        "norms": [local(p.detach()).clone() for n, p in student.named_parameters() if "norm" in n],
        "metrics": metrics,
        "advantages": {s.prompt.index: s.advantages for s in mine},
        "scored": scored,
        "filled": {
            (s.prompt.index, role): getattr(s, f"{role}_logprobs") for s in mine for role in models
        },
        "freed": all(s.teacher_hidden is None and s.reference_hidden is None for s in mine),
        "stood in": any(not m for minibatch in plan for m in minibatch.microbatches),
        "held": sum(local(p).numel() for p in models["teacher"].parameters()),
    }


@cache
def alone(case: int, max_tokens: int = 1 << 10) -> Results:
    with one_process_group():
        return one_step(build_world(CPU), OBJECTIVES[case], max_tokens)


def assert_same_update(mine: Results, truth: Results, **sizes: Any) -> None:
    start = dict(tiny(**{**SIZES["student"], **sizes}).named_parameters())
    for name, weight in truth["weights"].items():
        moved = (weight - start[name]).norm()
        assert moved > 1e-4, name
        assert (mine["weights"][name] - weight).norm() <= 2e-4 * moved, name
    assert mine["metrics"].keys() == truth["metrics"].keys()
    # Which tokens are probed depends on the micro-batches.
    probe = {n for n in truth["metrics"] if n.startswith(("kl/", "policy/t"))}
    assert all(math.isfinite(mine["metrics"][name]) for name in probe)
    for name in truth["metrics"].keys() - probe:
        expected = pytest.approx(truth["metrics"][name], rel=1e-4, abs=2e-5)
        assert mine["metrics"][name] == expected, name
    assert mine["freed"] and len(mine["filled"]) > 0
    for key, logprobs in mine["filled"].items():
        assert logprobs.dtype == torch.float32 and logprobs.device == CPU
        torch.testing.assert_close(logprobs, mine["scored"][key], rtol=0, atol=2e-6)
        torch.testing.assert_close(logprobs, truth["scored"][key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", range(len(OBJECTIVES)), ids=lambda i: str(OBJECTIVES[i]))
def test_any_number_of_microbatches_makes_the_same_update(case: int) -> None:
    for max_tokens in (1, 20):
        assert_same_update(alone(case, max_tokens), alone(case))
    probe = {"kl/reverse", "kl/forward", "policy/teacher_entropy", "policy/top_k_overlap"}
    assert (probe <= alone(case)["metrics"].keys()) is OBJECTIVES[case].exact


@pytest.mark.parametrize("i", range(len(UPDATES)), ids=lambda i: "-".join(map(str, UPDATES[i])))
def test_two_ranks_make_the_same_update_as_one(ranks: list[Results], i: int) -> None:
    layout, case = UPDATES[i]
    truth = alone(OBJECTIVES.index(case))
    results = [rank["updates"][i] for rank in ranks]
    for result in results:
        assert_same_update(result, truth)
        assert result["metrics"] == results[0]["metrics"]
    advantages = {k: v for result in results for k, v in result["advantages"].items()}
    assert advantages.keys() == truth["advantages"].keys()
    for index, values in truth["advantages"].items():
        torch.testing.assert_close(advantages[index], values, rtol=1e-4, atol=1e-4)
    if layout == "tp":  # the copies move alike, to the bit, or they would drift apart
        assert all(map(torch.equal, *(result["norms"] for result in results)))
    else:  # one update has a single sample
        assert any(result["stood in"] for result in results)
    if layout == "fsdp":  # ranks have freed what they gathered of the frozen models
        assert all(result["held"] == truth["held"] / 2 for result in results)


# ------------------------------------------------------------ the vocabulary-parallel head


by_split = pytest.mark.parametrize(
    "i", range(len(SPLIT)), ids=lambda i: "-".join(map(str, SPLIT[i]))
)


@by_split
def test_the_head_over_a_split_vocabulary_is_the_whole_one(ranks: list[Results], i: int) -> None:
    truth = split_results(None, *SPLIT[i])
    # Truncated tokens are all equally unlikely: which are among the top k is arbitrary.
    ties = {"policy/top_k_overlap"} if SPLIT[i][1].truncates else set()
    for mine in (rank["head"][i] for rank in ranks):
        assert mine.keys() == truth.keys()
        for name in truth.keys() - ties:
            torch.testing.assert_close(mine[name], truth[name], rtol=2e-5, atol=2e-6, msg=name)


# One of each kind of loss.
EXCHANGING = [SAMPLED[0], *BASELINES[:2], *DIVERGENCES[:8:3], DIVERGENCES[9]]


def exchanges(world: World, case: Case) -> dict[int, list[int]]:
    """Return the sizes of the collectives of a loss, by the rows of a chunk."""
    found = {}
    m, weight = split_problem(world, Distribution(0.9))
    for rows in (1000, 8):
        with pytest.MonkeyPatch.context() as patch, Collectives() as sent:
            set_chunk_rows(patch, case, rows, HEAD_VOCAB // world.tp.size)
            m.loss(case, weight, world.tp)
        found[rows] = [size for _, size in sent.seen]
    return found


@pytest.mark.parametrize("case", EXCHANGING, ids=str)
def test_ranks_exchange_a_few_numbers_per_token(ranks: list[Results], case: Case) -> None:
    """At most three times per chunk, and three times more if some of its tokens are probed.

    Per token and rank these are three numbers for each model, or those of the k tokens of a
    support. Nothing has the size of the vocabulary.
    """
    tokens, split = 21, 2
    models = 1 + case.exact * (1 + case.has_reference)
    has_support = "top_k" in (case.name[:5], case.how.baseline)
    per_token = models * (case.how.top_k + 1 if has_support else 3)
    for rank in ranks:
        for rows, sizes in rank["exchanges"][EXCHANGING.index(case)].items():
            rows = min(rows, tokens)
            starts = range(0, tokens, rows)
            looks = sum(len(probed(n, min(n + rows, tokens))) > 0 for n in starts) * case.exact
            assert len(sizes) <= 3 * (len(starts) + looks)
            probe_size = (-(-rows // PROBE_EVERY) + 1) * 2 * PROBE_TOP_K * split * case.exact
            assert max(sizes) <= max(rows * per_token * split, probe_size, tokens)


def checkpointed_gradients(world: World) -> list[float]:
    """Return by how much activation checkpointing changes any gradient of a split model."""
    found = {}
    for mode in ("none", "selective", "full"):
        model = tiny(vocab_size=62, tied=True).requires_grad_(True)
        FAMILY.parallelize(model, world, torch.float32, activation_checkpoint=mode)
        attend = PackedAttention([5, 3, 20], CPU)
        model(torch.arange(28), attend, lambda h_TD, _w: h_TD.square().sum()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found[mode] = torch.cat([g.to_local().flatten() for g in grads])
    return [(found["none"] - found[mode]).abs().max().item() for mode in ("selective", "full")]


def test_checkpointing_does_not_change_gradients_under_tensor_parallelism(
    ranks: list[Results],
) -> None:
    assert [rank["checkpointing"] for rank in ranks] == [[0.0, 0.0]] * 2


# ------------------------------------------------- what stays gathered between micro-batches

GROUPS = ARGS.n_layers + 1  # of FSDP: each layer, and the root
MICROBATCHES = 3
# Whether the student's weights stay, and whether its gradients do.
WAYS = [(False, False), (True, False), (True, True)]
VOCAB = 62
# Three micro-batches of one update. Layers are gathered in forward and backward.
ANEW = {"allgather_base": MICROBATCHES * (2 * GROUPS - 1)}
FSDP = [
    {**ANEW, "reduce_scatter_base": MICROBATCHES * GROUPS},
    {"allgather_base": GROUPS, "reduce_scatter_base": MICROBATCHES * GROUPS},
    {"allgather_base": GROUPS, "reduce_scatter_base": GROUPS},
]
# Copies of whole weights: nothing to gather, and one sum per update.
COPIES = [{"allreduce": GROUPS}] * 3
KEPT = [("fsdp", "float32"), ("fsdp", "bfloat16"), ("ddp", "float32")]
RULE = UpdateRule(policy_gradient, ObjectiveSettings(), Distribution(), max_grad_norm=0.0)


def student(world: World, dtype: str, kept: bool) -> nn.Module:
    model = tiny(vocab_size=VOCAB, tied=True).requires_grad_(True)
    FAMILY.parallelize(model, world, getattr(torch, dtype))
    if kept:
        keep_gathered(model)
    return model


def two_updates(world: World) -> list[Minibatch]:
    """Plan an update of one micro-batch, then one of three on each of two ranks."""

    def samples() -> list[Sample]:
        generator = torch.Generator().manual_seed(2)
        found = []
        for prompt in prompts([5, 9, 3, 7, 8, 2]):
            ids = torch.randint(VOCAB, (8,), generator=generator).tolist()
            s = Sample(prompt, 0, ids, "length")
            s.student_logprobs, s.teacher_logprobs = torch.randn(2, 8, generator=generator) - 3.0
            found.append(s)
        return found

    halves = [plan_minibatches(samples(), 1, budget, world.dp)[0] for budget in (1000, 18)]
    assert [len(m.microbatches) for m in halves] == [1, -(-2 * MICROBATCHES // world.dp.size)]
    return halves


def make(model: nn.Module, updates: list[Minibatch], world: World, once: bool) -> None:
    """Make these updates by plain SGD at a rate of 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update(model, optimizer, updates, RULE, world, exchange_once=once)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters()])


def moved(model: nn.Module, world: World, once: bool = False) -> Tensor:
    """Return all weights after both updates."""
    make(model, two_updates(world), world, once)
    return weights(model)


def sent_and_moved(layout: str, dtype: str) -> list[tuple[Counter[str], Tensor]]:
    """Return the large collectives of an update, and the weights after it, for each of `WAYS`."""
    world = build_world(CPU, *LAYOUTS[layout])
    found = []
    for kept, once in WAYS:
        model = student(world, dtype, kept)
        first, second = two_updates(world)
        make(model, [first], world, once)
        with Collectives() as sent:
            make(model, [second], world, once)
        found.append((sent.count(larger_than=ARGS.dim), weights(model)))
    return found


@pytest.mark.parametrize("i", range(len(KEPT)), ids=lambda i: "-".join(KEPT[i]))
def test_what_is_kept_changes_what_is_sent_and_no_number(ranks: list[Results], i: int) -> None:
    layout, dtype = KEPT[i]
    with one_process_group():
        world = build_world(CPU)
        truth = moved(student(world, dtype, False), world)
    distance = (truth - weights(tiny(vocab_size=VOCAB, tied=True))).norm()
    for found in (rank["kept"][i] for rank in ranks):
        assert [count for count, _ in found] == (FSDP if layout == "fsdp" else COPIES)
        for _, after in found:
            assert (after - found[0][1]).norm() < 1e-5 * distance
            # Half precision rounds each micro-batch; one process has others.
            assert (after - truth).norm() < (1e-5 if dtype == "float32" else 3e-2) * distance


def left_half_way(layout: str, dtype: str) -> list[bool]:
    """Return whether an interrupted update frees its gradients and changes no later update."""
    world, same = build_world(CPU, *LAYOUTS.get(layout, ())), []
    for kept, once in WAYS[::2]:
        twins = [student(world, dtype, kept) for _ in range(2)]

        def leave(sequences: int) -> None:
            raise Stopped

        optimizer = torch.optim.SGD(twins[0].parameters(), lr=1.0)
        updates = two_updates(world)[1:]
        with pytest.raises(Stopped):
            update(twins[0], optimizer, updates, RULE, world, leave, exchange_once=once)
        shards = list(twins[0].parameters())
        same.append(all(isinstance(p, DTensor) and p.grad is None for p in shards))
        same.append(torch.equal(*(moved(m, world, once) for m in twins)))
    return same


def test_an_interrupted_update_leaves_nothing(ranks: list[Results]) -> None:
    assert all(all(all(case) for case in rank["left"]) for rank in ranks)
    with one_process_group():
        assert all(left_half_way("alone", "bfloat16"))


def gathers_of_a_teacher(keep: bool) -> tuple[int, list[float], bool]:
    """Score three micro-batches; return gathers, sums of log-probs, and whether it is resharded."""
    world = build_world(CPU)
    model = tiny(vocab_size=VOCAB)
    FAMILY.parallelize(model, world, torch.float32)
    if keep:
        keep_gathered(model)
    with Collectives() as sent:
        pairs = score(model, two_updates(world)[1:], Distribution(), world)
    gathers = sent.count(larger_than=ARGS.dim)["allgather_base"]
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return gathers, [v.sum().item() for _, v in pairs], sharded


def test_a_kept_teacher_is_gathered_once_for_all_it_scores(ranks: list[Results]) -> None:
    for anew, once in (rank["scored"] for rank in ranks):
        # The root's weights are there from the first forward on.
        assert anew[0] == MICROBATCHES * (GROUPS - 1) + 1 and once[0] == GROUPS
        assert anew[1:] == once[1:] and once[2]


# --------------------------------------------------- the rollout and its weights


def gathered_weights_are_whole() -> list[bool]:
    """Each rank scales its own shard. The expected weights come from a plain model, cut by hand."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    source = sharded(build_world(CPU), torch.bfloat16, tied=True)
    weights = follow(source, torch.bfloat16)
    with torch.no_grad():
        for p in source.parameters():
            p.to_local().mul_(1.5 + rank)
    weights.mark_stale()
    weights.sync()
    same = []
    for name, p in tiny(tied=True).named_parameters():
        parts = [part * (1.5 + r) for r, part in enumerate(p.chunk(ranks))]
        same.append(torch.equal(held(weights, name), torch.cat(parts).bfloat16()))
    return same


def test_the_generator_gets_whole_weights(ranks: list[Results]) -> None:
    assert all(all(rank["followed"]) and len(rank["followed"]) > 20 for rank in ranks)


def roll_out(lengths: Sequence[int]) -> Results:
    """Sample a batch of prompts; LOCAL_RANK is 0 on every rank."""
    loader = PromptLoader([prompts(lengths)], prompts_per_step=len(lengths) // 5 + 1, seed=0)
    batch = [next(loader) for _ in range(3)][-1]
    sampled: list[int] = []
    generator, dp = Generator(tiny(), EOS, 4, 40), build_world(CPU).dp
    samples = sample_responses(generator, batch, 3, SamplingParams(8), (0, 1), dp, sampled.append)
    return {
        "batch": [p.index for p in batch],
        "samples": summary(samples),
        "logprobs": torch.cat([s.student_logprobs for s in samples]),
        "sampled": sum(sampled),
    }


BATCHES = [[1 + i % 7 for i in range(40)], [9, 4, 7]]  # of 9 prompts, and of one


def test_ranks_share_the_prompts_by_their_global_rank(ranks: list[Results]) -> None:
    """The prototype's data sampler took the local rank, which is the same on every node."""
    for i, lengths in enumerate(BATCHES):
        with one_process_group():
            truth = roll_out(lengths)
        found = [rank["rollout"][i] for rank in ranks]
        keys = [(index, i) for index, i, *_ in truth["samples"]]
        assert keys == [(index, i) for index in truth["batch"] for i in range(3)]
        for mine in found:
            assert (mine["batch"], mine["samples"]) == (truth["batch"], truth["samples"])
            torch.testing.assert_close(mine["logprobs"], truth["logprobs"], rtol=0, atol=1e-5)
        # Each token was sampled by one rank only.
        assert sum(mine["sampled"] for mine in found) == truth["sampled"]
        assert len(truth["batch"]) == 1 or all(mine["sampled"] for mine in found)


# ------------------------------------------------------------- mesh and collectives


def collectives() -> Results:
    dp = Axis(dist.get_rank(), 2, dist.group.WORLD)
    rank = dp.rank
    lengths = [(3, 5), (0, 2), (2, 0), (0, 0), (1, 1)]
    # The same keys in another order; a sum that fp32 would round.
    values = {"x": 2.0**24, "y": 1.5} if rank == 0 else {"y": -1.0, "x": 1.0}
    worlds = map(partial(build_world, CPU), (1, 1, 2, 1), (None, 2, None, None), (1, 1, 1, 2))
    return {
        "vectors": [
            gather_vector(torch.arange(pair[rank], dtype=dtype) + 10 * rank, dp).tolist()
            for pair in lengths
            for dtype in (torch.float32, torch.int64)
        ],
        "sums": sum_scalars(values, CPU, dp),
        "max": max_scalar([-2.0, -7.0][rank], CPU),
        "nan": [max_scalar(v[rank], CPU) for v in ([math.nan, 1.0], [1.0, math.nan])],
        "lists": [
            gather_lists([f"r{rank}", rank] * (rank + 1), dp),
            gather_lists([None] if rank == 1 else [], dp),
            gather_lists([], dp),
        ],
        "meshes": [(w.mesh.mesh_dim_names, tuple(w.mesh.shape)) for w in worlds],
    }


def test_collectives_of_two_ranks(ranks: list[Results]) -> None:
    vectors = [[0, 1, 2, 10, 11, 12, 13, 14], [10, 11], [0, 1], [], [0, 10]]
    for found in (rank["collectives"] for rank in ranks):
        assert found["vectors"] == [v for v in vectors for _ in range(2)]
        assert found["sums"] == {"x": 2.0**24 + 1, "y": 0.5}
        assert found["max"] == -2.0
        assert found["nan"] == [math.inf] * 2
        assert found["lists"] == [["r0", 0, "r1", 1, "r1", 1], [None], []]
        assert found["meshes"] == [
            (("dp_shard",), (2,)),
            (("dp_shard",), (2,)),
            (("dp_replicate", "dp_shard"), (2, 1)),
            (("dp_shard", "tp"), (1, 2)),
        ]


def waited_for_the_other_rank() -> list[float]:
    """Return how long rank 0 waited for rank 1, which comes late to a collective of each group."""
    groups = [None, dist.new_group()]
    set_timeout(1, CPU)
    if dist.get_rank() == 1:
        time.sleep(5)
        return []
    waits = []
    for group in groups:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.zeros(1), group=group)
        waits.append(time.monotonic() - start)
    return waits


def test_the_time_limit_holds_for_every_group(ranks: list[Results]) -> None:
    waits = ranks[0]["waited"]
    assert len(waits) == 2 and all(0.9 < wait < 4.0 for wait in waits)
