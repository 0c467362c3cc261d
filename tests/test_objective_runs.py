"""Whole runs with each objective, and with the student's samples and the data set's responses.

If `rollout.on_policy_fraction` is between 0 and 1, the data set answers some of the prompts.
"""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import (
    World,
    assert_same_run,
    hf_logprobs,
    load_hf,
    make_model,
    make_world,
    read_log,
    read_rollouts,
    read_scalars,
    train,
    train_on,
)

from opd_titan.config import load_config
from opd_titan.config.resolve import resolve
from opd_titan.data.types import Prompt, Sample
from opd_titan.errors import ModelError
from opd_titan.rollout.rollout import in_order, split_on_policy

SEED = 42  # the default of training.seed
TOKENS = 98  # of the tokenizer; the model "padded" has more rows
Row = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world.folder / "padded", seed=7, vocab_size=112, hidden_size=40)
    return world


# ---------------------------------------------------------------- every objective

RUNS: dict[str, str] = {
    "pg": "--distill.baseline kl --distill.minibatches 2 --reference.coef 0.5",
    "jsd": "--distill.objective jsd --distill.beta 0.3 --rollout.temperature 0.8",
    "top_k": "--distill.objective top_k_forward_kl --distill.top_k 4 --reference.coef 0.2",
    "padded-teacher": "--distill.baseline top_k --teacher.hf_path {folder}/padded",
    "padded-student": """--distill.objective reverse_kl --student.hf_path {folder}/padded
        --teacher.hf_path {folder}/student""",
}


def arguments(world: World, name: str, *more: Any) -> list[str]:
    options = RUNS[name].format(folder=world.folder).split()
    short = ["--training.steps", 2, "--validation.enable", "False"]
    short += ["--checkpoint.enable", "False", "--rollout.max_new_tokens", 10]
    return world.argv(name, *short, *options, *more)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_every_objective(world: World, name: str) -> None:
    assert train(arguments(world, name)) == 0
    out, has_reference = world.folder / name, "--reference.coef" in RUNS[name]
    scalars = read_scalars(out)
    wanted = {"loss/policy", "grad_norm", "kl/student_teacher", "policy/entropy"}
    wanted |= {"kl/reverse", "kl/forward", "policy/teacher_entropy", "policy/top_k_overlap"}
    wanted |= {"kl/student_reference"} if has_reference else set()
    for scalar in wanted:
        assert list(scalars[scalar]) == [1, 2], scalar
        assert all(map(math.isfinite, scalars[scalar].values())), scalar
    assert min(scalars["grad_norm"].values()) > 0
    assert ("policy/clip_fraction" in scalars) == (name in ("pg", "padded-teacher"))
    assert max(scalars["policy/logprob_gap_max"].values()) < 1e-4
    assert min(scalars["kl/reverse"].values()) > 0.01
    folder = {"padded-student": "student", "padded-teacher": "padded"}.get(name, "teacher")
    teacher, temperature = load_hf(world.folder / folder), 0.8 if name == "jsd" else 1.0
    for rows in read_rollouts(out).values():
        assert len(rows) == 8
        for row in rows:
            check_row(row, has_reference, name in ("jsd", "padded-student"))
        prompt, response = rows[0]["prompt_tokens"], rows[0]["response_tokens"]
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        theirs = (logits[:, :TOKENS] / temperature).log_softmax(-1)
        theirs = theirs[torch.arange(len(response)), torch.tensor(response)]
        ours = torch.tensor(rows[0]["teacher_logprobs"])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def check_row(row: Row, has_reference: bool, plain: bool) -> None:
    """Check a row of a rollout file.

    Args:
        plain: whether advantages are those of the policy gradient without baseline or reference.
    """
    n = len(row["response_tokens"])
    assert max(row["response_tokens"]) < TOKENS
    assert (row["reference_logprobs"] is not None) == has_reference
    keys = ["student_logprobs", "teacher_logprobs", "advantages"]
    for key in [*keys, "reference_logprobs"][: 3 + has_reference]:
        assert len(row[key]) == n and all(map(math.isfinite, row[key])), key
    if plain:
        student, teacher, advantages = (torch.tensor(row[key]) for key in keys)
        torch.testing.assert_close(advantages, teacher - student, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["padded-teacher", "padded-student"])
