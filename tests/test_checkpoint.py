"""Exact resume: a run that was stopped, killed or sent back ends as the one that never was."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from safetensors.torch import load_file
from same_run import tensors
from test_hf_io import assert_same_tensors, build_sharded, make_source
from tiny_student import one_process_group
from tiny_world import (
    World,
    assert_same_run,
    make_model,
    make_sums,
    make_world,
    read_log,
    read_rollouts,
    read_scalars,
    rollout_bytes,
    train,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_titan.checkpoint.checkpointer import Checkpointer, inspect_checkpoint
from opd_titan.checkpoint.hf_load import random_init_weights
from opd_titan.checkpoint.steps import agree_on_step, complete_steps, open_folder
from opd_titan.config import JobConfig
from opd_titan.distill.optim import build_optimizer
from opd_titan.errors import CheckpointError, StorageError

# All that has a state or a schedule. There are 22 prompts: step 6 starts an epoch.
OPTIONS = """
    --training.steps 6 --distill.minibatches 2 --reference.coef 0.5 --validation.interval 3
    --lr_scheduler.warmup_steps 1 --lr_scheduler.decay cosine --metrics.log_freq 2
""".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """Six steps without a stop; checkpoints 2, 4 and 6."""
    assert train(world.argv("whole", *OPTIONS)) == 0
    return world.folder / "whole"


def copy_run(source: Path, name: str, *, keep: tuple[int, ...]) -> Path:
    """A copy of a run's folder as a crash leaves it: these checkpoints, no export."""
    target = source.with_name(name)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("hf"))
    for folder in (target / "checkpoint").iterdir():
        if folder.name not in [f"step-{n}" for n in keep]:
            shutil.rmtree(folder)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------- resume


def test_resume_from_the_newest_equals_the_run_that_never_stopped(
    world: World, whole: Path
) -> None:
    out = copy_run(whole, "newest", keep=(2,))
    log = read_log(out)
    assert train(world.argv("newest", *OPTIONS)) == 0
    assert_same_run(whole, out, 6)
    # Times and memory have the same steps too.
    steps = {name: list(values) for name, values in read_scalars(whole).items()}
    assert {name: list(values) for name, values in read_scalars(out).items()} == steps
    new = read_log(out).removeprefix(log)
    resumed = [line for line in new.splitlines() if "Resumed" in line]
    assert len(resumed) == 1
    assert f"{out}/checkpoint/step-2 (the newest complete checkpoint)" in resumed[0]


def test_load_step_goes_back_and_sets_newer_checkpoints_aside(world: World, whole: Path) -> None:
    out = copy_run(whole, "back", keep=(2, 4, 6))
    assert train(world.argv("back", *OPTIONS, "--checkpoint.load_step", 2)) == 0
    assert_same_run(whole, out, 6)
    found = sorted(p.name for p in (out / "checkpoint").iterdir())
    assert found == ["step-2", "step-4", "step-4.old", "step-6", "step-6.old"]
    log = read_log(out)
    assert "step-2 (checkpoint.load_step)" in log
    assert "Set aside as step-N.old" in log


