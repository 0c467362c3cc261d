"""Mistakes that a user can make, each through the program itself: exit code 2, one line on stderr
that names the key or file, what is wrong and what would be right, and nothing written or loaded.

Mistakes of one reader (every TOML form, every broken row) are in the tests of that reader.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from list_mistakes import TABLE
from tiny_world import (
    REPO,
    TIMEOUT,
    World,
    make_sums,
    make_world,
    own_output,
    script,
    train,
)

from opd_titan.config import checks
from opd_titan.config.checks import OPTIONS, literal, wanted

LONGEST = 1000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


class WeightsLoaded(Exception):
    """The program went on to the weights: the mistake was not seen before them."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import opd_titan.training.trainer

    def load_model(*args: Any, **kwargs: Any) -> None:
        raise WeightsLoaded

    monkeypatch.setattr(opd_titan.training.trainer, "load_model", load_model)


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder below, and when it was last changed."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): path.lstat().st_mtime_ns for path in paths}


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("opd_titan: ") and line.isprintable(), line
    assert len(line) <= LONGEST + 20 and "Traceback" not in line, line
    return line


def refused(argv: list[str], capfd: pytest.CaptureFixture[str], *folders: Path) -> str:
    """The line with which the program refuses; it must leave the folders as they were."""
    before = [listing(folder) for folder in folders]
    capfd.readouterr()
    assert train([str(word) for word in argv]) == 2
    out, err = capfd.readouterr()
    assert own_output(out) == ""
    assert [listing(folder) for folder in folders] == before, "something was written"
    return one_line(err)


# ------------------------------------------- every key, wrongly typed or out of its range


def of_another_type(name: str) -> list[Any]:
    """Values of the wrong type, as TOML has them."""
    kind = OPTIONS[name]
    if get_args(kind):
        return ["nonsense", 7]
    return {bool: ["yes", 1], int: ["two", 1.5, True], float: ["two", True], str: [3, True]}[kind]


def out_of_range(name: str) -> list[Any]:
    kind = OPTIONS[name]
    step = {">=": -1, ">": 0, "<": 0, "<=": 1, "!=": 0}
    bounds = (bound.split() for bound in checks.bounds(name))
    return [kind(int(limit) + step[compare]) for compare, limit in bounds]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "job.config_file"])
def test_a_wrong_value_of_each_key(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    table, _, key = name.partition(".")
    file = tmp_path / "wrong.toml"
    argv = world.argv("out")
    for value in [*of_another_type(name), *out_of_range(name)]:
        file.write_text(f"[{table}]\n{key} = {literal(value)}\n")
        line = refused(["--job.config_file", file], capfd, tmp_path)
        for part in (f"{file}: [{table}] {key}: {literal(value)} is ", wanted(name)):
            assert part in line
        # On the command line everything is text, and text that reads as 1 or true is right.
        if OPTIONS[name] is str or value is True or (OPTIONS[name] is bool and value == 1):
            continue
        line = refused([*argv, f"--{name}={value}"], capfd, world.folder)
        assert f"--{name}: " in line and wanted(name) in line
        assert literal(value) in line or f'"{value}"' in line


# ------------------------------------------------------------------------- the table


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 80


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_told_in_one_line(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, parts = TABLE[name]
    new = tmp_path / "new"
    new.mkdir()
    options = make(world, new)
    line = refused([*world.argv("out"), *options], capfd, world.folder, tmp_path)
    for part in parts:
        assert part in line, line


# ----------------------------------------------------------- as a user starts the program


def started(
    argv: list[str], prefix: tuple[str, ...] = (), **environment: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m opd_titan.train`."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "opd_titan.train", *argv],
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, own_output(done.stdout), done.stderr


@pytest.fixture(scope="module")
def closed_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a machine on which nothing answers at the hub's address."""
    home = str(tmp_path_factory.mktemp("home"))
    yield {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": home, "HF_HUB_OFFLINE": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("option", ["student.hf_path", "data.path"])
def test_an_unreachable_hub_is_told_at_once(
    world: World, closed_hub: dict[str, str], option: str
) -> None:
    argv = world.argv("no-hub", f"--{option}", "org/name")
    code, out, err = started(argv, **closed_hub)
    assert (code, out) == (2, "")
    line = one_line(err)
    for part in (option, "org/name", "the hub at http://127.0.0.1:9 does not answer", "folder"):
        assert part in line
    assert not (world.folder / "no-hub").exists()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_broken_data_file_whatever_the_number_of_processes(world: World, processes: int) -> None:
    make_sums(world.folder / "cut.jsonl", 22, seed=1)
    with (world.folder / "cut.jsonl").open("a") as file:
        file.write('{"question": ')
    run = script(world.argv("cut", "--data.path", world.folder / "cut.jsonl"), processes)
    out, err = run.communicate(timeout=TIMEOUT)
    assert (run.returncode, own_output(out)) == (2, "")
    assert "cut.jsonl, line 23: broken JSON" in one_line(err)
    assert not (world.folder / "cut").exists()


@pytest.mark.slow
def test_no_space_is_told_with_the_folder(world: World) -> None:
    """On a file system of one page, which only a user namespace may mount."""
    full = world.folder / "full"
    full.mkdir()
    mount = f'mount -t tmpfs -o size=4k tmpfs {full} && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("cannot mount a small file system here")
    code, out, err = started(world.argv("full/run"), prefix)
    assert (code, out) == (2, "")
    line = one_line(err)
    for part in ("dump_folder: ", "full/run", "cannot be written (No space left on device)"):
        assert part in line
