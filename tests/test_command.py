"""The command `opd-titan`: dispatch, completion in real shells, and the wheel that brings it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from programs import run_program, run_python
from tiny_world import REPO, World

from opd_titan import __main__ as command
from opd_titan.cli.start import num_processes
from opd_titan.config.options import OPTIONS
from opd_titan.distributed.launched import LAUNCHED


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `opd-titan` outside of any launcher."""
    env = {k: v for k, v in os.environ.items() if k not in (*LAUNCHED, "NGPU")}
    return subprocess.run(
        [sys.executable, "-m", "opd_titan", *words],
        env={**env, "PYTHONPATH": str(REPO), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------ dispatch


def test_help_lists_what_there_is_and_loads_nothing() -> None:
    code = "import sys; sys.argv = ['opd-titan', '--help']; from opd_titan.__main__ import main"
    code += "; main(); print(*sorted(sys.modules), file=sys.stderr)"
    done = run_python("-c", code)
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "pydantic", "transformers", "opd_titan.config"}
    assert re.findall(r"^  (\w+) ", done.stdout, re.M) == [*command.PROGRAMS, "completion"]
    assert run().stdout == done.stdout


RECIPE = REPO / "train_configs" / "debug.toml"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "train --help", f"config {RECIPE}", "completion bash"])
def test_a_reader_that_leaves_is_no_error(words: str, unbuffered: str) -> None:
    """`opd-titan --help | head -1` closes the pipe, as a pager does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "opd_titan", *words.split()],
        env={**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_each_command_is_its_module() -> None:
    for name in command.PROGRAMS:
        own = run_python("-m", f"opd_titan.{name}", "--help", COLUMNS="100")
        ours = run(name, "--help", COLUMNS="100")
        assert (ours.returncode, ours.stdout) == (own.returncode, own.stdout), name


def test_the_first_argument_may_be_the_recipe() -> None:
    recipe = str(REPO / "train_configs" / "debug.toml")
    short = run("config", recipe, "--optimizer.lr", "1e-3")
    long = run("config", "--job.config_file", recipe, "--optimizer.lr", "1e-3")
    assert short.stdout == long.stdout and "lr = 0.001" in short.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope"], "nope: no such command; wanted one of train, plan,"),
        (["train", "--optimizer.lrr", "1"], "did you mean --optimizer.lr?"),
        (["train", "no.toml"], "no.toml: no such file"),
        (["completion"], "completion: wanted a shell, one of bash, zsh"),
        (["completion", "fish"], "completion: wanted a shell, one of bash, zsh"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str) -> None:
    done = run(*words)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("opd_titan: ") and said in line


# ------------------------------------------------------------------ train on this machine


BRIEF = ["--training.steps", "1", "--validation.enable", "false", "--checkpoint.enable", "false"]


@pytest.mark.parametrize(
    ("given", "processes"),
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "3,"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2,GPU-3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "", "NGPU": "4"}, 4),
        ({"NGPU": ""}, 2),
    ],
    ids=str,
)
def test_one_process_for_each_visible_gpu(
    given: dict[str, str], processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with two GPUs, as nvidia-smi lists them."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: GPU-1)'\necho 'GPU 1: H200'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert num_processes(given) == processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_train_starts_as_many_processes_as_asked(world: World, processes: str) -> None:
    out = world.folder / processes
    done = run("train", str(world.recipe), "--job.dump_folder", str(out), *BRIEF, NGPU=processes)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "logs").iterdir())) == int(processes)


@pytest.mark.slow
def test_a_rank_without_a_launcher_is_ignored(world: World) -> None:
    """A batch system may set some of a launcher's variables in every shell."""
    out = world.folder / "alone"
    options = ["--job.dump_folder", str(out), *BRIEF]
    done = run("train", str(world.recipe), *options, NGPU="1", RANK="3", LOCAL_RANK="3")
    assert done.returncode == 0, done.stderr
    assert (out / "logs" / "rank-0.log").exists()


