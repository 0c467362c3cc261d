"""The options reference: what `--help` prints, and docs/options.md.

The page is generated from `job_config.py`. Do not edit it:

    python -m opd_titan.config --markdown > docs/options.md
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from opd_titan.config.job_config import JobConfig
from opd_titan.config.options import LISTS, TABLES, fields_of, wanted
from opd_titan.config.value_types import literal

_PAGE = """\
# Options

<!-- Made by `python -m opd_titan.config --markdown > docs/options.md`; do not edit. -->

[configuration.md](configuration.md) explains how their values are set.
"""

_USAGE = """\
usage: python -m {prog} [--job.config_file FILE] [--table.key value ...]

{about}

The value of an option comes from the command line, else from the TOML file, else from its parent
(base = "other.toml"), else from the default below. Lists of tables are written as [[table.key]] in
the TOML file, or as one TOML array: --validation.sets '[{{name = "a", path = "a.jsonl"}}]'
"""


def _sections() -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """Yield the header and the fields of each table; each list of rows follows its table."""
    for table, cls in TABLES.items():
        yield f"[{table}]", fields_of(cls, f"{table}.")
        for name, row in LISTS.items():
            if name.startswith(f"{table}."):
                yield f"[[{name}]]", fields_of(row, f"{name}.")


def _describe(name: str, field: FieldInfo) -> tuple[str, str, str]:
    """Return the allowed values, the default and the docstring of an option, each on one line."""
    doc = " ".join((field.description or "").split())
    if name in LISTS:
        return "tables", "none", doc
    return wanted(field), literal(field.default), doc


def markdown() -> str:
    """Return docs/options.md."""
    lines = [_PAGE]
    for header, fields in _sections():
        lines += [f"## {header}", "", "| key | value | default | what |", "|---|---|---|---|"]
        for name, field in fields.items():
            values, default, doc = _describe(name, field)
            key = f"[[{name}]]" if name in LISTS else name.rpartition(".")[2]
            cells = (f"`{key}`", values, f"`{default}`", doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def help_text(prog: str) -> str:
    """Return what `python -m <prog> --help` prints."""
    lines = [_USAGE.format(prog=prog, about=JobConfig.__doc__)]
    for header, fields in _sections():
        lines.append(header)
        for name, field in fields.items():
            values, default, doc = _describe(name, field)
            option = name.rpartition(".")[2] if header.startswith("[[") else f"--{name}"
            lines += [f"  {option}  ({values}; default: {default})", _indented(doc)]
        lines.append("")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
