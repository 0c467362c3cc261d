"""Work in a process of its own, and a journal in which every figure is safe as soon as it is there.

`gpu.py` and `rollout.py` measure through it: what fails, hangs, runs out of memory or leaves a
broken device takes nothing with it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_setting import GIB, Setting

REPO = Path(__file__).resolve().parent.parent
Work = Callable[[Setting], None]


class Journal(NamedTuple):
    """JSON lines in a file, appended by one process at a time."""

    path: Path

    def begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")

    def add(self, record: dict[str, Any]) -> None:
        """Append the record; when this returns, no crash can lose it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, start: int = 0) -> list[dict[str, Any]]:
        """The records from number `start` on, without a last one that is not complete."""
        lines = self.path.read_bytes().split(b"\n")[start:-1]
        return [json.loads(line) for line in lines]


class Task(NamedTuple):
    """What one process does.

    Attributes:
        title: goes into each of its records, and so do the names and switches that the work was
            given by `partial`.
        works: in turn; one that raises does not keep the others from their turn.
        log: the file that gets what the process prints.
    """

    title: dict[str, Any]
    works: tuple[Work, ...]
    log: Path


def _run(journal: Journal, task: Task, s: Setting) -> None:
    os.setsid()  # a group of its own, with everything that it starts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(task.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable(sys.__stderr__)

    labels: dict[str, Any] = {}

    def emit(record: dict[str, Any]) -> None:
        journal.add({**task.title, **labels, **record})

    s = replace(s, emit=emit)
    for work in task.works:
        options = getattr(work, "keywords", {})
        labels = {k: v for k, v in options.items() if isinstance(v, (str, bool))}
        try:
            torch.manual_seed(0)
            work(s)
        except Exception:
            emit({"error": traceback.format_exc(limit=-6)})
        gc.collect()
        s.reset_memory()
    sys.stdout.flush()
    os._exit(0)  # nothing is left to tidy up that could not hang


def run_apart(
    start: str, task: Task, s: Setting, limit: float, journal: Journal
) -> Iterator[dict[str, Any]]:
    """Yield the task's records as they come, and last one with an "error" if it ended badly.

    Args:
        start: "fork", which imports nothing anew, or "spawn".
        limit: seconds; then the process and all that it started are killed.
    """
    read = len(journal.read())
    process = multiprocessing.get_context(start).Process(target=_run, args=(journal, task, s))
    process.start()
    deadline = time.monotonic() + limit
    try:
        while process.is_alive() and time.monotonic() < deadline:
            process.join(0.1)
            new = journal.read(read)
            read += len(new)
            yield from new
        late = process.is_alive()
    finally:
        _kill(process)
    if late:
        journal.add({**task.title, "error": f"stopped after {limit:.0f} s"})
    elif process.exitcode:
        journal.add({**task.title, "error": f"ended with exit code {process.exitcode}"})
    yield from journal.read(read)


def _kill(process: Any) -> None:
    """The process, and all of its group that has outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have had the time to make its group
    process.join()


def describe(s: Setting) -> None:
    """Versions and the device."""
    import transformers

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.cuda.is_available(),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if found["cuda"]:
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory_gib"] = properties.total_memory / GIB
        found["cuda_version"] = torch.version.cuda
    s.emit({"figure": "machine", **found})


def machine(s: Setting, folder: Path, journal: Journal) -> tuple[str, dict[str, Any]]:
    """How to start processes here, and what `describe` says.

    Raises:
        RuntimeError: not even that works.
    """
    task = Task({}, (describe,), folder / "machine.log")
    start, about = "fork", list(run_apart("fork", task, s, 120.0, journal))[-1]
    if not about.get("cuda") and Path("/dev/nvidiactl").exists():  # a fork that lost the device
        start, about = "spawn", list(run_apart("spawn", task, s, 120.0, journal))[-1]
    if "error" in about:
        raise RuntimeError(f"{about['error']}; see {task.log}")
    return start, about


def commit() -> str:
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def show(value: Any) -> str:
    """A figure for people: four digits of a float."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {show(v)}" for k, v in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_record(title: str, record: dict[str, Any], seconds: float) -> None:
    """One line, the largest kernels below it, and an error in full."""
    hidden = ("stage", "part", "case", "figure", "top", "error")
    values = "  ".join(f"{k} {show(v)}" for k, v in record.items() if k not in hidden)
    print(f"[{seconds:5.0f} s] {title}: {record.get('figure', '')}  {values}", flush=True)
    for line in record.get("top", [])[:6]:
        print(f"            {line}", flush=True)
    if "error" in record:
        print(f"            ERROR {record['error']}", flush=True)


def write_json(path: Path, value: Any) -> None:
    """Replace the file by a complete one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    new.replace(path)
