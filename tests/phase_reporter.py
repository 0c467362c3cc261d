"""Write to a file what a run of `opd_titan.train` is doing, for tests that kill it.

It watches and changes nothing: the phases of `PhaseClock` and a few functions are noted as they
begin and end, and an audit hook notes what is done to files of the dump folder. On request the
process stands still (SIGSTOP) right before one of those, so that it can be killed exactly there.

The variables below switch it on; `install` is called by a `sitecustomize` module in a folder of
PYTHONPATH, so that the program is started as users start it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any

EVENTS = "OPD_TEST_EVENTS"  # the file; lines of "pid rank seconds kind name"
FOLDER = "OPD_TEST_FOLDER"  # the dump folder
FREEZE = "OPD_TEST_FREEZE"  # "rename:checkpoint:3": stand still before the third; "begin:sync:2"

# What a phase is called, and the function that it lasts for.
FUNCTIONS = {
    "prepare": "opd_titan.training.trainer:set_up",
    "load": "opd_titan.training.models:load_model",
    "resume": "opd_titan.checkpoint.checkpointer:Checkpointer.load",
    "probe": "opd_titan.training.trainer:probe",
    "record": "opd_titan.observability.recorder:Recorder.record",
    "export": "opd_titan.training.saving:export_hf",
    "save": "opd_titan.checkpoint.checkpointer:Checkpointer.save",
    "end": "opd_titan.training.trainer:Trainer._finish",
}
VERBS = {
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "shutil.rmtree": "remove",
    "os.mkdir": "make",
    "open": "write",
}


class Reporter:
    """Writes one line an event; knows how many of each file operation there were."""

    def __init__(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self.file = os.open(os.environ[EVENTS], flags)
        self.folder = os.path.join(os.environ[FOLDER], "")
        verb, _, place = os.environ.get(FREEZE, "").partition(":")
        place, _, number = place.partition(":")
        self.freeze = (verb, place, int(number or 0))
        self.seen = 0
        self.rank = os.environ.get("RANK", "0")

    def say(self, kind: str, name: str) -> None:
        line = f"{os.getpid()} {self.rank} {time.monotonic():.6f} {kind} {name}\n"
        os.write(self.file, line.encode())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.say("begin", name)
        self._stand_still("begin", name, name)
        try:
            yield
        finally:
            self.say("end", name)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        verb = VERBS.get(event)
        if verb is None or (verb == "write" and not _writes(arguments)):
            return
        path = _path(arguments)
        if not path.startswith(self.folder):
            return
        inside = path[len(self.folder) :]
        place = inside.split(os.sep, 1)[0]
        self.say("file", f"{verb}:{inside}")
        self._stand_still(verb, place, inside)

    def _stand_still(self, verb: str, place: str, name: str) -> None:
        if (verb, place) == self.freeze[:2]:
            self.seen += 1
            if self.seen == self.freeze[2]:
                self.say("frozen", f"{verb}:{name}")
                os.kill(os.getpid(), signal.SIGSTOP)


def _path(arguments: tuple[Any, ...]) -> str:
    path = arguments[0]
    if not isinstance(path, (str, os.PathLike)):
        return ""
    path, within = os.fspath(path), arguments[-1]
    if isinstance(path, str) and not os.path.isabs(path) and isinstance(within, int) and within > 0:
        # shutil.rmtree names what it deletes within an open folder.
        path = os.path.join(os.readlink(f"/proc/self/fd/{within}"), path)
    return path if isinstance(path, str) else ""


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def install() -> None:
    """Report on this process if it is a worker of the program."""
    words = getattr(sys, "orig_argv", sys.argv)
    if (
        EVENTS not in os.environ
        or "opd_titan.train" not in words
        or "opd_titan.cli.launch" in words
    ):
        return
    reporter = Reporter()
    reporter.say("begin", "import")
    sys.addaudithook(reporter.audit)
    sys.meta_path.insert(0, _AfterImport(functools.partial(_watch, reporter)))


class _AfterImport(MetaPathFinder):
    """Calls `then` when the trainer, and so all of the program, has been imported."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "opd_titan.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            sys.modules[name] = module
            self.then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _watch(reporter: Reporter) -> None:
    """Everything is imported: wrap what phases last for."""
    reporter.say("end", "import")
    for name, where in FUNCTIONS.items():
        module, _, path = where.partition(":")
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, attribute, _reported(reporter, name, getattr(owner, attribute)))
    from opd_titan.observability.metrics import PhaseClock

    timed = PhaseClock.phase

    @contextmanager
    def phase(clock: Any, name: str) -> Iterator[None]:
        with reporter.phase(name), timed(clock, name):
            yield

    PhaseClock.phase = phase  # type: ignore[method-assign]


def _reported(reporter: Reporter, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with reporter.phase(name):
            return function(*args, **options)

    return call
