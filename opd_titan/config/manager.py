"""Read a config: TOML files, then the command line, then the checks.

Precedence is command line > TOML > parent TOML (`base`) > default. Whatever is wrong is a
`ConfigError` of one line.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_titan.config.checks import (
    OPTIONS,
    TABLES,
    check_consistency,
    check_value,
    config_error,
    literal,
    nearest,
    show,
    wanted,
)
from opd_titan.config.job_config import JobConfig
from opd_titan.errors import reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST = 1 << 20
# tomllib's time grows with the square of the parts of a dotted key; no key here has more than two.
_PART = r"""(?:[^\s.="']+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"^[ \t]*{_PART}(?:[ \t]*\.[ \t]*{_PART}){{100}}", re.MULTILINE)


def load_config(argv: Sequence[str]) -> JobConfig:
    """Resolve and check the config that `argv` (without the program's name) asks for.

    `--job.config_file PATH` names the TOML file, if any; every other argument is
    `--table.key value` and overrides it. When an option is given twice, the last one counts.

    Raises:
        ConfigError: something in the files or in `argv` is wrong; the message is one line.
        SystemExit: only for `--help`.
    """
    if "--help" in argv or "-h" in argv:
        _tyro(["--help"], JobConfig())
    given = _read_arguments(argv)
    tables = _read_files(given.get("job.config_file", ""))
    base = JobConfig(**{table: cls(**tables.get(table, {})) for table, cls in TABLES.items()})
    config = _tyro([f"--{name}={text}" for name, text in given.items()], base)
    check_consistency(config)
    return config


def to_toml(config: JobConfig) -> str:
    """The whole config as TOML; read back it gives an equal config. `job.config_file` is left out,
    since it is not part of what the run does."""
    lines = []
    for table, values in asdict(config).items():
        lines.append(f"[{table}]")
        lines += [
            f"{key} = {literal(value)}"
            for key, value in values.items()
            if f"{table}.{key}" != "job.config_file"
        ]
        lines.append("")
    return "\n".join(lines)


def _read_files(file: str) -> dict[str, dict[str, Any]]:
    """The merged tables of the TOML `file` and its chain of `base` parents; the child wins."""
    path, where = Path(file) if file else None, "--job.config_file"
    chain: dict[Path, Path] = {}  # resolved -> as written
    merged: dict[str, dict[str, Any]] = {}
    while path is not None:
        document, resolved = _parse_file(path, where)
        if resolved in chain:
            circle = " -> ".join(str(p) for p in [*chain.values(), path])
            raise config_error(where, f"goes in a circle: {circle}")
        chain[resolved] = path
        where = f"{path}: base"
        base = document.pop("base", None)
        for table, values in _check_document(str(path), document).items():
            merged[table] = {**values, **merged.get(table, {})}
        if base is not None and (not isinstance(base, str) or not base):
            raise config_error(where, f"{show(base)} is not the path of a TOML file")
        path = path.parent / base if base else None
    return merged


def _parse_file(path: Path, where: str) -> tuple[dict[str, Any], Path]:
    """The raw TOML document in `path`, and the path without links. `where` asked for it."""
    try:
        with path.open("rb") as file:
            resolved, data = path.resolve(), file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise config_error(where, f"{path}: no such file") from None
    except IsADirectoryError:
        raise config_error(where, f"{path} is a folder; wanted a TOML file") from None
    except (OSError, RuntimeError, ValueError) as e:  # unreadable, a circle of links, a NUL
        raise config_error(where, f"{path} cannot be read: {reason(e)}") from None
    if len(data) > _LARGEST:  # a device without end, or weights in place of the recipe
        raise config_error(where, f"{path} is larger than {_LARGEST >> 20} MiB; wanted a TOML file")
    try:
        text = data.decode("utf-8-sig")
        if found := _LONG_KEY.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise config_error(str(path), f"line {line}: a key of over 100 parts; wanted table.key")
        return tomllib.loads(text), resolved
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise config_error(str(path), f"not UTF-8 text (byte {e.start}, line {line})") from None
    except (ValueError, RecursionError) as e:
        raise config_error(str(path), f"not valid TOML: {e}") from None


def _check_document(file: str, document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of one file, each value checked by itself and turned into its field's type."""
    tables: dict[str, dict[str, Any]] = {}
    for table, values in document.items():
        if table not in TABLES:
            raise _unknown_at_top(file, table, values)
        if not isinstance(values, dict):
            raise config_error(
                f"{file}: {table}", f"{show(values)} is not a table; write [{table}]"
            )
        for key, value in values.items():
            where, name = f"{file}: [{table}] {key}", f"{table}.{key}"
            if name == "job.config_file":
                raise config_error(
                    where, 'only for the command line; a parent is base = "other.toml"'
                )
            if name not in OPTIONS:
                guesses = [g.removeprefix(f"{table}.") for g in nearest(table, key)]
                known = [n.partition(".")[2] for n in OPTIONS if n.startswith(f"{table}.")]
                raise config_error(where, "unknown key; " + _did_you_mean(guesses, known))
            tables.setdefault(table, {})[key] = check_value(where, name, value)
    return tables


def _unknown_at_top(file: str, name: str, value: Any) -> Exception:
    """The error for a table that does not exist, or for a key outside of any table."""
    if isinstance(value, dict):
        guesses = difflib.get_close_matches(name, TABLES, n=1)
        return config_error(
            f"{file}: [{name}]", "unknown table; " + _did_you_mean(guesses, list(TABLES))
        )
    guesses = difflib.get_close_matches(name, ["base"], n=1) or nearest("", name)
    hint = _did_you_mean(guesses, ["base"])
    return config_error(f"{file}: {name}", f"unknown key outside of any table; {hint}")


def _did_you_mean(guesses: list[str], known: list[str]) -> str:
    if guesses:
        return f"did you mean {' or '.join(guesses)}?"
    return f"known: {', '.join(known)}"


def _read_arguments(argv: Sequence[str]) -> dict[str, str]:
    """Check `--table.key value` arguments one by one: `{"table.key": text}` that tyro will accept.

    tyro reports in boxes of many lines, and has either `--flag/--no-flag` or `--flag True`; here
    are both, and messages of one line. A value that starts with `--` is written `--table.key=--x`.
    """
    given: dict[str, str] = {}
    rest = deque(argv)
    while rest:
        token = rest.popleft()
        if not token.startswith("--"):
            raise config_error(show(token), "not an option; options are written --table.key value")
        name, equals, text = token[2:].partition("=")
        name = name.replace("-", "_")
        negated = name.replace(".no_", ".", 1)
        if name not in OPTIONS and OPTIONS.get(negated) is bool and not equals:
            given[negated] = "False"
            continue
        if name not in OPTIONS:
            guesses = [f"--{guess}" for guess in nearest(*name.rpartition(".")[::2])]
            hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists them all"
            raise config_error(f"--{name}", f"unknown option; {hint}")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.popleft()
            elif OPTIONS[name] is bool:
                text = "True"
            else:
                raise config_error(f"--{name}", f"has no value; wanted {wanted(name)}")
        value = check_value(f"--{name}", name, _from_text(name, text))
        given[name] = str(value)
    return given


def _from_text(name: str, text: str) -> Any:
    """What `text` means for the option `name`; `text` itself when it means nothing there."""
    kind = OPTIONS[name]
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _tyro(arguments: list[str], default: JobConfig) -> JobConfig:
    import tyro  # costs more than the rest of this package, so only who parses pays for it

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                JobConfig,
                prog="python -m opd_titan.train",
                args=arguments,
                default=default,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise config_error("command line", " ".join(messages.getvalue().split())) from None
