"""User mistakes: a name, how to make the mistake, and what its one-line message must contain.

A mistake is a function of the world (see `tiny_world`) and of an empty folder for new files. It
returns options. `test_bad_input` runs each through the program. Most mistakes are tested where they
are found: options in `test_config.py` and `test_consistency.py`, data files in `test_data.py`,
model folders in `test_hf_refused.py` and `test_model.py`. Here is one of each kind, and those that
only the whole program finds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_world import World, make_model

Options = list[Any]
Mistake = Callable[[World, Path], Options]


def given(*options: Any) -> Mistake:
    """Options in which {world} and {new} are the world's folder and the empty folder."""
    return lambda world, folder: [str(o).format(world=world.folder, new=folder) for o in options]


def file(name: str, content: str | bytes, *options: Any) -> Mistake:
    """Options, and a file with this content in the empty folder."""

    def make(world: World, folder: Path) -> Options:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return given(*options)(world, folder)

    return make


def data(content: str | bytes, name: str = "a.jsonl") -> Mistake:
    """A data file with this content."""
    return file(name, content, "--data.path", f"{{new}}/{name}", "--rollout.prompts_per_step", 1)


def recipe(content: str) -> Mistake:
    """A recipe instead of the world's."""
    return file("own.toml", content, "--job.config_file", "{new}/own.toml")


def model(change: Callable[[Path], Any], role: str = "student") -> Mistake:
    """A changed copy of the student's folder."""

    def make(world: World, folder: Path) -> Options:
        shutil.copytree(world.student, folder / "model")
        change(folder / "model")
        return [f"--{role}.hf_path", folder / "model"]

    return make


def config(**values: Any) -> Mistake:
    """The student's folder with other values in its config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return model(change)


def put(name: str, content: str | bytes) -> Callable[[Path], Any]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def rows(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def other_vocabulary(folder: Path) -> Path:
    make_model(folder / "other", seed=3, extra=("\t",))
    return folder / "other"


def other_teacher(world: World, folder: Path) -> Options:
    models = TEACHERS.replace("{world}/student", str(other_vocabulary(folder)))
    return several(models, SETS)(world, folder)


def several(models: str, sets: str, *more: Any) -> Mistake:
    """Several teachers and data sets."""
    validation = "[{{name='v', teacher='a'}}]"
    options = ("--teacher.hf_path=", "--teacher.models", models, "--data.sets", sets)
    return given(*options, "--validation.sets", validation, *more)


ROW = {"question": "What is 1+1?", "answer": "#### 2"}
TEACHERS = "[{{name='a', hf_path='{world}/teacher'}}, {{name='b', hf_path='{world}/student'}}]"
SETS = "[{{name='x', teacher='a'}}, {{name='y', teacher='b'}}]"

TABLE: dict[str, tuple[Mistake, list[str]]] = {
    # ---- the command line, the recipe, and the rules between keys
    "an unknown option": (given("--optimizer.lrr", 1), ["--optimizer.lrr", "--optimizer.lr?"]),
    "no TOML": (recipe('{"data": {}}'), ["own.toml: not valid TOML", "line 1"]),
    "sft on own samples": (
        given("--distill.objective", "sft"),
        ["[rollout] on_policy_fraction: 1.0 contradicts", '"sft"', "wanted 0.0"],
    ),
    # ---- the world
    "too many replicas": (
        given("--parallelism.data_parallel_replicate_degree", 2),
        ["data_parallel_replicate_degree 2", "not the world size 1", "1 x 1 x 1"],
    ),
    # ---- the dump folder and its checkpoints
    "dump folder is a file": (
        file("taken", "mine", "--job.dump_folder", "{new}/taken"),
        ["[job] dump_folder: ", "new/taken cannot be written", "choose a folder"],
    ),
    "dump folder under a file": (
        file("taken", "mine", "--job.dump_folder", "{new}/taken/run"),
        ["[job] dump_folder: ", "new/taken/run cannot be written", "choose a folder"],
    ),
    "dump folder where nothing can be": (
        given("--job.dump_folder", "/proc/run"),
        ["[job] dump_folder: /proc/run cannot be written", "choose a folder"],
    ),
    "a step that is not there": (
        given("--checkpoint.load_step", 2),
        ["checkpoint.load_step", "step-2", "complete steps: none"],
    ),
    # ---- data files
    "no data file": (given("--data.path", "{new}/no.jsonl"), ["data.path = ", "does not exist"]),
    "one prompt as long as a library": (
        data(rows({**ROW, "question": "x" * 3_000_000})),
        ["data.max_prompt_tokens = 512 drops every prompt", "over 100,000 characters"],
    ),
    "a set that is not there": (
        several(TEACHERS, SETS.replace("'b'", "'b', path='{new}/no.jsonl'")),
        ["data.sets[1].path = ", "no.jsonl", "does not exist"],
    ),
    # ---- validation and graders
    "a validation set that is not there": (
        given("--validation.sets", "[{{name='a'}}, {{name='b', path='{new}/no.jsonl'}}]"),
        ["validation.sets[1].path = ", "no.jsonl", "does not exist"],
    ),
    "a grader that is not there": (
        given("--validation.grader", "math:grade"),
        ["validation.grader: 'math:grade' cannot be imported (AttributeError", "grade"],
    ),
    "answers that are no letters": (
        given("--validation.grader", "choice"),
        ["validation.path: ", "test.jsonl, line 1: the answer '", "graded by choice", 'as "B"'],
    ),
    # ---- models
    "no model": (given("--student.hf_path", "{new}/no"), ["student.hf_path = ", "local folder"]),
    "a file for a model": (
        file("model", "mine", "--teacher.hf_path", "{new}/model"),
        ["teacher.hf_path = ", "neither a local folder nor a hub id"],
    ),
    "config.json is deep": (model(put("config.json", '{"a":' * 10**5)), ["config.json: "]),
    "a size beyond any": (
        config(num_hidden_layers=10**12),
        ["config.json: n_layers is 1000000000000; wanted at most 1000"],
    ),
    "deep generation config": (
        model(put("generation_config.json", '{"a":' * 10**5)),
        ["generation_config.json: "],
    ),
    "truncated weights": (
        model(put("model.safetensors", b"\x10\0\0\0\0\0\0\0{}")),
        ["model/model.safetensors", "truncated"],
    ),
    "an end that is no token": (
        given("--student.eos_token", "<|end|>"),
        ["student.eos_token: '<|end|>' is not a token of ", "such as '<eos>'"],
    ),
    "broken chat template": (
        model(put("chat_template.jinja", "{% for %}")),
        ["model/chat_template.jinja: the chat template fails (TemplateSyntaxError", "or set"],
    ),
    "chat template that fails": (
        model(put("chat_template.jinja", "{{ 1 + messages[0].content }}")),
        ["model/chat_template.jinja: the chat template fails (TypeError", '"raw"'],
    ),
    "a teacher of another vocabulary": (
        other_teacher,
        ["student.hf_path and teacher.b.hf_path: the vocabularies differ"],
    ),
    "a reference of another vocabulary": (
        lambda world, new: [
            *("--reference.coef", 0.5, "--reference.hf_path", other_vocabulary(new))
        ],
        ["reference.hf_path", "vocabularies differ"],
    ),
    "nothing to grade": (
        file(
            *("own.jsonl", rows({"prompt": "Say hello."}), "--validation.dataset", "prompts"),
            *("--validation.path", "{new}/own.jsonl"),
        ),
        ["validation", "without an answer to grade"],
    ),
}
