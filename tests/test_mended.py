"""What whole runs once got wrong: validation's baselines, stops, folders, lengths, the launch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import (
    REPO,
    TIMEOUT,
    World,
    hf_greedy,
    load_hf,
    make_model,
    make_sums,
    make_world,
    own_output,
    read_log,
    read_scalars,
    rollout_bytes,
    start,
    train,
    write_rows,
)
from transformers import AutoTokenizer

from opd_titan.checkpoint.steps import complete_steps
from opd_titan.grading.answers import extract_answer

NO_VALIDATION = ["--validation.enable", "False"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def warnings_in(log: str) -> list[str]:
    return [line for line in log.splitlines() if " WARNING " in line]


def refusal(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that is refused with exit code 2."""
    capfd.readouterr()
    assert train(argv) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("opd_titan: ") and len(line) < 700 and own_output(out) == ""
    return line


# ---------------------------------------------------- the teacher's own stop tokens


def teacher_with_its_own_end(world: World) -> list[Any]:
    """A teacher that stops at another token than the student, and questions where that matters.

    The gold answers are what the teacher says up to its own stop token; beyond it, up to the
    student's, other numbers follow.
    """
    model, tokenizer = load_hf(world.teacher), AutoTokenizer.from_pretrained(world.teacher)
    make_sums(world.folder / "many.jsonl", 60, seed=3)
    texts = {}
    for line in (world.folder / "many.jsonl").read_text().splitlines():
        question = json.loads(line)["question"]
        ids = tokenizer(f"<user>{question}<assistant>()")["input_ids"]
        texts[question] = hf_greedy(model, ids, NEW_TOKENS)

    def rows(end: int) -> list[dict[str, str]]:
        found = []
        for question, response in texts.items():
            cut = response[: response.index(end) + 1] if end in response else response
            own, students = (extract_answer(tokenizer.decode(r)) for r in (cut, response))
            if own is not None and own != students:
                found.append({"question": question, "answer": f"#### {own}"})
        return found

    end = max(range(2, len(tokenizer)), key=lambda token: len(rows(token)))
    assert len(rows(end)) >= 4
    write_rows(world.folder / "own-end.jsonl", rows(end)[:6])
    make_model(world.folder / "own-end", seed=2, eos_ids=[end])
    return ["--teacher.hf_path", world.folder / "own-end"]


@pytest.fixture(scope="module")
def validated(world: World) -> tuple[Path, list[Any]]:
    """Two steps, validated after each against a teacher that knows everything; its options."""
    options = teacher_with_its_own_end(world)
    options += ["--validation.path", world.folder / "own-end.jsonl", "--training.steps", 2]
    options += ["--rollout.max_new_tokens", NEW_TOKENS, "--validation.interval", 1]
    options += ["--optimizer.lr", 1e-4]
    assert train(world.argv("validated", *options)) == 0
    return world.folder / "validated", options


def test_validation_stops_the_teacher_at_its_own_tokens(validated: tuple[Path, list[Any]]) -> None:
    scalars = read_scalars(validated[0])
    assert scalars["validation/teacher_accuracy"] == {0: 1.0, 1: 1.0, 2: 1.0}
    assert scalars["validation/accuracy"][0] < 1.0
    assert list(scalars["validation/gap_recovered"]) == [0, 1, 2]


# ------------------------------------------- what the baselines depend on, on resume

GAPS = ("validation/gap_recovered", "validation/teacher_accuracy")


def go_on(world: World, validated: tuple[Path, list[Any]], name: str, *options: Any) -> str:
    """Resume a copy of the run for one step more; what its log gained."""
    source, given = validated
    out = source.with_name(name)
    if not out.exists():
        shutil.copytree(source, out)
    before = read_log(out)
    steps = complete_steps(out / "checkpoint")[-1] + 1
    argv = world.argv(name, *given, "--checkpoint.interval", 1, "--training.steps", steps)
    argv.append("--checkpoint.allow_changes")
    assert train([*argv, *map(str, options)]) == 0
    log = read_log(out).removeprefix(before)
    assert "Resumed from" in log and f"next step {steps}" in log
    return log


@pytest.mark.parametrize(
    "options",
    [
        ["--validation.max_prompts", 3],
        ["--validation.temperature", 0.5],
        ["--validation.max_new_tokens", NEW_TOKENS - 1],
        ["--validation.path", "{}/data"],
        ["--teacher.hf_path", "{}/teacher"],
        ["--teacher.random_init"],
        ["--data.template", "raw"],
    ],
    ids=lambda options: options[0],
)
def test_baselines_of_something_else_are_not_compared_with(
    world: World, validated: tuple[Path, list[Any]], options: list[Any]
) -> None:
    options = [str(o).format(world.folder) for o in options]
    name = options[0].removeprefix("--")
    (warning,) = [w for w in warnings_in(go_on(world, validated, name, *options)) if "gap" in w]
    assert "changed since the checkpoint" in warning
    scalars = read_scalars(world.folder / name)
    assert list(scalars["validation/accuracy"]) == [0, 1, 2, 3]
    for gap in GAPS:
        assert list(scalars[gap]) == [0, 1, 2], gap


