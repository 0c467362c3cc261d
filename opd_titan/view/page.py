"""One HTML page out of the sources in `static/`, a run's rollouts and its curves."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from opd_titan.config import RECIPE_FILE
from opd_titan.errors import ConfigError, DataError
from opd_titan.view.curves import read_curves
from opd_titan.view.packing import Packed, block, pack
from opd_titan.view.rollouts import Rollout, read_rollouts, rollout_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SCRIPTS = ("data.js", "list.js", "answer.js", "token.js", "curves.js", "main.js")


def write_page(dump_folder: Path, out: Path) -> Packed:
    """Read a run's rollouts and curves and write the page; it appears whole or not at all.

    Returns:
        The rollouts that are on it.

    Raises:
        DataError: a rollout file is missing, damaged, or no such file; all of them are empty.
        ConfigError: `out` cannot be written.
    """

    def rollouts() -> Iterator[Rollout]:
        for step, path in rollout_files(dump_folder):
            yield from read_rollouts(step, path)

    packed = pack(rollouts())
    if not packed.count:
        raise DataError(f"{dump_folder / 'rollouts'}: its files are empty; wanted a rollout a line")
    curves = read_curves(dump_folder)
    if out.is_dir():  # also because "." has no name to make a part's name of
        raise ConfigError(f"--out: {out} cannot be written (Is a directory); choose a file")
    part = out.with_name(out.name + ".tmp")
    try:
        with part.open("w", encoding="ascii", newline="\n") as file:
            file.writelines(_parts(packed, curves, _run(dump_folder)))
        os.replace(part, out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ConfigError(
            f"--out: {out} cannot be written ({error.strerror}); choose a file that can"
        ) from error
    return packed


def _run(dump_folder: Path) -> dict[str, str]:
    """What the run's own recipe says of it, as far as there is one."""
    run = {"name": dump_folder.resolve().name}
    try:
        text = (dump_folder / RECIPE_FILE).read_text(encoding="utf-8")
        config = tomllib.loads(text)
    except (OSError, ValueError):
        return run
    keys = {
        "description": ("job", "description"),
        "student": ("student", "hf_path"),
        "teacher": ("teacher", "hf_path"),
        "objective": ("distill", "objective"),
    }
    for name, (table, key) in keys.items():
        value = config.get(table)
        if not isinstance(value, dict):
            continue
        rows = value.get("models")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        found = [text for row in rows or [value] if isinstance(text := row.get(key), str) and text]
        if name in ("student", "teacher"):
            # A folder on this machine is nobody else's business; its last two names say enough.
            found = ["/".join(Path(path).parts[-2:]) for path in found]
        if found:
            run[name] = ", ".join(found)
    return run


def _parts(packed: Packed, curves: dict[str, Any], run: dict[str, str]) -> Iterator[str]:
    """The page in order: what it shows first comes before what it may never be asked for."""
    style = _source("style.css")
    # A function of its own, so that nothing is left lying on `window`.
    script = '(() => {\n"use strict";\n' + "".join(map(_source, _SCRIPTS)) + "})();\n"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    index = {"run": run, "steps": packed.steps, "curves": curves, "rollouts": packed.index}
    head, shell, end = _source("index.html").split("<!-- cut -->\n")
    yield head.replace("POLICY", policy)
    yield f"<style>{style}</style>\n"
    yield shell
    yield _data("index", block(index))
    yield f"<script>{script}</script>\n"
    for i, chunk in enumerate(packed.chunks):
        yield _data(f"chunk-{i}", chunk)
    yield _data("texts", packed.texts)
    yield end


def _data(name: str, content: str) -> str:
    """A block that no browser runs, and that no text in it can end: it is base64."""
    return f'<script type="application/octet-stream" id="{name}">{content}</script>\n'


def _source(name: str) -> str:
    return (files("opd_titan.view") / "static" / name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
