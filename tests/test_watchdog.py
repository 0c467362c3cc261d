"""The watchdog on runs that collapse in the ways that on-policy distillation does.

The models are those of the debug recipe. Options ruin them, and one fault is put into the program:
weights that do not reach the generator.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_world import REPO, assert_same_run, read_log, read_scalars, train

from opd_titan.config import JobConfig
from opd_titan.config.resolve import resolve
from opd_titan.errors import Fault
from opd_titan.observability.watchdog import SIGNS, WINDOW, Watchdog
from opd_titan.rollout.weights import GeneratorWeights

# With the clamp all tokens of a loop are equally bad, so that the student does not unlearn it.
COLLAPSE = ("--optimizer.beta2", 0.95, "--distill.log_ratio_clamp", 10)
TOO_FAST = ("--optimizer.lr", 8e-3, "--lr_scheduler.warmup_steps", 20, "--training.steps", 8)
TOO_FAST += ("--rollout.prompts_per_step", 16, *COLLAPSE, "--watchdog.action", "rollback")
DEBUG = REPO / "assets" / "debug"


def argv(folder: Path, *options: Any) -> list[str]:
    fixed = [
        *("--job.dump_folder", folder, "--data.dataset", "gsm8k", "--data.template", "raw"),
        *("--student.hf_path", DEBUG / "student", "--teacher.hf_path", DEBUG / "teacher"),
        *("--data.path", DEBUG / "data", "--rollout.prompts_per_step", 8, "--rollout.group_size"),
        *(2, "--rollout.max_new_tokens", 64, "--validation.enable", False),
    ]
    return [str(option) for option in (*fixed, *options)]


def warnings(folder: Path) -> list[str]:
    return [line for line in read_log(folder).splitlines() if "WARNING" in line]


def signs(folder: Path) -> set[str]:
    return {s.name for s in SIGNS for line in warnings(folder) if f": {s.name} (" in line}


@pytest.mark.slow
def test_steps_far_too_large_show_every_sign_of_collapse(tmp_path: Path) -> None:
    options = ("--optimizer.lr", 2e-2, "--training.steps", 24, "--checkpoint.enable", False)
    assert train(argv(tmp_path, "--lr_scheduler.warmup_steps", 5, *options, *COLLAPSE)) == 0
    assert signs(tmp_path) == {
        "responses repeat themselves",
        "more and more responses are cut off",
        "responses become much longer",
        "entropy has collapsed away from the teacher",
        "no response ends",
        "the student samples tokens that the teacher almost excludes",
        "the student moves away from the teacher",
    }
    line = next(line for line in warnings(tmp_path) if "moves away" in line)
    assert "kl/student_teacher is " in line and "optimizer.lr" in line


def test_a_healthy_run_shows_none(tmp_path: Path) -> None:
    assert train(argv(tmp_path, "--optimizer.lr", 1e-4, "--training.steps", 8)) == 0
    assert warnings(tmp_path) == []


def test_a_generator_with_other_weights_than_the_student_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on several processes, where the generator has copies; on one it shares the weights.
    monkeypatch.setattr(GeneratorWeights, "_own_storage", lambda self, parameter: None)
    sync = GeneratorWeights.sync

    def wrong_by_a_percent(weights: GeneratorWeights) -> None:
        sync(weights)
        weights.model.norm.weight.mul_(1.01)

    monkeypatch.setattr(GeneratorWeights, "sync", wrong_by_a_percent)
    assert train(argv(tmp_path, "--training.steps", WINDOW)) == 0
    assert signs(tmp_path) == {"log-probs of rollout and update drift apart"}


@pytest.mark.slow
def test_a_stop_token_that_the_student_never_writes(tmp_path: Path) -> None:
    shutil.copytree(DEBUG / "student", tmp_path / "student")
    path = tmp_path / "student" / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": 0}))
    out = tmp_path / "out"
    options = ("--student.hf_path", tmp_path / "student", "--training.steps", WINDOW)
    assert train(argv(out, *options)) == 0
    assert "no response ends" in signs(out)
    assert "student ends with 0" in warnings(out)[0]


def sent_back_to(folder: Path) -> list[int]:
    lines = (line for line in read_log(folder).splitlines() if "Resumed from" in line)
    return [int(line.split("/step-")[1].split()[0]) for line in lines if "rollback" in line]


def with_template(source: Path, folder: Path, template: str) -> Path:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_different_templates_are_a_warning_or_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    template = "{% for m in messages %}Question: {{ m['content'] }}\n{% endfor %}Answer:"
    student = with_template(DEBUG / "student", tmp_path / "student", template)
    teacher = with_template(DEBUG / "teacher", tmp_path / "teacher", template + " Let's")
    models = ("--student.hf_path", student, "--teacher.hf_path", teacher)
    options = (*models, "--data.template", "chat", "--training.steps", 1)
    assert train(argv(tmp_path / "warned", *options)) == 0
    (line,) = warnings(tmp_path / "warned")
    assert "the chat templates of student and teacher render the same question differently" in line
    assert train(argv(tmp_path / "stopped", *options, "--watchdog.action", "stop")) == 2
    assert "watchdog.action is stop: the chat templates" in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()


def test_stop_ends_the_run_with_the_sign(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ("--optimizer.lr", 2e-2, "--training.steps", 24, "--watchdog.action", "stop")
    assert train(argv(tmp_path, *options)) == 1
    assert "watchdog: step 5: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_rollback_goes_on_from_before_the_sign_with_smaller_steps(tmp_path: Path) -> None:
    saves = ("--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 0)
    assert train(argv(tmp_path, *TOO_FAST, *saves)) == 0
    (first,) = sent_back_to(tmp_path)
    rates = read_scalars(tmp_path)["lr"]
    slowdown = {step: 1.0 if step <= first else 0.5 for step in range(1, 9)}
    assert rates == pytest.approx({n: 8e-3 * n / 20 * slowdown[n] for n in slowdown})
    assert sorted((tmp_path / "checkpoint").glob("step-*.old"))


TEACHERS = "[{{name = 'a', hf_path = '{0}/teacher'}}, {{name = 'b', hf_path = '{0}/student'}}]"
SETS = "[{name = 'a', teacher = 'a', weight = 3.0}, {name = 'b', teacher = 'b', split = 'test'}]"
TWO = ("--teacher.hf_path=", "--teacher.models", TEACHERS.format(DEBUG), "--data.sets", SETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, teachers",
    [("async", TWO), pytest.param("disabled", (), marks=pytest.mark.long)],
    ids=["async-two-teachers", "sync"],
)
def test_a_rollback_is_what_a_resume_would_be(
    tmp_path: Path, mode: str, teachers: tuple[str, ...]
) -> None:
    """Bit for bit, against a fresh process that resumes from the same checkpoint."""
    saves = ("--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 0)
    often = ("--validation.enable", True, "--validation.interval", 1, "--metrics.log_freq", 3)
    options = (*TOO_FAST, *teachers, *saves, *often, "--validation.max_prompts", 10)
    options += ("--distill.minibatches", 2, "--optimizer.lr", 6e-3, "--checkpoint.async_mode", mode)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(argv(whole, *options)) == 0
    *_, step = sent_back_to(whole)
    shutil.copytree(whole, resumed)
    for n in range(step + 1, 9):
        shutil.rmtree(resumed / "checkpoint" / f"step-{n}")
        (resumed / "rollouts" / f"step-{n}.jsonl").unlink()
    shutil.rmtree(resumed / "hf")
    assert train(argv(resumed, *options)) == 0
    assert f"Resumed from {resumed}/checkpoint/step-{step} " in read_log(resumed)
    assert_same_run(whole, resumed, 8)
    assert list(read_scalars(whole)["validation/accuracy"]) == list(range(9))


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, pytest.param(4, marks=pytest.mark.long)])
def test_a_stop_right_after_a_rollback_keeps_its_smaller_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    roll_back = Watchdog.roll_back

    def then_stop(dog: Watchdog, state: dict[str, Any]) -> None:
        roll_back(dog, state)
        if dog.rollbacks == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Watchdog, "roll_back", then_stop)
    options = (*TOO_FAST, "--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 0)
    options += ("--export.interval", every)
    assert train(argv(tmp_path, *options)) == 75
    (step,) = sent_back_to(tmp_path)
    # The weights that were given up are not published.
    latest = tmp_path / "hf" / "latest"
    assert step < 4 and (tmp_path / "hf" / "step-4").is_dir()
    assert latest.exists() == (every == 1)
    assert every > 1 or latest.resolve() == tmp_path / "hf" / f"step-{step}"
    state = json.loads((tmp_path / f"checkpoint/step-{step}/train_state.json").read_text())
    assert (state["watchdog"]["slowdown"], state["watchdog"]["rollbacks"]) == (0.5, 1)
    assert train(argv(tmp_path, *options)) == 0
    assert read_scalars(tmp_path)["lr"][step + 1] == pytest.approx(8e-3 * (step + 1) / 20 / 2)


def watchdog(action: str) -> Watchdog:
    config = JobConfig()
    config.watchdog.action = action
    return Watchdog(resolve(config, "cpu", 1))


def reading(kl: float) -> dict[str, float]:
    return {"kl/student_teacher": kl, "time/step(s)": 1.0}


def test_a_run_that_was_killed_sees_the_same_signs() -> None:
    kls = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1, 9.0]
    whole = watchdog("rollback")
    expected = [whole.observe(step, reading(kl)) for step, kl in enumerate(kls, 1)]
    # The weights of step 7 sampled the responses of step 8.
    assert expected == [None] * 7 + [6] + [None] * 5 + [12]
    resumed, found = watchdog("rollback"), []
    for step, kl in enumerate(kls, 1):
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = watchdog("rollback")
        resumed.load_state_dict(state)
        found.append(resumed.observe(step, reading(kl)))
    assert found == expected


def test_a_start_below_zero_is_noise() -> None:
    """The first step's estimate of a small KL may be negative; `max(0, start)` is doubled."""
    dog = watchdog("stop")
    assert [dog.observe(n, reading(kl)) for n, kl in enumerate([-0.06, *[0.08] * 9])] == [None] * 10
    with pytest.raises(Fault, match="moves away"):
        [dog.observe(n, reading(0.2)) for n in range(10, 15)]


