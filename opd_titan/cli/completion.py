"""Complete commands, options, their choices and file names of `opd-titan` in a shell.

There is one bash script; zsh loads it with its bashcompinit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args

from opd_titan.config.options import OPTIONS
from opd_titan.plan.__main__ import make_parser

SHELLS = ("bash", "zsh")
_FOR_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
_SCRIPT = """\
# Completion of opd-titan. In every shell: eval "$(opd-titan completion {shell})" in ~/.{shell}rc
{setup}_opd_titan() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    elif [[ "$previous" = --* && "$current" != -* ]]; then
        case "$previous" in
{choices}
        esac
    elif [[ "$current" = -* ]]; then
        words="--help"
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
# If there is no completion, offer file names.
complete -o default -F _opd_titan opd-titan
"""


def script(shell: str, commands: Iterable[str], with_recipe: Iterable[str]) -> str:
    """Return the script that a shell sources.

    Args:
        shell: one of `SHELLS`.
        commands: all commands.
        with_recipe: the commands that take every option of a recipe.
    """
    recipe = " ".join(f"--{name}" for name in OPTIONS)
    own = {"plan": " ".join(re.findall(r"--[a-z-]+", make_parser().format_usage()))}
    choices: dict[str, list[str]] = {}
    for name, field in OPTIONS.items():
        values = [value for value in get_args(field.annotation) if value]
        values = ["true", "false"] if field.annotation is bool else values
        if values:
            choices.setdefault(" ".join(values), []).append(f"--{name}")
    return _SCRIPT.format(
        shell=shell,
        setup=_FOR_ZSH if shell == "zsh" else "",
        commands=" ".join(commands),
        choices="\n".join(
            f'            {" | ".join(names)}) words="{values}" ;;'
            for values, names in choices.items()
        ),
        options="\n".join(
            f'            {command}) words+=" {recipe} {own.get(command, "")}" ;;'
            for command in with_recipe
        ),
    )
