"""A run is the same in any layout of ranks, up to fp32 rounding.

One process, 2 x FSDP, 2 x TP, 2 x 2 (FSDP x TP), 2 x 2 (HSDP) and 2 x 1 x 2 (HSDP x TP), on the CPU
over gloo: the same rollouts, losses, gradient norms and final weights (relative 1e-4). CI runs each
variant and each axis; the other pairs are long.

The rollout engine and the objectives are held to this file: a change there that needs another
layout to give other numbers is wrong. A new objective gets a variant below.
"""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import (
    World,
    hf_logprobs,
    load_hf,
    make_gradable,
    make_model,
    make_world,
    read_log,
    read_rollouts,
    read_scalars,
    read_weights,
    train,
    train_on,
)

from opd_titan.config import load_config
from opd_titan.config.resolve import resolve
from opd_titan.errors import ModelError
from opd_titan.training.sources import inspect_models

pytestmark = pytest.mark.slow

# data_parallel_replicate_degree, data_parallel_shard_degree, tensor_parallel_degree
Degrees = tuple[int, int, int]
ONE: Degrees = (1, 1, 1)
TWO: dict[str, Degrees] = {"fsdp": (1, 2, 1), "tp": (1, 1, 2)}
FOUR: dict[str, Degrees] = {"fsdp-tp": (1, 2, 2), "hsdp": (2, 2, 1), "hsdp-tp": (2, 1, 2)}

# Between them: tied and untied weights, a teacher of another shape, a reference, several updates
# and micro-batches a step, truncated sampling, a sampled validation, fewer sequences than
# data-parallel ranks, whole distributions.
VARIANTS: dict[str, str] = {
    "tied": """--teacher.hf_path {folder}/wide --reference.coef 0.5 --distill.minibatches 2
        --training.max_tokens_per_microbatch 90 --training.max_grad_norm 0.5
        --validation.path {folder}/graded.jsonl --validation.max_prompts 0
        --export.interval 2""",
    "untied": """--student.hf_path {folder}/untied --rollout.prompts_per_step 1
        --rollout.group_size 1 --rollout.temperature 0.8 --rollout.top_p 0.9 --rollout.top_k 20
        --rollout.max_new_tokens 11 --training.steps 3 --optimizer.weight_decay 0.1
        --validation.samples_per_prompt 2 --validation.temperature 1.0""",
    # Adam would turn the rounding of gradients near zero into steps; eps keeps those small.
    "exact": """--distill.objective jsd --distill.beta 0.3 --teacher.hf_path {folder}/wide
        --reference.coef 0.5 --distill.minibatches 2 --training.max_tokens_per_microbatch 90
        --optimizer.eps 1e-3 --training.steps 2 --validation.enable False""",
    "sft": """--distill.objective sft --rollout.on_policy_fraction 0.0 --rollout.group_size 1
        --rollout.max_new_tokens 20 --training.steps 2 --validation.enable False""",
}
LAST = {"tied": 4, "untied": 3, "exact": 2, "sft": 2}
RUNS = [("tied", "fsdp"), ("tied", "tp"), ("untied", "fsdp"), ("exact", "tp"), ("sft", "tp")]
RUNS += [("tied", "fsdp-tp"), ("untied", "hsdp"), ("exact", "hsdp-tp")]
MORE = [("tied", "hsdp"), ("tied", "hsdp-tp"), ("untied", "tp"), ("untied", "fsdp-tp")]
MORE += [("exact", "fsdp-tp"), ("sft", "fsdp-tp")]
NONE = ("--checkpoint.enable", "False")
CHECKPOINTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("tied", "fsdp-tp"): ("--checkpoint.async_mode", "async")
}


def arguments(world: World, variant: str, out: str, degrees: Degrees, *more: Any) -> list[str]:
    replicate, shard, tensor = degrees
    layout = ["--parallelism.data_parallel_replicate_degree", replicate]
    layout += ["--parallelism.data_parallel_shard_degree", shard]
    layout += ["--parallelism.tensor_parallel_degree", tensor]
    options = VARIANTS[variant].format(folder=world.folder).split()
    return world.argv(out, *options, *layout, *more)


def resumed(world: World, name: str) -> Path:
    """Copy the FSDP x TP run as it was after its second step."""
    out = world.folder / name
    shutil.copytree(world.folder / "tied-fsdp-tp", out, ignore=shutil.ignore_patterns("hf"))
    shutil.rmtree(out / "checkpoint" / "step-4")
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    wide = dict(hidden_size=48, num_hidden_layers=3, tie_word_embeddings=False)
    make_model(world.folder / "wide", seed=3, **wide)
    make_gradable(world, world.folder / "wide")
    make_model(world.folder / "untied", seed=4, tie_word_embeddings=False)
    make_model(world.folder / "one-kv-head", seed=5, num_key_value_heads=1)
    return world


