"""What recording rollouts costs: steps that record more and fewer of them, in turn, in one run.

    OMP_NUM_THREADS=1 python benchmarks/recording.py --data ../shared/data

The models and the workload are those of `compare_trl.py`. CPU seconds of one thread, which other
work on the machine changes little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from compare_trl import make_models  # noqa: E402

from opd_titan.train import main as train  # noqa: E402
from opd_titan.training.trainer import Trainer  # noqa: E402

# CPU seconds of each step, by the responses that it records.
SECONDS: dict[int, list[float]] = defaultdict(list)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has gsm8k/ and qwen3_tokenizer/")
    parser.add_argument("--objective", default="policy_gradient")
    parser.add_argument("--recorded", type=int, nargs="+", default=[0, 1, 4, -1])
    parser.add_argument("--cycles", type=int, default=9, help="the first one is not counted")
    return parser.parse_args()


def record_in_turn(recorded: list[int]) -> None:
    """Let each step record another number of responses; note its seconds, writing included."""
    train_step = Trainer.train_step

    def timed(trainer: Trainer) -> int | None:
        # Shifted by one in each cycle: the prompts of some steps take longer.
        number = recorded[(trainer.step + trainer.step // len(recorded)) % len(recorded)]
        trainer.config.metrics.sample_rollouts = number
        start = time.process_time()
        result = train_step(trainer)
        if trainer.step > len(recorded):
            SECONDS[number].append(time.process_time() - start)
        return result

    Trainer.train_step = timed  # type: ignore[method-assign]


def main() -> None:
    a = parse_arguments()
    record_in_turn(a.recorded)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, a.data / "qwen3_tokenizer")
        options = {
            "job.dump_folder": folder / "out",
            "student.hf_path": folder / "student",
            "teacher.hf_path": folder / "teacher",
            "data.path": a.data / "gsm8k",
            "rollout.prompts_per_step": 16,
            "rollout.group_size": 1,
            "rollout.max_new_tokens": 64,
            "training.steps": len(a.recorded) * a.cycles,
            "distill.objective": a.objective,
            "validation.enable": False,
            "checkpoint.enable": False,
        }
        train([str(word) for key, value in options.items() for word in (f"--{key}", value)])
    for number, seconds in SECONDS.items():
        median, least = statistics.median(seconds), min(seconds)
        print(f"{number:2d} of 16 recorded: median {median:.2f}, least {least:.2f} CPU s a step")


if __name__ == "__main__":
    main()
