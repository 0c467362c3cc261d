"""A step of opd_titan beside a step of TRL on the same work.

    python benchmarks/compare_trl.py --data ../shared/data \
        --trl-python /path/to/a/python/with/trl --trl-script ../shared/baselines/trl_opd.py

The work is the TRL script's: random Qwen3 (hidden 64, 2 layers, 152k vocabulary, tied), GSM8K
prompts through the chat template, fp32 on the CPU. Both minimise the exact reverse KL, unless
--objective names another one for ours. Rounds alternate. Options of the program may follow `--`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from harness import NO_PAUSES, Record, alternate, emit, machine, medians, ratio, table, train
from qwen3_shapes import SMALL, write_model

TIMES = ("rollout", "teacher", "update", "step")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has gsm8k/ and qwen3_tokenizer/")
    parser.add_argument("--trl-python", help="an interpreter that imports trl; none: ours alone")
    parser.add_argument("--trl-script", type=Path)
    parser.add_argument("--objective", default="reverse_kl")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", type=int, nargs="+", default=[0, 4],
                        help="metrics.sample_rollouts of ours, with a run for each")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("options", nargs="*", help="after --: more options of the program")
    return parser.parse_args()


def workload(folder: Path, data: Path) -> Record:
    """Write both models to the folder and return the options of a run of ours."""
    options: Record = {"job.dump_folder": folder / "out", "data.path": data / "gsm8k"}
    for role, std in (("student", 0.02), ("teacher", 0.2)):
        tokenizer = data / "qwen3_tokenizer"
        model = write_model("0.6B", folder / role, tokenizer, **SMALL, initializer_range=std)
        options |= {f"{role}.hf_path": model, f"{role}.random_init": "true"}
    rollout = {"prompts_per_step": 16, "group_size": 1, "max_new_tokens": 64}
    return options | NO_PAUSES | {f"rollout.{name}": value for name, value in rollout.items()}


def run_ours(options: Record, a: argparse.Namespace, recorded: int) -> Record:
    """Run a job; return median seconds by phase, the peak memory and the log-prob gap."""
    with tempfile.TemporaryDirectory() as folder:
        options = options | {
            "job.dump_folder": folder,
            "rollout.prompts_per_step": a.batch,
            "rollout.max_new_tokens": a.new_tokens,
            "training.steps": a.steps,
            "distill.objective": a.objective,
            "optimizer.lr": 1e-3,
            "metrics.sample_rollouts": recorded,
        }
        names = (word.removeprefix("--") for word in a.options[::2])
        scalars = train(options | dict(zip(names, a.options[1::2], strict=True)), a.threads)
    found: Record = medians(scalars, *(f"time/{name}(s)" for name in TIMES))
    found["peak_gib"] = max(scalars["memory/max_active(GiB)"].values())
    return found | {"logprob_gap_max": max(scalars["policy/logprob_gap_max"].values())}


def run_trl(a: argparse.Namespace) -> Record:
    command = [a.trl_python, str(a.trl_script), "--batch", str(a.batch), "--steps", str(a.steps)]
    command += ["--new-tokens", str(a.new_tokens), "--threads", str(a.threads)]
    with tempfile.TemporaryDirectory() as out:
        # /usr/bin/time writes the child's peak memory to stderr.
        timed = ["/usr/bin/time", "-f", "peak_kib %M", *command, "--out", out]
        done = subprocess.run(timed, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    peak = int(done.stderr.rsplit("peak_kib", 1)[1]) / 2**20
    return {"rollout": result["gen_s_median"], "step": result["step_s_median"], "peak_gib": peak}


def main() -> None:
    a = parse_arguments()
    emit(machine())
    with tempfile.TemporaryDirectory() as folder:
        options = workload(Path(folder), a.data)
        runs = {f"ours, {n} recorded": partial(run_ours, options, a, n) for n in a.record}
        found = alternate(runs | ({"TRL": partial(run_trl, a)} if a.trl_python else {}), a.rounds)
    for number in range(a.rounds):
        for name, results in found.items():
            emit({"round": number, "trainer": name, **results[number]})
    seconds = {name: [r["step"] for r in results] for name, results in found.items()}
    rows = [{"trainer": name, "step, s": values} for name, values in seconds.items()]
    for row in rows:
        if "TRL" in seconds:
            row["TRL's step over it"] = ratio(seconds["TRL"], seconds[row["trainer"]])
    print(table(rows))


if __name__ == "__main__":
    main()