ODD = {
    "student": "--student.hf_path {folder}/one-kv-head",
    "teacher": "--teacher.hf_path {folder}/one-kv-head",
    "reference": "--reference.hf_path {folder}/one-kv-head --reference.coef 0.5",
}


def jobs_of(
    world: World, chosen: list[tuple[str, str]], layouts: dict[str, Degrees]
) -> list[list[str]]:
    return [
        arguments(world, v, f"{v}-{name}", layouts[name], *CHECKPOINTS.get((v, name), NONE))
        for v, name in chosen
        if name in layouts
    ]


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """Return the world with every run that CI compares."""
    train_on(4, jobs_of(world, RUNS, FOUR))
    jobs = jobs_of(world, RUNS, TWO)
    jobs.append(arguments(world, "tied", resumed(world, "resumed-tp").name, TWO["tp"]))
    refused = [
        arguments(world, "tied", f"odd-{role}", TWO["tp"], *options.format(**vars(world)).split())
        for role, options in ODD.items()
    ]
    refused.append(arguments(world, "tied", "three", (1, -1, 3)))
    codes = [0] * len(jobs) + [2] * len(refused)
    train_on(2, jobs + refused, codes, stderr=world.folder / "stderr")

    for variant in VARIANTS:
        assert train(arguments(world, variant, f"{variant}-one", ONE, *NONE)) == 0
    assert train(arguments(world, "tied", resumed(world, "resumed-one").name, ONE)) == 0
    return world


@pytest.fixture(scope="module")
def more_runs(runs: World) -> World:
    for ranks, layouts in ((2, TWO), (4, FOUR)):
        train_on(ranks, jobs_of(runs, MORE, layouts))
    return runs


# ------------------------------------------------------------------ the same run


