"""`scripts/run_train.sh`: which recipe it uses, from which folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import REPO, TIMEOUT, own_output


def run_script(folder: Path, *options: str, **environment: str) -> tuple[int, str, str]:
    """Run the script in `folder` on a machine without a GPU. Return exit code and output."""
    env = {k: v for k, v in os.environ.items() if k not in ("NGPU", "CONFIG_FILE")}
    path = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        [REPO / "scripts" / "run_train.sh", *options],
        env={**env, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("first", [[], ["first.toml"]])
def test_a_recipe_as_first_argument_wins(tmp_path: Path, first: list[str]) -> None:
    """Recipes are relative to the user's folder."""
    for name in ("first", "variable"):
        (tmp_path / f"{name}.toml").write_text(f"[{name}]\n")
    code, out, err = run_script(
        tmp_path, *first, "--optimizer.lr", "1", CONFIG_FILE="variable.toml"
    )
    assert (code, out) == (2, "")
    assert err.startswith("opd_titan: first.toml: " if first else "opd_titan: variable.toml: ")


@pytest.mark.slow
def test_the_default_recipe_is_found_from_any_folder(tmp_path: Path) -> None:
    # This is refused only after the recipe, its models and its data have been found.
    code, out, err = run_script(tmp_path, "--rollout.prompts_per_step", "1000000")
    assert (code, own_output(out)) == (2, "")
    (line,) = err.splitlines()
    assert "rollout.prompts_per_step = 1000000" in line
    assert not list(tmp_path.iterdir())
