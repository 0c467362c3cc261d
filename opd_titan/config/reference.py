"""docs/configuration.md: every option with its range, its default and its docstring.

The page is made from `job_config.py` and `checks.py` and never edited:

    python -m opd_titan.config --markdown > docs/configuration.md
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

from opd_titan.config.checks import literal, wanted
from opd_titan.config.job_config import JobConfig

_HEAD = """\
# Configuration

<!-- Made by `python -m opd_titan.config --markdown > docs/configuration.md`; do not edit. -->

A recipe is a TOML file. An option's value is the first of

1. the command line, `--table.key value` (given twice, the last one counts);
2. the recipe, `[table]` and `key = value`;
3. the recipe's parent, `base = "other.toml"` as the first line, beside which it lies; a parent may
   have one of its own. Tables are merged key by key;
4. the default below.

```bash
CONFIG_FILE=train_configs/debug.toml ./scripts/run_train.sh --training.steps 10
./scripts/run_train.sh --help                  # this page, in the terminal
python -m opd_titan.config --job.config_file train_configs/debug.toml --training.steps 10
```

The last one prints the recipe as it will be run. Every run writes the same to
`<dump_folder>/config.resolved.toml`, which is a recipe itself.

On the command line `--table.key=value` does too, and `-` for `_`; a switch is `--profiling.enable`,
`--profiling.enable false` or `--profiling.no_enable`. Paths are relative to the folder that the
program is started in, not to the TOML file.

What is unknown, of another type, out of range or contradicted by another key is one line with the
key and what would be right, and exit code 2, before anything is loaded or written:

```text
opd_titan: train.toml: [rollout] group_sise: unknown key; did you mean group_size?
opd_titan: [rollout] on_policy_fraction: 1.0 contradicts [distill] objective = "sft", ...
```

An integer will do where a number is wanted. `auto` and empty strings mean what the help says.
"""


def markdown() -> str:
    """The whole page."""
    lines = [_HEAD]
    for table, cls in get_type_hints(JobConfig).items():
        lines += _table(table, cls)
    return "\n".join(lines)


def _table(name: str, kind: Any) -> Iterator[str]:
    """A heading and a row for each key; a list of tables has a heading of its own, after it."""
    is_list = get_origin(kind) is list
    cls = get_args(kind)[0] if is_list else kind
    kinds, docs = get_type_hints(cls), field_docs(cls)
    yield f"## [[{name}]]" if is_list else f"## [{name}]"
    yield ""
    yield "| key | value | default | what |"
    yield "|---|---|---|---|"
    nested = []
    for f in fields(cls):
        if get_origin(kinds[f.name]) is list:
            nested.append(f.name)
            cells = [f"`[[{name}.{f.name}]]`", "tables", "none"]
        else:
            cells = [f"`{f.name}`", wanted(f"{name}.{f.name}"), f"`{literal(_default(f))}`"]
        yield f"| {' | '.join(map(_cell, [*cells, docs[f.name]]))} |"
    yield ""
    for key in nested:
        yield from _table(f"{name}.{key}", kinds[key])


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def field_docs(cls: type) -> dict[str, str]:
    """The string that stands under each field of a dataclass."""
    definition: Any = ast.parse(inspect.getsource(cls)).body[0]
    found: dict[str, Any] = {}
    for node, below in pairwise(definition.body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
            name, doc = node.target, below.value
            assert isinstance(name, ast.Name) and isinstance(doc, ast.Constant)
            found[name.id] = doc.value
    return found
