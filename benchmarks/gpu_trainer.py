"""The debug recipe as a user runs it, through `scripts/run_train.sh`, and its resume."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_setting import Setting

REPO = Path(__file__).resolve().parent.parent
STEPS = 40  # as in train_configs/debug.toml
SMALL = {
    "rollout.prompts_per_step": 4,
    "rollout.max_new_tokens": 8,
    "validation.max_prompts": 4,
    "validation.max_new_tokens": 8,
}


def train_debug_recipe(s: Setting) -> None:
    """Half of the steps, then the others by a process that resumes: on one process, both."""
    steps = 4 if s.miniature else STEPS
    options: dict[str, Any] = {"validation.interval": steps // 2, **(SMALL if s.miniature else {})}
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), []
        for last in (steps // 2, steps):
            start = time.perf_counter()
            _run({**options, "job.dump_folder": name, "training.steps": last})
            seconds.append(time.perf_counter() - start)
            s.emit({"figure": f"recipe, to step {last}", "seconds": seconds[-1]})
        scalars = read_scalars(folder / "tb")
        found = {
            "resumed": [step for step, _ in scalars["lr"]] == [*range(1, steps + 1)],
            "exported": exports_load(folder / "hf" / "latest"),
            "logprob_gap_max": max(value for _, value in scalars["policy/logprob_gap_max"]),
            "step_s": scalars["time/step(s)"][-1][1],
            "recipe_s": sum(seconds),
        }
        for _, value in scalars.get("validation/gap_recovered", ())[-1:]:
            found["gap_recovered"] = value  # in miniature there may be no gap
    s.emit({"figure": "recipe", **found, "ok": found["resumed"] and found["exported"]})


def _run(options: dict[str, Any]) -> None:
    """In this process's group, so that it ends when the stage does. This log gets its output.

    Raises:
        RuntimeError: it did not end with exit code 0.
    """
    command = ["./scripts/run_train.sh"]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    env = {k: v for k, v in os.environ.items() if k != "CONFIG_FILE"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=REPO, env={**env, "PATH": path, "NGPU": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}")


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def exports_load(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return all(bool(p.isfinite().all()) for p in model.parameters())
