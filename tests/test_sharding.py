"""What stays gathered between micro-batches changes what is sent, and no number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed_utils import run_distributed
from tiny_rollout import ARGS, CPU, FAMILY, prompts, tiny
from tiny_student import one_process_group
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_titan.data.types import Sample
from opd_titan.distill.objectives import ObjectiveSettings, policy_gradient
from opd_titan.distill.packing import Minibatch, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distributed.sharding import fsdp_groups, keep_gathered
from opd_titan.distributed.stopping import Stopped
from opd_titan.distributed.world import World, build_world
from opd_titan.models.logits import Distribution
from opd_titan.models.qwen3.model import Qwen3Model

GROUPS = ARGS.n_layers + 1  # each layer, and the root
MICROBATCHES = 3
# Whether the student's weights stay, and whether its gradients do.
WAYS = [(False, False), (True, False), (True, True)]
VOCAB = 62  # for tensor parallelism


class Sent(TorchDispatchMode):
    """Counts the collectives of weights and gradients: small ones aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            if max(x.numel() for x in tensors) > ARGS.dim:
                self.count[func._schema.name.removeprefix("c10d::").strip("_")] += 1
        return func(*args, **(kwargs or {}))


def student(world: World, dtype: torch.dtype, kept: bool, tied: bool = True) -> Qwen3Model:
    model = tiny(vocab_size=VOCAB, tied=tied).requires_grad_(True)
    FAMILY.parallelize(model, world, dtype)
    if kept:
        keep_gathered(model)
    return model


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for prompt in prompts([5, 9, 3, 7, 8, 2]):
        s = Sample(prompt, 0, torch.randint(VOCAB, (8,), generator=generator).tolist(), "length")
        s.student_logprobs, s.teacher_logprobs = torch.randn(2, 8, generator=generator) - 3.0
        found.append(s)
    return found


