"""Tiny models, data and a recipe, and ways to run the program on them.

world = make_world(tmp_path)
assert train(world.argv("out")) == 0
rows = read_rollouts(world.folder / "out")
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_utils import start_ranks
from tiny_tokenizer import tiny_tokenizer
from tokenizers import decoders

REPO = Path(__file__).resolve().parent.parent
TIMEOUT = 600
# The second one ends responses too, but is not the tokenizer's own: both must count.
EOS_IDS = [1, 60]
# On CUDA the allocator's peaks reset each step; all these are measured, not computed.
MEASURED = ("rollout/idle_share", "rollout/preempted", "time/", "throughput/", "memory/", "charts/")

RECIPE = """
[student]
hf_path = "{folder}/student"
[teacher]
hf_path = "{folder}/teacher"
[data]
path = "{folder}/data"
[rollout]
prompts_per_step = 4
group_size = 2
max_new_tokens = 12
[optimizer]
lr = 1e-2
[training]
steps = 4
[checkpoint]
interval = 2
keep_latest_k = 0
[validation]
interval = 2
max_prompts = 6
[metrics]
sample_rollouts = -1
"""


@dataclass(frozen=True)
class World:
    folder: Path

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    def argv(self, out: str, *options: Any) -> list[str]:
        """Arguments of the program; the output goes to the folder `out` of this world."""
        where = ["--job.config_file", self.recipe, "--job.dump_folder", self.folder / out]
        return [str(word) for word in (*where, *options)]


def make_world(folder: Path) -> World:
    world = World(folder)
    shutil.copytree(_original().name, folder, dirs_exist_ok=True)
    world.recipe.write_text(RECIPE.format(folder=folder))
    return world


@functools.cache
def _original() -> tempfile.TemporaryDirectory[str]:
    """Make the models and the data that the worlds of this process are copies of."""
    folder = tempfile.TemporaryDirectory(prefix="opd_titan_world_", ignore_cleanup_errors=True)
    world = World(Path(folder.name))
    make_model(world.student, seed=1)
    make_model(world.teacher, seed=2)
    make_sums(world.folder / "data" / "train.jsonl", 22, seed=1)
    make_sums(world.folder / "data" / "test.jsonl", 8, seed=2)
    return folder


def make_model(
    folder: Path,
    seed: int,
    *,
    eos_ids: list[int] | None = None,
    chat: bool = True,
    extra: tuple[str, ...] = (),
    **sizes: Any,
) -> None:
    """A random Qwen3 with a character-level tokenizer, as transformers saves them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_tokenizer(extra, chat)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tiny = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # peaked enough for teacher and student to disagree
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**tiny, **sizes}))
    with torch.no_grad():  # numbers are likely, so that there is something to grade
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list("0123456789"))] *= 2.0
    model.generation_config.eos_token_id = eos_ids or EOS_IDS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_sums(path: Path, count: int, seed: int) -> None:
    """One-digit sums in GSM8K's format, all different."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    rows = []
    for a, b in random.Random(seed).sample(pairs, count):
        answer = f"{a}+{b}={a + b}\n#### {a + b}"
        rows.append({"question": f"What is {a}+{b}?", "answer": answer})
    write_rows(path, rows)


def make_gradable(world: World, teacher: Path) -> None:
    """`graded.jsonl`: the test questions, with answers that the models do give, so that some are
    right: every fourth is the student's, the others the teacher's.
    """
    from transformers import AutoTokenizer

    from opd_titan.grading.answers import extract_answer

    models = [load_hf(world.student), load_hf(teacher)]
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    path = world.folder / "data" / "test.jsonl"
    questions = [json.loads(line)["question"] for line in path.read_text().splitlines()]
    rows = []
    for i, question in enumerate(questions):
        ids = tokenizer(f"<user>{question}<assistant>()")["input_ids"]
        answers = [extract_answer(tokenizer.decode(hf_greedy(m, ids, 12))) for m in models]
        rows.append({"question": question, "answer": f"#### {answers[i % 4 > 0] or 7}"})
    write_rows(world.folder / "graded.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------ running


def train(argv: list[str]) -> int:
    """Run the program in this process, as `python -m opd_titan.train` would."""
    from opd_titan.train import main

    return run_here(main, argv)


def evaluate(argv: list[str]) -> int:
    """The same for `python -m opd_titan.evaluate`."""
    from opd_titan.evaluate import main

    return run_here(main, argv)


def run_here(main: Callable[[list[str]], int], argv: list[str]) -> int:
    import torch.distributed as dist

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        return main(argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_meshes()
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def _forget_meshes() -> None:
    """Clear DTensor's sharding cache, which refers to the mesh of the last world.

    The next world's mesh may be equal to that one, but the old one's groups are gone.
    """
    from torch.distributed.tensor import debug

    for which in ("python", "fast_path"):  # torch 2.10 may have only one
        getattr(debug, f"_clear_{which}_sharding_prop_cache", lambda: None)()


def train_on(
    ranks: int,
    jobs: list[list[str]],
    codes: Sequence[int] | None = None,
    stderr: Path | None = None,
) -> None:
    """Run the jobs one after another in a gloo world of this many processes.

    Args:
        codes: each job's exit code on every rank; 0 if left out.
        stderr: a file for the standard errors of all ranks.
    """
    ports = [_free_port() for _ in jobs]
    world = start_ranks(_run_jobs, ranks, ranks, ports, jobs, codes or [0] * len(jobs), stderr)
    deadline = time.monotonic() + TIMEOUT
    while not world.join(TIMEOUT):
        if time.monotonic() > deadline:
            for pid in world.pids():
                os.kill(pid, signal.SIGABRT)  # each rank prints its stack
            pytest.fail(f"a world of {ranks} ranks did not end in {TIMEOUT} s")


def _run_jobs(
    rank: int,
    ranks: int,
    ports: list[int],
    jobs: list[list[str]],
    codes: list[int],
    stderr: Path | None,
) -> None:
    faulthandler.enable()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(ranks)
    os.environ["MASTER_ADDR"] = "localhost"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if stderr:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    for port, argv, expected in zip(ports, jobs, codes, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        assert train(argv) == expected, argv


def start(argv: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start `python -m opd_titan.train`."""
    return subprocess.Popen(
        [sys.executable, "-m", "opd_titan.train", *argv],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.DEVNULL,
        text=True,
        **options,
    )


