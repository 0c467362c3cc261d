"""Several teachers and data sets: which teacher scores which set, and what is reported."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layouts import assert_same_rollouts, assert_same_weights
from tiny_plan import H200, resolved
from tiny_world import (
    World,
    assert_same_run,
    evaluate,
    hf_greedy,
    hf_logprobs,
    load_hf,
    make_gradable,
    make_model,
    make_sums,
    read_log,
    read_rollouts,
    read_scalars,
    train,
    train_on,
    write_rows,
)
from transformers import AutoTokenizer

from opd_titan.config import load_config
from opd_titan.config.resolve import resolve
from opd_titan.grading.answers import extract_answer
from opd_titan.plan.estimate import estimate
from opd_titan.plan.simulate import simulate
from opd_titan.training.fingerprint import differences, fingerprint
from opd_titan.training.sources import inspect_models

pytestmark = pytest.mark.slow  # worlds of two processes

RECIPE = """
[student]
hf_path = "{folder}/student"
[[teacher]]
name = "small"
hf_path = "{folder}/teacher"
[[teacher]]
name = "large"
hf_path = "{folder}/large"
[[data]]
name = "sums"
path = "{folder}/sums"
weight = 2.0
teacher = "small"
[[data]]
name = "words"
dataset = "prompts"
path = "{folder}/words"
teacher = "large"
[rollout]
prompts_per_step = 6
group_size = 2
max_new_tokens = 12
[optimizer]
lr = 2e-3
[training]
steps = 4
max_tokens_per_microbatch = 96
[checkpoint]
interval = 2
keep_latest_k = 0
[validation]
interval = 2
[metrics]
sample_rollouts = -1
"""
TEACHERS = {"sums": "teacher", "words": "large"}  # by set, the folder
TAUGHT_BY = {"sums": "small", "words": "large"}
KINDS = {"sums": "gsm8k", "words": "prompts"}
GRADES = ["--validation.enable", "false"]
RUNS: dict[str, list[Any]] = {
    "sampled": ["--reference.coef", 0.5, "--distill.minibatches", 2, *GRADES],
    "exact": ["--distill.objective", "reverse_kl", *GRADES],
    # A step has a response of one of the teachers, and one of the ranks has none.
    "scarce": ["--rollout.prompts_per_step", 1, "--rollout.group_size", 1, *GRADES],
    # Half of the prompts are answered by their data set.
    "mixed": ["--distill.objective", "jsd", "--rollout.on_policy_fraction", 0.5, *GRADES]
    + ["--reference.coef", 0.5],
}
OFFLOAD = ["--teacher.cpu_offload", "true", "--optimizer.cpu_offload", "true"]
OFFLOAD += ["--reference.cpu_offload", "true"]
TP = ["--parallelism.tensor_parallel_degree", 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Most validation answers of a set are those of its own teacher."""
    world = World(tmp_path_factory.mktemp("teachers"))
    make_model(world.student, seed=1)
    make_model(world.teacher, seed=2)
    make_model(world.folder / "large", seed=3, hidden_size=48, num_hidden_layers=3)
    for name, teacher in TEACHERS.items():
        make_sums(world.folder / "data" / "test.jsonl", 8, seed=len(name))
        make_gradable(world, world.folder / teacher)
        (world.folder / name).mkdir()
        shutil.move(world.folder / "graded.jsonl", world.folder / name / "test.jsonl")
    make_sums(world.folder / "sums" / "train.jsonl", 11, seed=1)
    words = [{"prompt": f"Say {n}.", "response": f"{n} + {n}"} for n in range(7)]
    write_rows(world.folder / "words" / "train.jsonl", words)
    rows = (world.folder / "words" / "test.jsonl").read_text().splitlines()
    as_prompts = [
        {"prompt": row["question"], "answer": row["answer"].removeprefix("#### ")}
        for row in map(json.loads, rows)
    ]
    write_rows(world.folder / "words" / "test.jsonl", as_prompts)
    world.recipe.write_text(RECIPE.format(folder=world.folder))
    return world


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """Run each on one process, on two, and one also with tensor parallelism."""
    for name, options in RUNS.items():
        assert train(world.argv(f"{name}-1", *options)) == 0
    as_of_step_2(world, "sampled-1", "moved")
    both = [world.argv(f"{name}-2", *options) for name, options in RUNS.items()]
    both += [world.argv("exact-tp", *RUNS["exact"], *TP), world.argv("moved", *RUNS["sampled"])]
    train_on(2, both)
    return world


