"""`opd_titan.evaluate` against the figures of a run; its files; its error messages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world
from tiny_world import (
    REPO,
    TIMEOUT,
    World,
    hf_greedy,
    load_hf,
    make_gradable,
    make_world,
    own_output,
    read_log,
    read_rollouts,
    read_scalars,
    train,
    train_on,
    write_rows,
)
from transformers import AutoTokenizer

OWN_GRADER = """
def length(response, answer):
    return min(1.0, len(response) / 16)

def broken(response, answer):
    raise KeyError("no such column")

calls = []
def brief(response, answer):
    calls.append(response)
    return len(calls) < 15 or [][0]
"""
SETS = """
[[validation.sets]]
name = "graded"
path = "{folder}/graded.jsonl"
[[validation.sets]]
name = "sums"
split = "train"
max_prompts = 5
grader = "own_graders:length"
"""
SAMPLED = ["--validation.samples_per_prompt", 3, "--validation.temperature", 0.3]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    make_gradable(world, world.teacher)
    (world.folder / "own_graders.py").write_text(OWN_GRADER)
    return world


@pytest.fixture(scope="module", autouse=True)
def own_module(world: World) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(world.folder))
        yield


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """A run that validates on two sets with several samples."""
    with world.recipe.open("a") as file:
        file.write(SETS.format(folder=world.folder))
    assert train(world.argv("run", *SAMPLED, "--training.steps", 2)) == 0
    return world.folder / "run"


def evaluate(*options: Any) -> int:
    return tiny_world.evaluate([str(word) for word in options])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def refused(capfd: pytest.CaptureFixture[str], *options: Any, loaded: bool = False) -> str:
    """The one line on stderr; `loaded`: something was logged about loading the model before."""
    capfd.readouterr()
    assert evaluate(*options) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert bool(own_output(out)) == loaded and line.startswith("opd_titan: "), line
    return line


# ------------------------------------------------------------- the run's own figures


def test_several_sets_in_one_run(run: Path) -> None:
    scalars = read_scalars(run)
    for step in (0, 2):
        sets = [scalars[f"validation/{name}/accuracy"][step] for name in ("graded", "sums")]
        mean = scalars["validation/accuracy"][step]
        assert mean == pytest.approx(sum(sets) / 2) and sets[0] != sets[1]
        ends = [scalars[f"validation/accuracy_{end}"][step] for end in ("low", "high")]
        assert ends[0] < mean < ends[1]
        one, three = (scalars[f"validation/graded/{n}"][step] for n in ("accuracy", "pass_at_3"))
        assert one <= three <= 1.0
    assert "by set: graded " in read_log(run)


WHICH = {"student": 0, "hf/step-2": 2, "checkpoint/step-2": 2, "teacher": 0}


@pytest.mark.parametrize("model", WHICH)
def test_it_measures_what_the_run_measured(run: Path, model: str) -> None:
    """Same prompts and seed: the same figure to the last bit, from a checkpoint or an export."""
    given, recipe = (run / model, []) if "/" in model else (model, ["--job.config_file"])
    recipe += [run / "config.resolved.toml"] if recipe else []
    assert evaluate("--evaluate.model", given, *recipe) == 0
    folder = run / "evaluation" / model.replace("/", "-")
    found, scalars = results(folder), read_scalars(run)
    figure = "teacher_accuracy" if model == "teacher" else "accuracy"
    expected = [found["accuracy"], *(s["accuracy"] for s in found["sets"])]
    for prefix, value in zip(("", "graded/", "sums/"), expected, strict=True):
        # TensorBoard keeps 32 bits.
        assert scalars[f"validation/{prefix}{figure}"][WHICH[model]] == np.float32(value)
    assert found["settings"]["samples_per_prompt"] == 3
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]


@pytest.mark.parametrize("model", ["student", "checkpoint/step-1", "hf/step-1"])
def test_it_ends_responses_where_the_run_did(world: World, model: str) -> None:
    out, question = world.folder / "ends", "<user>What is 1+1?<assistant>()"
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    ids = hf_greedy(load_hf(world.student), tokenizer(question)["input_ids"], 12)
    end = tokenizer.convert_ids_to_tokens(max(ids[2:-1], key=ids.count))
    if not out.exists():
        options = ["--student.eos_token", end, "--training.steps", 1, "--validation.sets=[]"]
        assert train(world.argv("ends", *options, "--optimizer.lr", 0.0)) == 0
    given, recipe = (out / model, []) if "/" in model else (model, ["--job.config_file"])
    recipe += [out / "config.resolved.toml"] if recipe else []
    assert evaluate("--evaluate.model", given, *recipe) == 0
    rows = samples(out / "evaluation" / model.replace("/", "-"))
    mean = np.float32(sum(row["response_tokens"] for row in rows) / len(rows))
    expected = read_scalars(out)["validation/response_tokens_mean"]
    assert mean == expected[0] == expected[1] < 12


def test_every_sample_is_written_with_its_grade(world: World, run: Path) -> None:
    folder, recipe = world.folder / "judged", ["--job.config_file", run / "config.resolved.toml"]
    assert evaluate("--evaluate.model", "teacher", "--evaluate.folder", folder, *recipe) == 0
    found, rows = results(folder), samples(folder)
    for s in found["sets"]:
        mine = [row for row in rows if row["set"] == s["name"]]
        assert len(mine) == s["samples"] == 3 * s["prompts"]
        assert sum(float(row["correct"]) for row in mine) / len(mine) == pytest.approx(
            s["accuracy"]
        )
        keys = [(row["prompt_index"], row["sample_index"]) for row in mine]
        assert len(set(keys)) == len(keys)
    graded = [row for row in rows if row["set"] == "graded"]
    right = [row for row in graded if row["correct"]]
    assert right and all(float(row["extracted"]) == float(row["answer"]) for row in right)
    assert {"torch", "transformers", "opd_titan", "python"} <= set(found["versions"])
    assert found["model"]["weights"].endswith("teacher")


def test_an_earlier_result_stays(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--evaluate.model", run / "hf/step-2", "--job.dump_folder", tmp_path]
    options = [*given, "--validation.sets=[]"]
    folders = [tmp_path / "evaluation" / f"hf-step-2{end}" for end in ("", "-2", "-3")]
    assert evaluate(*given) == 0
    before = (folders[0] / "results.json").read_bytes()
    for _ in range(2):
        assert evaluate(*options, "--validation.max_prompts", 2) == 0
    assert (folders[0] / "results.json").read_bytes() == before
    assert [len(results(folder)["sets"]) for folder in folders] == [2, 1, 1]
    assert samples(folders[1]) == samples(folders[2])
    line = refused(capfd, *options, "--evaluate.folder", folders[1])
    assert "[evaluate] folder: " in line and "has an earlier result" in line


def test_written_rollouts_have_the_grader_of_validation(world: World) -> None:
    options = ["--validation.grader", "own_graders:length", "--validation.sets=[]"]
    assert train(world.argv("own", *options, "--training.steps", 1)) == 0
    for row in read_rollouts(world.folder / "own")[1]:
        assert row["correct"] == pytest.approx(min(1.0, len(row["response"]) / 16))


@pytest.mark.slow
def test_a_grader_that_raises_on_one_rank_ends_all(world: World) -> None:
    """Rank 0 alone writes rollouts."""
    options = ["--validation.grader", "operator:sub", "--validation.enable", False]
    errors = world.folder / "errors.txt"
    argv = world.argv("broken", *options, "--validation.sets=[]")
    train_on(2, [argv], codes=[2], stderr=errors)
    said = [line for line in errors.read_text().splitlines() if line.startswith("opd_titan: ")]
    assert len(said) == 2 and len(set(said)) == 1, said
    assert "validation.grader = 'operator:sub' failed: TypeError: unsupported operand" in said[0]


def test_what_is_being_saved_when_a_grader_raises_is_kept(world: World) -> None:
    options = ["--validation.grader", "own_graders:brief", "--validation.enable", False]
    options += ["--checkpoint.interval", 1, "--checkpoint.async_mode", "async"]
    assert train(world.argv("kept", *options, "--validation.sets=[]")) == 2
    assert (world.folder / "kept" / "checkpoint" / "step-1").is_dir()


def test_an_answer_that_validations_grader_does_not_know_is_not_graded(world: World) -> None:
    """Training prompts may have gold answers of another kind than the validation prompts."""
    options = ["--validation.grader", "choice", "--validation.enable", False]
    assert train(world.argv("other", *options, "--validation.sets=[]", "--training.steps", 1)) == 0
    rows = read_rollouts(world.folder / "other")[1]
    assert {row["correct"] for row in rows} == {None} and all(row["answer"] for row in rows)


# ------------------------------------------------------------------- what is wrong

MODEL = "--evaluate.model"
DATA = ["--validation.path", "{world}/data", "--validation.max_new_tokens", "12"]
WRONG = {
    "no model": ([], ["[evaluate] model: required without [student] hf_path"]),
    "no teacher": ([MODEL, "teacher"], ["[teacher] hf_path: required", '"teacher"']),
    "not there": ([MODEL, "{run}/hf/step-9"], ["evaluate.model = ", "step-9' is neither"]),
    "a dump folder": (
        [MODEL, "{run}"],
        ["evaluate.model: ", "dump folder", "run/hf/step-2, ", "run/checkpoint/step-2"],
    ),
    "a checkpoint alone": (
        [MODEL, "{copy}/step-2"],
        ["evaluate.model: the checkpoint ", "--job.config_file", "student.hf_path"],
    ),
    "another model's checkpoint": (
        [MODEL, "{copy}/step-2", "--student.hf_path", "{world}/other", *DATA],
        ["step-2: is of another model: ", "student.hf_path"],
    ),
    "a damaged checkpoint": (
        [MODEL, "{copy}/step-1", "--student.hf_path", "{world}/student", *DATA],
        ["step-1/", "were written", "choose another checkpoint"],
    ),
    "a set without its file": (
        [MODEL, "{world}/student", "--validation.sets", "[{{name='a',path='no.jsonl'}}]"],
        ['validation.sets[0].path = "no.jsonl" does not exist'],
    ),
    "a row without an answer": (
        [MODEL, "{world}/student", "--validation.path", "{world}/rows.jsonl"]
        + ["--validation.dataset", "prompts"],
        ["validation: ", "rows.jsonl", "prompts without an answer"],
    ),
    "an answer that is no letter": (
        [MODEL, "{world}/student", "--validation.path", "{world}/letters.jsonl"]
        + ["--validation.dataset", "prompts", "--validation.grader", "choice"],
        ["letters.jsonl, line 2: the answer 'Rome' cannot be graded by choice; expected a letter"],
    ),
    "a grader that raises": (
        [MODEL, "{world}/student", *DATA, "--validation.grader", "own_graders:broken"],
        ["validation.grader = 'own_graders:broken' failed: KeyError: 'no such column'"],
    ),
    "responses too long": (
        [MODEL, "{world}/student", *DATA, "--validation.max_new_tokens", "300"],
        ["validation.max_new_tokens: ", "256 positions"],
    ),
    "an unknown option": ([MODEL, "x", "--evaluate.modle", "y"], ["--evaluate.model?"]),
}


@pytest.fixture(scope="module")
def broken(world: World, run: Path) -> dict[str, Path]:
    from tiny_world import make_model

    make_model(world.folder / "other", seed=4, num_hidden_layers=1)
    copy = world.folder / "copy"
    for step in (1, 2):
        shutil.copytree(run / "checkpoint" / "step-2", copy / f"step-{step}")
    part = max((copy / "step-1").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-100])
    write_rows(world.folder / "rows.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b"}])
    letters = [{"prompt": "a", "answer": "(A)"}, {"prompt": "b", "answer": "Rome"}]
    write_rows(world.folder / "letters.jsonl", letters)
    return {"world": world.folder, "run": run, "copy": copy}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(
    broken: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    options, parts = WRONG[name]
    arguments = (option.format(**broken) for option in options)
    line = refused(capfd, *arguments, loaded=name == "a grader that raises")
    assert all(part in line for part in parts), line


# ------------------------------------------------------------------- as a user starts it


def program(argv: list[Any], processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(REPO / "scripts" / "evaluate.sh"), *map(str, argv)],
        env={**os.environ, "PATH": path, "NGPU": str(processes), **options},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_find_what_one_does(world: World, run: Path) -> None:
    folder = world.folder / "two"
    options = ["--evaluate.model", run / "checkpoint/step-2", "--evaluate.folder", folder]
    done = program(options, 2, PYTHONPATH=str(world.folder))
    out, err = done.communicate(timeout=TIMEOUT)
    assert done.returncode == 0, err
    assert "pass@3" in out and "graded" in out and str(folder) in out
    alone = world.folder / "alone"
    assert evaluate(*options[:2], "--evaluate.folder", alone) == 0
    assert samples(folder) == samples(alone)
    first, second = results(folder), results(alone)
    for key in ("accuracy", "interval", "sets", "pass_at_k"):
        assert first[key] == second[key]
    assert first["settings"]["processes"] == 2
    # One line, and exit code 2, for a mistake that only one rank found.
    bad = program([*options[:2], "--validation.grader", "own_graders:broken"], 2)
    assert bad.wait(TIMEOUT) == 2 and len(bad.stderr.read().splitlines()) == 1


@pytest.mark.slow
def test_a_signal_ends_it_with_75(world: World, run: Path) -> None:
    options = ["--evaluate.model", run / "hf/step-2", "--validation.samples_per_prompt", 100_000]
    options += ["--rollout.max_concurrent", 4, "--evaluate.folder", world.folder / "stopped"]
    done = program(options, PYTHONPATH=str(world.folder))
    deadline = time.monotonic() + TIMEOUT
    while not (world.folder / "stopped").is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    done.send_signal(signal.SIGTERM)
    assert done.wait(TIMEOUT) == 75
    assert not (world.folder / "stopped" / "results.json").exists()
