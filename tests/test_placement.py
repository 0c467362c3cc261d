"""Where weights and optimizer state live: on the host, streamed, or given back for the update."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from tiny_rollout import CPU, follow, held, sharded
from tiny_student import one_process_group
from tiny_world import World, assert_same_run, read_log, run_here, train

import opd_titan.rollout.memory as memory_module
import opd_titan.training.trainer as trainer_module
from opd_titan.config import load_config
from opd_titan.config.resolve import resolve
from opd_titan.distributed.heartbeat import Heartbeat
from opd_titan.distributed.stopping import StopRequest
from opd_titan.distributed.world import build_world
from opd_titan.models.layers import products
from opd_titan.rollout.memory import StepMemory
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.trainer import Trainer

OFFLOAD = (
    *("--optimizer.cpu_offload", "true", "--teacher.cpu_offload", "true"),
    *("--reference.coef", 0.5, "--reference.cpu_offload", "true"),
)


@pytest.mark.slow
def test_a_run_with_everything_on_the_host_is_the_same_run(world: World) -> None:
    """FSDP's path of offloading (copies there and back, optimizer on the host), on a CPU."""
    resident, offloaded, resumed = (world.folder / n for n in ("resident", "offloaded", "resumed"))
    assert train(world.argv("resident", "--reference.coef", 0.5)) == 0
    assert train(world.argv("offloaded", *OFFLOAD)) == 0
    assert_same_run(resident, offloaded, step=4)
    shutil.copytree(resident, resumed)
    for left in (resumed / "checkpoint" / "step-4", resumed / "hf"):
        shutil.rmtree(left)
    assert train(world.argv("resumed", *OFFLOAD)) == 0
    assert f"Resumed from {resumed}/checkpoint/step-2" in read_log(resumed)
    assert_same_run(resident, resumed, step=4)


# ------------------------------------------------------- the generator's copy


def held_bytes(weights: GeneratorWeights) -> int:
    """Return the bytes of the generator's own copies; others read the training weights in place."""
    stored = (p.to_local() for p in weights.source.parameters())
    own = {p.untyped_storage().data_ptr() for p in stored}
    storages = [p.untyped_storage() for p in weights.model.parameters()]
    there = [s for s in storages if s.nbytes()]  # one that was given back has no address
    packed = [getattr(m, "packed", None) for m in weights.model.modules()]
    in_packed = sum(p.numel() * p.element_size() for p in packed if p is not None)
    return in_packed + sum(s.nbytes() for s in there if s.data_ptr() not in own)


def check_release_and_sync(spare: int | None) -> list[int]:
    """Return the bytes held after a sync, a rollout, an update with a sync, and a rollout."""
    model = sharded(build_world(CPU), tied=True)
    weights, memory = follow(model, torch.bfloat16), StepMemory(CPU)
    if spare is not None:
        memory_module.never_used_bytes = lambda device: spare
    sizes = [held_bytes(weights)]
    before = {n: held(weights, n).clone() for n, _ in weights.model.named_parameters()}
    memory.make_room(weights)
    sizes.append(held_bytes(weights))
    weights.sync()
    same = (torch.equal(value, held(weights, n)) for n, value in before.items())
    assert all(same), "released weights came back different"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    weights.mark_stale()
    memory.measure()
    weights.sync()
    sizes.append(held_bytes(weights))
    assert sizes == [weights.num_bytes, 0, weights.num_bytes]
    for name, old in before.items():
        new = held(weights, name).float()
        torch.testing.assert_close(new, old.float() + 1.0, rtol=0.02, atol=0.02)
    memory.make_room(weights)
    assert weights.bytes_now == held_bytes(weights)
    return [*sizes, held_bytes(weights)]


def check_ranks_agree() -> int:
    """One rank alone is short of memory; the next sync is collective."""
    model = sharded(build_world(CPU), tied=True)
    weights, memory = follow(model, torch.bfloat16), StepMemory(CPU)
    spare = 0 if dist.get_rank() == 1 else 1 << 40
    memory_module.never_used_bytes = lambda device: spare
    memory.measure()
    memory.make_room(weights)
    held = held_bytes(weights)
    weights.sync()
    return held


