"""The recipe for Qwen3-0.6B taught by Qwen3-1.7B, at full size, with random weights, anywhere.

    python benchmarks/full_size.py --data ../shared/data

Everything but the weights is real: shapes, tokenizer, GSM8K prompts, recipe. Prints the seconds of
each phase of each step and the peak memory; on a CPU it needs about 20 GiB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen3_shapes import write_config

REPO = Path(__file__).resolve().parent.parent


def make_folders(folder: Path, tokenizer: Path) -> None:
    """Two model folders without weights: config, tokenizer, generation config."""
    for role, size in (("student", "0.6B"), ("teacher", "1.7B")):
        shutil.copytree(tokenizer, folder / role)
        write_config(size, folder / role)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has gsm8k/ and qwen3_tokenizer/")
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "full_size")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("options", nargs="*", help="more of the program's, after --")
    a = parser.parse_args()
    shutil.rmtree(a.out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        make_folders(Path(folder), a.data / "qwen3_tokenizer")
        command = [sys.executable, "-m", "opd_titan.train"]
        options = {
            "job.config_file": REPO / "train_configs" / "qwen3_0.6b_gsm8k.toml",
            "job.dump_folder": a.out,
            "student.hf_path": Path(folder) / "student",
            "teacher.hf_path": Path(folder) / "teacher",
            "student.random_init": "true",
            "teacher.random_init": "true",
            "data.path": a.data / "gsm8k",
            "rollout.prompts_per_step": a.prompts,
            "rollout.max_new_tokens": a.new_tokens,
            "training.steps": a.steps,
            "validation.enable": "false",
            "checkpoint.enable": "false",
        }
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        env = {**os.environ, "PYTHONPATH": str(REPO)}
        subprocess.run([*command, *a.options], check=True, env=env)
    print_phases(a.out / "tb")


def print_phases(tb: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tb))
    events.Reload()
    for name in sorted(events.Tags()["scalars"]):
        if name.startswith(("time/", "throughput/", "memory/max_res", "policy/logprob", "kl/")):
            values = ", ".join(f"{e.value:.4g}" for e in events.Scalars(name))
            print(f"{name:36} {values}")


if __name__ == "__main__":
    main()