@pytest.mark.long
def test_under_a_launcher_it_is_one_of_the_processes(world: World) -> None:
    out = world.folder / "launched"
    launcher = ["-m", "opd_titan.cli.launch", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0", "-m", "opd_titan", "train"]
    argv = [str(world.recipe), "--job.dump_folder", str(out), *BRIEF]
    done = run_python(*launcher, *argv, NGPU="3")
    assert done.returncode == 0, done.stderr
    assert len(list((out / "logs").iterdir())) == 2


def test_what_is_wrong_with_ngpu_is_said() -> None:
    done = run("train", str(REPO / "train_configs" / "debug.toml"), NGPU="two")
    assert done.returncode == 2
    assert done.stderr == "opd_titan: NGPU is 'two'; wanted a number of processes\n"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the scripts and a Python that has only pip."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(REPO / "scripts", folder / "scripts")
    shutil.copy(REPO / "constraints.txt", folder)
    venv.create(folder / "python", with_pip=True)
    return folder


def without_index(bare: Path, command: list[str], **environment: str) -> Any:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    path = f"{bare}/python/bin:/usr/bin:/bin"
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    env |= {"PATH": path, **offline, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_without_packages_and_network_one_line_says_what_to_bring(bare: Path) -> None:
    done = without_index(bare, ["bash", str(bare / "scripts" / "run_train.sh")])
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("opd_titan: python3 lacks torch, transformers, ")
    assert "--find-links wheels" in line


@pytest.fixture
def wheels(tmp_path: Path) -> str:
    """A folder with a wheel of tqdm."""
    info = "tqdm-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tqdm-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tqdm.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tqdm\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return str(tmp_path)


def test_a_folder_of_wheels_is_an_index_too(bare: Path, wheels: str) -> None:
    ask = ["bash", "-c", f"source {bare}/scripts/environment.sh; finds_packages python3"]
    assert without_index(bare, ask).returncode != 0
    assert without_index(bare, ask, PIP_FIND_LINKS=wheels).returncode == 0


def test_packages_are_found_by_a_python_that_the_system_manages(bare: Path, wheels: str) -> None:
    python = "/usr/bin/python3"
    ask = [python, "-m", "pip", "install", "--dry-run", "--find-links", wheels, "tqdm"]
    if not Path(python).exists() or "externally-managed" not in without_index(bare, ask).stderr:
        pytest.skip("needs the Python of a system that manages it, with pip (PEP 668)")
    ask = ["bash", "-c", f"source {bare}/scripts/environment.sh; finds_packages {python}"]
    assert without_index(bare, ask, PIP_FIND_LINKS=wheels).returncode == 0


# Says what is set when torch begins to be imported.
WATCHED = """
import importlib, os, sys

class Inspector:
    def find_spec(self, name, *_):
        if name == "torch":
            own = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
            print(os.environ["PYTORCH_ALLOC_CONF"], own, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Inspector())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    "module", ["opd_titan.training.trainer", "opd_titan.cli.run", "opd_titan.cli.launch"]
)
@pytest.mark.parametrize("own", [None, "max_split_size_mb:64"])
def test_the_allocator_is_set_up_before_torch_is_imported(module: str, own: str | None) -> None:
    env = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    env |= {"PYTHONPATH": str(REPO)} | ({"PYTORCH_ALLOC_CONF": own} if own else {})
    command = [sys.executable, "-c", WATCHED, module]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{own or 'expandable_segments:True'} None\n"


# ------------------------------------------------------------------------ completion


def completed(shell: str, line: str) -> list[str]:
    """Return the completions of the last word of the line."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
        eval "$({sys.executable} -m opd_titan completion {shell})"
        COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
        _opd_titan; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = run_program("bash", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("opd-titan tr", ["train"]),
        ("opd-titan comp", ["completion"]),
        ("opd-titan train --optimizer.l", ["--optimizer.lr"]),
        ("opd-titan plan --optimizer.l", ["--optimizer.lr"]),
        ("opd-titan plan --gpu-m", ["--gpu-memory"]),
        ("opd-titan train --distill.objective rev", ["reverse_kl"]),
        ("opd-titan train --compile.enable ", ["auto", "on", "off"]),
        ("opd-titan train --job.config_file tr", []),  # the shell's own: file names
        ("opd-titan train x.toml --training.steps 3 --optimizer.w", ["--optimizer.weight_decay"]),
    ],
)
def test_bash_completes(line: str, offered: list[str]) -> None:
    assert completed("bash", line) == offered


def test_every_option_is_offered() -> None:
    for name in command.TAKE_A_RECIPE:
        assert {f"--{o}" for o in OPTIONS} <= set(completed("bash", f"opd-titan {name} --"))


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_reads_its_own() -> None:
    code = f'eval "$({sys.executable} -m opd_titan completion zsh)"; whence _opd_titan'
    done = run_program("zsh", "-fc", code)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


# ------------------------------------------------------------------------- the wheel


@pytest.mark.slow
def test_the_wheel_has_everything_and_brings_the_command(tmp_path: Path) -> None:
    """Build from a copy, because setuptools leaves its build folder beside the sources."""
    pytest.importorskip("setuptools", reason="builds without downloads")
    source = tmp_path / "source"
    shutil.copytree(REPO / "opd_titan", source / "opd_titan")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("opd_titan-*.whl")
    files = {p for p in (REPO / "opd_titan").rglob("*") if p.is_file()}
    ours = {p.relative_to(REPO).as_posix() for p in files if p.suffix not in (".pyc", ".nbi")}
    with zipfile.ZipFile(wheel) as content:
        assert ours <= set(content.namelist())
    place = tmp_path / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    target = ["--python", str(place / "bin" / "python"), "install", "--no-deps", str(wheel)]
    # pip must not see the sources: with an egg-info they count as an installed package.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", *LAUNCHED)}
    subprocess.run([*pip, *target], check=True, env=env, cwd=tmp_path)
    # Add the packages that run this test only now, because opd_titan may be one of them.
    others = next(path for path in sys.path if path.endswith("site-packages"))
    (next(place.glob("lib/python*/site-packages")) / "others.pth").write_text(others)
    program = str(place / "bin" / "opd-titan")
    assert subprocess.run([program, "train", "nope"], env=env, cwd=tmp_path).returncode == 2
    recipe = str(REPO / "train_configs" / "debug.toml")
    done = subprocess.run(
        [program, "config", recipe], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and 'hf_path = "assets/debug/student"' in done.stdout
    where = [str(place / "bin" / "python"), "-c", "import opd_titan; print(opd_titan.__file__)"]
    found = subprocess.run(where, env=env, cwd=tmp_path, capture_output=True, text=True).stdout
    assert found.startswith(str(place))
