"""Models split over ranks against the same models whole: gradients, head, weights, generator.

`test_layouts` runs the program; here are its parts, where a difference says which one it is in.
The rollout engine and the objectives are held to this file too: a change there must keep it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import lone_world, run_distributed
from test_head import DISTRIBUTIONS, SCALE, SETTINGS, D, Problem, R, full_logprobs, full_loss
from test_vocabulary_objectives import CASES, Case, Models, plain_loss, rows_per_chunk
from test_vocabulary_objectives import SCALE as CASE_SCALE
from test_vocabulary_objectives import V as CASE_VOCAB
from tiny_rollout import CPU, EOS, FAMILY, prompts, requests, summary, tiny
from tiny_student import naive_logprobs, one_process_group, random_samples
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_titan.checkpoint.hf_load import random_init_weights
from opd_titan.data.types import Sample
from opd_titan.distill import head as head_module
from opd_titan.distill.head import (
    PROBE_EVERY,
    PROBE_TOP_K,
    loss_head,
    probed,
    score_head,
)
from opd_titan.distill.inspection import Monitor
from opd_titan.distill.objectives import policy_gradient, sft
from opd_titan.distill.packing import pack, plan_minibatches
from opd_titan.distill.update import UpdateRule, forward_backward
from opd_titan.distributed.collectives import broadcast_tokens
from opd_titan.distributed.world import ALONE, Axis, World, build_world
from opd_titan.models.logits import Distribution, VocabHead
from opd_titan.models.qwen3 import parallelize
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.weights import GeneratorWeights

pytestmark = pytest.mark.slow  # four processes

# data_parallel_replicate_degree, data_parallel_shard_degree, tensor_parallel_degree
LAYOUTS = [(1, 2, 2), (2, 1, 2), (1, 1, 4)]
OBJECTIVES = {"policy_gradient": policy_gradient, "sft": sft}
RULE = UpdateRule(policy_gradient, SETTINGS, Distribution(0.9), max_grad_norm=0.0)
VOCAB = 16
GENERATED = [
    SamplingParams(6, temperature=0.0),
    SamplingParams(6),
    SamplingParams(6, temperature=0.8, top_p=0.8, top_k=9),
]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def sizes(tensor: int, tied: bool) -> dict[str, Any]:
    """Of the model. On 2 x 2, FSDP cannot cut a tensor-parallel rank's rows into equal parts."""
    if tensor == 2:
        return dict(vocab_size=62, ffn_dim=50, tied=tied)
    return dict(vocab_size=64, n_kv_heads=4, tied=tied)


def some_samples() -> list[Sample]:
    """Odd numbers of tokens, alone and together."""
    return random_samples([(3, 5), (1, 3), (6, 12), (4, 1), (2, 5)], vocab=60)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------ on the ranks


def gradients(world: World, tied: bool) -> dict[str, Any]:
    """The gradient of one update, whole; and of what all ranks hold, as this rank has it."""
    model = tiny(**sizes(world.tp.size, tied)).requires_grad_(True)
    FAMILY.parallelize(model, world, torch.float32)
    (minibatch,) = plan_minibatches(some_samples(), 1, 20, world.dp)
    for samples in minibatch.microbatches:
        forward_backward(model, samples, minibatch.response_tokens, RULE, world)
    grads = {name: p.grad for name, p in model.named_parameters()}
    own = {name: g.to_local().clone() for name, g in grads.items() if "norm" in name}
    return {"whole": {name: g.full_tensor() for name, g in grads.items()}, "own": own}


def head_results(world: World) -> dict[tuple[int, str], list[Tensor]]:
    results = {}
    for i, distribution in enumerate(DISTRIBUTIONS):
        for name, objective in OBJECTIVES.items():
            p = wide_problem()
            weight = distribute_tensor(p.weight_VD.detach(), world.tp_mesh, [Shard(0)])
            weight = nn.Parameter(weight)
            where = dict(predict_R=p.predict_R, targets_R=p.targets_R, dist=distribution)
            rest = dict(scores=p.scores, scale=SCALE, objective=objective, settings=SETTINGS)
            loss, stats = loss_head(p.hidden_TD, weight, **where, **rest)
            loss.backward(torch.tensor(-0.37))
            dist.all_reduce(p.hidden_TD.grad, group=world.tp.group)
            scored_R = score_head(p.hidden_TD, weight, **where)
            values = [loss.detach(), stats.logprob_R, stats.entropy_R, scored_R]
            results[i, name] = [*values, p.hidden_TD.grad, weight.grad.full_tensor()]
    return results


