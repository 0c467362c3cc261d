"""`rollout.on_policy_fraction` between 0 and 1: some prompts are the data set's to answer."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_student import one_process_group
from tiny_world import (
    World,
    assert_same_run,
    hf_logprobs,
    load_hf,
    make_world,
    own_output,
    read_log,
    read_rollouts,
    read_scalars,
    train,
    train_on,
    write_rows,
)

from opd_titan.config import JobConfig
from opd_titan.data.types import Prompt, Sample
from opd_titan.distributed.world import build_world
from opd_titan.observability.recorder import Recorder
from opd_titan.rollout.rollout import in_order, split_on_policy

SEED = 42  # the default of training.seed
Row = dict[str, Any]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, "", (0,)) for i in range(count)]


def chosen(count: int, fraction: float, *stream: int) -> set[int]:
    """The prompts, by index, that the student answers."""
    return {p.index for p in split_on_policy(prompts(count), fraction, stream)[0]}


# ------------------------------------------------------------- who answers what


def test_the_ends_leave_nothing_to_chance() -> None:
    everyone = prompts(1000)
    assert split_on_policy(everyone, 1.0, (0, 1)) == (everyone, [])
    assert split_on_policy(everyone, 0.0, (0, 1)) == ([], everyone)
    assert split_on_policy([], 0.5, (0, 1)) == ([], [])


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
def test_each_prompt_is_drawn_with_this_probability(fraction: float) -> None:
    n = 4000
    counts = [len(chosen(n, fraction, SEED, step)) for step in range(1, 21)]
    deviation = math.sqrt(fraction * (1 - fraction) * n)
    assert all(abs(c - fraction * n) < 4 * deviation for c in counts)
    assert abs(sum(counts) - fraction * n * 20) < 4 * deviation * math.sqrt(20)
    # A prompt comes back in every epoch: it must not be the same ones each time.
    steps = [chosen(n, fraction, SEED, step) for step in (1, 2)]
    both, share = len(steps[0] & steps[1]), fraction**2
    assert abs(both - share * n) < 4 * math.sqrt(share * (1 - share) * n) + 1


def test_the_draw_depends_on_seed_step_and_prompt_alone() -> None:
    first = chosen(500, 0.5, SEED, 7)
    assert first == chosen(500, 0.5, SEED, 7)
    assert len({frozenset(chosen(500, 0.5, *s)) for s in ((SEED, 7), (SEED, 8), (43, 7))}) == 3
    # Whatever else is in the batch, in whatever order; a larger fraction keeps who was in.
    some = prompts(500)[::-3]
    assert {p.index for p in split_on_policy(some, 0.5, (SEED, 7))[0]} == first & {p.index for p in some}
    assert first < chosen(500, 0.6, SEED, 7)


def test_samples_stand_in_the_order_of_the_prompts() -> None:
    batch = [Prompt(i, "", (0,)) for i in (7, 3, 5)]
    samples = [Sample(p, i, [1], "stop") for p in (batch[2], batch[0]) for i in (1, 0)]
    samples.append(Sample(batch[1], 0, [1], "stop"))
    found = [(s.prompt.index, s.sample_index) for s in in_order(samples, batch)]
    assert found == [(7, 0), (7, 1), (3, 0), (5, 0), (5, 1)]


# ------------------------------------------------------------------ whole runs

MIXED = ["--distill.objective", "reverse_kl", "--rollout.on_policy_fraction", 0.5]
MIXED += ["--rollout.max_new_tokens", 16, "--validation.enable", "False"]
VARIANTS: dict[str, list[Any]] = {
    "mixed": [],
    "limited": ["--distill.minibatches", 4, "--rollout.max_tokens_per_step", 20]
    + ["--distill.objective", "jsd", "--rollout.max_new_tokens", 10],
    # Of 2 prompts a step the student seldom has one: most of its rollouts are empty.
    "rare": ["--rollout.on_policy_fraction", 0.1, "--rollout.prompts_per_step", 2]
    + ["--training.steps", 8, "--distill.objective", "forward_kl"],
}
PROMPTS = {"mixed": 4, "limited": 4, "rare": 2}
# Of every n-th token of a micro-batch: which these are depends on the packing.
PROBES = ("kl/reverse", "kl/forward", "policy/teacher_entropy", "policy/top_k_overlap") + (
    "policy/top_1_agreement",
)
FRACTION = {"mixed": 0.5, "limited": 0.5, "rare": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


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


def is_ours(name: str, step: int, index: int) -> bool:
    return bool(split_on_policy([Prompt(index, "", (0,))], FRACTION[name], (SEED, step))[0])


@pytest.mark.parametrize("name", VARIANTS)
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
            ours = is_ours(name, step, index)
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
    # Log-probs round by the batch that a token is sampled in.
    tokens = {(r["prompt_index"], r["sample_index"]): r["response_tokens"] for r in rows}
    all_rows = read_rollouts(one["mixed"])[1]
    # Both sources stand in the batch's order: minibatches are cut from it.
    order, same = (list(dict.fromkeys(r["prompt_index"] for r in x)) for x in (all_rows, rows))
    assert order == same
    mixed = sampled(all_rows)
    assert 0 < len(mixed) < len(rows)
    for row in mixed:
        assert row["response_tokens"] == tokens[row["prompt_index"], row["sample_index"]]


def test_the_loss_is_the_mean_over_all_tokens_whoever_wrote_them(
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


@pytest.mark.parametrize("name", VARIANTS)
def test_rollout_scalars_are_of_the_students_samples_alone(one: dict[str, Path], name: str) -> None:
    scalars, without = read_scalars(one[name]), 0
    own = [n for n in scalars if n.startswith(("rollout/", "kl/student", "throughput/rollout"))]
    assert len(own) == 1 + 7 + 1 + 1
    for step, rows in read_rollouts(one[name]).items():
        ours = sampled(rows)
        value = {n: scalars[n].get(step) for n in scalars}
        assert value["rollout/on_policy_fraction"] == pytest.approx(len(ours) / len(rows))
        responses = sum(len(row["response_tokens"]) for row in rows)
        fed = responses + sum(len(row["prompt_tokens"]) - 1 for row in rows)
        work = {"teacher": fed, "update": fed, "step": responses}
        assert math.isfinite(value["loss/total"]) and value["grad_norm"] > 0
        if not ours:
            without += 1
            own.remove("rollout/on_policy_fraction")
            assert not [n for n in own if value[n] is not None]
            own.append("rollout/on_policy_fraction")
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
            gap = value["policy/logprob_gap_max"]  # none where only later updates are on them
            assert gap < 1e-4 if gap is not None else name == "limited"
        for phase, count in work.items():
            rate, seconds = value[f"throughput/{phase}(tok/s/gpu)"], value[f"time/{phase}(s)"]
            assert rate * seconds == pytest.approx(count, rel=1e-4), phase
    assert (without > 0) == (name == "rare")


def test_the_token_limit_is_one_of_the_students_samples(one: dict[str, Path]) -> None:
    found = []
    for rows in read_rollouts(one["limited"]).values():
        total = sum(len(row["response_tokens"]) for row in sampled(rows))
        assert total <= 20
        given = [row for row in rows if row["student_logprobs"] is None]
        assert all(len(row["response_tokens"]) == 10 for row in given)
        found.append(total)
    assert max(found) > 10


@pytest.mark.parametrize("name", VARIANTS)
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


def test_a_row_without_a_response_is_refused(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {i}?", "response": str(i)} for i in range(8)]
    del rows[5]["response"]
    write_rows(world.folder / "holes" / "train.jsonl", rows)
    options = ["--data.dataset", "prompts", "--data.path", world.folder / "holes"]
    assert train(argv(world, "mixed", "refused", *options)) == 2
    captured = capfd.readouterr()
    (line,) = own_output(captured.err).splitlines()
    assert "data.path" in line and "line 6: no response" in line
    assert "rollout.on_policy_fraction < 1" in line
    assert not (world.folder / "refused").exists()
    options += ["--rollout.on_policy_fraction", 1.0, "--training.steps", 1]
    assert train(argv(world, "mixed", "accepted", *options)) == 0


# ---------------------------------------------------------------- the recorder


def recorded(folder: str) -> dict[str, float]:
    """Scalars of a step: one sample without repetition, two of the data set with nothing else."""
    config = JobConfig()
    config.job.dump_folder = folder
    config.distill.objective, config.rollout.on_policy_fraction = "jsd", 0.5
    config.metrics.enable_tensorboard, config.metrics.sample_rollouts = False, 0
    recorder = Recorder(
        config,
        world=build_world(torch.device("cpu")),
        dtype=torch.float32,
        decode=lambda ids: "".join(map(chr, ids)),
        grade=lambda response, answer: None,
        forward_flops={"student": lambda lengths, projected: float(sum(lengths))},
        decode_bytes=lambda forwards, cached, size: float(forwards),
        start_step=0,
        total_steps=2,
    )
    ones = [Sample(p, 0, [ord("x")] * 200, "stop") for p in prompts(3)]
    own = ones[1]
    own.response_ids, own.student_logprobs = list(range(32, 127)), torch.zeros(95)
    for s in ones:
        s.advantages = s.teacher_logprobs = -torch.ones(len(s.response_ids))
    with recorder.clock.phase("rollout"):
        recorder.record(1, ones, {}, decode_forwards=95, preempted=0, seconds=1.0)
    return recorder.metrics.last


def test_what_the_data_set_says_does_not_count_as_the_students(tmp_path: Path) -> None:
    with one_process_group():
        found = recorded(str(tmp_path))
    assert found["rollout/repetition"] == 0.0
    assert found["rollout/on_policy_fraction"] == pytest.approx(1 / 3)
    assert found["kl/student_teacher"] == 1.0
