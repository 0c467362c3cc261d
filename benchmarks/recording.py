"""What it costs to record rollouts: steps that record more and fewer of them, in turn, in one run.

    OMP_NUM_THREADS=1 python benchmarks/recording.py --data ../shared/data

The models and the work are those of `compare_trl.py`. Seconds are CPU seconds of one thread, which
other work on the machine changes little; writing the records is included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from compare_trl import workload
from harness import emit, machine, spread, table, words

from opd_titan.train import main as train
from opd_titan.training.trainer import Trainer


def record_in_turn(recorded: list[int]) -> dict[int, list[float]]:
    """Let each step of a trainer record another number of responses.

    Returns:
        By that number the seconds of its steps, filled while the trainer runs. The first cycle
        through all numbers is left out.
    """
    seconds: dict[int, list[float]] = defaultdict(list)
    train_step = Trainer.train_step

    def timed(trainer: Trainer) -> int | None:
        # Shifted by one in each cycle, because the prompts of some steps take longer.
        number = recorded[(trainer.step + trainer.step // len(recorded)) % len(recorded)]
        trainer.config.metrics.sample_rollouts = number
        start = time.process_time()
        result = train_step(trainer)
        if trainer.step > len(recorded):
            seconds[number].append(time.process_time() - start)
        return result

    Trainer.train_step = timed
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has gsm8k/ and qwen3_tokenizer/")
    parser.add_argument("--objective", default="policy_gradient")
    parser.add_argument("--record", type=int, nargs="+", default=[0, 1, 4, -1])
    parser.add_argument("--cycles", type=int, default=9, help="the first one is not counted")
    parser.add_argument("--new-tokens", type=int, default=64)
    a = parser.parse_args()
    emit(machine())
    seconds = record_in_turn(a.record)
    with tempfile.TemporaryDirectory() as folder:
        options = workload(Path(folder), a.data) | {
            "rollout.max_new_tokens": a.new_tokens,
            "training.steps": len(a.record) * a.cycles,
            "distill.objective": a.objective,
        }
        train(words(options))
    print(table([{"recorded of 16": n, **spread(values)} for n, values in seconds.items()]))


if __name__ == "__main__":
    main()
