"""Updates by every objective: the same for any number of micro-batches and ranks, and whole runs.

`test_vocabulary_objectives` checks the head's arithmetic; here it is in its place.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from distributed_utils import run_distributed
from test_vocabulary_objectives import REF, Case
from tiny_rollout import CPU, FAMILY, tiny
from tiny_student import LargestTensor, one_process_group, random_samples
from tiny_world import (
    World,
    load_hf,
    make_model,
    make_world,
    read_rollouts,
    read_scalars,
    train,
    train_on,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd_titan.data.types import Sample
from opd_titan.distill import head as head_module
from opd_titan.distill.packing import Minibatch, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distributed import world as worlds
from opd_titan.models.logits import Distribution

CASES = [
    Case("policy_gradient"),
    Case("policy_gradient", {"baseline": "kl", "true_ratio": True, **REF}),
    Case("policy_gradient", {"baseline": "top_k", "true_ratio": True}),
    Case("reverse_kl", REF),
    Case("forward_kl"),
    Case("jsd", {"beta": 0.3, **REF}),
    Case("top_k_reverse_kl"),
    Case("top_k_forward_kl", REF),
]
each_case = pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: str(CASES[i]))
SIZES: dict[str, dict[str, Any]] = {
    "student": dict(vocab_size=64, tied=True),
    "teacher": dict(seed=1, vocab_size=64, dim=48, n_layers=3),
    "reference": dict(seed=2, vocab_size=64, tied=True),
}
TEMPERATURE = Distribution(0.9)
# data_parallel_replicate_degree, data_parallel_shard_degree, tensor_parallel_degree
LAYOUTS = {"fsdp": (1, 2, 1), "ddp": (2, 1, 1), "tp": (1, 1, 2)}


def some_samples() -> list[Sample]:
    lengths = [(3, 5), (1, 9), (6, 12), (4, 1), (2, 17)]
    samples = random_samples(lengths, vocab=60, noise=0.5)
    for s in samples:
        s.student_logprobs = s.student_logprobs - 2.0
        s.teacher_logprobs = s.reference_logprobs = None
    return samples


def one_step(world: worlds.World, case: Case, max_tokens: int) -> dict[str, Any]:
    """Two updates from two models' scores; what they leave behind on this rank."""
    roles = ["student", "teacher"] + ["reference"] * (case.chosen.reference_coef != 0.0)
    models = {role: tiny(**SIZES[role]) for role in roles}
    models["student"].requires_grad_(True)
    for model in models.values():
        FAMILY.parallelize(model, world, torch.float32)
    student, samples = models.pop("student"), some_samples()
    plan = plan_minibatches(samples, 3, max_tokens, world.dp)
    mine = own(plan)
    scored = {}
    for role, model in models.items():
        for s, logprobs in score(model, plan, TEMPERATURE, world):
            scored[s.prompt.index, role] = logprobs
        for s, values in score(model, plan, TEMPERATURE, world, keep_hidden=case.exact):
            setattr(s, f"{role}_hidden" if case.exact else f"{role}_logprobs", values)
    rule = UpdateRule(case.objective, case.chosen, TEMPERATURE, max_grad_norm=5.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    frozen = models if case.exact else {}
    metrics = update(student, optimizer, plan, rule, world, frozen=frozen).scalars
    held = [local(p).numel() for m in models.values() for p in m.parameters()]
    return {
        "weights": {n: whole(p.detach()).clone() for n, p in student.named_parameters()},
        "metrics": metrics,
        "advantages": {s.prompt.index: s.advantages for s in mine},
        "scored": scored,
        "filled": {
            (s.prompt.index, role): getattr(s, f"{role}_logprobs") for s in mine for role in models
        },
        "freed": all(s.teacher_hidden is None and s.reference_hidden is None for s in mine),
        "stood_in": any(not m for minibatch in plan for m in minibatch.microbatches),
        "held": sum(held),
    }


def own(plan: list[Minibatch]) -> list[Sample]:
    return [s for minibatch in plan for m in minibatch.microbatches for s in m]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_two_ranks() -> dict[str, list[dict[str, Any]]]:
    head_module.CHUNK_BYTES = {"cpu": 5 * 4 * 64}  # a few rows
    found = {}
    for name, layout in LAYOUTS.items():
        world = worlds.build_world(CPU, *layout)
        found[name] = [one_step(world, case, 1 << 10) for case in CASES]
    return found


@cache
def alone(i: int, max_tokens: int) -> dict[str, Any]:
    with one_process_group():
        return one_step(worlds.build_world(CPU), CASES[i], max_tokens)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[dict[str, Any]]]]:
    return run_distributed(on_two_ranks, 2)