def check_joined_copies() -> None:
    """Assert that they are one tensor, which follows the training weights and is released."""
    model = sharded(build_world(CPU))
    weights = follow(model, torch.bfloat16, pack=False)
    source = {n: p for n, p in model.named_parameters()}
    for shift in (0.0, 1.0):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(shift)
        weights.mark_stale()
        weights.sync()
        names = {module: name for name, module in weights.model.named_modules()}
        for layers in weights.model.layers_with_one_input():
            rows = [source[f"{names[layer]}.weight"].full_tensor() for layer in layers]
            joined = layers[0].joined
            assert torch.equal(joined, torch.cat(rows).bfloat16())
            x_TD = torch.randn(3, joined.shape[1], dtype=torch.bfloat16)
            for found, layer in zip(products(x_TD, *layers), layers, strict=True):
                torch.testing.assert_close(found, layer(x_TD))
        weights.release()
        assert held_bytes(weights) == joined.untyped_storage().nbytes() == 0


def on_two_ranks() -> dict[str, Any]:
    check_joined_copies()
    return {"released": check_release_and_sync(None), "agreed": check_ranks_agree()}


@pytest.mark.slow
def test_copies_of_two_ranks_are_released_together_and_come_back() -> None:
    for found in run_distributed(on_two_ranks, 2):
        full, released, again, kept = found["released"]
        assert full == again == kept > 0 == released
        assert found["agreed"] == 0


@pytest.fixture
def alone() -> Iterator[None]:
    with one_process_group():
        yield


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("spare", "kept"), [(None, True), (0, False)])
def test_the_copy_is_released_until_an_update_has_shown_that_it_can_stay(
    spare: int | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "never_used_bytes", memory_module.never_used_bytes)
    full, _, _, last = check_release_and_sync(spare)
    assert last == (full if kept else 0)


@pytest.mark.usefixtures("alone")
def test_copies_of_layers_with_one_input_are_one_tensor() -> None:
    check_joined_copies()


@pytest.mark.usefixtures("alone")
def test_whole_weights_in_the_right_dtype_are_read_in_place() -> None:
    model = sharded(build_world(CPU), tied=True)
    weights = follow(model, torch.float32)
    weights.release()
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    assert weights.num_bytes == 0
    assert torch.equal(weights.model.norm.weight, model.norm.weight.to_local())


# --------------------------------------------------------------------- the trainer


def trainer_of(argv: list[str]) -> Trainer:
    return Trainer(resolve(load_config(argv), "cpu", 1), StopRequest(), Heartbeat(0, 600))


def held_after_rollouts(argv: list[str]) -> list[int]:
    """Return the bytes of the copy after each rollout of a run."""
    trainer, held = trainer_of(argv), []
    phases, score = trainer.phases, trainer.phases.score
    phases.score = lambda *args: (held.append(held_bytes(trainer.models.weights)), score(*args))
    assert trainer.train() == 0
    return held


@pytest.mark.slow
def test_a_resumed_run_releases_its_copy_before_its_first_update(world: World) -> None:
    """This process has not measured an update yet, so it cannot know what an update needs."""
    options = ("--training.dtype", "bfloat16", "--validation.enable", "false")
    fresh, resumed = (
        run_here(held_after_rollouts, world.argv("bf16", *options, "--training.steps", steps))
        for steps in (2, 4)
    )
    assert fresh[0] == resumed[0] == 0
    assert fresh[1] == resumed[1] > 0


@pytest.mark.slow
def test_the_teacher_answers_alone_and_is_let_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the teacher answers the student has no copy; after it the teacher's model is gone."""
    made: list[weakref.ref] = []
    beside: list[int] = []
    build = trainer_module.build_generator

    def generator(*args: Any) -> Any:
        found = build(*args)
        made.append(weakref.ref(found[0].model))
        return found

    def measure(argv: list[str]) -> int:
        trainer = trainer_of(argv)
        measure_teacher = trainer.validator.measure_teacher

        def measured(*args: Any) -> None:
            beside.append(held_bytes(trainer.models.weights))
            measure_teacher(*args)

        monkeypatch.setattr(trainer_module, "build_generator", generator)
        monkeypatch.setattr(trainer.validator, "measure_teacher", measured)
        trainer.models.weights.sync()
        trainer.recorder = SimpleNamespace(metrics=SimpleNamespace(log=lambda *_: None))
        trainer._measure_teacher("teacher")
        return sum(ref() is not None for ref in made)

    assert run_here(measure, world.argv("alone", "--training.dtype", "bfloat16")) == 0
    assert beside == [0] and made