class Sent(TorchDispatchMode):
    """Elements of the larger buffer of each collective inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
            self.sizes.append(max(t.numel() for t in tensors))
        return out


def objective_results(world: World) -> list[dict[str, Any]]:
    """Of every objective: the loss, its gradients, diagnostics, and what was sent for them."""
    return [objective_result(world, case) for case in CASES]


def objective_result(world: World, case: Case) -> dict[str, Any]:
    m, found = Models(temperature=0.9), {}
    weight = nn.Parameter(distribute_tensor(m.weight_VD.detach(), world.tp_mesh, [Shard(0)]))
    for role, (hidden, whole_VE) in m.heads.items():
        m.heads[role] = (hidden, VocabHead(whole_VE.chunk(world.tp.size)[world.tp.rank], world.tp))
    m.frozen_logprobs = Models(temperature=0.9).frozen_logprobs
    for name, rows in (("one chunk", 1000), ("chunks", 8), ("unprobed chunks", 1)):
        with pytest.MonkeyPatch.context() as patch, Sent() as sent:
            rows_per_chunk(patch, case, rows, CASE_VOCAB // world.tp.size)
            loss, stats = m.loss(case, weight=weight)
        found[name] = sent.sizes
        if name == "chunks":
            loss.backward(torch.tensor(-0.37))
            dist.all_reduce(m.hidden_TD.grad, group=world.tp.group)
            found["values"] = [loss.detach(), m.hidden_TD.grad, weight.grad.full_tensor()]
            found["stats"] = stats
    return found


def inspected(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """More of the likeliest tokens than one rank holds."""
    p = wide_problem()
    weight = nn.Parameter(distribute_tensor(p.weight_VD.detach(), world.tp_mesh, [Shard(0)]))
    watch = Monitor([slice(0, 2), slice(3, R)], VOCAB // 2 + 2)
    score_head(
        p.hidden_TD.detach(), weight, p.predict_R, p.targets_R, Distribution(0.9), watch=watch
    )
    return watch.columns


def wide_problem() -> Problem:
    """With a vocabulary that splits, and targets in every part of it."""
    p, g = Problem(), torch.Generator().manual_seed(7)
    p.weight_VD = (0.6 * torch.randn(VOCAB, D, generator=g)).requires_grad_()
    p.targets_R = torch.arange(R) * 5 % VOCAB
    return p


def random_weights(world: World, tied: bool) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = tiny(**sizes(world.tp.size, tied))
    FAMILY.parallelize(model, world, torch.float32)
    model.to_empty(device="cpu")
    model.assert_tied()
    random_init_weights(model, seed=3, std=0.02)
    return {name: full(p.detach()) for name, p in model.named_parameters()}


def generated(world: World, tied: bool) -> list[list[Any]]:
    """Before and after a change of the weights, which the generator is told of."""
    source = tiny(**sizes(world.tp.size, tied)).requires_grad_(True)
    args = source.args
    FAMILY.parallelize(source, world, torch.float32)

    def build() -> Qwen3Model:
        model = Qwen3Model(FAMILY.rank_args(args, world.tp.size, "here"))
        FAMILY.join_ranks(model, world.tp, sequence_parallel=False)
        return model

    weights = GeneratorWeights(source, build, torch.float32, CPU)
    weights.sync()
    generator = Generator(weights.model, EOS, 5, 40, world.tp)
    rounds = [answers(generator)]
    with torch.no_grad():
        for p in source.parameters():
            p.to_local().mul_(1.1)
    weights.mark_stale()
    weights.release()
    copies = [p for p in weights.model.parameters() if p.untyped_storage().size() == 0]
    # Without FSDP a rank's share is read where it is trained.
    sharded = dict(zip(world.mesh.mesh_dim_names, world.mesh.shape, strict=True))["dp_shard"] > 1
    assert len(copies) == (len(list(source.parameters())) if sharded else 0)
    weights.sync()
    rounds.append(answers(generator))
    kept = [p.clone() for p in weights.model.parameters()]
    weights.release()  # nothing has changed: the next sync still has to gather again
    weights.sync()
    assert all(map(torch.equal, kept, weights.model.parameters()))
    head = weights.model.lm_head.weight
    assert (head is weights.model.tok_embeddings.weight) == tied
    return rounds


@torch.no_grad()
def answers(generator: Generator) -> list[Any]:
    """Per parameters of sampling, the tokens and their log-probs."""
    found = []
    for params in GENERATED:
        samples = generator.generate(requests(prompts([1, 20, 7, 16, 5]), 2), params)
        found.append((summary(samples), torch.cat([s.student_logprobs for s in samples]).tolist()))
    return found


def broken_tie(world: World) -> str:
    """What is said of a transform that unties head and embedding."""
    model = tiny(**sizes(world.tp.size, tied=True))
    model.tie_weights = lambda: None
    with pytest.raises(AssertionError) as caught:
        FAMILY.parallelize(model, world, torch.float32)
    return str(caught.value)


def on_four_ranks() -> dict[tuple[int, int, int], dict[str, Any]]:
    """Everything at once: processes start slowly."""
    torch.distributed.tensor._redistribute.logger.setLevel("ERROR")
    head_module.CHUNK_BYTES = {"cpu": 3 * 4 * VOCAB // 2}  # a few rows
    results = {}
    for layout in LAYOUTS:
        world = build_world(CPU, *layout)
        results[layout] = {
            "head": head_results(world),
            "objectives": objective_results(world),
            "tie": broken_tie(world),
            "axes": [(axis.rank, axis.size) for axis in (world.dp, world.tp)],
            "members": [
                dist.get_process_group_ranks(axis.group) if axis.group else [dist.get_rank()]
                for axis in (world.dp, world.tp)
            ],
            "gradients": {tied: gradients(world, tied) for tied in (False, True)},
            "inspected": inspected(world),
            "random": {tied: random_weights(world, tied) for tied in (False, True)},
            "generated": {tied: generated(world, tied) for tied in (False, True)},
        }
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[int, int, int], dict[str, Any]]]:
    return run_distributed(on_four_ranks, 4)


# ------------------------------------------------------------------ against the truth


@each_layout
def test_ranks_know_where_they_stand(ranks: list[Any], layout: tuple[int, int, int]) -> None:
    replicate, shard, tensor = layout
    for rank, result in enumerate(ranks):
        assert result[layout]["axes"] == [
            (rank // tensor, replicate * shard), (rank % tensor, tensor)
        ]  # fmt: skip
        first = rank - rank % tensor
        peers = [list(range(rank % tensor, 4, tensor)), list(range(first, first + tensor))]
        assert result[layout]["members"] == peers


@each_layout
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_whole_model(
    ranks: list[Any], layout: tuple[int, int, int], tied: bool
) -> None:
    model = tiny(**sizes(layout[2], tied)).requires_grad_(True)
    samples, total = some_samples(), torch.zeros(())
    for s in samples:
        logprob_R, old_R = naive_logprobs(model, s, 0.9), s.student_logprobs
        advantage_R = (s.teacher_logprobs - old_R) + 0.5 * (s.reference_logprobs - old_R)
        ratio_R = (logprob_R - old_R).exp()
        terms_R = torch.minimum(ratio_R * advantage_R, ratio_R.clamp(0.8, 1.2) * advantage_R)
        total = total - terms_R.sum()
    (total / sum(len(s.response_ids) for s in samples)).backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    assert ("lm_head.weight" in truth) is not tied
    for rank, result in enumerate(ranks):
        mine = result[layout]["gradients"][tied]
        assert mine["whole"].keys() == truth.keys()
        for name, grad in truth.items():
            assert grad.norm() > 1e-4, name
            assert (mine["whole"][name] - grad).norm() <= 1e-5 * grad.norm(), name
        # What tensor-parallel ranks hold alike must move alike, to the bit, or they drift apart.
        neighbour = ranks[rank - rank % layout[2]][layout]["gradients"][tied]["own"]
        assert any("q_norm" in name for name in mine["own"])
        for name, grad in mine["own"].items():
            assert torch.equal(grad, neighbour[name]), name


@each_layout
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("i", range(len(DISTRIBUTIONS)), ids=lambda i: str(DISTRIBUTIONS[i]))
def test_the_vocabulary_parallel_head_is_the_whole_one(
    ranks: list[Any], layout: tuple[int, int, int], i: int, name: str
) -> None:
    p = wide_problem()
    assert {t // (VOCAB // layout[2]) for t in p.targets_R.tolist()} == set(range(layout[2]))
    loss, logprob_R, entropy_R = full_loss(p, OBJECTIVES[name], DISTRIBUTIONS[i])
    truth = [loss.detach(), logprob_R, entropy_R, logprob_R, *p.gradients(loss, -0.37)]
    for result in ranks:
        for mine, value in zip(result[layout]["head"][i, name], truth, strict=True):
            torch.testing.assert_close(mine, value, rtol=2e-5, atol=2e-6)


@each_layout
def test_ranks_and_the_likeliest_tokens_are_those_of_the_whole_vocabulary(
    ranks: list[Any], layout: tuple[int, int, int]
) -> None:
    p = wide_problem()
    logprobs_RV = full_logprobs(p, Distribution(0.9)).detach()
    target_R1 = logprobs_RV.gather(1, p.targets_R[:, None])
    values_RK, ids_RK = logprobs_RV.topk(VOCAB // 2 + 2, dim=1)
    watched = torch.arange(R) != 2
    for rank in ranks:
        found_ranks_W, found_ids_WK, found_WK = rank[layout]["inspected"]
        assert torch.equal(found_ranks_W, 1 + (logprobs_RV > target_R1).sum(1)[watched])
        assert torch.equal(found_ids_WK, ids_RK[watched])
        torch.testing.assert_close(found_WK, values_RK[watched], rtol=2e-5, atol=2e-6)


@each_layout
@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_every_objective_over_a_split_vocabulary_is_the_whole_one(
    ranks: list[Any], layout: tuple[int, int, int], i: int
) -> None:
    m, case = Models(temperature=0.9), CASES[i]
    loss, stats = m.loss(case)
    truth = [loss.detach(), *m.gradients(loss, -0.37)]
    plain = CASE_SCALE * plain_loss(m, case, m.student_logprobs()).sum()
    torch.testing.assert_close(loss, plain.float(), rtol=2e-5, atol=2e-6)
    for result in ranks:
        mine = result[layout]["objectives"][i]
        for value, expected in zip(mine["values"], truth, strict=True):
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6)
        for name, expected in vars(stats).items():
            torch.testing.assert_close(
                getattr(mine["stats"], name), expected, rtol=2e-5, atol=2e-6, msg=name
            )


def exchanges(case: Case) -> int:
    """Per chunk, those of the probe aside: the log-probs, entropy and reverse KLs, and means."""
    if "top_k" in (case.name[:5], case.chosen.baseline):
        return 3
    reverse = case.name == "reverse_kl" or (case.name == "jsd" and case.chosen.beta == 1.0)
    return 2 if case.exact and not reverse else 1


@each_layout
@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_ranks_exchange_a_few_numbers_per_token(
    ranks: list[Any], layout: tuple[int, int, int], i: int
) -> None:
    """At most three times per chunk, and three times more where a chunk has tokens to probe.

    Never anything of the vocabulary's size: per token and rank, a few numbers for each model, and
    twice the k of a support.
    """
    case, tokens, split = CASES[i], 21, layout[2]
    models = 1 + case.exact * (1 + (case.chosen.reference_coef != 0.0))
    per_chunk, probe = exchanges(case), 3 * case.exact
    assert per_chunk <= 3
    per_token = 3 * models
    if per_chunk == 3 and "top_k" in (case.name[:5], case.chosen.baseline):
        k = case.chosen.top_k
        per_token = max(2 * min(k, CASE_VOCAB // split), models * (min(k, CASE_VOCAB) + 1))

    def looks(rows: int) -> int:
        return sum(len(probed(n, min(n + rows, tokens))) > 0 for n in range(0, tokens, rows))

    for result in ranks:
        mine = result[layout]["objectives"][i]
        assert len(mine["one chunk"]) == per_chunk + probe
        assert len(mine["chunks"]) == 3 * per_chunk + looks(8) * probe
        assert len(mine["unprobed chunks"]) == tokens * per_chunk + looks(1) * probe
        for name, rows in (("one chunk", tokens), ("chunks", 8), ("unprobed chunks", 1)):
            top = (-(-rows // PROBE_EVERY) + 1) * 2 * PROBE_TOP_K * split * case.exact
            assert max(mine[name]) <= max(rows * per_token * split, top, tokens)


@each_layout
@pytest.mark.parametrize("tied", [False, True])
def test_random_init_is_that_of_one_process(
    ranks: list[Any], layout: tuple[int, int, int], tied: bool
) -> None:
    model = tiny(**sizes(layout[2], tied))
    random_init_weights(model, seed=3, std=0.02)
    truth = dict(model.named_parameters())
    for result in ranks:
        mine = result[layout]["random"][tied]
        assert mine.keys() == truth.keys()
        assert all(torch.equal(mine[name], p) for name, p in truth.items())


@each_layout
@pytest.mark.parametrize("tied", [False, True])
def test_split_generators_sample_what_a_whole_one_does(
    ranks: list[Any], layout: tuple[int, int, int], tied: bool
) -> None:
    model = tiny(**sizes(layout[2], tied))
    before = answers(Generator(model, EOS))
    for p in model.parameters():
        p.mul_(1.1)
    after = answers(Generator(model, EOS))
    assert [tokens for tokens, _ in before] != [tokens for tokens, _ in after]
    for result in ranks:
        # Tensor-parallel ranks must not even differ in rounding: they would sample apart.
        assert result[layout]["generated"] == ranks[0][layout]["generated"]
        for mine, truth in zip(result[layout]["generated"][tied], (before, after), strict=True):
            for (tokens, logprobs), (true_tokens, true_logprobs) in zip(mine, truth, strict=True):
                assert tokens == true_tokens
                assert logprobs == pytest.approx(true_logprobs, abs=1e-5)


@each_layout
def test_a_transform_that_unties_is_found(ranks: list[Any], layout: tuple[int, int, int]) -> None:
    assert all("has untied head and embedding" in r[layout]["tie"] for r in ranks)


@pytest.mark.parametrize("transform", ["apply_activation_checkpointing", "fully_shard"])
def test_a_later_transform_that_unties_is_found(
    monkeypatch: pytest.MonkeyPatch, transform: str
) -> None:
    """Each of them could: it has the model in its hands."""
    model, real = tiny(tied=True).requires_grad_(), getattr(parallelize, transform)

    def unties(*args: Any, **options: Any) -> None:
        real(*args, **options)
        model.lm_head.weight = nn.Parameter(full(model.lm_head.weight.detach()).clone())

    monkeypatch.setattr(parallelize, transform, unties)
    with one_process_group(), pytest.raises(AssertionError, match="untied"):
        FAMILY.parallelize(model, build_world(CPU), torch.float32)


@each_layout
def test_padding_to_equal_shares_predicts_nothing(layout: tuple[int, int, int]) -> None:
    samples = some_samples()
    split = World(CPU, None, ALONE, Axis(0, layout[2]))
    whole, padded = pack(samples, lone_world()), pack(samples, split)
    missing = -len(whole.tokens_T) % layout[2]
    assert missing > 0 and len(padded.tokens_T) == len(whole.tokens_T) + missing
    assert torch.equal(padded.predict_R, whole.predict_R)
    assert torch.equal(padded.targets_R, whole.targets_R)
    assert torch.equal(padded.tokens_T[: len(whole.tokens_T)], whole.tokens_T)
    # A sequence of its own: no token of a sample's attends to it, or it to them.
    assert padded.attend.seq_lens == [*whole.attend.seq_lens, missing]


def check_one_rank_decides() -> tuple[list[int], list[float]]:
    """Ranks that have drawn different tokens, as rounding on a GPU may make them."""
    world = build_world(CPU, tensor=2)
    tokens = torch.tensor([3, 1 << 40, 5]) + world.tp.rank
    logprobs = torch.tensor([-0.1, -2.5, -1e-7]) - world.tp.rank
    same, their = broadcast_tokens(tokens, logprobs, world.tp)
    return same.tolist(), their.tolist()


def test_ranks_of_one_model_go_on_with_the_same_tokens() -> None:
    expected = ([3, 1 << 40, 5], torch.tensor([-0.1, -2.5, -1e-7]).tolist())
    assert run_distributed(check_one_rank_decides, 4) == [expected] * 4