def assert_same_update(mine: dict[str, Any], truth: dict[str, Any]) -> None:
    start = dict(tiny(**SIZES["student"]).named_parameters())
    for name, weight in truth["weights"].items():
        moved = (weight - start[name]).norm()
        assert moved > 1e-4, name
        assert (mine["weights"][name] - weight).norm() <= 2e-4 * moved, name
    assert mine["metrics"].keys() == truth["metrics"].keys()
    # The probe looks at other tokens where they are dealt out otherwise.
    probed = {n for n in truth["metrics"] if n.startswith(("kl/", "policy/t"))}
    for name in truth["metrics"].keys() - probed:
        expected = pytest.approx(truth["metrics"][name], rel=1e-4, abs=2e-5)
        assert mine["metrics"][name] == expected, name


@each_case
def test_any_number_of_microbatches_is_the_same_update(i: int) -> None:
    truth = alone(i, 1 << 10)
    for max_tokens in (1, 20):
        assert_same_update(alone(i, max_tokens), truth)


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_ranks_is_the_same_update(ranks: list[Any], layout: str, i: int) -> None:
    truth = alone(i, 1 << 10)
    results = [rank[layout][i] for rank in ranks]
    for result in results:
        assert_same_update(result, truth)
        assert result["metrics"] == results[0]["metrics"]  # on every rank, names and values
    advantages = {k: v for result in results for k, v in result["advantages"].items()}
    assert advantages.keys() == truth["advantages"].keys()
    for index, values in truth["advantages"].items():
        torch.testing.assert_close(advantages[index], values, rtol=1e-4, atol=1e-4)
    if layout != "tp":  # one update has a single sample
        assert any(result["stood_in"] for result in results)


@each_case
def test_hidden_states_are_used_up_and_log_probs_are_in_their_place(
    ranks: list[Any], i: int
) -> None:
    results = [alone(i, 20), *(rank[layout][i] for rank in ranks for layout in LAYOUTS)]
    for result in results:
        assert result["freed"]
        assert len(result["filled"]) > 0
        for key, logprobs in result["filled"].items():
            assert logprobs.dtype == torch.float32 and logprobs.device == CPU
            torch.testing.assert_close(logprobs, result["scored"][key], rtol=0, atol=2e-6)
    # FSDP's ranks have given up what they gathered of the frozen models.
    for rank in ranks:
        assert rank["fsdp"][i]["held"] == alone(i, 20)["held"] / 2


@each_case
def test_the_probe_is_of_an_eighth_of_the_tokens(ranks: list[Any], i: int) -> None:
    names = {
        "kl/reverse", "kl/forward", "policy/teacher_entropy", "policy/top_k_overlap",
        "policy/top_1_agreement",
    }  # fmt: skip
    for result in (alone(i, 20), *(rank["fsdp"][i] for rank in ranks)):
        found = {n: result["metrics"][n] for n in names & result["metrics"].keys()}
        assert found.keys() == (names if CASES[i].exact else set())
        assert all(math.isfinite(v) and v >= 0.0 for v in found.values())


@pytest.mark.parametrize("responses", [(20, 70, 30), (120, 70, 30), (320, 270, 300)], ids=sum)
def test_no_tensor_grows_with_tokens_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch, responses: tuple[int, ...]
) -> None:
    vocab, rows = 3000, 20
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": rows * vocab * 4})
    case = Case("reverse_kl", REF)
    samples = random_samples([(6, n) for n in responses], vocab)
    student, teacher, reference = (
        tiny(seed=n, vocab_size=vocab, n_layers=1, tied=True) for n in range(3)
    )
    student.requires_grad_(True)
    with one_process_group():
        world = worlds.build_world(CPU)
        models = {"teacher": teacher, "reference": reference}
        for model in (student, *models.values()):
            FAMILY.parallelize(model, world, torch.float32)
        plan = plan_minibatches(samples, 1, 1 << 20, world.dp)
        rule = UpdateRule(case.objective, case.chosen, TEMPERATURE, 1.0)
        with LargestTensor() as scoring:
            for role, model in models.items():
                for s, hidden in score(model, plan, TEMPERATURE, world, keep_hidden=True):
                    setattr(s, f"{role}_hidden", hidden)
        with LargestTensor() as plain:
            score(teacher, plan, TEMPERATURE, world)
        optimizer = torch.optim.AdamW(student.parameters())
        with LargestTensor() as updating:
            update(student, optimizer, plan, rule, world, frozen=models)
    weight = vocab * student.args.dim
    rest = 2 * student.args.dim  # FSDP keeps the last norm in one tensor with the head
    assert rows * vocab < weight <= updating.numel <= weight + rest
    assert max(scoring.numel, plain.numel) == weight
    tokens = sum(responses)
    assert sum(s.teacher_logprobs.numel() for s in samples) == tokens
    assert weight < tokens * vocab / 3


# ---------------------------------------------------------------- whole runs

