"""Every recipe in train_configs/ runs on a tiny model, and fits the GPU that it names."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_world import REPO, World, make_model, make_sums, read_log, read_scalars, train, write_rows

from opd_titan.config import JobConfig, load_config
from opd_titan.config.value_types import literal
from opd_titan.plan.__main__ import main as plan

sys.path.append(str(REPO / "benchmarks"))
from qwen3_shapes import NAMES, write_config  # noqa: E402

FOLDER = REPO / "train_configs"
RECIPES = sorted(path.name for path in FOLDER.glob("*.toml"))
END = "<|im_end|>"
# The plan's line in a head: its options, the peak, the memory there is, seconds of a step.
PLANNED = re.compile(r"^#   plan\.sh (.+): ([\d.]+) of ([\d.]+) GiB, ([\d.]+) s a step$", re.M)


def recipe(name: str) -> JobConfig:
    return load_config(["--job.config_file", str(FOLDER / name)])


def head(name: str) -> str:
    return re.match(r"(#.*\n)+", (FOLDER / name).read_text("utf-8")).group()


def test_the_table_of_the_docs_has_every_recipe() -> None:
    text = (REPO / "docs" / "recipes.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([\w.]+\.toml)`", text, re.M)) == set(RECIPES)
    for name in RECIPES:
        if found := PLANNED.search(head(name)):
            row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
            assert f"{found[2]} of {found[3]} GiB" in row and f"{found[4]} s" in row, name


# ------------------------------------------------------------------------ they plan


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with the model's config.json for each hub id."""
    root = tmp_path_factory.mktemp("shapes")
    made = {size: write_config(size, root / size) for size in NAMES}
    return {f"Qwen/Qwen3-{size}{base}": made[size] for size in NAMES for base in ("", "-Base")}


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RECIPES if PLANNED.search(head(name))])
def test_it_fits_where_its_head_says(name: str, shapes: dict[str, Path], capsys: Any) -> None:
    config, (said, *figures) = recipe(name), PLANNED.search(head(name)).groups()
    argv = ["--job.config_file", str(FOLDER / name), *shlex.split(said)]
    for role in ("student", "teacher"):
        if path := getattr(config, role).hf_path:
            argv += [f"--{role}.hf_path", str(shapes[path])]
    if models := config.teacher.models:
        argv += [
            "--teacher.models",
            inline([replace(m, hf_path=str(shapes[m.hf_path])) for m in models]),
        ]
    assert plan(argv) == 0
    out = capsys.readouterr().out
    rows = {line[:34].strip(): line[34:].split() for line in out.splitlines()}
    found = [float(rows[key][0]) for key in ("PEAK", "of", "STEP")]
    # Versions of torch differ a little in what they keep.
    assert found == pytest.approx([float(f) for f in figures], rel=0.02, abs=0.06), found


# ------------------------------------------------------------------------- they run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world"))
    make_model(world.student, seed=1, extra=(END,), eos_ids=[1])
    make_model(world.teacher, seed=2, extra=(END,))
    make_sums(world.folder / "gsm8k" / "train.jsonl", 22, seed=1)
    make_sums(world.folder / "gsm8k" / "test.jsonl", 8, seed=2)
    turns = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    rows = [{"conversations": [{**turns[0], "value": f"{n}+1?"}, turns[1]]} for n in range(8)]
    write_rows(world.folder / "openthoughts3" / "train.jsonl", rows)
    own = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(8)]
    write_rows(world.folder / "prompts" / "train.jsonl", own)
    return world


def inline(rows: list[Any]) -> str:
    """Return rows as one TOML array, for the command line."""
    pairs = [", ".join(f"{k} = {literal(v)}" for k, v in asdict(row).items()) for row in rows]
    return "[" + ", ".join("{" + row + "}" for row in pairs) + "]"


def shrunken(world: World, name: str) -> list[str]:
    """Return the recipe with tiny models and data and two steps, otherwise unchanged."""
    config = recipe(name)
    held_out = config.validation.dataset or config.data.dataset
    options = {
        "job.dump_folder": world.folder / "out" / name,
        "student.hf_path": world.student,
        "data.path": world.folder / config.data.dataset,
        "data.max_prompt_tokens": 64,
        "rollout.prompts_per_step": 4,
        "rollout.group_size": min(2, config.rollout.group_size),
        "rollout.max_new_tokens": 8,
        "training.epochs": 0,
        "training.steps": 2,
        "validation.path": world.folder / held_out,
        "validation.max_prompts": 4,
        "validation.max_new_tokens": 8,
        # One process: other tests compare layouts.
        "parallelism.data_parallel_replicate_degree": 1,
        "parallelism.tensor_parallel_degree": 1,
    }
    if config.teacher.hf_path:
        options["teacher.hf_path"] = world.teacher
    if models := config.teacher.models:
        options["teacher.models"] = inline([replace(m, hf_path=str(world.teacher)) for m in models])
    if sets := config.data.sets:
        local = [world.folder / (row.dataset or config.data.dataset) for row in sets]
        rows = [replace(row, path=str(path)) for row, path in zip(sets, local, strict=True)]
        options["data.sets"] = inline(rows)
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["--job.config_file", str(FOLDER / name), *words]


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs(name: str, world: World) -> None:
    config = recipe(name)
    assert train(shrunken(world, name)) == 0
    out = world.folder / "out" / name
    assert "Done: 2 steps" in read_log(out)
    assert list(read_scalars(out)["loss/policy"]) == [1, 2]
    ends = json.loads((out / "hf" / "latest" / "generation_config.json").read_text())
    assert (ends["eos_token_id"] != [1]) == bool(config.student.eos_token)
