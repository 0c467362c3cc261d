"""Start a program with one process per GPU of this machine: `python -m opd_titan.cli.start train`.

The environment variable NGPU sets the number of processes. This module does not import torch, so
that a mistake in the options is reported at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

from opd_titan.cli.exits import exit_code
from opd_titan.errors import ConfigError

PROGRAMS = ("train", "evaluate")


def start(program: str, argv: list[str]) -> int:
    """Replace this process by the program, or by a launcher that runs it in several processes.

    Args:
        program: one of `PROGRAMS`.
        argv: its arguments.

    Raises:
        ConfigError: NGPU or an option is wrong.
    """
    count = 1 if {"-h", "--help"} & set(argv) else num_processes(os.environ)
    command = [sys.executable, "-m"]
    if count > 1:
        _check_options(program, argv)  # a single process checks them itself
        command += ["opd_titan.cli.launch", "--nproc-per-node", str(count)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"]
    command += [f"opd_titan.{program}", *argv]
    sys.stdout.flush()
    # malloc reads its settings when a process image starts.
    os.execve(sys.executable, command, {**worker_environment(count), **os.environ})


def _check_options(program: str, argv: list[str]) -> None:
    if program == "train":
        from opd_titan.config import load_config

        load_config(argv)
    else:
        from opd_titan.cli.evaluate import load_evaluation

        load_evaluation(argv)


def num_processes(environment: Mapping[str, str]) -> int:
    """Return NGPU, or the number of visible GPUs, or 1 without a GPU.

    Raises:
        ConfigError: NGPU is not a positive integer.
    """
    count = environment.get("NGPU") or str(visible_gpus(environment) or 1)
    if not re.fullmatch("[1-9][0-9]*", count):
        raise ConfigError(f"NGPU is '{count}'; wanted a number of processes")
    return int(count)


def visible_gpus(environment: Mapping[str, str]) -> int:
    """Return the number of GPUs of this machine that CUDA would use."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # set but empty hides every GPU
        return len([name for name in visible.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def worker_environment(processes: int) -> dict[str, str]:
    """Return the defaults of environment variables for this many processes on one machine."""
    # Huge pages for malloc (glibc 2.35 and newer): large tensors that come and go cause 512 times
    # fewer page faults, which saves 10 to 25 % of a rollout on a CPU. One arena: otherwise the
    # thread of a background save has its own, which keeps 0.6 MiB more after each save
    # (benchmarks/endurance.py).
    found = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"}
    if processes > 1:
        # The processes share the cores. torchrun would give each one thread, but an optimizer on
        # the host needs more.
        found["OMP_NUM_THREADS"] = str(-(-_num_cores() // processes))
    return found


def _num_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(exit_code(lambda: start(sys.argv[1], sys.argv[2:])))
