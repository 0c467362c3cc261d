"""Worlds of four processes: models split over ranks against the same models whole.

`test_layouts` runs the program in such worlds; here are its parts, so that a difference says which
one is wrong. `test_two_ranks` has what two ranks suffice for.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_two_ranks
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from test_two_ranks import (
    OBJECTIVES,
    WAYS,
    assert_same_update,
    by_split,
    make,
    one_step,
    student,
    two_updates,
)
from test_two_ranks import weights as all_weights
from tiny_head import SPLIT, split_results
from tiny_rollout import CPU, EOS, FAMILY, prompts, requests, summary, tiny
from tiny_student import one_process_group
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_titan.checkpoint.hf_load import random_init_weights
from opd_titan.distributed.collectives import broadcast_tokens
from opd_titan.distributed.world import World, build_world
from opd_titan.models.qwen3 import parallelize
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.weights import GeneratorWeights

pytestmark = pytest.mark.slow  # four processes

# data_parallel_replicate_degree, data_parallel_shard_degree, tensor_parallel_degree
LAYOUTS = [(1, 2, 2), (2, 1, 2), (1, 1, 4)]
KEPT = [(1, 2, 2), (2, 2, 1), (2, 1, 2)]
GENERATED = [
    SamplingParams(6, temperature=0.0),
    SamplingParams(6),
    SamplingParams(6, temperature=0.8, top_p=0.8, top_k=9),
]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def sizes(tensor: int, tied: bool) -> dict[str, Any]:
    """Return sizes of the model. On 2 x 2, FSDP cannot split a rank's rows into equal parts."""
    if tensor == 2:
        return dict(vocab_size=62, ffn_dim=50, tied=tied)
    return dict(vocab_size=64, n_kv_heads=4, tied=tied)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------ on the ranks


def updated(world: World, tied: bool) -> dict[str, Any]:
    return one_step(world, OBJECTIVES[0], 20, **sizes(world.tp.size, tied))


def random_weights(world: World, tied: bool) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = tiny(**sizes(world.tp.size, tied))
    FAMILY.parallelize(model, world, torch.float32)
    model.to_empty(device="cpu")
    model.assert_tied()
    random_init_weights(model, seed=3, std=0.02)
    return {name: full(p.detach()) for name, p in model.named_parameters()}


def generated(world: World, tied: bool) -> list[list[Any]]:
    """Return samples before and after a change of the weights that the generator follows."""
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
    # Without FSDP the generator reads a rank's share from the trained model.
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
    """Return for each of `GENERATED` the tokens and their log-probs."""
    found = []
    for params in GENERATED:
        samples = generator.generate(requests(prompts([1, 20, 7, 16, 5]), 2), params)
        found.append((summary(samples), torch.cat([s.student_logprobs for s in samples]).tolist()))
    return found


def broken_tie(world: World) -> str:
    """Return the error of a transform that unties head and embedding."""
    model = tiny(**sizes(world.tp.size, tied=True))
    model.tie_weights = lambda: None
    with pytest.raises(AssertionError) as caught:
        FAMILY.parallelize(model, world, torch.float32)
    return str(caught.value)


def on_four_ranks() -> dict[Any, Any]:
    """Compute everything in one start of the processes."""
    torch.distributed.tensor._redistribute.logger.setLevel("ERROR")
    results: dict[Any, Any] = {
        "head": [split_results(build_world(CPU, 1, 1, 4), *case) for case in SPLIT],
        "kept": [moved_each_way(layout) for layout in KEPT],
        "tokens": one_rank_decides(),
    }
    for layout in LAYOUTS:
        world = build_world(CPU, *layout)
        results[layout] = {
            "tie": broken_tie(world),
            "axes": [(axis.rank, axis.size) for axis in (world.dp, world.tp)],
            "members": [
                dist.get_process_group_ranks(axis.group) if axis.group else [dist.get_rank()]
                for axis in (world.dp, world.tp)
            ],
            "updates": {tied: updated(world, tied) for tied in (False, True)},
            "random": {tied: random_weights(world, tied) for tied in (False, True)},
            "generated": {tied: generated(world, tied) for tied in (False, True)},
        }
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[int, int, int], dict[str, Any]]]:
    return run_distributed(on_four_ranks, 4)


# ------------------------------------------------------------------ against the truth


@each_layout
def test_ranks_and_groups_of_the_axes(ranks: list[Any], layout: tuple[int, int, int]) -> None:
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
def test_four_ranks_make_the_same_update_as_one(
    ranks: list[Any], layout: tuple[int, int, int], tied: bool
) -> None:
    with one_process_group():
        truth = one_step(build_world(CPU), OBJECTIVES[0], 1 << 10, **sizes(layout[2], tied))
    assert ("lm_head.weight" in truth["weights"]) is not tied
    for rank, result in enumerate(ranks):
        mine = result[layout]["updates"][tied]
        assert_same_update(mine, truth, **sizes(layout[2], tied))
        # Copies that tensor-parallel ranks hold must move alike, to the bit, or they drift apart.
        neighbour = ranks[rank - rank % layout[2]][layout]["updates"][tied]
        assert all(map(torch.equal, mine["norms"], neighbour["norms"]))


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
        # If tensor-parallel ranks differed by rounding, they would sample different tokens.
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
    model, real = tiny(tied=True).requires_grad_(), getattr(parallelize, transform)

    def unties(*args: Any, **options: Any) -> None:
        real(*args, **options)
        model.lm_head.weight = nn.Parameter(full(model.lm_head.weight.detach()).clone())

    monkeypatch.setattr(parallelize, transform, unties)
    with one_process_group(), pytest.raises(AssertionError, match="untied"):
        FAMILY.parallelize(model, build_world(CPU), torch.float32)


def one_rank_decides() -> tuple[list[int], list[float]]:
    """Agree on tokens of ranks that have drawn different ones, as they may by rounding on a GPU."""
    world = build_world(CPU, tensor=2)
    tokens = torch.tensor([3, 1 << 40, 5]) + world.tp.rank
    logprobs = torch.tensor([-0.1, -2.5, -1e-7]) - world.tp.rank
    same, their = broadcast_tokens(tokens, logprobs, world.tp)
    return same.tolist(), their.tolist()


def test_ranks_of_one_model_go_on_with_the_same_tokens(ranks: list[Any]) -> None:
    expected = ([3, 1 << 40, 5], torch.tensor([-0.1, -2.5, -1e-7]).tolist())
    assert [rank["tokens"] for rank in ranks] == [expected] * 4


@by_split
def test_the_head_over_a_vocabulary_in_four_parts(ranks: list[Any], i: int) -> None:
    test_two_ranks.test_the_head_over_a_split_vocabulary_is_the_whole_one(ranks, i)


def moved_each_way(layout: tuple[int, int, int]) -> list[Tensor]:
    """Return the weights after two updates, by what stays gathered between micro-batches."""
    world, found = build_world(CPU, *layout), []
    for kept, once in WAYS:
        model = student(world, "bfloat16", kept)
        make(model, two_updates(world), world, once)
        found.append(all_weights(model))
    return found


@pytest.mark.parametrize("i", range(len(KEPT)), ids=lambda i: str(KEPT[i]))
def test_what_is_kept_changes_no_number(ranks: list[Any], i: int) -> None:
    start = all_weights(tiny(vocab_size=62, tied=True))
    for first, *others in (rank["kept"][i] for rank in ranks):
        # Tensor-parallel ranks sum the norms' gradients in the type that they are kept in.
        limit = (1e-3 if KEPT[i][2] > 1 else 1e-5) * (first - start).norm()
        assert all((after - first).norm() < limit for after in others)
