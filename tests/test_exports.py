"""Exports in other programs: the hub reads the model card, vLLM reads the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_world import REPO, hf_greedy, load_hf, make_world, train
from transformers import AutoTokenizer

from opd_titan.checkpoint.model_card import model_card
from opd_titan.config import JobConfig, load_config
from opd_titan.config.resolve import resolve

SCALARS = {
    "validation/accuracy": 0.8125,
    "validation/teacher_accuracy": 0.9,
    "validation/gap_recovered": 0.75,
    "kl/student_teacher": 0.0123,
    "loss/policy": 1.0,
}


def gsm8k(**changes: str) -> JobConfig:
    recipe = ["--job.config_file", str(REPO / "train_configs" / "qwen3_0.6b_gsm8k.toml")]
    options = [f"--{name}={value}" for name, value in changes.items()]
    return load_config([*recipe, *options])


# --------------------------------------------------------------------- the model card


def test_the_hub_reads_base_model_data_and_result() -> None:
    card = ModelCard(model_card(resolve(gsm8k(), "cpu", 1), 200, SCALARS))
    data = card.data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert data.datasets == ["openai/gsm8k"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.8125)
    assert (result.dataset_type, result.dataset_split) == ("openai/gsm8k", "test")
    rows = [line.strip("| ").split(" | ", 1) for line in card.text.splitlines()]
    cells = dict(row for row in rows if len(row) == 2)
    assert cells["teacher"] == "Qwen/Qwen3-1.7B" and cells["steps"] == "200"
    assert cells["validation/gap_recovered"] == "0.7500"
    assert cells["kl/student_teacher"] == "0.0123" and "loss/policy" not in cells
    for package in ("torch", "transformers"):
        assert cells[package] == version(package)


def test_the_recipe_in_it_gives_the_same_config(tmp_path: Path) -> None:
    config = gsm8k(**{"job.description": 'a "b" | c'})
    text = model_card(resolve(config, "cpu", 1), 1, {}).split("```toml\n")[1].split("```")[0]
    (tmp_path / "again.toml").write_text(text)
    assert load_config(["--job.config_file", str(tmp_path / "again.toml")]) == config


@pytest.mark.parametrize("description", ["", "a: [b", "---", "x\n---\ny: 1", "# {x} | 'y' \"z\""])
def test_no_description_breaks_it(description: str, tmp_path: Path) -> None:
    config = gsm8k(**{"job.description": description, "student.hf_path": str(tmp_path)})
    config.data.path = str(tmp_path / "a|b.jsonl")
    for scalars in (SCALARS, {}):
        card = ModelCard(model_card(resolve(config, "cpu", 1), 1, scalars))
        # The hub takes no local paths as ids.
        assert card.data.base_model is None and card.data.datasets is None
        assert card.data.library_name == "transformers"
        assert bool(card.data.eval_results) == bool(scalars)
        assert str(tmp_path) in card.text and "a\\|b.jsonl" in card.text


def test_a_card_has_no_accuracy_of_other_weights(tmp_path: Path) -> None:
    """Steps 0, 2 and 3 are validated; steps 1, 2 and 3 are exported."""
    argv = make_world(tmp_path).argv("run", "--training.steps", 2)
    often = [*argv, "--export.interval", "1", "--validation.interval", "2"]
    assert train(often) == 0
    assert train([*often, "--training.steps", "3"]) == 0
    for step, known in ((1, False), (2, True), (3, True)):
        folder = tmp_path / "run" / "hf" / f"step-{step}"
        card = ModelCard((folder / "README.md").read_text())
        assert bool(card.data.eval_results) == known, step
        assert ("validation/accuracy" in card.text) == known
        assert "kl/student_teacher" in card.text


# ------------------------------------------------------------------------------- vLLM


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug student after a few steps."""
    out = tmp_path_factory.mktemp("run")
    assets = REPO / "assets" / "debug"
    words: list[Any] = ["--job.config_file", REPO / "train_configs" / "debug.toml"]
    words += ["--job.dump_folder", out, "--student.hf_path", assets / "student"]
    words += ["--teacher.hf_path", assets / "teacher", "--data.path", assets / "data"]
    words += ["--training.steps", 2, "--rollout.prompts_per_step", 8]
    words += ["--validation.enable", "False", "--checkpoint.enable", "False"]
    assert train([str(word) for word in words]) == 0
    return out / "hf" / "latest"


PROMPTS = [
    "Question: Ben gets 29 coins a day. How many coins does Ben have after 2 days?\n"
    "Answer: Let's solve this step by step.\n",
    "Question: A shop sold 13 coins a day. How many coins did it sell in 6 days?\n"
    "Answer: Let's solve this step by step.\n",
]
# vLLM in a process of its own: it starts others and changes settings of torch.
SAMPLE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, limit = json.loads(sys.argv[1])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    sampled = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], SamplingParams(temperature=0, max_tokens=limit)
    )
    print("FOUND", json.dumps([list(s.outputs[0].token_ids) for s in sampled]))
"""


# vLLM pins its own torch, so it often has a Python of its own.
VLLM_PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if find_spec("vllm") else "")


@pytest.mark.slow
@pytest.mark.skipif(
    not VLLM_PYTHON,
    reason="vLLM is not installed here, and VLLM_PYTHON names no Python that has it",
)
def test_vllm_samples_from_it_as_transformers_does(export: Path, tmp_path: Path) -> None:
    tokenizer, limit = AutoTokenizer.from_pretrained(export), 32
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    model = load_hf(export)
    expected = [hf_greedy(model, ids, limit) for ids in prompts]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in expected)
    (tmp_path / "sample.py").write_text(SAMPLE)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [VLLM_PYTHON, "sample.py", json.dumps([str(export.resolve()), prompts, limit])],
        env={**env, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert json.loads(line.removeprefix("FOUND ")) == expected
