"""The recipe for Qwen3-0.6B taught by Qwen3-1.7B at full size, with random weights.

    python benchmarks/full_size.py --data ../shared/data

Shapes, tokenizer, GSM8K prompts and recipe are the real ones. Prints the seconds of each phase and
the peak memory of each step; a CPU needs about 20 GiB.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from harness import NO_PAUSES, REPO, Record, emit, machine, train
from qwen3_shapes import write_model

COLUMNS = {
    "rollout": "time/rollout(s)",
    "teacher": "time/teacher(s)",
    "update": "time/update(s)",
    "step": "time/step(s)",
    "peak, GiB": "memory/max_active(GiB)",
    "log-prob gap": "policy/logprob_gap_max",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has gsm8k/ and qwen3_tokenizer/")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--miniature", action="store_true", help="tiny models, to try the script")
    a = parser.parse_args()
    emit(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: Record = {
            "job.config_file": REPO / "train_configs" / "qwen3_0.6b_gsm8k.toml",
            "job.dump_folder": folder / "out",
            "data.path": a.data / "gsm8k",
            "rollout.prompts_per_step": a.prompts,
            "rollout.max_new_tokens": a.new_tokens,
            "training.steps": a.steps,
        }
        small = {"hidden_size": 64, "num_hidden_layers": 2} if a.miniature else {}
        for role, size in (("student", "0.6B"), ("teacher", "1.7B")):
            model = write_model(size, folder / role, a.data / "qwen3_tokenizer", **small)
            options |= {f"{role}.hf_path": model, f"{role}.random_init": "true"}
        scalars = train(options | NO_PAUSES)
    for number in range(1, a.steps + 1):
        figures = {name: scalars[key][number] for name, key in COLUMNS.items()}
        emit({"number": number, **figures})


if __name__ == "__main__":
    main()
