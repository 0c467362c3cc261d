"""One workload, two trainers, back to back: a step of opd_titan beside a step of TRL.

    python benchmarks/compare_trl.py --data ../shared/data \
        --trl-python /path/to/a/python/with/trl --trl-script ../shared/baselines/trl_opd.py

The workload is the TRL script's: random Qwen3 (hidden 64, 2 layers, 152k vocabulary, tied), GSM8K
prompts through the chat template, batch x new tokens, fp32 on the CPU. Both minimise the
full-vocabulary reverse KL, unless --objective says otherwise for ours. Rounds alternate, so that a
machine that drifts slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from opd_titan.config import JobConfig  # noqa: E402


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
    parser.add_argument(
        "--sample-rollouts",
        type=int,
        nargs="+",
        default=[0, JobConfig().metrics.sample_rollouts],
        help="responses that ours records, a run for each; by default none and the default's",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def make_models(folder: Path, tokenizer: Path) -> None:
    """The same shapes, seeds and initialisation as the TRL script's."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for role, seed, std in (("student", 0, 0.02), ("teacher", 1, 0.2)):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=151936,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=std,
            rope_theta=1e6,
            bos_token_id=None,
            eos_token_id=151645,
            pad_token_id=151643,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / role)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(tokenizer / name, folder / role / name)


def run_ours(models: Path, a: argparse.Namespace, recorded: int) -> dict[str, float]:
    """Median seconds by phase over the steps after the first, from TensorBoard; peak memory."""
    out = models / "ours"
    shutil.rmtree(out, ignore_errors=True)
    options = {
        "job.dump_folder": out,
        "student.hf_path": models / "student",
        "teacher.hf_path": models / "teacher",
        "data.path": a.data / "gsm8k",
        "rollout.prompts_per_step": a.batch,
        "rollout.group_size": 1,
        "rollout.max_new_tokens": a.new_tokens,
        "training.steps": a.steps,
        "distill.objective": a.objective,
        "optimizer.lr": 1e-3,
        "metrics.sample_rollouts": recorded,
        "validation.enable": "false",
        "checkpoint.enable": "false",
    }
    command = [sys.executable, "-m", "opd_titan.train"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": str(a.threads)}
    subprocess.run(command, check=True, env=env, capture_output=True)
    return read_phases(out / "tb")


def read_phases(tb: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tb))
    events.Reload()
    names = [n for n in events.Tags()["scalars"] if n.startswith(("time/", "memory/"))]
    values = {n: [e.value for e in events.Scalars(n) if e.step > 1] for n in names}
    return {n: statistics.median(v) for n, v in values.items() if v}


def run_trl(a: argparse.Namespace) -> dict[str, float]:
    command = [a.trl_python, str(a.trl_script), "--batch", str(a.batch), "--steps", str(a.steps)]
    command += ["--new-tokens", str(a.new_tokens), "--threads", str(a.threads)]
    with tempfile.TemporaryDirectory() as out:
        # /usr/bin/time reports the child's peak memory on stderr.
        timed = ["/usr/bin/time", "-f", "peak_kib %M", *command, "--out", out]
        done = subprocess.run(timed, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    peak = done.stderr.rsplit("peak_kib", 1)[1]
    return {**result, "peak_gib": int(peak) / 2**20}


def main() -> None:
    a = parse_arguments()
    ours: list[dict[int, dict[str, float]]] = []
    trl = []
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), a.data / "qwen3_tokenizer")
        for _ in range(a.rounds):
            ours.append({n: run_ours(Path(folder), a, n) for n in a.sample_rollouts})
            if a.trl_python:
                trl.append(run_trl(a))
    print(f"{platform.machine()}, {a.threads} threads, batch {a.batch} x {a.new_tokens} tokens")
    for i, results in enumerate(ours):
        for recorded, result in results.items():
            phases = ", ".join(f"{n} {v:.3f}" for n, v in sorted(result.items()) if v >= 0.0005)
            print(f"round {i}: opd_titan, {recorded} recorded: {phases}")
        if trl:
            t = trl[i]
            steps = {n: result["time/step(s)"] for n, result in results.items()}
            ratios = ", ".join(f"{t['step_s_median'] / s:.2f}x ({n})" for n, s in steps.items())
            print(
                f"round {i}: TRL {t['trl']}: step {t['step_s_median']:.3f} s, generate "
                f"{t['gen_s_median']:.3f} s, peak {t['peak_gib']:.2f} GiB; ratio {ratios}"
            )


if __name__ == "__main__":
    main()