def test_ranks_do_not_split_vocabularies_of_different_sizes(world: World, name: str) -> None:
    from opd_titan.training.sources import inspect_models

    tp = ["--parallelism.data_parallel_shard_degree", 1, "--parallelism.tensor_parallel_degree", 2]
    with pytest.raises(ModelError) as caught:
        inspect_models(resolve(load_config(arguments(world, name, *tp)), "cpu", 2))
    message = str(caught.value)
    assert "teacher.hf_path: vocab_size is " in message and "\n" not in message
    assert "tensor_parallel_degree = 2" in message
    assert "112" in message and f"{TOKENS}" in message
    assert "wanted 1 there, or equal sizes" in message


# ------------------------------------------------------------- who answers what


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, "", (0,)) for i in range(count)]


def chosen(count: int, fraction: float, *stream: int) -> set[int]:
    """Return the prompts, by index, that the student answers."""
    return {p.index for p in split_on_policy(prompts(count), fraction, stream)[0]}


def test_nothing_is_drawn_at_fractions_of_0_and_1() -> None:
    everyone = prompts(1000)
    assert split_on_policy(everyone, 1.0, (0, 1)) == (everyone, [])
    assert split_on_policy(everyone, 0.0, (0, 1)) == ([], everyone)
    assert split_on_policy([], 0.5, (0, 1)) == ([], [])


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9])
def test_each_prompt_is_drawn_with_this_probability(fraction: float) -> None:
    n = 4000
    counts = [len(chosen(n, fraction, SEED, step)) for step in range(1, 11)]
    deviation = math.sqrt(fraction * (1 - fraction) * n)
    assert all(abs(c - fraction * n) < 4 * deviation for c in counts)
    assert abs(sum(counts) - fraction * n * 10) < 4 * deviation * math.sqrt(10)
    # Every epoch has the same prompts, but the draw must differ.
    steps = [chosen(n, fraction, SEED, step) for step in (1, 2)]
    both, share = len(steps[0] & steps[1]), fraction**2
    assert abs(both - share * n) < 4 * math.sqrt(share * (1 - share) * n) + 1


def test_the_draw_depends_on_seed_step_and_prompt_alone() -> None:
    first = chosen(500, 0.5, SEED, 7)
    assert first == chosen(500, 0.5, SEED, 7)
    assert len({frozenset(chosen(500, 0.5, *s)) for s in ((SEED, 7), (SEED, 8), (43, 7))}) == 3
    # It does not depend on the rest of the batch or its order; a larger fraction adds prompts.
    some = prompts(500)[::-3]
    assert {p.index for p in split_on_policy(some, 0.5, (SEED, 7))[0]} == first & {
        p.index for p in some
    }
    assert first < chosen(500, 0.6, SEED, 7)


def test_samples_are_in_the_order_of_the_prompts() -> None:
    batch = [Prompt(i, "", (0,)) for i in (7, 3, 5)]
    samples = [Sample(p, i, [1], "stop") for p in (batch[2], batch[0]) for i in (1, 0)]
    samples.append(Sample(batch[1], 0, [1], "stop"))
    found = [(s.prompt.index, s.sample_index) for s in in_order(samples, batch)]
    assert found == [(7, 0), (7, 1), (3, 0), (5, 0), (5, 1)]


# ------------------------------------------------------------------ mixed runs

MIXED = ["--distill.objective", "reverse_kl", "--rollout.on_policy_fraction", 0.5]
MIXED += ["--rollout.max_new_tokens", 16, "--validation.enable", "False"]
VARIANTS: dict[str, list[Any]] = {
    "mixed": [],
    "limited": ["--distill.minibatches", 4, "--rollout.max_tokens_per_step", 20]
    + ["--distill.objective", "jsd", "--rollout.max_new_tokens", 10],
    # The student rarely answers one of the 2 prompts of a step, so most of its rollouts are empty.
    "rare": ["--rollout.on_policy_fraction", 0.1, "--rollout.prompts_per_step", 2]
    + ["--training.steps", 8, "--distill.objective", "forward_kl"],
}
by_variant = pytest.mark.parametrize("name", VARIANTS)
PROMPTS = {"mixed": 4, "limited": 4, "rare": 2}
FRACTION = {"mixed": 0.5, "limited": 0.5, "rare": 0.1}
# Which tokens are probed depends on the packing.
PROBES = ("kl/reverse", "kl/forward", "policy/teacher_entropy", "policy/top_k_overlap") + (
    "policy/top_1_agreement",
)


