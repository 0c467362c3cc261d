"""The whole program on a tiny world: what a run leaves behind, and that its numbers are right."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import (
    World,
    hf_greedy,
    hf_logprobs,
    load_hf,
    make_gradable,
    make_model,
    make_world,
    read_log,
    read_rollouts,
    read_scalars,
    read_weights,
    rollout_bytes,
    start,
    train,
)

from opd_titan.grading.graders import GRADERS

ROW_KEYS = (
    "step prompt_index sample_index prompt response prompt_tokens response_tokens student_logprobs "
    "teacher_logprobs reference_logprobs advantages finish_reason answer correct "
    "data_set response_pieces student_ranks teacher_ranks reference_ranks teacher_top"
).split()
STEP_SCALARS = set(
    """
    loss/policy kl/student_teacher kl/p1 kl/p99 policy/entropy policy/clip_fraction
    policy/ratio_mean policy/logprob_gap_max kl_by_position/1-16 rollout/response_tokens_mean
    rollout/response_tokens_max rollout/truncated_fraction rollout/eos_fraction rollout/repetition
    rollout/idle_share rollout/preempted
    grad_norm skipped_updates lr
    time/data(s) time/rollout(s) time/teacher(s) time/reference(s)
    time/update(s) time/sync(s) time/step(s)
    throughput/rollout(tok/s/gpu) throughput/teacher(tok/s/gpu)
    throughput/update(tok/s/gpu) throughput/step(tok/s/gpu) memory/max_active(GiB)
    memory/max_reserved(GiB)
    """.split()
)
VALIDATION_SCALARS = {
    "validation/accuracy",
    "validation/accuracy_low",
    "validation/accuracy_high",
    "validation/teacher_accuracy",
    "validation/gap_recovered",
    "validation/response_tokens_mean",
    "time/validate(s)",
}

# Runs that must not depend on the token budget; `test_layouts` has several processes.
VARIANTS: dict[str, list[Any]] = {
    "plain": ["--validation.samples_per_prompt", 2, "--validation.temperature", 1.0],
    "clipped": ["--distill.minibatches", 2, "--reference.coef", 0.5, "--distill.clip_low", 0.01],
    "top_p": ["--rollout.top_p", 0.9, "--rollout.temperature", 0.8],
    "sft": ["--distill.objective", "sft", "--rollout.on_policy_fraction", 0.0]
    + ["--rollout.group_size", 1, "--rollout.max_new_tokens", 32],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    make_gradable(world, world.teacher)
    return world


def variant(world: World, name: str, out: str, *options: Any) -> list[str]:
    validation = [] if name == "plain" else ["--validation.enable", "False"]
    return world.argv(out, *validation, *VARIANTS[name], *options)


@pytest.fixture(scope="module")
def base(world: World) -> Path:
    """Run four steps as a user does, validated on answers that the models give."""
    argv = world.argv("base", "--validation.path", world.folder / "graded.jsonl")
    run = start([*argv, "--validation.max_prompts", "0", "--export.interval", "2"])
    assert run.wait() == 0
    return world.folder / "base"


@pytest.fixture(scope="module")
def one(world: World) -> dict[str, Path]:
    """Run every variant on one process."""
    for name in VARIANTS:
        assert train(variant(world, name, f"one-{name}")) == 0
    return {name: world.folder / f"one-{name}" for name in VARIANTS}


# ------------------------------------------------------------- what is left


def test_the_output_folder_is_the_contracts(base: Path) -> None:
    assert {p.name for p in base.iterdir()} == {
        "config.resolved.toml", "tb", "checkpoint", "hf", "rollouts", "logs"
    }  # fmt: skip
    assert len(list((base / "tb").iterdir())) == 1
    assert {p.name for p in (base / "checkpoint").iterdir()} == {"step-2", "step-4"}
    assert {p.name for p in (base / "hf").iterdir()} == {"step-2", "step-4", "latest"}
    assert (base / "hf" / "latest").readlink() == Path("step-4")  # relative: folders move
    assert {p.name for p in (base / "logs").iterdir()} == {"rank-0.log"}
    assert {p.name for p in (base / "rollouts").iterdir()} == {
        f"step-{n}.jsonl" for n in (1, 2, 3, 4)
    }


def test_every_scalar_of_the_design_is_there_at_every_step(base: Path) -> None:
    scalars = {n: v for n, v in read_scalars(base).items() if not n.startswith("charts/")}
    assert set(scalars) == STEP_SCALARS | VALIDATION_SCALARS | {"time/checkpoint(s)"}
    for name in STEP_SCALARS:
        assert list(scalars[name]) == [1, 2, 3, 4], name
        assert all(map(math.isfinite, scalars[name].values())), name
    for name in VALIDATION_SCALARS:
        assert list(scalars[name]) == [0, 2, 4], name
    assert list(scalars["time/checkpoint(s)"]) == [2, 4]
    for name in ("time/rollout(s)", "time/teacher(s)", "time/update(s)", "time/checkpoint(s)"):
        assert min(scalars[name].values()) > 0, name
    assert list(scalars["lr"].values()) == pytest.approx([1e-2] * 4)
    assert set(scalars["policy/ratio_mean"].values()) == {1.0}
    assert max(scalars["policy/logprob_gap_max"].values()) < 1e-4


def test_rollout_rows_have_the_contracts_keys_and_lengths(base: Path, world: World) -> None:
    reasons = set()
    for step, rows in read_rollouts(base).items():
        assert len(rows) == 8
        assert len({row["prompt_index"] for row in rows}) == 4
        assert [row["sample_index"] for row in rows] == [0, 1] * 4
        for row in rows:
            assert list(row) == ROW_KEYS
            assert row["step"] == step
            assert row["prompt"].startswith("<user>What is ")
            assert len(row["prompt_tokens"]) == len(row["prompt"])
            n = len(row["response_tokens"])
            for key in ("student_logprobs", "teacher_logprobs", "advantages"):
                assert len(row[key]) == n, key
            assert row["reference_logprobs"] is None
            stopped = row["response_tokens"][-1] in (1, 60)
            assert row["finish_reason"] == ("stop" if stopped else "length")
            assert stopped or n == 12
            assert not {1, 60} & set(row["response_tokens"][:-1])
            assert row["correct"] == GRADERS["auto"].score(row["response"], row["answer"])
            reasons.add(row["finish_reason"])
    assert reasons == {"stop", "length"}


def test_exports_load_in_transformers_as_they_stand(base: Path, world: World) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start_weights = load_hf(world.student).state_dict()
    for step in (2, 4):
        folder = base / "hf" / f"step-{step}"
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.generation_config.eos_token_id == [1, 60]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer("4+5=9")["input_ids"]) == "4+5=9"
        moved = [n for n, w in model.state_dict().items() if not torch.equal(w, start_weights[n])]
        assert len(moved) == len(start_weights)
        card = (folder / "README.md").read_text()
        assert f"| steps | {step} |" in card and "validation/accuracy" in card


def test_the_resolved_config_gives_the_same_run(base: Path, world: World) -> None:
    again = world.folder / "again"
    argv = ["--job.config_file", str(base / "config.resolved.toml")]
    assert train([*argv, "--job.dump_folder", str(again)]) == 0
    assert rollout_bytes(again) == rollout_bytes(base)
    assert read_scalars(again, measured=False) == read_scalars(base, measured=False)
    first, second = ((out / "config.resolved.toml").read_text() for out in (base, again))
    assert first.replace(str(base), str(again)) == second


# ---------------------------------------------------------- what is measured


def test_scalars_are_means_over_the_rollout_files_tokens(one: dict[str, Path]) -> None:
    for name in ("plain", "top_p"):
        scalars = read_scalars(one[name])
        for step, rows in read_rollouts(one[name]).items():
            student, teacher = (
                torch.tensor([x for row in rows for x in row[f"{who}_logprobs"]]).double()
                for who in ("student", "teacher")
            )
            mean = (student - teacher).mean().item()
            assert scalars["kl/student_teacher"][step] == pytest.approx(mean, abs=1e-5)
            lengths = [len(row["response_tokens"]) for row in rows]
            assert scalars["rollout/response_tokens_mean"][step] == pytest.approx(sum(lengths) / 8)
            assert scalars["rollout/response_tokens_max"][step] == max(lengths)
            cut = sum(row["finish_reason"] == "length" for row in rows) / 8
            assert scalars["rollout/truncated_fraction"][step] == pytest.approx(cut)
            assert scalars["rollout/eos_fraction"][step] == pytest.approx(1 - cut)


@pytest.mark.parametrize(("name", "coef"), [("plain", 0.0), ("clipped", 0.5), ("top_p", 0.0)])
def test_advantages_are_the_designs(one: dict[str, Path], name: str, coef: float) -> None:
    """In the second update of a step, they have the log-probs of a student that has moved."""
    for rows in read_rollouts(one[name]).values():
        exact = 0
        for row in rows:
            student, teacher, advantages = (
                torch.tensor(row[key])
                for key in ("student_logprobs", "teacher_logprobs", "advantages")
            )
            expected = -(student - teacher)
            assert (row["reference_logprobs"] is None) == (coef == 0.0)
            if coef:
                expected -= coef * (student - torch.tensor(row["reference_logprobs"]))
            exact += torch.allclose(advantages, expected, rtol=0, atol=2e-5)
        assert exact == (len(rows) // 2 if name == "clipped" else len(rows))


def test_log_probs_are_those_of_transformers(one: dict[str, Path], world: World) -> None:
    models = {"teacher": load_hf(world.teacher), "reference": load_hf(world.student)}
    for name, temperature in (("clipped", 1.0), ("top_p", 0.8)):
        for step, rows in read_rollouts(one[name]).items():
            for row in rows:
                ids = row["prompt_tokens"], row["response_tokens"]
                for who, model in models.items():
                    if row[f"{who}_logprobs"] is not None:
                        theirs = hf_logprobs(model, *ids, temperature)
                        ours = torch.tensor(row[f"{who}_logprobs"])
                        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
                if step == 1 and name == "clipped":  # the student still is what it was
                    theirs = hf_logprobs(models["reference"], *ids)
                    ours = torch.tensor(row["student_logprobs"])
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_clip_acts_on_later_minibatches(one: dict[str, Path]) -> None:
    scalars = read_scalars(one["clipped"])
    assert all(0 < v < 1 for v in scalars["policy/clip_fraction"].values())
    assert any(v != 1 for v in scalars["policy/ratio_mean"].values())
    assert list(scalars["kl/student_reference"]) == [1, 2, 3, 4]
    assert scalars["kl/student_reference"][1] == pytest.approx(0, abs=1e-5)
    assert scalars["kl/student_reference"][4] > 0.01


# -------------------------------------------------------- what it depends on


def assert_equivalent(a: Path, b: Path, *, on_policy: bool) -> None:
    """Assert the same tokens, and the same numbers up to fp32 rounding."""
    if on_policy:
        tokens = [
            [(row["step"], row["prompt_index"], row["response_tokens"]) for row in chain(*run)]
            for run in (read_rollouts(a).values(), read_rollouts(b).values())
        ]
        assert tokens[0] == tokens[1]
    first, second = (read_scalars(out, measured=False) for out in (a, b))
    assert first.keys() == second.keys()
    for name in first.keys() - {"policy/logprob_gap_max"}:
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", VARIANTS)
def test_the_token_budget_changes_no_number(one: dict[str, Path], world: World, name: str) -> None:
    argv = variant(world, name, f"tiny-{name}", "--training.max_tokens_per_microbatch", 50)
    assert train(argv) == 0
    assert_equivalent(one[name], world.folder / f"tiny-{name}", on_policy=name != "sft")


# --------------------------------------------------------------- validation


def test_validation_is_transformers_own_greedy_accuracy(base: Path, world: World) -> None:
    rows = [json.loads(line) for line in (world.folder / "graded.jsonl").read_text().splitlines()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.student)

    def accuracy(folder: Path) -> tuple[float, float]:
        model, right, tokens = load_hf(folder), 0, 0
        for row in rows:
            ids = tokenizer(f"<user>{row['question']}<assistant>()")["input_ids"]
            answer = hf_greedy(model, ids, 12)
            right += GRADERS["auto"].score(
                tokenizer.decode(answer), row["answer"].removeprefix("#### ")
            )
            tokens += len(answer)
        return right / len(rows), tokens / len(rows)

    scalars = read_scalars(base)
    first, teacher = accuracy(world.student)[0], accuracy(world.teacher)[0]
    assert 0 < first < teacher
    for step, folder in ((0, world.student), (2, base / "hf/step-2"), (4, base / "hf/step-4")):
        right, tokens = accuracy(folder)
        assert scalars["validation/accuracy"][step] == pytest.approx(right)
        assert scalars["validation/response_tokens_mean"][step] == pytest.approx(tokens)
        gap = (right - first) / (teacher - first)
        assert scalars["validation/gap_recovered"][step] == pytest.approx(gap)
    assert list(scalars["validation/teacher_accuracy"].values()) == pytest.approx([teacher] * 3)


# ---------------------------------------------------------------------- sft


def test_sft_is_cross_entropy_on_the_data_sets_responses(world: World) -> None:
    options = [*VARIANTS["sft"], "--teacher.hf_path=", "--rollout.prompts_per_step", 22]
    options += ["--training.steps", 12, "--export.dtype", "bfloat16", "--validation.interval", 0]
    assert train(world.argv("sft", *options)) == 0
    out = world.folder / "sft"
    loss = list(read_scalars(out)["loss/policy"].values())

    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(world.student), load_hf(world.student)
    total, count = 0.0, 0
    for line in (world.folder / "data" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"<user>{row['question']}<assistant>()")["input_ids"]
        response = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        total -= hf_logprobs(model, prompt, response).sum().item()
        count += len(response)
    assert loss[0] == pytest.approx(total / count, rel=1e-4)
    assert loss[-1] < 0.6 * loss[0]

    assert not (out / "rollouts").exists()
    scalars = read_scalars(out)
    assert list(scalars["validation/accuracy"]) == [0, 12]
    assert not [name for name in scalars if name.startswith(("kl/", "rollout/", "throughput/t"))]
    assert {w.dtype for w in read_weights(out, 12).values()} == {torch.bfloat16}
    assert load_hf(out / "hf" / "step-12").config.dtype == torch.float32  # asked for by load_hf
    config = json.loads((out / "hf" / "step-12" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


# ---------------------------------------------------------------- switches


def test_epochs_traces_and_records_that_are_off(world: World) -> None:
    options = ["--training.epochs", 2, "--rollout.prompts_per_step", 10, "--training.steps", 99]
    options += ["--profiling.enable", "--profiling.interval", 2, "--metrics.sample_rollouts", 3]
    options += ["--metrics.enable_tensorboard", "False", "--validation.enable", "False"]
    options += ["--checkpoint.enable", "False"]
    assert train(world.argv("epochs", *options)) == 0
    out = world.folder / "epochs"
    rows = read_rollouts(out)
    assert list(rows) == [1, 2, 3, 4]  # 2 x floor(22 / 10)
    assert [len(step) for step in rows.values()] == [3] * 4
    assert {p.name for p in out.iterdir()} == {
        "config.resolved.toml", "hf", "rollouts", "logs", "profile"
    }  # fmt: skip
    assert {p.name for p in (out / "profile").iterdir()} == {"step-2", "step-4"}
    assert (out / "profile" / "step-4" / "rank-0.json.gz").stat().st_size > 1000
    assert (out / "hf" / "step-4" / "model.safetensors").is_file()


def test_another_end_token_is_a_warning_and_the_run_goes_on(world: World) -> None:
    make_model(world.folder / "other-end", seed=2, eos_ids=[1])
    options = ["--teacher.hf_path", world.folder / "other-end", "--training.steps", 1]
    assert train(world.argv("ends", *options, "--validation.enable", "False")) == 0
    log = read_log(world.folder / "ends")
    (warning,) = [line for line in log.splitlines() if "WARNING" in line]
    assert "student ends with 1 ('<eos>'), 60" in warning
    assert "teacher ends with 1 ('<eos>')" in warning
    assert "Self-check: student as its own teacher: KL " in log
