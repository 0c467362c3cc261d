"""How close is the planner's memory figure to that of real runs on this machine's CPU?

    python benchmarks/plan_accuracy.py                       # all cases
    python benchmarks/plan_accuracy.py --only "tp 2" "bf16"  # some of them

Random models with the debug recipe's tokenizer and data, so large that tensors dominate. Measured
is the largest resident memory of any process (`memory/max_active(GiB)`). By default glibc keeps
freed blocks of up to 32 MiB, which no count of tensors can predict, so the runs turn that off with
MALLOC_TRIM_THRESHOLD_; `--default-malloc` also measures them with glibc's default.

Exit code 1: a figure is more than 10 % off.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness import (
    DEBUG,
    NO_PAUSES,
    REPO,
    TUNABLES,
    Record,
    emit,
    machine,
    parser,
    run,
    table,
    train,
    words,
)
from qwen3_shapes import write_model

TOLERANCE = 0.10
PROMPT_TOKENS = 33  # the mean of the debug recipe's data


def sizes(width: int, layers: int, vocab: int) -> Record:
    """Return the changed keys of a config.json, with the special tokens of the debug models."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "intermediate_size": 3 * width,
        "vocab_size": vocab,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 443,
        "pad_token_id": 441,
    }


SMALL, MEDIUM = sizes(512, 4, 8192), sizes(512, 6, 16384)


class Case(NamedTuple):
    """A number of processes, the options beside the common ones, and the models' sizes."""

    processes: int = 1
    options: Record = {}
    student: Record = sizes(768, 6, 32768)
    teacher: Record = sizes(1024, 8, 32768)


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
    "long, no checkpointing": Case(1, {**LONG, AC: "none"}, SMALL, SMALL),
    "long, selective": Case(1, {**LONG, AC: "selective"}, SMALL, SMALL),
    "long, full": Case(1, {**LONG, AC: "full"}, SMALL, SMALL),
    # Weights and activations are of about the same size, and it is quick: for the test suite.
    "fsdp 2, selective": Case(2, {"rollout.prompts_per_step": 16, AC: "selective"}, MEDIUM, MEDIUM),
}
COMMON: Record = NO_PAUSES | {
    "job.config_file": REPO / "train_configs" / "debug.toml",
    "data.path": DEBUG / "data",
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 16,
    "rollout.ignore_eos": "true",
    "training.steps": 2,
}


def planned(case: Case, options: Record) -> float:
    """Return the planner's GiB of one process."""
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
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    arguments.add_argument("--default-malloc", action="store_true", help="measure that as well")
    a = arguments.parse_args()
    emit(machine())
    rows: list[Record] = []
    for name in a.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            options = COMMON | case.options
            for role in ("student", "teacher"):
                changes = getattr(case, role)
                model = write_model("0.6B", Path(folder) / role, DEBUG / "student", **changes)
                options |= {f"{role}.hf_path": model, f"{role}.random_init": "true"}
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
