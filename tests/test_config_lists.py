"""Lists of tables in a recipe, [[validation.sets]]: read, inherited, written, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config import MODELS, load, refusal

from opd_titan.config import load_config, to_toml
from opd_titan.config.job_config import ValidationSet
from opd_titan.config.resolve import validation_sets

OWN = "my.module:grade"
SETS = """
[validation]
split = "dev"
[[validation.sets]]
name = "a"
path = "a.jsonl"
max_prompts = 3
[[validation.sets]]
name = "b"
grader = "my.module:grade"
[metrics]
log_freq = 2
"""


def test_rows_are_read_and_written(tmp_path: Path) -> None:
    c = load(tmp_path, SETS)
    rows = [ValidationSet("a", path="a.jsonl", max_prompts=3), ValidationSet("b", grader=OWN)]
    assert c.validation.sets == rows
    assert (c.validation.split, c.metrics.log_freq) == ("dev", 2)
    (tmp_path / "again.toml").write_text(to_toml(c))
    assert load_config(["--job.config_file", str(tmp_path / "again.toml")]) == c


def test_a_list_replaces_the_inherited_one_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text(SETS)
    child = 'base = "parent.toml"\n[validation]\ninterval = 7\n'
    assert len(load(tmp_path, child).validation.sets) == 2
    child += '[[validation.sets]]\nname = "c"\n'
    c = load(tmp_path, child)
    assert c.validation.sets == [ValidationSet("c")] and c.validation.split == "dev"
    given = load(tmp_path, child, "--validation.sets", '[{name = "d"}, {name = "e"}]')
    assert given.validation.sets == [ValidationSet("d"), ValidationSet("e")]
    assert load(tmp_path, child, "--validation.sets=[]").validation.sets == []


def test_what_a_set_leaves_out_is_as_in_validation(tmp_path: Path) -> None:
    options = ["--validation.path", "v.jsonl", "--validation.max_prompts", "9"]
    a, b = validation_sets(load(tmp_path, SETS, *options))
    assert a == ValidationSet("a", "gsm8k", "a.jsonl", "dev", 3, "auto")
    assert b == ValidationSet("b", "gsm8k", "v.jsonl", "dev", 9, OWN)
    options += ["--validation.sets", '[{name = "o", dataset = "openthoughts3"}]']
    (other,) = validation_sets(load(tmp_path, "", *options))
    assert other.path == ""  # that set's own home
    (only,) = validation_sets(load(tmp_path, "", *options[:4]))
    assert only == ValidationSet("", "gsm8k", "v.jsonl", "test", 9, "auto")


BAD_TOML = [
    # graders
    ("[validation]\ngrader = 'latex'", '[validation] grader: "latex" is not a grader; wanted one'),
    ("[validation]\ngrader = ''", "[validation] grader: ", "auto, gsm8k", "module:function"),
    ("[validation]\ngrader = 'a.b:c d'", '"a.b:c d" is not a grader'),
    ("[validation]\ngrader = 'a.b'", '"a.b" is not a grader'),
    # lists
    ("[validation.sets]\nname = 'a'", "validation.sets: a table is not a list of tables", "[[val"),
    ("[validation]\nsets = 3", "validation.sets: 3 is not a list of tables; write [[validation"),
    ("[validation]\nsets = [1]", "validation.sets[0]: 1 is not a table; write [[validation.sets]]"),
    ("[validation]\nset = []", "[validation] set: unknown key", "did you mean sets?"),
    ("[[validation.sets]]\npth = 'x'", "validation.sets[0].pth: unknown key", "mean path?"),
    ("[[validation.sets]]\nzzz = 1", "validation.sets[0].zzz: unknown key; known: name, dataset,"),
    (
        "[[validation.sets]]\nname = 'a'\n[[validation.sets]]\npath = 3",
        "own.toml: validation.sets[1].path: 3 is not a string",
    ),
    ("[[validation.sets]]\nmax_prompts = -1", "validation.sets[0].max_prompts: -1 is out of range"),
    ("[[validation.sets]]\npath = '~zz/x'", "validation.sets[0].path: ", "no such user's home"),
    ("[[validation.sets]]\ngrader = 'x'", 'validation.sets[0].grader: "x" is not a grader'),
    ("[[validation.sets]]\ndataset = 'x'", "validation.sets[0].dataset: ", 'one of "", gsm8k'),
]


@pytest.mark.parametrize("case", BAD_TOML, ids=lambda case: repr(case[0][:40]))
def test_bad_toml(tmp_path: Path, case: tuple) -> None:
    toml, *parts = case
    (tmp_path / "own.toml").write_text(toml)
    message = refusal(["--job.config_file", str(tmp_path / "own.toml"), *MODELS])
    assert message.startswith(str(tmp_path)) and all(part in message for part in parts), message


BAD_ARGUMENTS = [
    ("--validation.sets x", '--validation.sets: "x" is not a TOML array of tables', "'[{key"),
    ("--validation.sets {}", "--validation.sets: a table is not a list of tables"),
    ("--validation.sets", "--validation.sets: has no value; wanted a TOML array of tables"),
    ("--validation.sets [{nme='a'}]", "--validation.sets[0].nme: unknown key; did you mean name?"),
    ("--validation.sets.name a", "--validation.sets.name: unknown option", "--validation.sets?"),
    # between keys
    ("--validation.sets [{}]", 'validation.sets[0].name: "" is not a name'),
    ("--validation.sets [{name='a/b'}]", 'validation.sets[0].name: "a/b" is not a name'),
    (
        "--validation.sets [{name='a'},{name='b'},{name='a'}]",
        'validation.sets[2].name: "a" is the name of another one too',
    ),
    (
        "--validation.sets [{name='a',dataset='prompts'}]",
        'validation.sets[0].path: required with dataset = "prompts"',
    ),
    (
        "--validation.sets [{name='a',path='outputs'}]",
        '[job] dump_folder: "outputs" is also validation.sets[0].path',
    ),
]


@pytest.mark.parametrize("case", BAD_ARGUMENTS, ids=lambda case: repr(case[0][:40]))
def test_bad_arguments(case: tuple) -> None:
    line, *parts = case
    message = refusal([*MODELS, *line.split(" ")])
    assert all(part in message for part in parts), message
