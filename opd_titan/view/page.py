"""Write one HTML page from the sources in `static/`, a run's rollouts and its curves."""

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
from opd_titan.view.rollouts import rollout_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SCRIPTS = ("data.js", "list.js", "answer.js", "token.js", "curves.js", "main.js")


def write_page(dump_folder: Path, out: Path) -> Packed:
    """Read a run's rollouts and curves, and write the page atomically.

    Returns:
        The rollouts on the page.

    Raises:
        DataError: there are no rollouts, or one of their files is damaged.
        ConfigError: `out` cannot be written.
    """
    packed = pack(rollout_files(dump_folder))
    if not packed.count:
        raise DataError(f"{dump_folder / 'rollouts'}: all files are empty; wanted rollouts in them")
    curves = read_curves(dump_folder)
    if out.is_dir():  # checked here because "." has no name
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
            f"--out: {out} cannot be written ({error.strerror}); choose another file"
        ) from error
    return packed


def _run(dump_folder: Path) -> dict[str, str]:
    """Return the run's name and, if it has a recipe, its description, models and objective."""
    run = {"name": dump_folder.resolve().name}
    try:
        config = tomllib.loads((dump_folder / RECIPE_FILE).read_text(encoding="utf-8"))
        teacher = config["teacher"]
        teachers = teacher.get("models") or [teacher]
        return run | {
            "description": str(config["job"]["description"]),
            "student": _model_name(config["student"]["hf_path"]),
            "teacher": ", ".join(_model_name(model["hf_path"]) for model in teachers),
            "objective": str(config["distill"]["objective"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or edited
        return run


def _model_name(path: str) -> str:
    """Return the last two parts of a path, because the page may leave this machine."""
    return "/".join(Path(path).parts[-2:])


def _parts(packed: Packed, curves: dict[str, Any], run: dict[str, str]) -> Iterator[str]:
    """Yield the page in the order in which it is needed: the index first, rare data last."""
    style = _source("style.css")
    # In a function, so that the script defines nothing on `window`.
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
    """Return a data element. Browsers do not run it, and base64 text cannot close it."""
    return f'<script type="application/octet-stream" id="{name}">{content}</script>\n'


def _source(name: str) -> str:
    return (files("opd_titan.view") / "static" / name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