def argv(world: World, name: str, out: str, *options: Any) -> list[str]:
    return world.argv(out, *MIXED, *VARIANTS[name], *options)


@pytest.fixture(scope="module")
def one(world: World) -> dict[str, Path]:
    for name in VARIANTS:
        assert train(argv(world, name, f"one-{name}")) == 0
    return {name: world.folder / f"one-{name}" for name in VARIANTS}


@pytest.fixture(scope="module")
def two(world: World) -> dict[str, Path]:
    train_on(2, [argv(world, name, f"two-{name}") for name in VARIANTS])
    return {name: world.folder / f"two-{name}" for name in VARIANTS}


def sampled(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["student_logprobs"] is not None]


@by_variant
def test_each_prompt_has_samples_or_the_data_sets_response(
    one: dict[str, Path], world: World, name: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer, sources = AutoTokenizer.from_pretrained(world.student), set()
    limit = 10 if name == "limited" else 16
    for step, rows in read_rollouts(one[name]).items():
        by_prompt: dict[int, list[Row]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt_index"], []).append(row)
        assert len(by_prompt) == PROMPTS[name]
        for index, group in by_prompt.items():
            ours = bool(split_on_policy([Prompt(index, "", (0,))], FRACTION[name], (SEED, step))[0])
            sources.add(ours)
            assert [row["sample_index"] for row in group] == ([0, 1] if ours else [0])
            for row in group:
                n = len(row["response_tokens"])
                assert len(row["teacher_logprobs"]) == len(row["advantages"]) == n
                assert (row["student_logprobs"] is not None) == ours
                assert not ours or len(row["student_logprobs"]) == n
            if not ours:
                sum_ = group[0]["prompt"].removeprefix("<user>What is ").split("?")[0]
                total = sum(map(int, sum_.split("+")))
                text = f"{sum_}={total}\n#### {total}"
                ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
                assert group[0]["response_tokens"] == ids[:limit]
                reason = "stop" if len(ids) <= limit else "length"
                assert group[0]["finish_reason"] == reason
    assert sources == {True, False}


def test_the_students_samples_are_those_of_a_purely_on_policy_step(
    one: dict[str, Path], world: World
) -> None:
    options = ["--rollout.on_policy_fraction", 1.0, "--training.steps", 1]
    assert train(argv(world, "mixed", "pure", *options)) == 0
    (rows,) = read_rollouts(world.folder / "pure").values()
    assert "rollout/on_policy_fraction" not in read_scalars(world.folder / "pure")
    # The rounding of log-probs depends on the batch of a token, so only tokens are compared.
    tokens = {(r["prompt_index"], r["sample_index"]): r["response_tokens"] for r in rows}
    all_rows = read_rollouts(one["mixed"])[1]
    # Samples and responses are in the batch's order, in which mini-batches are formed.
    order, same = (list(dict.fromkeys(r["prompt_index"] for r in x)) for x in (all_rows, rows))
    assert order == same
    mixed = sampled(all_rows)
    assert 0 < len(mixed) < len(rows)
    for row in mixed:
        assert row["response_tokens"] == tokens[row["prompt_index"], row["sample_index"]]


def test_the_loss_is_the_mean_over_all_tokens_of_both_sources(
    one: dict[str, Path], world: World
) -> None:
    student, teacher = load_hf(world.student), load_hf(world.teacher)
    total, tokens = 0.0, 0
    for row in read_rollouts(one["mixed"])[1]:
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        theirs = hf_logprobs(teacher, prompt, response)
        torch.testing.assert_close(torch.tensor(row["teacher_logprobs"]), theirs, rtol=0, atol=1e-4)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *response]])
            s, t = (
                m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student, teacher)
            )
        total += (s.exp() * (s - t)).sum().item()
        tokens += len(response)
    assert read_scalars(one["mixed"])["loss/policy"][1] == pytest.approx(total / tokens, rel=1e-4)