def plan(world: World) -> list[Minibatch]:
    """The first update has one micro-batch, the second three on each of two ranks."""
    halves = [plan_minibatches(samples(), 1, budget, world.dp)[0] for budget in (1000, 18)]
    assert [len(m.microbatches) for m in halves] == [1, -(-2 * MICROBATCHES // world.dp.size)]
    return halves


def moved(model: nn.Module, updates: list[Minibatch], world: World, once: bool) -> Tensor:
    """All weights after some updates of plain SGD at a rate of 1."""
    rule = UpdateRule(policy_gradient, ObjectiveSettings(), Distribution(), 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update(model, optimizer, updates, rule, world, exchange_once=once)
    return weights(model)


def weights(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([w.detach().flatten() for w in whole])


# ------------------------------------------------------------------ what is sent


def sent_and_moved(layout: tuple[int, int, int], name: str) -> list[tuple[Counter[str], Tensor]]:
    world = build_world(CPU, *layout)
    found = []
    for kept, once in WAYS:
        model, sent = student(world, getattr(torch, name), kept), Sent()
        moved(model, plan(world)[:1], world, once)
        with sent:
            after = moved(model, plan(world)[1:], world, once)
        found.append((sent.count, after))
    return found


# Three micro-batches of one update. Layers are gathered in forward and backward.
GATHERED_ANEW = {"allgather_base": MICROBATCHES * (2 * GROUPS - 1)}
EXPECTED = {
    (1, 2, 1): [
        {**GATHERED_ANEW, "reduce_scatter_base": MICROBATCHES * GROUPS},
        {"allgather_base": GROUPS, "reduce_scatter_base": MICROBATCHES * GROUPS},
        {"allgather_base": GROUPS, "reduce_scatter_base": GROUPS},
    ],
    # Copies of whole weights: nothing to gather, and one sum per update whatever is kept.
    (2, 1, 1): [{"allreduce": GROUPS}] * 3,
}


DTYPES = ("float32", "bfloat16")
CASES = [(layout, dtype) for layout in EXPECTED for dtype in DTYPES]


def on_two_ranks() -> dict[str, list[Any]]:
    """Everything that this file asks two ranks, in one start of them."""
    return {
        "sent": [sent_and_moved(*case) for case in CASES],
        "left": [left_half_way(*case) for case in CASES],
        "scored": [scored(keep) for keep in (False, True)],
    }


@pytest.fixture(scope="module")
def two() -> list[dict[str, list[Any]]]:
    """By rank."""
    return run_distributed(on_two_ranks, 2)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_one_exchange_per_update_where_weights_and_gradients_are_kept(
    two: list[dict[str, list[Any]]], case: int
) -> None:
    layout, dtype = CASES[case]
    with one_process_group():
        world = build_world(CPU)
        truth = moved(student(world, getattr(torch, dtype), False), plan(world), world, False)
    distance = (truth - weights(tiny(vocab_size=VOCAB, tied=True))).norm()
    for found in (rank["sent"][case] for rank in two):
        assert [count for count, _ in found] == EXPECTED[layout]
        for _, after in found:
            assert (after - found[0][1]).norm() < 1e-5 * distance
            # Half precision rounds each micro-batch; one process has others.
            assert (after - truth).norm() < (1e-5 if dtype == "float32" else 3e-2) * distance


LARGE = [(1, 2, 2), (2, 2, 1), (2, 1, 2)]


def on_four_ranks() -> list[list[tuple[Counter[str], Tensor]]]:
    return [sent_and_moved(layout, "bfloat16") for layout in LARGE]


@pytest.mark.slow
def test_every_layout_moves_alike_whatever_is_kept() -> None:
    for by_layout in run_distributed(on_four_ranks, 4):
        for layout, found in zip(LARGE, by_layout, strict=True):
            distance = (found[0][1] - weights(tiny(vocab_size=VOCAB, tied=True))).norm()
            # Tensor-parallel ranks sum the norms' gradients in the type that they are kept in.
            limit = 1e-3 if layout[2] > 1 else 1e-5
            assert all((after - found[0][1]).norm() < limit * distance for _, after in found)


@pytest.fixture
def alone() -> Iterator[World]:
    with one_process_group():
        yield build_world(CPU)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_process_moves_bit_for_bit_alike(alone: World, dtype: torch.dtype, tied: bool) -> None:
    found = [
        moved(student(alone, dtype, kept, tied), plan(alone), alone, once) for kept, once in WAYS
    ]
    assert torch.equal(found[0], found[1])
    if dtype == torch.float32:
        assert torch.equal(found[0], found[2])
    else:
        torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------- left half-way


def left_half_way(layout: tuple[int, int, int], name: str) -> list[bool]:
    """Whether what follows an interrupted update is what it would have been without."""
    world, same = build_world(CPU, *layout), []
    for kept, once in WAYS:
        twins = [student(world, getattr(torch, name), kept) for _ in range(2)]

        def leave(sequences: int) -> None:
            raise Stopped

        rule = UpdateRule(policy_gradient, ObjectiveSettings(), Distribution(), 0.0)
        optimizer = torch.optim.SGD(twins[0].parameters(), lr=1.0)
        with pytest.raises(Stopped):
            update(twins[0], optimizer, plan(world)[1:], rule, world, leave, exchange_once=once)
        shards = list(twins[0].parameters())
        same.append(all(isinstance(p, DTensor) and p.grad is None for p in shards))
        same.append(torch.equal(*(moved(m, plan(world), world, once) for m in twins)))
    return same


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_left_half_way_leaves_nothing(dtype: str) -> None:
    with one_process_group():
        assert all(left_half_way((1, 1, 1), dtype))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_an_update_left_half_way_leaves_nothing_on_two_ranks(
    two: list[dict[str, list[Any]]], case: int
) -> None:
    assert all(all(rank["left"][case]) for rank in two)


# ------------------------------------------------------------------- frozen models


def scored(keep: bool) -> tuple[int, list[float], bool]:
    """Gathers of one scoring of three micro-batches, what it found, and whether it resharded."""
    world = build_world(CPU)
    model = tiny(vocab_size=VOCAB)
    FAMILY.parallelize(model, world, torch.float32)
    if keep:
        keep_gathered(model)
    minibatch = plan(world)[1]
    with Sent() as sent:
        pairs = score(model, [minibatch], Distribution(), world)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return sent.count["allgather_base"], [v.sum().item() for _, v in pairs], sharded


def test_a_kept_teacher_is_gathered_once_for_all_it_scores(
    two: list[dict[str, list[Any]]],
) -> None:
    for anew, once in (rank["scored"] for rank in two):
        # The root's weights are there from the first forward on.
        assert anew[0] == MICROBATCHES * (GROUPS - 1) + 1 and once[0] == GROUPS
        assert anew[1:] == once[1:] and once[2]


def test_a_frozen_model_that_is_whole_and_as_it_computes_is_not_copied(alone: World) -> None:
    plain, frozen = (tiny(vocab_size=VOCAB) for _ in range(2))
    storage = [p.data_ptr() for p in frozen.parameters()]
    FAMILY.parallelize(frozen, alone, torch.float32)
    seen: list[int] = []

    def look(module: nn.Module, args: Any) -> None:
        seen.extend(p.data_ptr() for p in module.parameters(recurse=False))

    for module in frozen.modules():
        module.register_forward_pre_hook(look)
    minibatch = plan(alone)[1]
    pairs = score(frozen, [minibatch], Distribution(), alone)
    assert not fsdp_groups(frozen) and seen and set(seen) <= set(storage)
    for (_, mine), (_, theirs) in zip(
        pairs, score(plain, [minibatch], Distribution(), alone), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_frozen_model_in_another_type_is_still_cast(alone: World) -> None:
    model = tiny(vocab_size=VOCAB)
    FAMILY.parallelize(model, alone, torch.bfloat16)
    assert len(fsdp_groups(model)) == GROUPS