def script(argv: list[str], processes: int = 1) -> subprocess.Popen[str]:
    """Start `scripts/run_train.sh` with these arguments (the recipe goes to CONFIG_FILE)."""
    flag, recipe, *rest = argv
    assert flag == "--job.config_file"
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(REPO / "scripts" / "run_train.sh"), *rest],
        env={**os.environ, "PATH": path, "CONFIG_FILE": recipe, "NGPU": str(processes)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _free_port() -> int:
    """Return a free port that the system does not give to connections.

    The system takes the ports of connections from 32768 up (gloo makes dozens of them for each
    job): a port from there may be taken by the time that its job begins.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as s, suppress(OSError):
            s.bind(("localhost", port))
            return port


# ------------------------------------------------------------------ reading


def read_rollouts(out: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of each step."""
    return read_rows(out / "rollouts")


def read_rows(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of each step in a folder of rollouts."""
    found = {}
    for path in folder.iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[int(path.stem.removeprefix("step-"))] = rows
    return dict(sorted(found.items()))


def rollout_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "rollouts").iterdir()}


def read_scalars(out: Path, *, measured: bool = True) -> dict[str, dict[int, float]]:
    """Value by step of each scalar, as TensorBoard shows them; no step may come twice.

    Args:
        measured: False leaves out times and memory, which no two runs share.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tb"), size_guidance={"scalars": 0}).Reload()
    scalars: dict[str, dict[int, float]] = {}
    for name in events.Tags()["scalars"]:
        if not measured and name.startswith(MEASURED):
            continue
        values = events.Scalars(name)
        scalars[name] = {event.step: event.value for event in values}
        assert len(scalars[name]) == len(values), f"{name}: a step comes twice"
    return scalars


def read_weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "hf" / f"step-{step}" / "model.safetensors")


def read_log(out: Path, rank: int = 0) -> str:
    return (out / "logs" / f"rank-{rank}.log").read_text()


def assert_same_run(a: Path, b: Path, step: int) -> None:
    """Assert bitwise equal rollouts, scalars (except measured ones) and final weights."""
    assert rollout_bytes(a) == rollout_bytes(b)
    assert read_scalars(a, measured=False) == read_scalars(b, measured=False)
    weights_a, weights_b = read_weights(a, step), read_weights(b, step)
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


# -------------------------------------------------------------- transformers


def load_hf(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def hf_logprobs(
    model: Any, prompt_ids: list[int], response_ids: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """transformers' log-probs of each response token."""
    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    logprobs = (logits[len(prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(response_ids)), torch.tensor(response_ids)]


@torch.no_grad()
def hf_greedy(model: Any, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """Return the response of transformers' `generate`, including the stop token."""
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
    )
    return out[0, len(prompt_ids) :].tolist()


def own_output(out: str) -> str:
    """Return the output without the line that torch 2.10's gloo writes to stdout."""
    return "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]"))
