"""The command `opd-titan`, also `python -m opd_titan`: the programs of this package by one name.

    opd-titan train train_configs/debug.toml --optimizer.lr 1e-4

Each is `python -m opd_titan.<name>` with the same arguments. `train` alone does more: like
scripts/run_train.sh it starts a process for each GPU of this machine, or runs as one of them where
a launcher (torchrun, SLURM's tasks) has started it. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping

from opd_titan import __version__
from opd_titan.errors import ConfigError, UserError, for_a_pipe, tell

PROGRAMS = {
    "train": "distil a teacher into a student, on all GPUs of this machine (or NGPU processes)",
    "plan": "say what a recipe will need on a cluster, without a GPU",
    "view": "write a run's rollouts as one HTML page",
    "evaluate": "grade a checkpoint or a Hugging Face folder",
    "config": "print a recipe as it is resolved",
}
COMPLETION = "completion"
# Those whose first argument may be a recipe, short for --job.config_file.
TAKE_A_RECIPE = ("train", "plan", "evaluate", "config")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


def main() -> int:
    """Run the program that the first argument names, with the rest. Returns its exit code."""
    argv = sys.argv[1:]
    name = argv[0] if argv else "--help"
    try:
        if name in ("-h", "--help"):
            with for_a_pipe():
                print(usage())
            return 0
        if name == "--version":
            print(__version__)
            return 0
        if name == COMPLETION:
            return complete(argv[1:])
        if name not in PROGRAMS:
            known = ", ".join((*PROGRAMS, COMPLETION))
            raise ConfigError(f"{name}: no such command; wanted one of {known}")
        rest = argv[1:]
        if name in TAKE_A_RECIPE and rest and re.fullmatch(r"[^-].*\.toml", rest[0]):
            rest = ["--job.config_file", *rest]
        if name == "train" and not is_launched(os.environ) and not {"-h", "--help"} & set(rest):
            return start(rest)
    except UserError as error:
        tell(error)
        return 2
    module = f"opd_titan.{name}"
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def usage() -> str:
    lines = [f"  {name:<10}  {does}" for name, does in PROGRAMS.items()]
    evaluate = f'eval "$(opd-titan {COMPLETION} bash)"'
    lines.append(f"  {COMPLETION:<10}  print what bash or zsh completes: {evaluate}")
    return "\n".join(
        [
            "usage: opd-titan <command> [recipe.toml] [--table.key value ...]",
            "",
            *lines,
            "",
            "opd-titan <command> --help lists a command's options.",
        ]
    )


# ------------------------------------------------------------------ train on this machine


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether this process already is one of several that a launcher has started."""
    return all(name in environment for name in LAUNCHED)


def start(argv: list[str]) -> int:
    """Become the trainer, or the launcher of one for each GPU.

    Raises:
        ConfigError: the options are wrong; told once, before any process starts.
    """
    from opd_titan.config import load_config

    load_config(argv)
    count = os.environ.get("NGPU") or str(visible_gpus(os.environ) or 1)
    if not re.fullmatch("[1-9][0-9]*", count):
        raise ConfigError(f"NGPU is '{count}'; wanted a number of processes")
    command = [sys.executable, "-m"]
    if count != "1":
        command += ["opd_titan.cli.launch", "--nproc-per-node", count, "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", "-m"]
    command += ["opd_titan.train", *argv]
    sys.stdout.flush()
    # A new process image: malloc's settings are read at its start.
    os.execve(sys.executable, command, {**worker_environment(int(count)), **os.environ})


def visible_gpus(environment: Mapping[str, str]) -> int:
    """The GPUs of this machine that CUDA would see; 0 without any. As scripts/environment.sh."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(listed.stdout.split("\n")) - 1 if listed.returncode == 0 else 0


def worker_environment(processes: int) -> dict[str, str]:
    """What processes on this machine get unless the user has set it; see scripts/environment.sh."""
    found = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
    }
    if processes > 1:
        found["OMP_NUM_THREADS"] = str(-(-_cores() // processes))
    return found


def _cores() -> int:
    """As `nproc`: those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def complete(argv: list[str]) -> int:
    """Print a shell's completion of this command, to be sourced.

    Raises:
        ConfigError: `argv` names no shell, or another one.
    """
    from opd_titan.cli.completion import SHELLS, script

    if len(argv) != 1 or argv[0] not in SHELLS:
        raise ConfigError(f"{COMPLETION}: wanted a shell, one of {', '.join(SHELLS)}")
    with for_a_pipe():
        print(script(argv[0], [*PROGRAMS, COMPLETION], TAKE_A_RECIPE), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