RUNS: dict[str, str] = {
    "pg-kl": "--distill.baseline kl --distill.minibatches 2 --reference.coef 0.5",
    "pg-top_k": "--distill.baseline top_k --distill.reward_power 0.5",
    "reverse_kl": "--distill.objective reverse_kl --reference.coef 0.5",
    "forward_kl": "--distill.objective forward_kl --distill.minibatches 2",
    "jsd": "--distill.objective jsd --distill.beta 0.3 --rollout.temperature 0.8",
    "top_k_reverse_kl": "--distill.objective top_k_reverse_kl --distill.top_k 4",
    "top_k_forward_kl": "--distill.objective top_k_forward_kl --reference.coef 0.2",
    # A teacher, or a student, with more rows than there are tokens.
    "padded-pg": "--teacher.hf_path {folder}/padded",
    "padded-reverse_kl": "--distill.objective reverse_kl --teacher.hf_path {folder}/padded",
    "padded-student": """--distill.objective reverse_kl --student.hf_path {folder}/padded
        --teacher.hf_path {folder}/student""",
}
STEPS = 2
TOKENS = 98  # that the tokenizer has


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world.folder / "padded", seed=7, vocab_size=112, hidden_size=40)
    return world


def arguments(world: World, name: str, *more: Any) -> list[str]:
    options = RUNS[name].format(folder=world.folder).split()
    short = ["--training.steps", STEPS, "--validation.enable", "False"]
    short += ["--checkpoint.enable", "False", "--rollout.max_new_tokens", 10]
    return world.argv(name, *short, *options, *more)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_every_objective(world: World, name: str) -> None:
    assert train(arguments(world, name)) == 0
    out = world.folder / name
    scalars = read_scalars(out)
    wanted = {"loss/policy", "grad_norm", "kl/student_teacher", "policy/entropy"}
    if name != "padded-pg":
        wanted |= {"kl/reverse", "kl/forward", "policy/teacher_entropy", "policy/top_k_overlap"}
    if "--reference.coef" in RUNS[name]:
        wanted |= {"kl/student_reference"}
    for scalar in wanted:
        assert list(scalars[scalar]) == [1, 2], scalar
        assert all(map(math.isfinite, scalars[scalar].values())), scalar
    assert min(scalars["grad_norm"].values()) > 0
    assert ("policy/clip_fraction" in scalars) == name.startswith(("pg", "padded-pg"))
    assert max(scalars["policy/logprob_gap_max"].values()) < 1e-4
    if "kl/reverse" in wanted:
        assert min(scalars["kl/reverse"].values()) > 0.01
        assert max(scalars["policy/top_k_overlap"].values()) <= 1
    folder = "student" if name == "padded-student" else "padded" if "padded" in name else "teacher"
    teacher = load_hf(world.folder / folder)
    plain = "minibatches" not in RUNS[name] and not name.startswith(("pg", "padded-pg"))
    for rows in read_rollouts(out).values():
        assert len(rows) == 8
        for row in rows:
            check_row(row, "--reference.coef" in RUNS[name], plain)
        check_teacher(rows[0], teacher, 0.8 if name == "jsd" else 1.0)


def check_row(row: dict[str, Any], has_reference: bool, plain: bool) -> None:
    """
    Args:
        plain: the student has not moved since the rollout, and there is no baseline.
    """
    n = len(row["response_tokens"])
    assert max(row["response_tokens"]) < TOKENS
    assert (row["reference_logprobs"] is not None) == has_reference
    keys = ["student_logprobs", "teacher_logprobs", "advantages"]
    for key in [*keys, "reference_logprobs"][: 3 + has_reference]:
        assert len(row[key]) == n and all(map(math.isfinite, row[key])), key
    if plain and not has_reference:  # what the policy gradient's would have been
        student, teacher, advantages = (torch.tensor(row[key]) for key in keys)
        torch.testing.assert_close(advantages, teacher - student, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def check_teacher(row: dict[str, Any], teacher: Any, temperature: float) -> None:
    """Its log-probs are transformers', over the tokens that there are."""
    prompt, response = row["prompt_tokens"], row["response_tokens"]
    logits_TV = teacher(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :TOKENS]
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)
    theirs = logprobs_TV[torch.arange(len(response)), torch.tensor(response)]
    ours = torch.tensor(row["teacher_logprobs"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_ranks_do_not_split_vocabularies_of_different_sizes(world: World) -> None:
    tp = ["--parallelism.data_parallel_shard_degree", 1, "--parallelism.tensor_parallel_degree", 2]
    names = [name for name in RUNS if "padded" in name]
    jobs = [arguments(world, name, "--job.dump_folder", world.folder / "tp", *tp) for name in names]
    train_on(2, jobs, [2] * len(jobs), stderr=world.folder / "stderr")
    lines = (world.folder / "stderr").read_text().splitlines()
    said = [line for line in lines if line.startswith("opd_titan: ")]
    assert len(said) == 2 * len(jobs) and not any("Traceback" in line for line in lines)
    for line in said:
        assert "teacher.hf_path: vocab_size is " in line and "tensor_parallel_degree = 2" in line
        assert "112" in line and f"{TOKENS}" in line and "wanted 1 there, or equal sizes" in line
    assert not (world.folder / "tp").exists()