def test_load_step_0_starts_afresh_and_keeps_its_own_checkpoints(world: World, whole: Path) -> None:
    out = copy_run(whole, "afresh", keep=(4, 6))
    options = [*OPTIONS, "--training.steps", 3, "--lr_scheduler.decay", "constant"]
    options += ["--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 2]
    assert train(world.argv("afresh", *options, "--checkpoint.load_step", 0)) == 0
    assert complete_steps(out / "checkpoint") == [2, 3]
    assert "Starting at step 1: checkpoint.load_step is 0" in read_log(out)
    assert max(read_scalars(out)["loss/policy"]) == 3
    # The next start resumes from this run and not from the one that it replaced.
    options[options.index("--training.steps", 12) + 1] = 4
    assert train(world.argv("afresh", *options)) == 0
    assert complete_steps(out / "checkpoint") == [3, 4]


def test_a_finished_run_stays_as_it_is(world: World, whole: Path) -> None:
    out = copy_run(whole, "finished", keep=(2, 4, 6))
    assert train(world.argv("finished", *OPTIONS)) == 0
    assert complete_steps(out / "checkpoint") == [2, 4, 6]
    assert rollout_bytes(out) == rollout_bytes(whole)
    assert read_scalars(out) == read_scalars(whole)


def test_a_run_that_is_shortened_exports_its_last_step_once(world: World, whole: Path) -> None:
    out = copy_run(whole, "shortened", keep=(2, 4))
    written = set()
    for _ in range(2):
        assert train(world.argv("shortened", *OPTIONS, "--training.steps", 4)) == 0
        written.add((out / "hf" / "step-4" / "config.json").stat().st_mtime_ns)
    assert len(written) == 1 and complete_steps(out / "checkpoint") == [2, 4]
    assert max(read_scalars(out)["loss/policy"]) == 4  # and no step comes twice


def test_async_mode_writes_the_same_checkpoints(world: World, whole: Path, tmp_path: Path) -> None:
    assert train(world.argv("async", *OPTIONS, "--checkpoint.async_mode", "async")) == 0
    out = world.folder / "async"
    assert_same_run(whole, out, 6)
    assert complete_steps(out / "checkpoint") == [2, 4, 6]
    for step in (2, 6):
        folders = (run / "checkpoint" / f"step-{step}" for run in (whole, out))
        a, b = (tensors(folder) for folder in folders)
        assert a.keys() == b.keys() and len(a) > 60
        for name, value in a.items():
            assert torch.equal(value, b[name]), name


# ------------------------------------------------------- what is not resumed


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--checkpoint.load_step", 5], ["step-5 is not a complete", "steps: 2, 4, 6"]),
        (["--student.hf_path", "{}/wide"], ["another model", "[98, 32] there and [98, 16]"]),
        (["--training.seed", 7], ["training.seed is 7 but was 42"]),
        (
            ["--data.path", "{}/fewer.jsonl"],
            ["data.path was", "(22 prompts) and is", "(20 prompts)"],
        ),
        (["--teacher.hf_path", "{}/other"], ["teacher.hf_path was", "/teacher and is", "/other;"]),
        (["--teacher.random_init"], ["teacher.hf_path", "/teacher has changed content"]),
        (
            ["--distill.objective", "jsd"],
            ["objective was policy_gradient and is jsd with beta 0.5"],
        ),
        (["--student.eos_token", "?"], ["student.eos_token was nothing and is ?"]),
        (["--reference.coef", 0], ["reference.coef was 0.5 and is 0.0", "allow_changes"]),
    ],
)
def test_what_cannot_be_resumed_is_one_line_and_exit_code_2(
    world: World,
    whole: Path,
    capfd: pytest.CaptureFixture[str],
    options: list[Any],
    parts: list[str],
) -> None:
    for name, sizes in (("other", {}), ("wide", {"hidden_size": 16})):
        if not (world.folder / name).exists():
            make_model(world.folder / name, seed=4, **sizes)
    make_sums(world.folder / "fewer.jsonl", 20, seed=1)
    shutil.rmtree(world.folder / "refused", ignore_errors=True)
    out = copy_run(whole, "refused", keep=(2, 4, 6))
    before = contents(out)
    capfd.readouterr()
    options = [str(o).format(world.folder) for o in options]
    assert train(world.argv("refused", *OPTIONS, *options)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("opd_titan: ") and len(line) < 600
    for part in parts:
        assert part in line
    assert contents(out) == before


def test_another_jobs_checkpoint_is_resumed_if_asked_for(world: World, whole: Path) -> None:
    make_sums(world.folder / "changed.jsonl", 24, seed=5)
    out = copy_run(whole, "changed", keep=(2,))
    options = ["--data.path", world.folder / "changed.jsonl", "--distill.objective", "reverse_kl"]
    options += [*OPTIONS, "--checkpoint.allow_changes"]
    seen = len(read_log(out))
    assert train(world.argv("changed", *options)) == 0
    log = read_log(out)[seen:]
    assert "belongs to a different job (checkpoint.allow_changes)" in log
    assert "distill.objective was policy_gradient and is reverse_kl" in log
    assert "order of the prompts starts from the beginning" in log and "next step 3" in log
    known = {json.loads(x)["question"] for x in (world.folder / "changed.jsonl").open()}
    rows = read_rollouts(out)
    assert all(any(q in row["prompt"] for q in known) for row in rows[3])


def test_only_complete_checkpoints_count(
    tmp_path: Path, model_and_optimizer: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    with one_process_group():
        checkpointer = Checkpointer(
            tmp_path, *model_and_optimizer, keep_latest_k=0, background=False
        )
        assert agree_on_step(tmp_path / "absent", -1) is None
        assert agree_on_step(tmp_path, -1) is None
        for step in (2, 10):
            checkpointer.save(step, {})
            checkpointer.finish()
        for name in ("step-12.tmp", "step-16.old", "step-18.damaged"):
            shutil.copytree(tmp_path / "step-2", tmp_path / name)
        assert complete_steps(tmp_path) == [2, 10]
        assert agree_on_step(tmp_path, -1) == 10
        assert agree_on_step(tmp_path, 2) == 2
        assert agree_on_step(tmp_path, 0) is None
        for step in (12, 16, 18, 3):
            with pytest.raises(CheckpointError, match=r"complete steps: 2, 10;"):
                agree_on_step(tmp_path, step)


# ------------------------------------------------------------ the checkpointer


@pytest.fixture
def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(1500, 1500)  # large enough for a write to take a while
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1500)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("background", [False, True])
def test_what_changes_after_a_save_is_not_in_it(
    tmp_path: Path, model_and_optimizer: tuple[nn.Module, torch.optim.Optimizer], background: bool
) -> None:
    model, optimizer = model_and_optimizer
    with one_process_group():
        checkpointer = Checkpointer(
            tmp_path, model, optimizer, keep_latest_k=0, background=background
        )
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        state = {"list": [1.5]}
        checkpointer.save(1, state)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
                optimizer.state[p]["exp_avg"].fill_(7.0)
        state["list"].append(7.0)
        checkpointer.wait()
        checkpointer.load(1)
        assert inspect_checkpoint(tmp_path / "step-1", model)["list"] == [1.5]
        torch.testing.assert_close(
            [model.state_dict(), optimizer.state_dict()], saved, rtol=0, atol=0
        )


def test_a_background_save_is_incomplete_until_it_is_polled(
    tmp_path: Path, model_and_optimizer: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    with one_process_group():
        checkpointer = Checkpointer(
            tmp_path, *model_and_optimizer, keep_latest_k=2, background=True
        )
        for step in (1, 2, 3):
            checkpointer.save(step, {"step": step})
            assert step not in complete_steps(tmp_path)
            deadline = time.monotonic() + 60
            while step not in complete_steps(tmp_path):
                assert time.monotonic() < deadline
                checkpointer.poll()
        assert complete_steps(tmp_path) == [2, 3]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-3"]
        assert json.loads((tmp_path / "step-3" / "train_state.json").read_text())["step"] == 3
    assert not dist.is_initialized()


def test_the_recipes_optimizer_settings_win_over_the_checkpoints(tmp_path: Path) -> None:
    def build(seed: int, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        config = JobConfig()
        for name, value in settings.items():
            setattr(config.optimizer, name, value)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        optimizer = build_optimizer(model, config.optimizer)
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    def open_(pair: tuple[nn.Module, torch.optim.Optimizer]) -> Checkpointer:
        return Checkpointer(tmp_path, *pair, keep_latest_k=0, background=False)

    saved = build(0, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    own = {"weight_decay": 0.5, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6}
    loaded = build(1, **own)
    with one_process_group():
        checkpointer = open_(saved)
        checkpointer.save(1, {})
        checkpointer.finish()
        open_(loaded).load(1)
    matrices, norms = loaded[1].param_groups
    assert (matrices["weight_decay"], norms["weight_decay"]) == (0.5, 0.0)
    for group in (matrices, norms):
        assert (group["betas"], group["eps"]) == ((0.8, 0.99), 1e-6)
    # Weights and moments are the checkpoint's.
    torch.testing.assert_close(loaded[0].state_dict(), saved[0].state_dict(), rtol=0, atol=0)
    states = (optimizer.state_dict()["state"] for _, optimizer in (loaded, saved))
    torch.testing.assert_close(*states, rtol=0, atol=0)


# ----------------------------------------------------------------- other layouts

# data_parallel_replicate_degree, data_parallel_shard_degree, tensor_parallel_degree
LAYOUTS = {"fsdp": (1, 2, 1), "tensor parallel": (1, 1, 2), "hsdp": (2, 1, 1)}


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state, gathered."""
    found = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    tensors = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def build(source: Path, degrees: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_sharded(source, degrees)
    return model, torch.optim.AdamW(model.parameters())


@torch.no_grad()
def save_and_load_in_each_layout(source: Path, out: Path) -> list[dict[str, Tensor]]:
    """Save in each layout, load in each; what was saved, by layout."""
    saved = []
    for number, degrees in enumerate(LAYOUTS.values()):
        model, optimizer = build(source, degrees)
        random_init_weights(model, seed=number, std=1.0)
        for parameter in model.parameters():
            moments = {"exp_avg": parameter * 2, "exp_avg_sq": parameter**2}
            optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
        folder = out / str(number)
        open_folder(folder)
        checkpointer = Checkpointer(folder, model, optimizer, keep_latest_k=0, background=False)
        checkpointer.save(1, {})
        checkpointer.finish()
        saved.append(gathered(model, optimizer))
        for other in LAYOUTS.values():
            model, optimizer = build(source, other)
            Checkpointer(folder, model, optimizer, keep_latest_k=0, background=False).load(1)
            assert_same_tensors(gathered(model, optimizer), saved[-1])
    return saved


@pytest.mark.slow
def test_a_checkpoint_of_any_layout_loads_in_any_other(tmp_path: Path) -> None:
    """The hidden size is odd, so that FSDP's shards are uneven; embedding and head are tied."""
    sizes = {"vocab_size": 38, "hidden_size": 33, "tied": True}
    source = make_source(tmp_path / "source", **sizes)
    ranks = run_distributed(save_and_load_in_each_layout, 2, source, tmp_path)
    with one_process_group():
        for number, saved in enumerate(ranks[0]):
            model, optimizer = build(source, (1, 1, 1))
            folder = tmp_path / str(number)
            Checkpointer(folder, model, optimizer, keep_latest_k=0, background=False).load(1)
            assert_same_tensors(gathered(model, optimizer), saved)
            # Every value is saved once, even if both ranks have it.
            files = [load_file(path) for path in (folder / "step-1").glob("*.safetensors")]
            sizes = sum(tensor.numel() for file in files for tensor in file.values())
            unique = {n: t for n, t in saved.items() if n != "lm_head.weight"}
            assert sizes == sum(tensor.numel() for tensor in unique.values())
            assert len(files) == 2


# -------------------------------------------------------- folders of two ranks


def refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except (CheckpointError, StorageError) as error:
        return str(error)
    return None


def on_ranks_with_folders(shared: Path, own: list[Path]) -> dict[str, Any]:
    """What each rank gets in a folder of all ranks, and in one of its own."""
    folder = own[dist.get_rank()]
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    out: dict[str, Any] = {"open": refusal(lambda: open_folder(folder / "new"))}
    open_folder(shared)
    for background in (False, True):
        options = {"keep_latest_k": 0, "background": background}
        checkpointer = Checkpointer(folder / "new", model, optimizer, **options)
        checkpointer.save(1, {})
        out[f"save {background}"] = refusal(checkpointer.finish)
        checkpointer = Checkpointer(shared, model, optimizer, **options)
        checkpointer.save(3 + background, {})
        checkpointer.wait()
    out["shared"] = [agree_on_step(shared, step) for step in (-1, 3, 0)]
    out["absent"] = refusal(lambda: agree_on_step(shared, 7))
    for name in ("first", "second"):  # only this rank has a checkpoint there
        out[name] = refusal(lambda name=name: agree_on_step(folder / name, -1))
    total = torch.ones(1)
    dist.all_reduce(total)  # the ranks still call the same collectives
    return {**out, "ranks": total.item()}


@pytest.mark.slow
def test_ranks_agree_on_a_step_and_must_share_the_folder(tmp_path: Path) -> None:
    own = [tmp_path / "0", tmp_path / "1"]
    for rank, name in enumerate(("first", "second")):
        (own[rank] / name / "step-2").mkdir(parents=True)
        (own[rank] / name / "step-2" / "train_state.json").write_text("{}")
    results = run_distributed(on_ranks_with_folders, 2, tmp_path / "shared", own)
    for result in results:
        assert result["ranks"] == 2
        assert result["shared"] == [4, 3, None]
        assert "checkpoint.load_step" in result["absent"]
        for name in ("open", "first"):
            message = result[name]
            assert "is not there on every rank" in message and "\n" not in message
            assert message.startswith("job.dump_folder: ") and "share" in message
        for name in ("save False", "save True"):
            assert "step 1 not saved: " in result[name] and "No such file" in result[name]
        # Only what rank 0 sees counts: the job would start a new run, but `open_folder` refuses.
        assert result["second"] is None
    for folder in own:
        assert complete_steps(folder / "new") == []
