"""A user's mistakes through the program itself: exit code 2, one line on stderr that names the key
or file, what is wrong and what would be right; nothing is written and no weights are loaded.

Most mistakes are tested where they are found: see `mistakes.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mistakes import TABLE
from programs import run_program
from tiny_world import (
    TIMEOUT,
    World,
    make_sums,
    own_output,
    script,
    train,
)

LONGEST = 1000


class WeightsLoaded(Exception):
    """The program did not find the mistake before it loaded weights."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import opd_titan.training.models

    def load_model(*args: Any, **kwargs: Any) -> None:
        raise WeightsLoaded

    monkeypatch.setattr(opd_titan.training.models, "load_model", load_model)


def listing(folder: Path) -> dict[str, int]:
    """Return all files and folders below, with the times of their last change."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): path.lstat().st_mtime_ns for path in paths}


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("opd_titan: ") and line.isprintable(), line
    assert len(line) <= LONGEST + 20 and "Traceback" not in line, line
    return line


def refused(argv: list[str], capfd: pytest.CaptureFixture[str], *folders: Path) -> str:
    """Return the line of the refusal; assert that the folders have not changed."""
    before = [listing(folder) for folder in folders]
    capfd.readouterr()
    assert train([str(word) for word in argv]) == 2
    out, err = capfd.readouterr()
    assert own_output(out) == ""
    assert [listing(folder) for folder in folders] == before, "something was written"
    return one_line(err)


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_one_line(
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
    """Return exit code, stdout and stderr of `python -m opd_titan.train`."""
    command = (*prefix, sys.executable, "-m", "opd_titan.train", *argv)
    done = run_program(*command, **environment)
    return done.returncode, own_output(done.stdout), done.stderr


@pytest.fixture(scope="module")
def closed_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return an environment in which nothing answers at the hub's address."""
    home = str(tmp_path_factory.mktemp("home"))
    yield {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": home, "HF_HUB_OFFLINE": "0"}


@pytest.mark.slow
def test_an_unreachable_hub_is_one_line(world: World, closed_hub: dict[str, str]) -> None:
    argv = world.argv("no-hub", "--data.path", "org/name")
    code, out, err = started(argv, **closed_hub)
    assert (code, out) == (2, "")
    line = one_line(err)
    for part in ("data.path", "org/name", "the hub at http://127.0.0.1:9 does not answer"):
        assert part in line
    assert not (world.folder / "no-hub").exists()


@pytest.mark.slow
def test_a_mistake_that_all_ranks_find_is_one_line(world: World) -> None:
    make_sums(world.folder / "cut.jsonl", 22, seed=1)
    with (world.folder / "cut.jsonl").open("a") as file:
        file.write('{"question": ')
    run = script(world.argv("cut", "--data.path", world.folder / "cut.jsonl"), processes=2)
    out, err = run.communicate(timeout=TIMEOUT)
    assert (run.returncode, own_output(out)) == (2, "")
    assert "cut.jsonl, line 23: broken JSON" in one_line(err)
    assert not (world.folder / "cut").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line(world: World) -> None:
    """The dump folder is on a file system of one page, which needs a user namespace."""
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