def test_a_figure_that_the_first_step_lacks_starts_later() -> None:
    """If the data set answers some prompts, step 1 may have no samples of the student."""
    dog = watchdog("stop")
    endless = {"rollout/eos_fraction": 0.0, "rollout/response_tokens_mean": 12.0}
    rows = [{"policy/entropy": 1.0}, *[endless] * 3]
    assert [dog.observe(n, row) for n, row in enumerate(rows, 1)] == [None] * 4
    with pytest.raises(Fault, match="no response ends .rollout/eos_fraction is 0, was 0"):
        dog.observe(5, endless)
    dog = watchdog("stop")
    loops = [{"policy/entropy": 1.0}, *({"rollout/repetition": r} for r in (0.1, 0.1, 0.9, 0.9))]
    assert [dog.observe(n, row) for n, row in enumerate(loops, 1)] == [None] * 5
    with pytest.raises(Fault, match="repeat themselves .* was 0.1 at the start"):
        dog.observe(6, {"rollout/repetition": 0.9})


def test_a_step_without_samples_does_not_dilute_a_mean() -> None:
    dog = watchdog("stop")
    rows = [reading(0.1), {}, {}, reading(0.5)]
    assert [dog.observe(n, row) for n, row in enumerate(rows, 1)] == [None] * 4
    with pytest.raises(Fault, match="moves away"):
        dog.observe(5, reading(0.5))


def test_after_three_rollbacks_the_run_ends() -> None:
    dog = watchdog("rollback")
    healthy = dog.state_dict()
    for slowdown in (0.5, 0.25, 0.125):
        assert dog.observe(1, reading(0.1)) is None
        assert [dog.observe(n, reading(9.0)) for n in range(2, 6)] == [None, None, None, 0]
        dog.roll_back(healthy)
        assert dog.slowdown == slowdown
    assert dog.observe(1, reading(0.1)) is None
    with pytest.raises(Fault, match="stopped after 3 rollbacks"):
        [dog.observe(n, reading(9.0)) for n in range(2, 6)]
