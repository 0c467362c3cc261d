"""The planner's memory figure beside that of real runs on this machine's CPU.

    python benchmarks/plan_accuracy.py                       # all cases
    python benchmarks/plan_accuracy.py --only "tp 2" "bf16"  # some of them

Random models with the debug recipe's tokenizer and data, large enough for tensors to dominate.
Measured is the largest resident memory of any process (`memory/max_active(GiB)`). By default glibc
keeps freed blocks of up to 32 MiB for itself, which no count of tensors can predict, so the runs
turn that off by MALLOC_TRIM_THRESHOLD_; `--default-malloc` measures them with it on as well.

Exit code 1 if a figure is more than 10 % off.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness import REPO, TUNABLES, Record, emit, machine, run, table, train, words
from qwen3_shapes import write_model

DEBUG = REPO / "assets" / "debug"
TOLERANCE = 0.10
PROMPT_TOKENS = 33  # the mean of the debug recipe's data

KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
SIZES = {
    "small": (512, 4, 8, 4, 1536, 8192),
    "medium": (512, 6, 8, 4, 1536, 16384),
    "student": (768, 6, 12, 6, 2304, 32768),
    "teacher": (1024, 8, 16, 8, 3072, 32768),
}
# Of the debug models' config.json.
DEBUG_TOKENS: Record = {"bos_token_id": None, "eos_token_id": 443, "pad_token_id": 441}
DEBUG_TOKENS |= {"head_dim": 64, "max_position_embeddings": 512}


class Case(NamedTuple):
    """Options beside the common ones; `student` and `teacher` name rows of SIZES."""

    processes: int = 1
    options: Record = {}
    student: str = "student"
    teacher: str = "teacher"


COPIES = "parallelism.data_parallel_replicate_degree"
SHARDS = "parallelism.data_parallel_shard_degree"
TP = "parallelism.tensor_parallel_degree"
AC = "activation_checkpoint.mode"
# Many tokens in a micro-batch, so that what the backward needs outweighs the weights.
LONG: Record = {"rollout.prompts_per_step": 16, "rollout.max_new_tokens": 32}
SFT: Record = {"distill.objective": "sft", "rollout.on_policy_fraction": 0, "rollout.group_size": 1}
CASES = {
    "1 process": Case(),
    "fsdp 2": Case(2),
    "tp 2": Case(2, {TP: 2}),
    "fsdp 2 x tp 2": Case(4, {TP: 2}),
    "hsdp 2 x 2": Case(4, {COPIES: 2, SHARDS: 2}),
    "ddp 2": Case(2, {COPIES: 2, SHARDS: 1}),
    "micro-batches": Case(2, {"training.max_tokens_per_microbatch": 128}),
    "mini-batches": Case(1, {"distill.minibatches": 2}),
    "reference": Case(1, {"reference.coef": 0.5}),
    "sft": Case(1, SFT),
    "bf16": Case(2, {"training.dtype": "bfloat16"}),
    "long, no checkpointing": Case(1, {**LONG, AC: "none"}, "small", "small"),
    "long, selective": Case(1, {**LONG, AC: "selective"}, "small", "small"),
    "long, full": Case(1, {**LONG, AC: "full"}, "small", "small"),
    # Weights and activations weigh the same, and it is quick: for the test suite.
    "fsdp 2, selective": Case(
        2, {"rollout.prompts_per_step": 16, AC: "selective"}, "medium", "medium"
    ),
}
COMMON: Record = {
    "job.config_file": REPO / "train_configs" / "debug.toml",
    "student.random_init": "true",
    "teacher.random_init": "true",
    "data.path": DEBUG / "data",
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 16,
    "rollout.ignore_eos": "true",
    "validation.enable": "false",
    "checkpoint.enable": "false",
    "training.steps": 2,
}


def options_of(case: Case, folder: Path) -> Record:
    """Write the case's models to the folder and return the program's options."""
    options = COMMON | case.options
    for role in ("student", "teacher"):
        sizes = dict(zip(KEYS, SIZES[getattr(case, role)], strict=True))
        model = write_model("0.6B", folder / role, DEBUG / "student", **DEBUG_TOKENS, **sizes)
        options[f"{role}.hf_path"] = model
    return options


def planned(case: Case, options: Record) -> float:
    """Return the GiB of one process by the planner."""
    plan = ("-m", "opd_titan.plan", "--gpu", "cpu", "--world-size", case.processes)
    text = run([*plan, "--prompt-tokens", PROMPT_TOKENS, *words(options)], codes=(0, 1))
    return float(re.search(r"PEAK +([\d.]+)", text)[1])


def measured(case: Case, options: Record, **env: str) -> float:
    """Return the GiB of the largest process of a real run."""
    with tempfile.TemporaryDirectory() as out:
        options = options | {"job.dump_folder": out}
        scalars = train(options, 1, case.processes, **TUNABLES, **env)
    return max(scalars["memory/max_active(GiB)"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--default-malloc", action="store_true", help="measure that as well")
    a = parser.parse_args()
    emit(machine())
    rows: list[Record] = []
    for name in a.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            options = options_of(case, Path(folder))
            plan = planned(case, options)
            real = measured(case, options, MALLOC_TRIM_THRESHOLD_=str(2**25))
            row = {"case": name, "planned GiB": plan, "measured GiB": real, "ratio": plan / real}
            if a.default_malloc:
                row["measured, default malloc"] = measured(case, options)
        emit(row)
        rows.append(row)
    print(table(rows))
    return int(any(abs(row["ratio"] - 1.0) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