def test_no_gap_later_either(world: World, validated: tuple[Path, list[Any]]) -> None:
    options = ["--rollout.max_new_tokens", 8]  # which validation takes too
    assert "changed since" in go_on(world, validated, "later", *options)
    assert "changed since" not in go_on(world, validated, "later", *options)
    for gap in GAPS:
        assert list(read_scalars(world.folder / "later")[gap]) == [0, 1, 2], gap


def test_where_things_lie_and_how_often_is_validated_may_change(
    world: World, validated: tuple[Path, list[Any]]
) -> None:
    shutil.copy(world.folder / "own-end.jsonl", world.folder / "moved.jsonl")
    shutil.copytree(world.folder / "own-end", world.folder / "moved")
    options = ["--validation.interval", 3, "--validation.path", world.folder / "moved.jsonl"]
    options += ["--teacher.hf_path", world.folder / "moved"]
    assert "changed since" not in go_on(world, validated, "interval", *options)
    for gap in GAPS:
        assert list(read_scalars(world.folder / "interval")[gap]) == [0, 1, 2, 3], gap


# --------------------------------------------------------------- held-out prompts


@pytest.mark.parametrize("shared", [0, 3, 8])
def test_validation_on_training_prompts_is_named(world: World, shared: int) -> None:
    rows = [{"question": f"What is {n} - {n}?", "answer": "#### 0"} for n in range(20)]
    folder = world.folder / f"shared-{shared}"
    write_rows(folder / "train.jsonl", rows[:12])
    write_rows(folder / "test.jsonl", rows[12 - shared : 20 - shared])
    options = ["--data.path", folder, "--validation.max_prompts", 0, "--training.steps", 1]
    assert train(world.argv(f"held-out-{shared}", *options)) == 0
    found = warnings_in(read_log(world.folder / f"held-out-{shared}"))
    assert len(found) == (shared > 0)
    if found:
        assert f"Validation: {shared} of 8 prompts are training prompts too" in found[0]


# --------------------------------------------------------------------- stopping


def test_a_stop_without_checkpoints_fails_and_says_so(world: World) -> None:
    options = ["--checkpoint.enable", "False", "--training.steps", 5000, *NO_VALIDATION]
    run, out = start(world.argv("unsaved", *options)), world.folder / "unsaved"
    deadline = time.monotonic() + TIMEOUT
    while not (out / "rollouts" / "step-2.jsonl").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    assert run.wait(TIMEOUT) == 1
    (warning,) = [w for w in warnings_in(read_log(out)) if "Stopped" in w]
    assert "signal 15" in warning and "nothing was saved" in warning
    assert "checkpoint.enable is false" in warning
    assert not (out / "checkpoint").exists() and not (out / "hf").exists()


# ------------------------------------------------------------ folders and lengths


@pytest.mark.parametrize(
    ("file", "dump_folder"),
    [("file", "file"), ("file", "file/run"), ("run/logs", "run"), ("there/checkpoint", "there")],
)
def test_a_folder_that_cannot_be_written_is_named(
    world: World, capfd: pytest.CaptureFixture[str], file: str, dump_folder: str
) -> None:
    path = world.folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    line = refusal(world.argv(dump_folder), capfd)
    assert "[job] dump_folder: " in line and "cannot be written" in line
    assert f"{world.folder}/{dump_folder}" in line
    assert path.read_text() == "mine"


# Every prompt of the tiny world has 31 tokens.
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_outgrows_a_models_positions_is_refused(
    world: World, capfd: pytest.CaptureFixture[str], role: str
) -> None:
    make_model(world.folder / f"short-{role}", seed=3, max_position_embeddings=43)
    model = [f"--{role}.hf_path", world.folder / f"short-{role}", "--training.steps", 1]
    longer = ["--rollout.max_new_tokens", 13, *NO_VALIDATION]
    line = refusal(world.argv("long", *model, *longer), capfd)
    for part in ("rollout.max_new_tokens", "31 tokens", "13", "43", f"short-{role}"):
        assert part in line
    # Held-out prompts and their answers count too.
    line = refusal(world.argv("long", *model, "--validation.max_new_tokens", 13), capfd)
    assert "validation.max_new_tokens" in line and "13" in line
    question = {"question": "What is 10+2?", "answer": "#### 12"}
    write_rows(world.folder / "longer.jsonl", [question])
    line = refusal(
        world.argv("long", *model, "--validation.path", world.folder / "longer.jsonl"), capfd
    )
    assert "32 tokens" in line and "43" in line
    assert not (world.folder / "long").exists()
    # Just fitting is fine, and validation that is off asks for nothing.
    fits = ["--rollout.max_new_tokens", 12, *NO_VALIDATION, "--validation.max_new_tokens", 13]
    assert train(world.argv(f"fits-{role}", *model, *fits)) == 0


