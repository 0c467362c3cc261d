"""Runs that go wrong the ways that on-policy distillation does: what the watchdog says and does.

The models are the debug recipe's; nothing is made up but the options that ruin them, and one fault
that is put into the program: weights that do not reach the generator.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import REPO, read_log, read_scalars, train

from opd_titan.config import JobConfig
from opd_titan.errors import Fault
from opd_titan.observability.watchdog import SIGNS, WINDOW, Watchdog
from opd_titan.rollout.weights import GeneratorWeights

# The clamp keeps loops from being unlearned again: all their tokens are as bad as can be.
COLLAPSE = ("--optimizer.beta2", 0.95, "--distill.log_ratio_clamp", 10)
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


def test_steps_far_too_large_show_every_sign_of_collapse(tmp_path: Path) -> None:
    options = ("--optimizer.lr", 2e-2, "--training.steps", 24, "--checkpoint.enable", False)
    assert train(argv(tmp_path, "--lr_scheduler.warmup_steps", 5, *options, *COLLAPSE)) == 0
    assert signs(tmp_path) == {
        "responses repeat themselves",
        "ever more responses are cut off",
        "responses run away in length",
        "entropy has collapsed away from the teacher",
        "no response ends",
        "the student leaves what the teacher could say",
        "the student moves away from the teacher",
    }
    line = next(line for line in warnings(tmp_path) if "moves away" in line)
    assert "kl/student_teacher is " in line and "optimizer.lr" in line


def test_a_healthy_run_shows_none(tmp_path: Path) -> None:
    assert train(argv(tmp_path, "--optimizer.lr", 1e-4, "--training.steps", 8)) == 0
    assert warnings(tmp_path) == []


def test_a_generator_with_other_weights_is_told_from_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on several processes, where the generator has copies; on one it shares the student's own.
    monkeypatch.setattr(GeneratorWeights, "_own_storage", lambda self, parameter: None)
    sync = GeneratorWeights.sync

    def wrong_by_a_percent(weights: GeneratorWeights) -> None:
        sync(weights)
        weights.model.norm.weight.mul_(1.01)

    monkeypatch.setattr(GeneratorWeights, "sync", wrong_by_a_percent)
    assert train(argv(tmp_path, "--training.steps", WINDOW)) == 0
    assert signs(tmp_path) == {"log-probs of rollout and update drift apart"}


def test_a_stop_token_that_nobody_writes(tmp_path: Path) -> None:
    shutil.copytree(DEBUG / "student", tmp_path / "student")
    path = tmp_path / "student" / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": 0}))
    out = tmp_path / "out"
    options = ("--student.hf_path", tmp_path / "student", "--training.steps", WINDOW)
    assert train(argv(out, *options)) == 0
    assert "no response ends" in signs(out)
    assert "student ends with 0" in warnings(out)[0]


def with_template(source: Path, folder: Path, template: str) -> Path:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_templates_at_odds_are_a_warning_or_a_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    template = "{% for m in messages %}Question: {{ m['content'] }}\n{% endfor %}Answer:"
    student = with_template(DEBUG / "student", tmp_path / "student", template)
    teacher = with_template(DEBUG / "teacher", tmp_path / "teacher", template + " Let's")
    models = ("--student.hf_path", student, "--teacher.hf_path", teacher)
    options = (*models, "--data.template", "chat", "--training.steps", 1)
    assert train(argv(tmp_path / "warned", *options)) == 0
    (line,) = warnings(tmp_path / "warned")
    assert "the chat templates of student and teacher make two prompts of one question" in line
    assert train(argv(tmp_path / "stopped", *options, "--watchdog.action", "stop")) == 2
    assert "watchdog.action is stop: the chat templates" in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()


def test_stop_ends_the_run_with_the_sign(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ("--optimizer.lr", 2e-2, "--training.steps", 24, "--watchdog.action", "stop")
    assert train(argv(tmp_path, *options)) == 1
    assert "watchdog: step 5: " in capsys.readouterr().err.splitlines()[-1]


def test_rollback_goes_on_from_before_the_sign_with_smaller_steps(tmp_path: Path) -> None:
    options = ("--optimizer.lr", 8e-3, "--lr_scheduler.warmup_steps", 20, "--training.steps", 8)
    options += ("--rollout.prompts_per_step", 16, *COLLAPSE)
    saves = ("--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 0)
    assert train(argv(tmp_path, *options, *saves, "--watchdog.action", "rollback")) == 0
    resumed = [line for line in read_log(tmp_path).splitlines() if "Resumed from" in line]
    assert resumed and "watchdog.action is rollback" in resumed[0]
    first = int(resumed[0].split("/step-")[1].split()[0])
    rates = read_scalars(tmp_path)["lr"]
    slowdown = {step: 1.0 if step <= first else 0.5 for step in range(1, 9)}
    assert rates == pytest.approx({n: 8e-3 * n / 20 * slowdown[n] for n in slowdown})
    assert sorted((tmp_path / "checkpoint").glob("step-*.old"))


def watchdog(action: str) -> Watchdog:
    config = JobConfig()
    config.watchdog.action = action
    return Watchdog(config, torch.float32)


def reading(kl: float) -> dict[str, float]:
    return {"kl/student_teacher": kl, "time/step(s)": 1.0}


def test_a_run_that_was_killed_sees_the_same_signs() -> None:
    kls = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1, 9.0]
    whole = watchdog("rollback")
    expected = [whole.look_at(step, reading(kl)) for step, kl in enumerate(kls, 1)]
    # The weights of step 7 made the responses of step 8.
    assert expected == [None] * 7 + [6] + [None] * 5 + [12]
    resumed, found = watchdog("rollback"), []
    for step, kl in enumerate(kls, 1):
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = watchdog("rollback")
        resumed.load_state_dict(state)
        found.append(resumed.look_at(step, reading(kl)))
    assert found == expected


def test_after_three_rollbacks_the_run_ends() -> None:
    dog = watchdog("rollback")
    healthy = dog.state_dict()
    for slowdown in (0.5, 0.25, 0.125):
        assert dog.look_at(1, reading(0.1)) is None
        assert [dog.look_at(n, reading(9.0)) for n in range(2, 6)] == [None, None, None, 0]
        dog.send_back(healthy)
        assert dog.slowdown == slowdown
    assert dog.look_at(1, reading(0.1)) is None
    with pytest.raises(Fault, match="stopped after 3 rollbacks"):
        [dog.look_at(n, reading(9.0)) for n in range(2, 6)]
