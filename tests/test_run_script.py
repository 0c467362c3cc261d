"""`scripts/run_train.sh` starts a process for each visible GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import REPO, TIMEOUT, own_output

HIDDEN = ("CUDA_VISIBLE_DEVICES", "NGPU", "CONFIG_FILE")
# Prints the current folder and the arguments instead of starting the program.
STUB_PYTHON = """#!/bin/bash
[ "$1" = - ] && exec "{python}" "$@"
case "$2" in *.config) exit 0 ;; esac
pwd; printf '%s\n' "$@"
"""


def run_script(
    folder: Path, *options: str, gpus: int = 0, stub: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script in `folder`, on a machine with this many GPUs."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    commands = {
        "nvidia-smi": f"#!/bin/bash\nfor ((i = 0; i < {gpus}; i++)); do echo GPU $i; done\n"
    }
    if stub:
        commands["python3"] = STUB_PYTHON.format(python=sys.executable)
    for name, text in commands.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in HIDDEN}
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), env["PATH"]])
    return subprocess.run(
        [REPO / "scripts" / "run_train.sh", *options],
        env={**env, "PATH": path, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.parametrize(
    ("gpus", "environment", "processes"),
    [
        (0, {}, 1),
        (3, {}, 3),
        (3, {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (3, {"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        (3, {"CUDA_VISIBLE_DEVICES": "", "NGPU": "2"}, 2),
        (3, {"NGPU": ""}, 3),
    ],
    ids=str,
)
def test_one_process_for_each_visible_gpu(
    tmp_path: Path, gpus: int, environment: dict[str, str], processes: int
) -> None:
    done = run_script(tmp_path, gpus=gpus, CONFIG_FILE="mine.toml", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    folder, *words = done.stdout.splitlines()
    assert folder == str(tmp_path), "a recipe's path is relative to the user's current folder"
    started = ["-m", "opd_titan.train", "--job.config_file", "mine.toml"]
    assert words[-4:] == started
    if processes == 1:
        assert words == started
    else:
        assert words[:4] == ["-m", "opd_titan.cli.launch", "--nproc-per-node", str(processes)]


@pytest.mark.slow
def test_the_default_recipe_is_found_from_anywhere(tmp_path: Path) -> None:
    # This is refused only after the recipe, its models and its data have been found.
    options = ["--rollout.prompts_per_step", "1000000"]
    done = run_script(tmp_path, *options, stub=False, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, own_output(done.stdout)) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "rollout.prompts_per_step = 1000000" in line
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
