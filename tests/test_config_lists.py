"""Lists of tables in a recipe, such as [[validation.sets]]: read, inherited and written."""

from __future__ import annotations

from pathlib import Path

from test_config import load

from opd_titan.config import JobConfig, load_config, to_toml
from opd_titan.config.job_config import ValidationSet
from opd_titan.config.resolve import data_sets, teachers, validation_sets

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
    assert other.path == ""  # the default of that data set
    (only,) = validation_sets(load(tmp_path, "", *options[:4]))
    assert only == ValidationSet("", "gsm8k", "v.jsonl", "test", 9, "auto")


def test_rows_of_teachers_and_data_in_both_spellings(tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text(
        '[student]\nhf_path = "s"\n[teacher]\nhf_path = "t"\ncpu_offload = true\n'
        '[data]\ndataset = "prompts"\npath = "p"\n'
    )
    short = """
        base = "parent.toml"
        [[teacher]]
        name = "a"
        hf_path = "ta"
        [[teacher]]
        name = "b"
        hf_path = "tb"
        [[data]]
        name = "x"
        teacher = "b"
        [[data]]
        name = "y"
        dataset = "gsm8k"
        teacher = "a"
        weight = 2
    """

    def read(toml: str) -> JobConfig:
        (tmp_path / "own.toml").write_text(toml)
        return load_config(["--job.config_file", str(tmp_path / "own.toml")])

    c = read(short)
    assert (c.teacher.hf_path, c.teacher.cpu_offload) == ("", True)
    assert [t.hf_path for t in teachers(c)] == ["ta", "tb"]
    assert [(s.name, s.dataset, s.path, s.weight, s.teacher) for s in data_sets(c)] == [
        ("x", "prompts", "p", 1.0, "b"),
        ("y", "gsm8k", "", 2.0, "a"),  # rows of another format are not at the table's path
    ]
    assert [(s.name, s.split, s.teacher) for s in validation_sets(c)] == [
        ("x", "test", "b"),
        ("y", "test", "a"),
    ]
    # sft needs no teachers, so the sets need not name one.
    plain = short.replace('teacher = "a"', "").replace('teacher = "b"', "")
    sft = '[distill]\nobjective = "sft"\n[rollout]\non_policy_fraction = 0\ngroup_size = 1\n'
    for text in (plain, short):
        c_sft = read(text + sft)
        assert teachers(c_sft) == [] and {s.teacher for s in data_sets(c_sft)} == {""}
    long = short.replace("[[teacher]]", "[[teacher.models]]").replace("[[data]]", "[[data.sets]]")
    other = read(long + '[teacher]\nhf_path = ""\n')
    assert (other.teacher, other.data) == (c.teacher, c.data)
    assert read(to_toml(c)) == c