def assert_same_rollouts(ours: Path, truth: Path) -> None:
    """Assert the same tokens and texts, and log-probs and advantages within 1e-4."""
    mine, theirs = (list(chain(*read_rollouts(out).values())) for out in (ours, truth))
    assert len(mine) == len(theirs) > 0
    for row, expected in zip(mine, theirs, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            if key.endswith("logprobs") or key == "advantages":
                assert row[key] == (value and pytest.approx(value, rel=1e-4, abs=1e-4)), key
            elif key == "teacher_top" and value:
                assert texts_of(row[key]) == texts_of(value)
                assert logprobs_of(row[key]) == pytest.approx(logprobs_of(value), rel=1e-3)
            else:
                assert row[key] == value, key


def texts_of(top: list[list[Any]]) -> list[str]:
    return [text for place in top for text, _ in place]


def logprobs_of(top: list[list[Any]]) -> list[float]:
    return [logprob for place in top for _, logprob in place]


def assert_same_scalars(ours: Path, truth: Path) -> None:
    mine, theirs = (read_scalars(out, measured=False) for out in (ours, truth))
    assert mine.keys() == theirs.keys() >= {"loss/policy", "grad_norm"}
    # Rounding itself, and what is measured on some of each rank's tokens.
    probed = {"kl/reverse", "kl/forward"} | {n for n in theirs if n.startswith("policy/t")}
    for name in theirs.keys() - probed - {"policy/logprob_gap_max"}:
        assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    for name in theirs.keys() & {"policy/logprob_gap_max"}:
        assert max(mine[name].values()) < 1e-4


def assert_same_weights(ours: Path, truth: Path, step: int) -> None:
    mine, theirs = (read_weights(out, step) for out in (ours, truth))
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (mine[name] - expected).norm() <= 1e-4 * expected.norm(), name


def assert_same(world: World, variant: str, layout: str) -> None:
    ours, truth = (world.folder / f"{variant}-{name}" for name in (layout, "one"))
    if variant != "sft":
        assert_same_rollouts(ours, truth)
    assert_same_scalars(ours, truth)
    assert_same_weights(ours, truth, LAST[variant])
    ranks = range(4 if layout in FOUR else 2)
    assert {p.name for p in (ours / "logs").iterdir()} == {f"rank-{n}.log" for n in ranks}


@pytest.mark.parametrize(("variant", "layout"), RUNS)
def test_any_layout_is_the_same_run(runs: World, variant: str, layout: str) -> None:
    assert_same(runs, variant, layout)


@pytest.mark.long
@pytest.mark.parametrize(("variant", "layout"), MORE)
def test_any_variant_is_the_same_run_in_any_layout(
    more_runs: World, variant: str, layout: str
) -> None:
    assert_same(more_runs, variant, layout)


def test_the_runs_show_what_they_are_to_show(runs: World) -> None:
    """The comparisons above mean little if, say, no response is ever clipped."""
    tied, untied = (read_scalars(runs.folder / f"{name}-one") for name in ("tied", "untied"))
    assert list(tied["validation/accuracy"]) == [0, 2, 4]
    assert min(tied["validation/teacher_accuracy"].values()) > 0
    assert len(set(tied["validation/accuracy"].values())) > 1
    assert max(tied["policy/clip_fraction"].values()) > 0
    assert min(tied["grad_norm"].values()) > 0.5  # all are clipped
    assert "kl/student_reference" in tied and "kl/student_teacher" in untied
    assert "lm_head.weight" not in read_weights(runs.folder / "tied-tp", 4)
    assert "lm_head.weight" in read_weights(runs.folder / "untied-fsdp", 3)
    fed_in = [
        len(row["prompt_tokens"]) + len(row["response_tokens"]) - 1
        for (row,) in read_rollouts(runs.folder / "untied-one").values()
    ]
    assert any(n % 2 for n in fed_in)  # must be padded for tensor parallelism
    start = load_hf(runs.student).state_dict()
    for name, weight in read_weights(runs.folder / "tied-fsdp-tp", 4).items():
        assert (weight - start[name]).norm() > 1e-2 * start[name].norm(), name


@pytest.mark.parametrize("layout", ["tp", "fsdp-tp"])
def test_transformers_agrees_with_an_export_of_tensor_parallel_ranks(
    runs: World, layout: str
) -> None:
    """What was exported after step 2 sampled step 3."""
    out = runs.folder / f"tied-{layout}"
    model, teacher = load_hf(out / "hf" / "step-2"), load_hf(runs.folder / "wide")
    for row in read_rollouts(out)[3]:
        ids = row["prompt_tokens"], row["response_tokens"]
        for key, theirs in (("student_logprobs", model), ("teacher_logprobs", teacher)):
            ours = torch.tensor(row[key])
            torch.testing.assert_close(ours, hf_logprobs(theirs, *ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["one", "tp"])
def test_a_checkpoint_goes_on_under_another_layout(runs: World, layout: str) -> None:
    out, truth = runs.folder / f"resumed-{layout}", runs.folder / "tied-one"
    assert f"Resumed from {out / 'checkpoint'}/step-2" in read_log(out)
    assert_same_rollouts(out, truth)
    assert_same_scalars(out, truth)
    assert_same_weights(out, truth, 4)


# ------------------------------------------------------------------ what cannot be


def test_models_that_do_not_split_are_refused_before_their_weights_are_read(runs: World) -> None:
    said = [
        line
        for line in (runs.folder / "stderr").read_text().splitlines()
        if line.startswith("opd_titan: ")
    ]
    # Both ranks print each line; the ranks need not wait for each other in between.
    counts = Counter(said)
    assert counts.total() == 2 * (len(ODD) + 1) and all(n % 2 == 0 for n in counts.values())
    (world_size,) = (line for line in counts if "is not the world size 2" in line)
    assert "tensor_parallel_degree 3" in world_size
    assert "what fits: 1 x 2 x 1, 1 x 1 x 2" in world_size
    for line in counts.keys() - {world_size}:
        assert "[parallelism] tensor_parallel_degree: 2 does not divide" in line
        assert "num_key_value_heads 1" in line and str(runs.folder / "one-kv-head") in line
    for name in (*(f"odd-{role}" for role in ODD), "three"):
        assert not (runs.folder / name).exists()  # nor has anything been written


@pytest.mark.parametrize(
    ("sizes", "ranks", "part"),
    [
        ({}, 4, "4 does not divide num_key_value_heads 2"),
        ({"num_key_value_heads": 4, "num_attention_heads": 4}, 8, "num_key_value_heads 4"),
        ({"intermediate_size": 47}, 2, "2 does not divide intermediate_size 47"),
        ({"vocab_size": 99}, 2, "2 does not divide vocab_size 99"),
    ],
    ids=str,
)
def test_each_size_that_does_not_split_is_named(
    world: World, tmp_path: Path, sizes: dict[str, int], ranks: int, part: str
) -> None:
    make_model(tmp_path / "student", seed=1, **sizes)
    options = ["--student.hf_path", tmp_path / "student"]
    argv = world.argv("none", *options, "--parallelism.tensor_parallel_degree", ranks)
    with pytest.raises(ModelError) as caught:
        inspect_models(resolve(load_config(argv), "cpu", ranks))
    message = str(caught.value)
    assert part in message and "\n" not in message
    assert "wanted a common divisor of" in message and str(tmp_path / "student") in message
