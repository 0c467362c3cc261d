"""Which folder may import which, and the maximum length of files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "opd_titan"
FOLDER = Path(__file__).resolve().parent.parent / PACKAGE
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60

# From the ground up. A module imports from lower floors and from its own, never from above.
FLOORS = (
    "errors",
    "config",
    "distributed",
    "models",
    "data",
    "grading",
    "rollout",
    "distill",
    "checkpoint",
    "observability",
    "evaluation",
    "training",
    "plan",  # runs the pieces of the program without a device
    "view",  # reads what a run has left behind
    "cli",
    "top",  # the programs: __main__.py, train.py, evaluate.py
)
# What the order alone does not forbid.
FORBIDDEN = {
    "config": ("torch",),
    "view": ("torch", *(f"opd_titan.{floor}" for floor in FLOORS[2:] if floor != "view")),
    "data": ("opd_titan.models",),
    "distill": ("opd_titan.rollout",),
    "checkpoint": ("opd_titan.distill.objectives",),
    "observability": tuple(
        f"opd_titan.{floor}" for floor in ("models", "rollout", "distill", "checkpoint")
    ),
}
FILES = sorted(FOLDER.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "top"


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Yield all imported names, also inside functions and TYPE_CHECKING.

    `from a import b` gives a.b, because b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                up = node.level - is_package
                base = ".".join([*parts[: len(parts) - up], *base.split(".")]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    own = floor_of(module)
    found = []
    for name in imported_names(ast.parse(source), module, is_package):
        if name == f"{PACKAGE}.__version__":  # a constant of the package, of no floor
            continue
        too_high = within(name, PACKAGE) and FLOORS.index(floor_of(name)) > FLOORS.index(own)
        if too_high or any(within(name, f) for f in FORBIDDEN.get(own, ())):
            found.append(f"{module} imports {name}")
    return found


def all_violations(path: Path) -> list[str]:
    return violations(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_from_below(floor: str) -> None:
    files = [path for path in FILES if floor_of(module_name(path)) == floor]
    assert files, f"no file on floor {floor}: is the list of floors out of date?"
    assert [v for path in files for v in all_violations(path)] == []


def test_every_folder_is_on_a_floor() -> None:
    folders = {p.name for p in FOLDER.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders <= set(FLOORS)


def test_no_files_import_each_other_in_a_circle() -> None:
    sources = {module_name(path): path for path in FILES}
    graph = {}
    for module, path in sources.items():
        tree, is_package = ast.parse(path.read_text("utf-8")), path.name == "__init__.py"
        names = imported_names(tree, module, is_package)
        # `from a.b import c`: of the module a.b.c where there is one, else of a.b.
        found = {n if n in sources else n.rpartition(".")[0] for n in names}
        graph[module] = (found & sources.keys()) - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_files_and_functions_stay_short() -> None:
    too_long = []
    for path in FILES:
        source = path.read_text("utf-8")
        if source.count("\n") > MAX_FILE_LINES:
            too_long.append(f"{module_name(path)}: {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = own_lines(node)
                if lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{module_name(path)}.{node.name}: {lines} lines")
    assert too_long == []
