"""How long does a step take? Runs of the program with different options, in alternating rounds.

    python benchmarks/step.py trl --data ../shared/data \
        --trl-python /path/to/a/python/with/trl --trl-script ../shared/baselines/trl_opd.py
    python benchmarks/step.py recording --data ../shared/data --threads 1
    python benchmarks/step.py objectives --data ../shared/data
    python benchmarks/step.py full-size --data ../shared/data

trl: beside a step of TRL on the same work, with exact reverse KL; without --trl-python ours alone.
recording: with 0, 1, 4 and all of 16 responses recorded. objectives: each objective.
full-size: the recipe for Qwen3-0.6B taught by Qwen3-1.7B; a CPU needs about 20 GiB.

All but full-size: random Qwen3 (hidden 64, 2 layers, 152k vocabulary, tied), GSM8K prompts through
the chat template, 16 x 64 new tokens, fp32. Options of the program may follow `--`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from harness import NO_PAUSES, REPO, Record, alternate, emit, machine, parser, ratio, table, train
from qwen3_shapes import MINIATURE, SMALL, write_model

COLUMNS = {
    "rollout": "time/rollout(s)",
    "teacher": "time/teacher(s)",
    "update": "time/update(s)",
    "step": "time/step(s)",
    "peak_gib": "memory/max_active(GiB)",
    "logprob_gap_max": "policy/logprob_gap_max",
}
OBJECTIVES = ("policy_gradient", "reverse_kl", "forward_kl", "jsd", "top_k_reverse_kl")
# By comparison, the options of each case.
CASES: dict[str, dict[str, Record]] = {
    "trl": {
        f"{n} recorded": {"distill.objective": "reverse_kl", "metrics.sample_rollouts": n}
        for n in (0, 4)
    },
    "recording": {
        name: {"distill.objective": "policy_gradient", "metrics.sample_rollouts": n}
        for name, n in (("0 recorded", 0), ("1 recorded", 1), ("4 recorded", 4), ("all", -1))
    },
    "objectives": {
        name: {"distill.objective": name, "metrics.sample_rollouts": 0} for name in OBJECTIVES
    },
    "full-size": {"0.6B taught by 1.7B": {}},
}


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("comparison", choices=CASES)
    arguments.add_argument(
        "--data", type=Path, required=True, help="of gsm8k/ and qwen3_tokenizer/"
    )
    arguments.add_argument("--trl-python", help="an interpreter that imports trl")
    arguments.add_argument("--trl-script", type=Path)
    arguments.add_argument("--batch", type=int, help="prompts; default: 16, or 4 at full size")
    arguments.add_argument("--new-tokens", type=int, help="default: 64, or 32 at full size")
    arguments.add_argument("--steps", type=int, help="default: 6, or 2 at full size")
    arguments.add_argument("--rounds", type=int, help="default: 2, or 1 at full size")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument(
        "--miniature", action="store_true", help="tiny models, to try the script"
    )
    arguments.add_argument("options", nargs="*", help="after --: more options of the program")
    a = arguments.parse_args()
    defaults = (4, 32, 2, 1) if a.comparison == "full-size" else (16, 64, 6, 2)
    for name, value in zip(("batch", "new_tokens", "steps", "rounds"), defaults, strict=True):
        setattr(a, name, getattr(a, name) or value)
    return a


def workload(folder: Path, a: argparse.Namespace) -> Record:
    """Write both models to the folder and return the options that all cases have."""
    options: Record = {
        "data.path": a.data / "gsm8k",
        "rollout.prompts_per_step": a.batch,
        "rollout.max_new_tokens": a.new_tokens,
        "training.steps": a.steps,
    }
    sizes = {"student": "0.6B", "teacher": "0.6B"}
    changes: Record = SMALL
    if a.comparison == "full-size":
        options["job.config_file"] = REPO / "train_configs" / "qwen3_0.6b_gsm8k.toml"
        sizes["teacher"], changes = "1.7B", {}
    else:
        options |= {"rollout.group_size": 1, "optimizer.lr": 1e-3}
    if a.miniature:
        changes = MINIATURE | {"vocab_size": 151936, "eos_token_id": 151645}  # the tokenizer's
    for role, size in sizes.items():
        std = {"initializer_range": 0.2} if role == "teacher" and changes else {}
        model = write_model(size, folder / role, a.data / "qwen3_tokenizer", **changes, **std)
        options |= {f"{role}.hf_path": model, f"{role}.random_init": "true"}
    names = (word.removeprefix("--") for word in a.options[::2])
    return options | NO_PAUSES | dict(zip(names, a.options[1::2], strict=True))


def run_ours(name: str, options: Record, threads: int) -> Record:
    """Run a job; return medians over the steps after the first, and the greatest of the rest."""
    with tempfile.TemporaryDirectory() as folder:
        scalars = train(options | {"job.dump_folder": folder}, threads)
    steps = sorted(scalars["time/step(s)"])
    rows = {n: {key: scalars[column][n] for key, column in COLUMNS.items()} for n in steps}
    for number, row in rows.items():
        emit({"case": name, "step_number": number, **row})
    later = [rows[n] for n in steps[1:] or steps]
    found = {key: statistics.median(row[key] for row in later) for key in COLUMNS}
    return found | {
        k: max(row[k] for row in rows.values()) for k in ("peak_gib", "logprob_gap_max")
    }


def run_trl(a: argparse.Namespace) -> Record:
    command = [a.trl_python, str(a.trl_script), "--batch", str(a.batch), "--steps", str(a.steps)]
    command += ["--new-tokens", str(a.new_tokens), "--threads", str(a.threads)]
    with tempfile.TemporaryDirectory() as out:
        # /usr/bin/time writes the child's peak memory to stderr.
        timed = ["/usr/bin/time", "-f", "peak_kib %M", *command, "--out", out]
        done = subprocess.run(timed, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    peak = int(done.stderr.rsplit("peak_kib", 1)[1]) / 2**20
    found = {"rollout": result["gen_s_median"], "step": result["step_s_median"], "peak_gib": peak}
    emit({"case": "TRL", **found})
    return found


def main() -> None:
    a = parse_arguments()
    emit(machine())
    with tempfile.TemporaryDirectory() as folder:
        common = workload(Path(folder), a)
        cases = {
            name: partial(run_ours, name, options | common, a.threads)
            for name, options in CASES[a.comparison].items()
        }
        if a.comparison == "trl" and a.trl_python:
            cases["TRL"] = partial(run_trl, a)
        found = alternate(cases, a.rounds)
    first = next(iter(found.values()))
    rows = []
    for name, results in found.items():
        row: Record = {"case": name}
        row |= {key: [r[key] for r in results] for key in results[0]}
        row["step, ratio"] = ratio(*([r["step"] for r in x] for x in (results, first)))
        if "update" in row:
            both = ([r["teacher"] + r["update"] for r in x] for x in (results, first))
            row["teacher + update, ratio"] = ratio(*both)
        rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
