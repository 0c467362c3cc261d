"""What the benchmarks share: runs of the program, alternating rounds, records, tables, the machine.

Nothing here imports torch before it is needed, so that `--help` of a script is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # `opd_titan` of this checkout

DEBUG = REPO / "assets" / "debug"
# What scripts/environment.sh sets.
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"}
NO_PAUSES = {"validation.enable": "false", "checkpoint.enable": "false"}

Record = dict[str, Any]
Result = TypeVar("Result")


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that prints the description, a script's docstring, as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


# ------------------------------------------------------------------ the machine


def machine() -> Record:
    """Return the command, the date, the commit, the versions and the device."""
    import torch
    import transformers

    on_cuda = torch.cuda.is_available()
    return {
        "figure": "machine",
        "command": command_line(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "device": torch.cuda.get_device_name() if on_cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def command_line() -> str:
    """Return the command that started this script."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def _commit() -> str:
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def _cpu_name() -> str:
    with suppress(OSError):
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if name:
            return name[1]
    return platform.machine()


# ------------------------------------------------------------- records and tables


class Journal:
    """JSON lines in a file. Processes may append to it in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, record: Record) -> None:
        """Append the record. A crash after this has returned cannot lose it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, start: int = 0) -> list[Record]:
        """Return the records from number `start` on, without an incomplete last one."""
        lines = self.path.read_bytes().split(b"\n")[start:-1]
        return [json.loads(line) for line in lines]


def emit(record: Record) -> None:
    """Print the record as a JSON line."""
    print(json.dumps(record, default=str), flush=True)


def show(value: Any) -> str:
    """Return a value as text, floats with four digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(v)}" for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table with a column for each key that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([show(r.get(k, "")) for k in keys] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------- alternating rounds


def alternate(
    cases: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 0
) -> dict[str, list[Result]]:
    """Run all cases in each round, so that a slow moment of the machine affects all of them.

    Each round starts with another case. Results of the first `warmup` rounds are dropped.

    Returns:
        The results of each case, by round.
    """
    results: dict[str, list[Result]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = cases[name]()
            if number >= 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float]) -> Record:
    """Return the median, the least and the greatest value."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """Return the median ratio of paired rounds, with the least and the greatest in brackets."""
    ratios = [a / b for a, b in zip(values, base, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


# --------------------------------------------------------------- runs of the program


def words(options: Mapping[str, object]) -> list[str]:
    """Return the options as words of the program's command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run(
    arguments: Sequence[object], threads: int = 0, codes: Sequence[int] = (0,), **env: str
) -> str:
    """Run this Python interpreter with these arguments and return what it printed.

    Args:
        threads: `OMP_NUM_THREADS`; 0 does not set it.
        codes: exit codes that are no failure.
        env: further variables of the environment.

    Raises:
        SystemExit: it ended with another exit code. The message has the end of its output.
    """
    command = [sys.executable, *map(str, arguments)]
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    whole = {**os.environ, "PYTHONPATH": str(REPO), **env}
    done = subprocess.run(command, env=whole, cwd=REPO, capture_output=True, text=True)
    if done.returncode not in codes:
        output = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        sys.exit(f"{shlex.join(command)} ended with exit code {done.returncode}:\n{output}")
    return done.stdout


def launch(processes: int, *program: object) -> list[object]:
    """Return the interpreter's arguments that run the program in this number of processes."""
    if processes == 1:
        return [*program]
    launcher = ("-m", "opd_titan.cli.launch", "--nproc-per-node", processes)
    return [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *program]


def train(
    options: Mapping[str, object],
    threads: int = 0,
    processes: int = 1,
    program: Sequence[object] = ("-m", "opd_titan.train"),
    **env: str,
) -> dict[str, dict[int, float]]:
    """Run a training job and return its scalars: by name, values by step.

    Args:
        options: of the program, `job.dump_folder` among them.
        program: the interpreter's arguments before the options.

    Raises:
        SystemExit: as for `run`.
    """
    run(launch(processes, *program, *words(options)), threads, **env)
    return read_scalars(Path(str(options["job.dump_folder"])))


def open_trainer(argv: Sequence[str]) -> Any:
    """Return the trainer of a job in this process, with its models loaded, before its first step.

    Args:
        argv: the words of the program's command line.
    """
    import torch

    from opd_titan.config import load_config
    from opd_titan.config.resolve import resolve
    from opd_titan.distributed.heartbeat import Heartbeat
    from opd_titan.distributed.stopping import StopRequest
    from opd_titan.training.recording import make_recorder
    from opd_titan.training.trainer import Trainer

    job = resolve(load_config(list(argv)), "cuda" if torch.cuda.is_available() else "cpu", 1)
    trainer = Trainer(job, StopRequest(), Heartbeat(0, 600))
    trainer.recorder = make_recorder(trainer.setup, 0, trainer.phases.rule)
    return trainer


def scalar_events(folder: Path) -> dict[str, list[Any]]:
    """Return the TensorBoard events of a job's output folder, by the scalar's name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the TensorBoard scalars of a job's output folder: by name, values by step."""
    return {name: {e.step: e.value for e in es} for name, es in scalar_events(folder).items()}