def as_of_step_2(world: World, run: str, copy: str) -> None:
    """Copy the run as it was after its second step."""
    shutil.copytree(
        world.folder / run, world.folder / copy, ignore=shutil.ignore_patterns("hf", "step-4")
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    return list(chain(*read_rollouts(out).values()))


def test_each_response_is_scored_by_its_sets_teacher(runs: World) -> None:
    models = {name: load_hf(runs.folder / folder) for name, folder in TEACHERS.items()}
    for name in ("sampled-1", "sampled-2", "exact-1", "mixed-1"):
        rows = rows_of(runs.folder / name)
        assert {row["data_set"] for row in rows} == {"sums", "words"}
        for row in rows:
            assert row["prompt"].startswith(
                "<user>" + {"sums": "What", "words": "Say"}[row["data_set"]]
            )
            tokens = row["prompt_tokens"], row["response_tokens"]
            expected = hf_logprobs(models[row["data_set"]], *tokens)
            assert row["teacher_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_exact_loss_and_gradient_are_those_of_each_sets_own_teacher(runs: World) -> None:
    student = load_hf(runs.student)
    models = {name: load_hf(runs.folder / folder) for name, folder in TEACHERS.items()}
    total, tokens = torch.zeros(()), 0
    for row in read_rollouts(runs.folder / "exact-1")[1]:
        ids = torch.tensor([row["prompt_tokens"] + row["response_tokens"]])
        at = slice(len(row["prompt_tokens"]) - 1, -1)
        mine = student(ids).logits[0, at].log_softmax(-1)
        with torch.no_grad():
            other = models[row["data_set"]](ids).logits[0, at].log_softmax(-1)
        total = total + (mine.exp() * (mine - other)).sum()
        tokens += len(row["response_tokens"])
    loss = total / tokens
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    for out in ("exact-1", "exact-2", "exact-tp"):
        scalars = read_scalars(runs.folder / out)
        assert scalars["loss/policy"][1] == pytest.approx(loss.item(), rel=1e-4)
        assert scalars["grad_norm"][1] == pytest.approx(norm.item(), rel=1e-3)


@pytest.mark.parametrize("name", [*RUNS, "tp"])
def test_any_number_of_processes_is_the_same_run(runs: World, name: str) -> None:
    one, many = (f"{name}-1", f"{name}-2") if name != "tp" else ("exact-1", "exact-tp")
    assert_same_rollouts(runs.folder / many, runs.folder / one)
    assert_same_weights(runs.folder / many, runs.folder / one, 4)


def test_a_run_goes_on_in_another_world(runs: World) -> None:
    """It resumes on two processes, in the middle of an epoch of both sets."""
    assert "Resumed from" in read_log(runs.folder / "moved")
    assert_same_rollouts(runs.folder / "moved", runs.folder / "sampled-1")
    assert_same_weights(runs.folder / "moved", runs.folder / "sampled-1", 4)


def test_teachers_on_the_host_make_the_same_run(runs: World) -> None:
    assert train(runs.argv("offloaded", *RUNS["sampled"], *OFFLOAD)) == 0
    assert_same_run(runs.folder / "offloaded", runs.folder / "sampled-1", 4)


def test_each_set_answers_its_own_prompts_where_the_student_does_not(runs: World) -> None:
    answered = {name: 0 for name in TEACHERS}
    for row in rows_of(runs.folder / "mixed-1"):
        if row["student_logprobs"] is None:
            answered[row["data_set"]] += 1
            assert row["response"][0] == re.search(r"\d", row["prompt"])[0]
    assert min(answered.values()) > 0


def test_sets_have_their_shares_and_their_own_figures(runs: World) -> None:
    out = runs.folder / "sampled-2"
    scalars = read_scalars(out)
    for step, rows in read_rollouts(out).items():
        sums = []
        for name, share in (("sums", 2 / 3), ("words", 1 / 3)):
            own = [row for row in rows if row["data_set"] == name]
            lengths = [len(row["response_tokens"]) for row in own]
            gaps = [
                s - t
                for row in own
                for s, t in zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)
            ]
            found = {key: scalars[f"data/{name}/{key}"][step] for key in FIGURES}
            assert found == pytest.approx(
                {
                    "share": share,
                    "response_tokens_mean": sum(lengths) / len(own),
                    "truncated_fraction": sum(r["finish_reason"] == "length" for r in own)
                    / len(own),
                    "kl_student_teacher": sum(gaps) / len(gaps),
                },
                rel=1e-5,
                abs=1e-6,
            )
            sums += gaps
        assert scalars["kl/student_teacher"][step] == pytest.approx(sum(sums) / len(sums), rel=1e-5)


FIGURES = ("share", "response_tokens_mean", "truncated_fraction", "kl_student_teacher")


def test_each_set_is_validated_against_its_own_teacher(world: World) -> None:
    assert train(world.argv("graded")) == 0
    as_of_step_2(world, "graded", "resumed")
    assert train(world.argv("resumed")) == 0
    assert_same_run(world.folder / "resumed", world.folder / "graded", 4)
    scalars, tokenizer = (
        read_scalars(world.folder / "graded"),
        AutoTokenizer.from_pretrained(world.student),
    )
    for name, folder in TEACHERS.items():
        model, right = load_hf(world.folder / folder), []
        for line in (world.folder / name / "test.jsonl").read_text().splitlines():
            row = json.loads(line)
            asked = f"<user>{row.get('question') or row['prompt']}<assistant>()"
            ids = hf_greedy(model, tokenizer(asked)["input_ids"], 12)
            answer = row["answer"].removeprefix("#### ")
            right.append(extract_answer(tokenizer.decode(ids)) == answer)
        assert 0 < sum(right) < len(right)
        expected = pytest.approx(sum(right) / len(right))
        assert scalars[f"validation/{name}/teacher_accuracy"][4] == expected
        assert accuracy_of("teacher." + TAUGHT_BY[name], name, world) == expected
    log = read_log(world.folder / "graded")
    assert "Data sums: " in log and "67% of each step, scored by teacher.small" in log
    card = (world.folder / "graded" / "hf" / "step-4" / "README.md").read_text()
    assert f"small: {world.teacher}, large: {world.folder / 'large'}" in card


def accuracy_of(model: str, name: str, world: World) -> float:
    """Return the model's accuracy on one set, measured by `evaluate`."""
    folder = world.folder / f"evaluation-{name}"
    only = f"[{{name = 'a', path = '{world.folder / name}', dataset = '{KINDS[name]}'}}]"
    argv = world.argv("evaluated", "--evaluate.model", model, "--evaluate.folder", folder)
    assert evaluate([*argv, "--validation.sets", only]) == 0
    return json.loads((folder / "results.json").read_text())["accuracy"]


def test_a_teacher_that_is_not_there_is_not_graded(world: World, capsys: Any) -> None:
    for name in ("teacher", "teacher.smal"):
        assert evaluate(world.argv("evaluated", "--evaluate.model", name)) == 2
        told = f'[evaluate] model: "{name}" is not one of the teachers; wanted teacher.small or'
        assert told in capsys.readouterr().err


def test_a_change_of_weights_or_teachers_is_another_job(world: World, capsys: Any) -> None:
    argv = world.argv("changed", *GRADES, "--training.steps", 1)
    assert train(argv) == 0
    text = world.recipe.read_text()
    changes = {
        text.replace("weight = 2.0", "weight = 1.0"): "data.sets.weight was sums 2, words 1",
        text.replace('teacher = "small"', 'teacher = "large"', 1).replace(
            'words"\nteacher = "large"', 'words"\nteacher = "small"'
        ): "scored by teacher.small and is",
    }
    for recipe, told in changes.items():
        (world.folder / "other.toml").write_text(recipe)
        assert train([argv[0], str(world.folder / "other.toml"), *argv[2:]]) == 2
        assert told in capsys.readouterr().err


def test_random_teachers_in_another_order_are_another_job(world: World) -> None:
    """A random teacher's seed is its place in the list."""
    rows = [f"{{name = '{n}', hf_path = '{world.teacher}'}}" for n in ("small", "large")]
    found = []
    for models in (rows, rows[::-1]):
        listed = ["--teacher.models", f"[{', '.join(models)}]", "--teacher.random_init"]
        config = load_config([str(word) for word in world.argv("order", *listed)])
        job = resolve(config, "cpu", 1)
        found.append(fingerprint(job, inspect_models(job), {"sums": (0, ""), "words": (0, "")}))
    assert set(differences(*found)) == {"teacher.small.hf_path", "teacher.large.hf_path"}


def test_a_plan_holds_all_teachers_and_asks_each_its_own(world: World) -> None:
    """Compare with plans for each teacher alone: weights add up, work is divided."""
    cluster = replace(H200, world_size=1)
    found, jobs = {}, []
    for name in ("teacher", "large"):
        argv = ["--student.hf_path", world.student, "--teacher.hf_path", world.folder / name]
        argv += ["--rollout.prompts_per_step", 6, "--rollout.group_size", 2]
        argv += ["--training.max_tokens_per_microbatch", 96, "--rollout.max_new_tokens", 12]
        jobs.append(resolved(load_config([str(word) for word in argv]), cluster))
        found[name] = simulate(jobs[-1], cluster, 16, 12)
    jobs.append(resolved(load_config(world.argv("plan")), cluster))
    both = simulate(jobs[-1], cluster, 16, 12)
    one, other = (found[name].weights["teacher"] for name in ("teacher", "large"))
    assert both.weights["teacher.small"] == one < both.weights["teacher.large"] == other
    simulations = zip(jobs, (*found.values(), both), strict=True)
    flops = [estimate(job, cluster, s).flops["teacher"] for job, s in simulations]
    assert flops[2] == pytest.approx(flops[0] * 2 / 3 + flops[1] / 3)
    for role in ("teacher.small", "teacher.large"):
        assert {s.prompt.teacher for m in both.microbatches(role) for s in m} == {role}
