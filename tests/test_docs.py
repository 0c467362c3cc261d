"""Options, scalars, messages, files and links in README, CONTRIBUTING and docs/ exist."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from programs import run_python

from opd_titan.config import load_config
from opd_titan.config.options import TABLES
from opd_titan.observability.metrics import SCALARS

REPO = Path(__file__).resolve().parent.parent
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
]
MODELS = ["--student.hf_path", "s", "--teacher.hf_path", "t"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in _FENCE.findall(text_of(page)) if kind == language]


def prose(page: Path) -> str:
    """Return the page without code blocks and without other programs' options."""
    text = _FENCE.sub("", text_of(page))
    if page.name == "coming_from.md":  # the first cell of a row is the other program's
        text = re.sub(r"^\|.*?(?<!\\)\|", "|", text, flags=re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def code(page: Path) -> list[str]:
    """Return all `inline code`, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# ---------------------------------------------------------------- options


def test_the_options_page_is_the_programs() -> None:
    done = run_python("-m", "opd_titan.config", "--markdown")
    assert done.returncode == 0, done.stderr
    page = text_of(REPO / "docs" / "options.md")
    assert page == done.stdout, (
        "docs/options.md does not match the options; run "
        "python -m opd_titan.config --markdown > docs/options.md"
    )


@every_page
def test_toml_snippets_are_recipes(page: Path, tmp_path: Path) -> None:
    for recipe in (REPO / "train_configs").glob("*.toml"):  # what a snippet may inherit from
        shutil.copy(recipe, tmp_path)
    for i, snippet in enumerate(blocks(page, "toml")):
        file = tmp_path / f"snippet_{i}.toml"
        file.write_text(snippet)
        models = MODELS[:2] if "[[teacher]]" in snippet else MODELS
        load_config(["--job.config_file", str(file), *models])


@every_page
def test_options_exist(page: Path) -> None:
    named = re.findall(rf"--((?:{'|'.join(TABLES)})\.\w+)", text_of(page))
    for span in code(page):
        match = re.fullmatch(r"(\w+)\.(\w+)( = .*)?", span)
        if match and match[1] in TABLES and match[2] not in ("py", "md", "toml", "json"):
            named.append(f"{match[1]}.{match[2]}")
    known = {f"{table}.{f.name}" for table, cls in TABLES.items() for f in fields(cls)}
    assert {name.replace(".no_", ".") for name in named} - known == set()


@every_page
def test_commands_can_be_started(page: Path) -> None:
    """Each training command's recipe exists and accepts its options."""
    for words in commands(page):
        start = next((i for i, w in enumerate(words) if w.endswith("run_train.sh")), None)
        if start is None or "--plan" in words or "--help" in words or "<" in " ".join(words):
            continue
        environment = dict(w.split("=", 1) for w in words[:start])
        recipe = REPO / environment.get("CONFIG_FILE", "train_configs/debug.toml")
        if recipe.parent.name == "train_configs":
            assert recipe.is_file(), words
            load_config(["--job.config_file", str(recipe), *words[start + 1 :]])


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


# ---------------------------------------------------------------- scalars


@every_page
def test_scalars_exist(page: Path) -> None:
    prefixes = {name.partition("/")[0] for name in SCALARS if "/" in name}
    unknown = []
    for span in code(page):
        for name in expanded(span):
            prefix = name.partition("/")[0]
            looks_like_one = "/" in name and prefix in prefixes and not name.endswith((".py", "/"))
            if looks_like_one and not any(is_named(known, name) for known in SCALARS):
                unknown.append(name)
    assert unknown == []


def expanded(span: str) -> list[str]:
    """Expand `a/{b,c}` to a/b and a/c."""
    match = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", span)
    return [f"{match[1]}{part}{match[3]}" for part in match[2].split(",")] if match else [span]


def is_named(known: str, name: str) -> bool:
    """Return whether a name, maybe with `*` and without its unit, is that known scalar."""
    pattern = re.sub(r"<\w+>", "*", known)
    return any(
        fnmatchcase(known, name) or fnmatchcase(name, p) for p in (pattern, pattern.split("(")[0])
    )


# ---------------------------------------------------------------- messages

# Inline code with a blank in it that is no message.
_NO_MESSAGE = re.compile(
    r"-|\[|\w+\.\w+ = |(python|sbatch|torchrun|apt-get) |\./|[A-Z_]+=|.*_dump_|step-N"
)


@cache
def messages() -> list[str]:
    """Every text in the program, with \\0 for what is filled in."""
    found = []
    for path in (REPO / "opd_titan").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in inside:
                    found.append(re.sub(r"%[.\d]*[sdfe]", "\0", node.value))
    return found


def can_be_printed(message: str) -> bool:
    pattern = re.compile(".*?".join(map(re.escape, message.strip(" .").split("..."))))
    return any(pattern.search(" ".join(text.split())) for text in messages())


def test_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    page = REPO / "docs" / "troubleshooting.md"
    quoted = [span for span in code(page) if " " in span and not _NO_MESSAGE.match(span)]
    assert len(quoted) > 30
    assert [span for span in quoted if not can_be_printed(span)] == []
    assert not can_be_printed("has not moved for ... hours")


# ---------------------------------------------------------------- files, tests, links


@every_page
def test_files_and_tests_exist(page: Path) -> None:
    spans = {word for span in code(page) for word in span.split()}
    spans |= {word for body in blocks(page, "bash") for word in body.split()}
    folders = ("tests", "benchmarks", "scripts", "docs", "opd_titan", "train_configs", "assets")
    paths = [s for s in spans if re.fullmatch(rf"(\./)?({'|'.join(folders)})/[\w./-]+", s)]
    assert [p for p in paths if not (REPO / p).exists()] == []
    sources = "".join(text_of(p) for p in (REPO / "tests").glob("*.py"))
    tests = [s for s in spans if re.fullmatch(r"test_\w+", s)]
    missing = [
        t for t in tests if f"def {t}(" not in sources and not (REPO / f"tests/{t}.py").exists()
    ]
    assert missing == []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", text_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_index_has_every_page() -> None:
    index = text_of(REPO / "docs" / "README.md")
    listed = set(re.findall(r"^\| \[(\w+\.md)\]\(\1\) \|", index, re.MULTILINE))
    there = {p.name for p in (REPO / "docs").glob("*.md")} - {"README.md"}
    assert there == listed
    assert "docs/README.md" in text_of(REPO / "README.md")
