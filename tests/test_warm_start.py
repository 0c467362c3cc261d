"""Off-policy training: SFT, then OPD on its export; offline distillation; a mixture.

SFT followed by OPD needs `student.eos_token` and the link `hf/latest`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import (
    REPO,
    World,
    hf_greedy,
    load_hf,
    make_model,
    make_world,
    read_log,
    read_rollouts,
    read_scalars,
    train,
)
from transformers import AutoTokenizer, GenerationConfig

from opd_titan.checkpoint.hf_folder import check_unchanged
from opd_titan.checkpoint.publish import link_latest

END = "<|im_end|>"
SFT = ["--distill.objective", "sft", "--rollout.on_policy_fraction", 0.0]
SFT += ["--rollout.group_size", 1, "--rollout.max_new_tokens", 32]
BRIEF = ["--validation.enable", "False", "--checkpoint.enable", "False", "--training.steps", 2]

# ------------------------------------------------------------------ the debug models


def debug_run(out: Path, recipe: str, *options: Any) -> dict[int, float]:
    """Run a recipe on the debug models; accuracy by step."""
    where = ["--job.config_file", REPO / "train_configs" / recipe, "--job.dump_folder", out]
    words = [*where, "--data.path", REPO / "assets/debug/data", "--validation.interval", 0]
    words += ["--validation.path", REPO / "assets/debug/data", "--validation.max_prompts", 100]
    words += ["--checkpoint.enable", "False", *options]
    assert train([str(word) for word in words]) == 0
    return read_scalars(out)["validation/accuracy"]


@pytest.mark.slow
def test_base_then_sft_then_opd_is_two_commands(tmp_path: Path) -> None:
    """From the student with misconceptions: a few steps on right answers, then its teacher."""
    base = ["--student.hf_path", REPO / "assets/debug/student", "--student.random_init", "False"]
    warm_up = ["--training.steps", 8, "--optimizer.lr", 2e-4, "--lr_scheduler.warmup_steps", 2]
    sft = debug_run(tmp_path / "sft", "debug_teacher.toml", *base, *warm_up)
    teacher = ["--teacher.hf_path", REPO / "assets/debug/teacher", "--training.steps", 8]
    start = ["--student.hf_path", tmp_path / "sft" / "hf" / "latest", "--rollout.group_size", 1]
    opd = debug_run(tmp_path / "opd", "debug.toml", *start, *teacher)
    assert sft[0] < 0.4 and sft[8] > sft[0] + 0.1
    assert opd[0] == pytest.approx(sft[8], abs=0.05)  # the export is what was measured
    assert opd[8] > opd[0] + 0.1 and opd[8] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "fraction", "group_size"), [("forward_kl", 0.0, 1), ("jsd", 0.5, 2)]
)
def test_offline_distillation_and_a_mixture_learn(
    tmp_path: Path, objective: str, fraction: float, group_size: int
) -> None:
    options = ["--student.hf_path", REPO / "assets/debug/student", "--training.steps", 8]
    options += ["--teacher.hf_path", REPO / "assets/debug/teacher", "--optimizer.lr", 4e-4]
    options += ["--distill.objective", objective, "--rollout.on_policy_fraction", fraction]
    accuracy = debug_run(tmp_path, "debug.toml", *options, "--rollout.group_size", group_size)
    assert accuracy[0] < 0.4 and accuracy[8] > accuracy[0] + 0.15


# ----------------------------------------------------------------- student.eos_token


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The student ends with <eos>, the teacher with <|im_end|> or <eos>."""
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world.student, seed=1, extra=(END,), eos_ids=[1])
    ids = AutoTokenizer.from_pretrained(world.student).get_vocab()
    make_model(world.teacher, seed=2, extra=(END,), eos_ids=[ids[END], 1])
    return world


@pytest.fixture(scope="module")
def warm(world: World) -> Path:
    """SFT with the teacher's end; its export."""
    options = ["--student.eos_token", END, *SFT, *BRIEF]
    assert train(world.argv("sft", *options)) == 0
    return world.folder / "sft" / "hf" / "latest"


def test_the_data_sets_responses_get_that_end(world: World) -> None:
    end = AutoTokenizer.from_pretrained(world.student).get_vocab()[END]
    options = ["--distill.objective", "jsd", "--rollout.on_policy_fraction", 0.5, *BRIEF]
    options += ["--rollout.max_new_tokens", 16, "--student.eos_token", END]
    assert train(world.argv("mixed", *options)) == 0
    rows = [row for rows in read_rollouts(world.folder / "mixed").values() for row in rows]
    given = [row for row in rows if "\n####" in row["response"]]
    assert given and all(row["response_tokens"][-1] == end for row in given)


def test_the_export_ends_with_either(world: World, warm: Path) -> None:
    end = AutoTokenizer.from_pretrained(world.student).get_vocab()[END]
    assert GenerationConfig.from_pretrained(warm).eos_token_id == [end, 1]
    assert json.loads((warm / "config.json").read_text())["eos_token_id"] == [end, 1]
    tokenizer = AutoTokenizer.from_pretrained(warm)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, end)
    check_unchanged(warm)
    # The student's own folder has not changed.
    assert AutoTokenizer.from_pretrained(world.student).eos_token == "<eos>"


def test_transformers_stops_there(world: World, warm: Path) -> None:
    """The token is made the likeliest: one is all that `generate` writes."""
    model = load_hf(warm)
    end = model.generation_config.eos_token_id[0]
    with torch.no_grad():
        model.lm_head.weight[end] = 0.0
        hidden = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        model.lm_head.weight[end] = 100 * hidden
    assert hf_greedy(model, [5, 6, 7], 8) == [end]


def test_opd_on_the_export_needs_no_option(world: World, warm: Path) -> None:
    warning = "student ends with"
    assert train(world.argv("after", "--student.hf_path", warm, *BRIEF)) == 0
    assert warning not in read_log(world.folder / "after")
    assert train(world.argv("cold", *BRIEF)) == 0
    assert warning in read_log(world.folder / "cold")


# ------------------------------------------------------------------------ hf/latest


def test_latest_leads_to_the_newest_export(tmp_path: Path) -> None:
    for step in (2, 10, 4):  # an older run's step-10 may still be there: the newest counts
        (tmp_path / f"step-{step}").mkdir()
        link_latest(tmp_path, step)
        assert (tmp_path / "latest").readlink() == Path(f"step-{step}")
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "step-4", "step-10", "latest"}
    link_latest(tmp_path, 0)
    assert not (tmp_path / "latest").is_symlink()


def test_no_link_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "step-2").mkdir()
    (tmp_path / "latest").mkdir()  # not made by this program
    (tmp_path / "latest" / "file").touch()
    link_latest(tmp_path, 2)
    assert (tmp_path / "latest" / "file").exists()
    assert "no link to step-2" in caplog.text