@by_variant
def test_rollout_scalars_are_of_the_students_samples_alone(one: dict[str, Path], name: str) -> None:
    scalars, without = read_scalars(one[name]), 0
    fraction = "rollout/on_policy_fraction"
    of_samples = ("rollout/", "kl/student", "throughput/rollout")
    own = [n for n in scalars if n.startswith(of_samples) and n != fraction]
    assert len(own) == 6 + 1 + 1 + 1
    for step, rows in read_rollouts(one[name]).items():
        ours = sampled(rows)
        value = {n: scalars[n].get(step) for n in scalars}
        assert value[fraction] == pytest.approx(len(ours) / len(rows))
        responses = sum(len(row["response_tokens"]) for row in rows)
        fed = responses + sum(len(row["prompt_tokens"]) - 1 for row in rows)
        work = {"teacher": fed, "update": fed, "step": responses}
        assert math.isfinite(value["loss/policy"]) and value["grad_norm"] > 0
        if not ours:
            without += 1
            assert not [n for n in own if value[n] is not None]
        else:
            lengths = [len(row["response_tokens"]) for row in ours]
            work["rollout"] = sum(lengths)
            assert value["rollout/response_tokens_mean"] == pytest.approx(sum(lengths) / len(ours))
            assert value["rollout/response_tokens_max"] == max(lengths)
            cut = sum(row["finish_reason"] == "length" for row in ours) / len(ours)
            assert value["rollout/truncated_fraction"] == pytest.approx(cut)
            student, teacher = (
                torch.tensor([x for row in ours for x in row[f"{who}_logprobs"]]).double()
                for who in ("student", "teacher")
            )
            mean = (student - teacher).mean().item()
            assert value["kl/student_teacher"] == pytest.approx(mean, abs=1e-5)
            gap = value["policy/logprob_gap_max"]  # none if only later updates have samples
            assert gap < 1e-4 if gap is not None else name == "limited"
        for phase, count in work.items():
            rate, seconds = value[f"throughput/{phase}(tok/s/gpu)"], value[f"time/{phase}(s)"]
            assert rate * seconds == pytest.approx(count, rel=1e-4), phase
    assert (without > 0) == (name == "rare")


def test_the_token_limit_counts_the_students_samples_alone(one: dict[str, Path]) -> None:
    found = []
    for rows in read_rollouts(one["limited"]).values():
        total = sum(len(row["response_tokens"]) for row in sampled(rows))
        assert total <= 20
        given = [row for row in rows if row["student_logprobs"] is None]
        assert all(len(row["response_tokens"]) == 10 for row in given)
        found.append(total)
    assert max(found) > 10


@pytest.mark.slow
@by_variant
def test_two_processes_give_the_same_run(
    one: dict[str, Path], two: dict[str, Path], name: str
) -> None:
    def responses(out: Path) -> list[tuple]:
        return [
            (row["step"], row["prompt_index"], row["response_tokens"], not row["student_logprobs"])
            for row in chain(*read_rollouts(out).values())
        ]

    assert responses(one[name]) == responses(two[name])
    first, second = (read_scalars(out[name], measured=False) for out in (one, two))
    assert first.keys() == second.keys()
    for scalar in first.keys() - {"policy/logprob_gap_max", *PROBES}:
        assert second[scalar] == pytest.approx(first[scalar], rel=1e-4, abs=1e-6), scalar


def test_a_resumed_run_draws_the_same(one: dict[str, Path], world: World) -> None:
    assert train(argv(world, "mixed", "resumed", "--training.steps", 2)) == 0
    assert train(argv(world, "mixed", "resumed")) == 0
    assert "Resumed" in read_log(world.folder / "resumed")
    assert_same_run(world.folder / "resumed", one["mixed"], 4)


def test_a_divergence_can_do_without_samples(world: World) -> None:
    options = ["--rollout.on_policy_fraction", 0.0, "--rollout.group_size", 1]
    assert train(argv(world, "mixed", "offline", *options)) == 0
    scalars = read_scalars(world.folder / "offline")
    assert not [name for name in scalars if name.startswith(("rollout/", "kl/student"))]
    losses = list(scalars["loss/policy"].values())
    assert losses[-1] < losses[0]
