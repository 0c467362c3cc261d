"""Update, scoring and whole steps of the trainer, and the debug recipe.

The trainer is the program's own. Its models have true shapes and random weights, and the tokenizer
of the debug recipe, which needs no download.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import DEBUG, NO_PAUSES, REPO, Record, open_trainer, read_scalars, words
from qwen3_shapes import MINIATURE, write_model
from setting import Setting, draw_weights
from transformers import AutoModelForCausalLM

from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.head import CHUNK_BYTES
from opd_titan.models.attention import PackedAttention
from opd_titan.models.transforms import num_compiled_graphs
from opd_titan.training import models

PROMPT = 128  # tokens
STEPS = 40  # as in train_configs/debug.toml


def sizes(s: Setting) -> Record:
    """Return the tokens of a sequence and of micro-batches, and the numbers of micro-batches."""
    if s.miniature:
        return {"prompt": 16, "sequence": 64, "budgets": (128, 256), "counts": (2,)}
    return {"prompt": PROMPT, "sequence": 1024, "budgets": (4096, 8192), "counts": (2, 8)}


def random_trainer(s: Setting, student: str, teacher: str = "", **options: object) -> Any:
    """Return the trainer of a job with random models.

    Args:
        student, teacher: sizes; an empty one has a single layer.
        options: of the program, with "__" in place of the dot.
    """
    folder = Path(tempfile.mkdtemp())
    found: Record = NO_PAUSES | {
        "job.dump_folder": folder / "out",
        "data.path": _write_prompts(folder),
        "data.dataset": "prompts",
        "data.template": "raw",
        "training.max_tokens_per_microbatch": max(sizes(s)["budgets"]),
        "activation_checkpoint.mode": "none",
        "compile.enable": "off",
        "metrics.sample_rollouts": 0,
        "metrics.enable_tensorboard": "false",
    }
    for role, size in (("student", student), ("teacher", teacher)):
        changes: Record = MINIATURE if s.miniature else {}
        changes = changes | ({} if size else {"num_hidden_layers": 1})
        model = write_model(size or "0.6B", folder / role, DEBUG / "student", **changes)
        found |= {f"{role}.hf_path": model, f"{role}.random_init": "true"}
    found |= {name.replace("__", "."): value for name, value in options.items()}
    models.random_init_weights = draw_weights  # the program draws on the host, which is slow
    return open_trainer(words(found))


def _write_prompts(folder: Path) -> Path:
    """Write prompts of about `PROMPT` tokens: four of the debug recipe's questions each."""
    lines = (DEBUG / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    rows = [{"prompt": " ".join(questions[i : i + 4])} for i in range(0, 1024, 4)]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_samples(s: Setting, budget: int, count: int, vocab: int) -> list[Sample]:
    """Return sequences for `count` micro-batches, with log-probs as if they had been scored."""
    prompt, sequence = sizes(s)["prompt"], sizes(s)["sequence"]
    samples = []
    for i in range(count * (budget // sequence)):
        ids = torch.randint(vocab, (sequence,)).tolist()
        student, teacher = (torch.randn(2, sequence - prompt) * 0.3 - 11.0).unbind()
        both = {"student_logprobs": student, "teacher_logprobs": teacher}
        question = Prompt(i, "", tuple(ids[:prompt]))
        samples.append(Sample(question, 0, ids[prompt:], "length", **both))
    return samples


def fed_in(samples: list[Sample]) -> list[int]:
    """Return the tokens of each sequence that go through a model: all but the last."""
    return [s.num_tokens - 1 for s in samples]


def responses(samples: list[Sample]) -> int:
    return sum(len(s.response_ids) for s in samples)


# ------------------------------------------------------------- update, scoring, step


def measure_update(s: Setting, size: str, compile: bool) -> None:
    """Measure updates of each number of micro-batches of each size; profile one micro-batch."""
    trainer = random_trainer(s, size, compile__enable="on" if compile else "off")
    phases, args = trainer.phases, trainer.setup.sources["student"].args
    phases.step, rate = 1, trainer.setup.learning_rate(1)
    for budget in sizes(s)["budgets"]:
        trainer.config.training.max_tokens_per_microbatch = budget
        for count in sizes(s)["counts"]:
            samples = random_samples(s, budget, count, args.vocab_size)
            flops = 3.0 * args.forward_flops(fed_in(samples), responses(samples))
            s.reset_memory()
            timed = s.seconds(partial(phases.update, phases.plan(samples), rate))
            rates = s.rates(timed["median_s"], flops, sum(fed_in(samples)))
            how = {"budget": budget, "microbatches": count, "compiled": num_compiled_graphs()}
            first = {"first_s": timed["first_s"]}  # it may compile
            s.emit({"figure": "update", **how, **first, **rates, **s.peak_memory()})
    plan = phases.plan(random_samples(s, budget, 1, args.vocab_size))
    kernels = s.kernels(partial(phases.update, plan, rate))
    s.emit({"figure": "microbatch kernels", "budget": budget, **kernels})


def measure_score(s: Setting, size: str) -> None:
    trainer = random_trainer(s, "", size)
    args = trainer.setup.sources["teacher"].args
    for budget in sizes(s)["budgets"]:
        trainer.config.training.max_tokens_per_microbatch = budget
        samples = random_samples(s, budget, max(sizes(s)["counts"]), args.vocab_size)
        flops = args.forward_flops(fed_in(samples), responses(samples))
        s.reset_memory()
        plan = trainer.phases.plan(samples)
        seconds = s.seconds(partial(trainer.phases.score, "teacher", plan))["median_s"]
        rates = s.rates(seconds, flops, sum(fed_in(samples)))
        s.emit({"figure": "score", "budget": budget, **rates, **s.peak_memory()})


def measure_step(s: Setting, objective: str) -> None:
    """Measure two steps of 0.6B taught by 4B, after one to warm up."""
    trainer = random_trainer(
        s,
        "0.6B",
        "4B",
        distill__objective=objective,
        rollout__prompts_per_step=4 if s.miniature else 32,
        rollout__group_size=1,
        rollout__max_new_tokens=24 if s.miniature else 1024,
        rollout__ignore_eos="true",
    )
    steps = []
    for number in range(3):
        trainer.train_step()
        scalars = trainer.recorder.metrics.last
        # "time/update(s)" becomes "update".
        row = {n[5:-3]: v for n, v in scalars.items() if n.startswith("time/")}
        row |= {n: v for n, v in scalars.items() if n.startswith(("memory/", "mfu/", "mbu/"))}
        row["logprob_gap_max"] = scalars["policy/logprob_gap_max"]
        s.emit({"figure": f"step {number}" if number else "warm-up", **row})
        steps.append(row)
    medians = {key: statistics.median(row[key] for row in steps[1:]) for key in steps[0]}
    s.emit({"figure": "step", **medians})


# ----------------------------------------------------------------------- limits


def measure_device(s: Setting) -> None:
    """Measure a plain copy, a plain read and a plain product."""
    n = 8192 if s.on_cuda else 256
    product = s.rates(s.product_seconds(n, n, n)[0], 2.0 * n**3)
    rates = {f"{name}_gb_per_s": value / 1e9 for name, value in s.bandwidths().items()}
    s.emit({"figure": "limits of the device", **rates, **product})


def measure_limit(s: Setting, size: str) -> None:
    """Measure a model's plain products, forward and backward, and its attention, and add them."""
    args = s.shape(size).args
    samples = random_samples(s, max(sizes(s)["budgets"]), 1, args.vocab_size)
    lengths, rows = fed_in(samples), responses(samples)
    tokens = sum(lengths)
    heads, groups = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    products = (
        (1, args.dim, heads),  # wq
        (2, args.dim, groups),  # wk, wv
        (1, heads, args.dim),  # wo
        (2, args.dim, args.ffn_dim),  # w1, w3
        (1, args.ffn_dim, args.dim),  # w2
    )
    layers = [0.0, 0.0]
    for count, inside, outside in products:
        found = s.product_seconds(tokens, inside, outside)
        layers = [x + args.n_layers * count * f for x, f in zip(layers, found, strict=True)]
    attention = _attention_seconds(s, args, lengths)
    # A chunk of the head has as many rows as its memory allows.
    chunk = min(rows, max(1, CHUNK_BYTES[s.device.type] // (4 * args.vocab_size)))
    head = [x * rows / chunk for x in s.product_seconds(chunk, args.dim, args.vocab_size)]
    flops = args.forward_flops(lengths, rows)
    forward, backward = (sum(parts) for parts in zip(layers, attention, head, strict=True))
    s.emit({"figure": "limit of score", **s.rates(forward, flops, tokens)})
    parts = {"layers_s": sum(layers), "attention_s": sum(attention), "head_s": sum(head)}
    s.emit({"figure": "limit of update", **parts, **s.rates(forward + backward, 3 * flops, tokens)})


def _attention_seconds(s: Setting, args: Any, lengths: list[int]) -> tuple[float, float]:
    """Return the seconds of the program's packed attention in all layers, forward and backward."""
    q, k, v = (
        torch.randn(sum(lengths), n, args.head_dim, device=s.device, dtype=torch.bfloat16)
        for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)
    )
    attend = PackedAttention(lengths, s.device)

    @torch.no_grad()
    def forward() -> None:
        attend(q, k, v, 0)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, 0)
        torch.autograd.grad(out, leaves, out)

    there, whole = (args.n_layers * s.seconds(w, inner=8)["median_s"] for w in (forward, both))
    return there, whole - there


# -------------------------------------------------------------- the debug recipe


def train_debug_recipe(s: Setting) -> None:
    """Run half of its steps as a user does, then the others by a process that resumes."""
    small = ("rollout.prompts_per_step", 4), ("rollout.max_new_tokens", 8)
    small += ("validation.max_prompts", 4), ("validation.max_new_tokens", 8)
    steps, options = (4, dict(small)) if s.miniature else (STEPS, {})
    folder, seconds = Path(tempfile.mkdtemp()), []
    for last in (steps // 2, steps):
        start = time.perf_counter()
        job = {"job.dump_folder": folder, "training.steps": last}
        _train(options | job | {"validation.interval": steps // 2})
        seconds.append(time.perf_counter() - start)
        s.emit({"figure": f"recipe, to step {last}", "seconds": seconds[-1]})
    scalars = read_scalars(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf" / "latest")
    found: Record = {
        "resumed": [*scalars["lr"]] == [*range(1, steps + 1)],
        "exported": all(bool(p.isfinite().all()) for p in model.parameters()),
        "logprob_gap_max": max(scalars["policy/logprob_gap_max"].values()),
        "step_s": scalars["time/step(s)"][steps],
        "recipe_s": sum(seconds),
    }
    for value in [*scalars.get("validation/gap_recovered", {}).values()][-1:]:
        found["gap_recovered"] = value  # in miniature there may be no gap
    s.emit({"figure": "recipe", **found, "ok": found["resumed"] and found["exported"]})


def _train(options: Record) -> None:
    """Run the job in this process's group, so that it ends when the stage does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if k != "CONFIG_FILE"} | {"PATH": path, "NGPU": "1"}
    subprocess.run(["./scripts/run_train.sh", *words(options)], cwd=REPO, env=env, check=True)
