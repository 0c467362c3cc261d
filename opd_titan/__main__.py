"""The command `opd-titan`, also `python -m opd_titan`: run a program of this package by its name.

    opd-titan train train_configs/debug.toml --optimizer.lr 1e-4

Each is `python -m opd_titan.<name>` with the same arguments. `train` and `evaluate` start one
process per GPU of this machine, unless a launcher (torchrun, SLURM) has started this one. Nothing
here imports torch.
"""

from __future__ import annotations

import re
import runpy
import sys

from opd_titan import __version__
from opd_titan.cli.start import PROGRAMS as STARTED
from opd_titan.cli.start import start
from opd_titan.distributed.launched import is_launched
from opd_titan.errors import ConfigError, UserError, for_a_pipe, print_error

PROGRAMS = {
    "train": "distil a teacher into a student, on all GPUs of this machine (or NGPU processes)",
    "plan": "print what a recipe needs on a cluster, without a GPU",
    "view": "write a run's rollouts as one HTML page",
    "evaluate": "grade a checkpoint or a Hugging Face folder",
    "config": "print a recipe with all defaults",
}
COMPLETION = "completion"
# Commands that take a recipe as their first argument, short for --job.config_file.
TAKE_A_RECIPE = ("train", "plan", "evaluate", "config")


def main() -> int:
    """Run the program that the first argument names. Return its exit code."""
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
        if name in STARTED and not is_launched():
            return start(name, rest)
    except UserError as error:
        print_error(error)
        return 2
    module = f"opd_titan.{name}"
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def usage() -> str:
    lines = [f"  {name:<10}  {does}" for name, does in PROGRAMS.items()]
    evaluate = f'eval "$(opd-titan {COMPLETION} bash)"'
    lines.append(f"  {COMPLETION:<10}  print the completion for bash or zsh: {evaluate}")
    return "\n".join(
        [
            "usage: opd-titan <command> [recipe.toml] [--table.key value ...]",
            "",
            *lines,
            "",
            "opd-titan <command> --help lists a command's options.",
        ]
    )


def complete(argv: list[str]) -> int:
    """Print a shell's completion of this command, to be sourced.

    Raises:
        ConfigError: `argv` is not the name of a known shell.
    """
    from opd_titan.cli.completion import SHELLS, script

    if len(argv) != 1 or argv[0] not in SHELLS:
        raise ConfigError(f"{COMPLETION}: wanted a shell, one of {', '.join(SHELLS)}")
    with for_a_pipe():
        print(script(argv[0], [*PROGRAMS, COMPLETION], TAKE_A_RECIPE), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