@pytest.mark.parametrize("option", ["--rollout.temperature=0.7", "--rollout.top_p=0.9"])
def test_sft_takes_no_sampling_settings(
    world: World, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    sft = ["--distill.objective", "sft", "--rollout.on_policy_fraction", 0.0]
    line = refusal(world.argv("cold", *sft, "--rollout.group_size", 1, option), capfd)
    assert "[rollout] temperature: " in line and '"sft"' in line
    assert option.split("=")[1] in line


# ----------------------------------------------------- determinism, random weights


@pytest.fixture
def determinism_restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "options",
    [
        ["--rollout.top_p", 0.9, "--distill.minibatches", 2, "--reference.coef", 0.5],
        ["--distill.objective", "sft", "--rollout.on_policy_fraction", 0.0]
        + ["--rollout.group_size", 1, "--rollout.max_new_tokens", 32],
    ],
    ids=["policy_gradient", "sft"],
)
def test_deterministic_algorithms_do_everything_on_a_cpu(
    world: World, determinism_restored: None, options: list[Any], request: pytest.FixtureRequest
) -> None:
    name = f"deterministic-{request.node.callspec.id}"
    options = [*options, "--training.deterministic", "--training.steps", 2]
    assert train(world.argv(name, *options, "--validation.max_prompts", 2)) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert complete_steps(world.folder / name / "checkpoint") == [2]


def test_a_random_teacher_is_another_model_and_the_reference_is_the_student(world: World) -> None:
    options = ["--student.random_init", "--teacher.random_init", "--training.steps", 1]
    options += ["--teacher.hf_path", world.student, "--reference.coef", 0.5, *NO_VALIDATION]
    for name in ("random", "random-again"):
        assert train(world.argv(name, *options)) == 0
    out = world.folder / "random"
    scalars = read_scalars(out)
    assert scalars["kl/student_teacher"][1] > 0.01
    assert scalars["kl/student_reference"][1] == pytest.approx(0, abs=1e-5)
    assert read_log(out).count("RANDOM weights") == 3
    assert rollout_bytes(out) == rollout_bytes(world.folder / "random-again")


# ----------------------------------------------------------------- run_train.sh

HIDDEN = ("CUDA_VISIBLE_DEVICES", "NGPU", "CONFIG_FILE")
# Says what the script would start, from where, and starts nothing else.
STUB_PYTHON = """#!/bin/bash
[ "$1" = - ] && exec "{python}" "$@"
case "$2" in *.config) exit 0 ;; esac
pwd; printf '%s\n' "$@"
"""


def run_script(
    folder: Path, *options: str, gpus: int = 0, stub: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """run_train.sh from `folder`, on a machine with so many GPUs."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    commands = {
        "nvidia-smi": f"#!/bin/bash\nfor ((i = 0; i < {gpus}; i++)); do echo GPU $i; done\n"
    }
    if stub:
        commands["python3"] = STUB_PYTHON.format(python=sys.executable)
    for name, text in commands.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in HIDDEN}
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), env["PATH"]])
    return subprocess.run(
        [REPO / "scripts" / "run_train.sh", *options],
        env={**env, "PATH": path, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.parametrize("wrong", ["two", "0", "-1", "1.5", "2 "])
def test_a_wrong_number_of_processes_is_one_line(tmp_path: Path, wrong: str) -> None:
    done = run_script(tmp_path, NGPU=wrong)
    assert (done.returncode, own_output(done.stdout)) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == f"opd_titan: NGPU is '{wrong}'; wanted a number of processes"


@pytest.mark.parametrize(
    ("gpus", "environment", "processes"),
    [
        (0, {}, 1),
        (3, {}, 3),
        (3, {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (3, {"CUDA_VISIBLE_DEVICES": "2"}, 1),
        (3, {"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        (3, {"CUDA_VISIBLE_DEVICES": "", "NGPU": "2"}, 2),
        (3, {"NGPU": ""}, 3),
    ],
    ids=str,
)
def test_one_process_for_each_visible_gpu(
    tmp_path: Path, gpus: int, environment: dict[str, str], processes: int
) -> None:
    done = run_script(tmp_path, gpus=gpus, CONFIG_FILE="mine.toml", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    folder, *words = done.stdout.splitlines()
    assert folder == str(tmp_path), "the user's recipe is relative to where the user is"
    started = ["-m", "opd_titan.train", "--job.config_file", "mine.toml"]
    assert words[-4:] == started
    if processes == 1:
        assert words == started
    else:
        assert words[:4] == ["-m", "opd_titan.cli.launch", "--nproc-per-node", str(processes)]


def test_the_default_recipe_is_found_from_anywhere(tmp_path: Path) -> None:
    # So many prompts are refused only once the recipe, its models and its data were found.
    options = ["--rollout.prompts_per_step", "1000000"]
    done = run_script(tmp_path, *options, stub=False, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, own_output(done.stdout)) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "rollout.prompts_per_step = 1000000" in line
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
