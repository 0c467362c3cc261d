"""The planner's memory figure beside that of real runs on this machine's CPU.

    python benchmarks/plan_accuracy.py                  # every case
    python benchmarks/plan_accuracy.py --only tp hsdp   # some of them

Random models with the debug recipe's tokenizer and data, large enough for tensors to dominate.
Measured is the largest resident memory of a process ever (`memory/max_active(GiB)`, the largest of
all ranks). glibc keeps freed blocks of up to 32 MiB for itself by default, which no count of
tensors can know; MALLOC_TRIM_THRESHOLD_ turns that off. `--default-malloc` measures with it on.

Exit code 1 if a figure is more than 10 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DEBUG = REPO / "assets" / "debug"
TOLERANCE = 0.10
PROMPT_TOKENS = 33  # the mean of the debug recipe's data

# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size
_SIZES = {
    "small": (512, 4, 8, 1536, 8192),
    "medium": (512, 6, 8, 1536, 16384),
    "student": (768, 6, 12, 2304, 32768),
    "teacher": (1024, 8, 16, 3072, 32768),
}


@dataclass(frozen=True)
class Case:
    """Options beside the common ones; `student` and `teacher` name rows of _SIZES."""

    processes: int = 1
    options: str = ""
    student: str = "student"
    teacher: str = "teacher"


_SHARDS = "--parallelism.data_parallel_shard_degree"
_COPIES = "--parallelism.data_parallel_replicate_degree"
_TP = "--parallelism.tensor_parallel_degree"
# Many tokens in a micro-batch, so that what the backward needs outweighs the weights.
_LONG = "--rollout.prompts_per_step 16 --rollout.group_size 2 --rollout.max_new_tokens 32"
_AC = "--activation_checkpoint.mode"
CASES: dict[str, Case] = {
    "1 process": Case(),
    "fsdp 2": Case(2),
    "tp 2": Case(2, f"{_TP} 2"),
    "fsdp 2 x tp 2": Case(4, f"{_TP} 2"),
    "hsdp 2 x 2": Case(4, f"{_COPIES} 2 {_SHARDS} 2"),
    "ddp 2": Case(2, f"{_COPIES} 2 {_SHARDS} 1"),
    "micro-batches": Case(2, "--training.max_tokens_per_microbatch 128"),
    "mini-batches": Case(1, "--distill.minibatches 2"),
    "reference": Case(1, "--reference.coef 0.5"),
    "sft": Case(
        1,
        "--distill.objective sft --rollout.on_policy_fraction 0 --rollout.group_size 1",
    ),
    "bf16": Case(2, "--training.dtype bfloat16"),
    "long, no checkpointing": Case(1, f"{_LONG} {_AC} none", "small", "small"),
    "long, selective": Case(1, f"{_LONG} {_AC} selective", "small", "small"),
    "long, full": Case(1, f"{_LONG} {_AC} full", "small", "small"),
    # As much of one as of the other, in little time: the test suite's.
    "fsdp 2, selective": Case(
        2, f"--rollout.prompts_per_step 16 {_AC} selective", "medium", "medium"
    ),
}
_COMMON = (
    "--student.random_init true --teacher.random_init true --rollout.prompts_per_step 4 "
    "--rollout.group_size 2 --rollout.max_new_tokens 16 --rollout.ignore_eos true "
    "--validation.enable false --checkpoint.enable false --training.steps 2"
)


def write_model(size: str, folder: Path) -> Path:
    """A folder without weights: the debug student's tokenizer, and its config with these sizes."""
    shutil.copytree(DEBUG / "student", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    hidden, layers, heads, ffn, vocab = _SIZES[size]
    config |= {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 64}
    path.unlink()  # a copied one may be read-only
    path.write_text(json.dumps(config | {"vocab_size": vocab}))
    return folder


def arguments(case: Case, folder: Path) -> list[str]:
    """The program's, for a case whose models and output are made in `folder`."""
    words = [*_COMMON.split(), *case.options.split()]
    for role in ("student", "teacher"):
        words += [f"--{role}.hf_path", str(write_model(getattr(case, role), folder / role))]
    return [*words, "--job.dump_folder", str(folder / "out")]


def planned(case: Case, options: list[str]) -> float:
    """GiB of one process."""
    command = [sys.executable, "-m", "opd_titan.plan", "--gpu", "cpu"]
    command += ["--world-size", str(case.processes), "--prompt-tokens", str(PROMPT_TOKENS)]
    command += ["--job.config_file", str(REPO / "train_configs" / "debug.toml"), *options]
    done = _run(command, os.environ)
    return float(re.search(r"PEAK +([\d.]+)", done).group(1))


def measured(case: Case, options: list[str], trim: bool) -> float:
    """GiB of the largest process of a real run."""
    folder = Path(options[options.index("--job.dump_folder") + 1])
    shutil.rmtree(folder, ignore_errors=True)
    env = {**os.environ, "NGPU": str(case.processes)}
    env.setdefault("OMP_NUM_THREADS", "1")
    if trim:
        env["MALLOC_TRIM_THRESHOLD_"] = str(2**25)
    recipe = ["--data.path", str(DEBUG / "data")]
    _run([str(REPO / "scripts" / "run_train.sh"), *options, *recipe], env)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return max(e.value for e in events.Scalars("memory/max_active(GiB)"))


def _run(command: list[str], env: dict[str, str]) -> str:
    env = {**env, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True)
    if done.returncode not in (0, 1) or (done.returncode and "PEAK" not in done.stdout):
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--default-malloc", action="store_true", help="measure that as well")
    a = parser.parse_args()
    print("| case | planned GiB | measured GiB | planned / measured | measured, default malloc |")
    print("|---|--:|--:|--:|--:|")
    wrong = 0
    for name in a.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            options = arguments(case, Path(folder))
            plan = planned(case, options)
            real = measured(case, options, trim=True)
            loose = f"{measured(case, options, trim=False):.2f}" if a.default_malloc else ""
        wrong += abs(plan / real - 1) > TOLERANCE
        print(f"| {name} | {plan:.2f} | {real:.2f} | {plan / real:.2f} | {loose} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
