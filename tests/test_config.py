"""The configuration: what is read from TOML files and the command line, and what is refused."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any, get_args

import pytest
from programs import run_python

from opd_titan.config import ConfigError, JobConfig, job_config, load_config
from opd_titan.config.options import LISTS, OPTIONS, VALUES
from opd_titan.config.resolve import resolve, teacher_specs

MODELS = ["--student.hf_path", "s", "--teacher.hf_path", "t"]


def load(tmp_path: Path, toml: str | bytes, *argv: str) -> JobConfig:
    """Load `toml` (as train.toml, with both models named) and `argv`."""
    file = tmp_path / "train.toml"
    file.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    return load_config(["--job.config_file", str(file), *MODELS, *argv])


def refusal(argv: list[str]) -> str:
    """Return the message of the ConfigError for `argv`; assert that it is one printable line."""
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable(), message
    assert message.isascii() or not " ".join(argv).isascii(), message  # no boxes
    return message


# --- what is right ---


def test_defaults() -> None:
    c = load_config(MODELS)
    assert c == JobConfig(student=job_config.Student("s"), teacher=job_config.Teacher("t"))
    assert (c.rollout.prompts_per_step, c.rollout.group_size, c.optimizer.lr) == (32, 4, 1e-6)
    assert (c.parallelism.data_parallel_shard_degree, c.checkpoint.load_step) == (-1, -1)


def test_precedence(tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text(
        "[rollout]\ngroup_size = 2\ntop_k = 5\nprompts_per_step = 6\n"
    )
    toml = 'base = "parent.toml"\n[rollout]\ngroup_size = 3\ntop_k = 7\n'
    c = load(tmp_path, toml, "--rollout.top_k", "9")
    assert (c.rollout.top_k, c.rollout.group_size, c.rollout.prompts_per_step) == (9, 3, 6)
    assert c.rollout.max_new_tokens == 512
    # The command line wins even when it says what the default says.
    assert load(tmp_path, toml, "--rollout.top_k", "0").rollout.top_k == 0
    assert c.job.config_file == str(tmp_path / "train.toml")


def test_base_is_relative_to_the_including_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "top.toml").write_text('[student]\nhf_path = "top"\n[training]\nsteps = 7\n')
    (tmp_path / "a" / "mid.toml").write_text('base = "../top.toml"\n[teacher]\nhf_path = "mid"\n')
    (tmp_path / "a" / "b" / "low.toml").write_text('base = "../mid.toml"\n[student]\n')
    monkeypatch.chdir(tmp_path / "a")
    c = load_config(["--job.config_file", "b/low.toml"])
    assert (c.student.hf_path, c.teacher.hf_path, c.training.steps) == ("top", "mid", 7)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--metrics.enable_tensorboard", "False"], ("metrics", "enable_tensorboard", False)),
        (["--profiling.enable", "true"], ("profiling", "enable", True)),
        (["--profiling.enable"], ("profiling", "enable", True)),
        (["--profiling.enable", "--training.steps", "3"], ("profiling", "enable", True)),
        (["--validation.no_enable"], ("validation", "enable", False)),
        (["--validation.no-enable"], ("validation", "enable", False)),
        (["--rollout.group-size", "2"], ("rollout", "group_size", 2)),
        (["--metrics.sample_rollouts", "-1"], ("metrics", "sample_rollouts", -1)),
        (["--reference.coef", "-0.5"], ("reference", "coef", -0.5)),
        (["--optimizer.lr", "3e-5"], ("optimizer", "lr", 3e-5)),
        (["--optimizer.lr", "1"], ("optimizer", "lr", 1.0)),
        (["--training.steps", "3", "--training.steps", "5"], ("training", "steps", 5)),
        (["--profiling.enable", "--profiling.no_enable"], ("profiling", "enable", False)),
        (["--metrics.enable_tensorboard=FALSE"], ("metrics", "enable_tensorboard", False)),
        (["--job.description=--a b=c"], ("job", "description", "--a b=c")),
        (["--job.description", "-h x"], ("job", "description", "-h x")),
        (["--job.description", ""], ("job", "description", "")),
        (["--data.path", "/a b/{c}'\"[d]"], ("data", "path", "/a b/{c}'\"[d]")),
        (["--data.path", "123"], ("data", "path", "123")),
        (["--validation.dataset", ""], ("validation", "dataset", "")),
    ],
)
def test_command_line_forms(argv: list[str], expected: tuple[str, str, Any]) -> None:
    table, key, value = expected
    got = getattr(getattr(load_config([*MODELS, *argv]), table), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("toml", [b"", b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n", b"# only\n"])
def test_odd_but_right_files(tmp_path: Path, toml: bytes) -> None:
    assert load(tmp_path, toml).training.steps in (3, 100)


def test_integer_for_a_float_becomes_one(tmp_path: Path) -> None:
    c = load(tmp_path, "[optimizer]\nlr = 1\n")
    assert c.optimizer.lr == 1.0 and type(c.optimizer.lr) is float


# --- what is wrong in a TOML file ---

BAD_TOML = [
    # unknown names
    ("[rollout]\ngroup_sise = 2", "train.toml: [rollout] group_sise: unknown key", "group_size?"),
    ("[rolout]\ngroup_size = 2", "train.toml: rolout: unknown table", "did you mean rollout?"),
    ("[training]\nlr = 2", "[training] lr: unknown key", "did you mean optimizer.lr?"),
    ("lr = 3", "train.toml: lr: unknown key outside of any table", "did you mean optimizer.lr?"),
    ("bse = 'x.toml'", "bse: unknown key outside of any table", "did you mean base?"),
    ('[job]\n"a\\u2028b\\u001b[31m" = 1', "a\\u2028b\\x1b[31m: unknown key"),
    ("[[validation.sets]]\npth = 'x'", "validation.sets[0].pth: unknown key", "sets.path?"),
    ("[[data]]\ntemplate = 'raw'", "data.sets[0].template: unknown key; did you mean data.templ"),
    ("[job]\nconfig_file = 'x'", "[job] config_file: only for the command line", "base ="),
    # tables and lists
    ("rollout = 3", "train.toml: rollout: 3 is not a table; write [rollout]"),
    ("[[rollout]]\ngroup_size = 2", "rollout: an array is not a table", "[rollout]"),
    ("[validation.sets]\nname = 'a'", "validation.sets: a table is not a list of tables", "[[val"),
    ("[validation]\nsets = [1]", "validation.sets[0]: 1 is not a table; write [[validation.sets]]"),
    # types
    ("[rollout]\ngroup_size = [2]", "[rollout] group_size: an array is not an integer"),
    ("[rollout.group_size]\nx = 2", "[rollout] group_size: a table is not an integer"),
    ("[rollout]\ngroup_size = 1979-05-27", "group_size: ", "is not an integer"),
    ("[optimizer]\nlr = nan", "[optimizer] lr: nan is not a finite 32-bit number"),
    ("[optimizer]\nlr = 1e999", "[optimizer] lr: inf is not a finite 32-bit number"),
    ("[optimizer]\nlr = 0x" + "f" * 4000, "lr: a number of over 60 digits is not a number >= 0"),
    ("[training]\nsteps = 9223372036854775808", "steps: 9223372036854775808 does not fit in 64 bi"),
    (
        "[[validation.sets]]\nname = 'a'\n[[validation.sets]]\npath = 3",
        "train.toml: validation.sets[1].path: 3 is not a string",
    ),
    ("[[validation.sets]]\nmax_prompts = -1", "validation.sets[0].max_prompts: -1 is out of range"),
    ("[[data]]\nname = 'x'\nweight = 0", "data.sets[0].weight: 0 is out of range; wanted a numb"),
    ("[job]\ndump_folder = ''", '[job] dump_folder: "" is not a non-empty string'),
    ("[data]\nsplit = ''", '[data] split: "" is not a non-empty string'),
    # texts
    ('[data]\npath = "a\\u0000b"', "[data] path: ", "a NUL"),
    ("[validation]\ngrader = 'latex'", '[validation] grader: "latex" is not a grader; wanted one'),
    ("[validation]\ngrader = 'a.b:c d'", '"a.b:c d" is not a grader', "package.module:function"),
    ("[[validation.sets]]\ngrader = 'a.b'", 'validation.sets[0].grader: "a.b" is not a grader'),
    ("[[validation.sets]]\npath = '~zz/x'", "validation.sets[0].path: ", "no such user"),
    # not TOML
    ("[rollout]\n\ngroup_size = \n", "train.toml: not valid TOML", "line 3"),
    ("[data]\n[data]\n", "train.toml: not valid TOML", "line 2"),
    ("[training]\nseed = " + "9" * 5000, "train.toml: not valid TOML"),
    ("x = " + "[" * 20000, "train.toml: not valid TOML"),
    ("\n" + "a." * 9999, "train.toml: line 2: a key of over 100 parts"),
    (b"[job]\ndescription = '\xff'", "train.toml: not UTF-8 text (byte 21, line 2)"),
    # base
    ("base = 'no.toml'", "train.toml: base: ", "no.toml: no such file"),
    ("base = 3", "train.toml: base: 3 is not the path of a TOML file"),
    ("[base]\nx = 1", "base: a table is not the path of a TOML file"),
    ("base = '.'", "train.toml: base: ", "is a folder; wanted a TOML file"),
    ("base = 'train.toml'", "base: goes in a circle: ", "train.toml -> "),
    ("base = \"a\\u0000.toml\"", "base: ", "cannot be read"),
    ("base = '" + "x" * 5000 + "'", "base: ", "cannot be read: File name too long"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_TOML, ids=lambda case: repr(case[0][:30]))
def test_bad_toml(tmp_path: Path, case: tuple) -> None:
    toml, *parts = case
    (tmp_path / "train.toml").write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    message = refusal(["--job.config_file", str(tmp_path / "train.toml"), *MODELS])
    assert message.startswith(str(tmp_path)) and all(part in message for part in parts), message


def test_error_in_a_parent_names_the_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text("[training]\nstep = 1\n")
    (tmp_path / "train.toml").write_text('base = "parent.toml"\n[training]\nsteps = 1\n')
    message = refusal(["--job.config_file", str(tmp_path / "train.toml")])
    assert message.startswith(f"{tmp_path}/parent.toml: [training] step: unknown key")
    assert message.endswith("did you mean training.steps?")


def test_cycle_names_the_chain(tmp_path: Path, monkeypatch) -> None:
    for name, parent in [("a", "b"), ("b", "c"), ("c", "a")]:
        (tmp_path / f"{name}.toml").write_text(f'base = "{parent}.toml"\n')
    monkeypatch.chdir(tmp_path)
    message = refusal(["--job.config_file", "a.toml"])
    assert message == "c.toml: base: goes in a circle: a.toml -> b.toml -> c.toml -> a.toml"


def test_cycle_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('base = "link.toml"\n')
    (tmp_path / "link.toml").symlink_to("a.toml")
    (tmp_path / "self.toml").symlink_to("self.toml")
    assert "goes in a circle" in refusal(["--job.config_file", str(tmp_path / "a.toml")])
    assert "cannot be read" in refusal(["--job.config_file", str(tmp_path / "self.toml")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").touch(mode=0)
    assert "Permission denied" in refusal(["--job.config_file", str(tmp_path / "a.toml")])


def test_too_large_files() -> None:
    message = refusal(["--job.config_file", "/dev/zero"])
    assert message == "--job.config_file: /dev/zero is larger than 1 MiB; wanted a TOML file"


# --- what is wrong on the command line ---

BAD_ARGUMENTS = [
    # names
    ("--rollout.group_sise=2", "--rollout.group_sise: unknown option", "--rollout.group_size?"),
    ("--training.lr 2", "--training.lr: unknown option", "did you mean --optimizer.lr?"),
    ("--rollout.no_group_size", "--rollout.no_group_size: unknown", "--rollout.group_size?"),
    ("--validation.no_enable=True", "--validation.no_enable: unknown", "--validation.enable?"),
    ("--a\x1b[31m\nb 1", "--a\\x1b[31m\\nb: unknown option"),
    ("--", "--: unknown option", "--help"),
    ("train.toml", '"train.toml": not an option', "--table.key value"),
    ("", '"": not an option', "--table.key value"),
    ("--training.steps 3 4", '"4": not an option', "--table.key value"),
    ("--validation.no_enable False", '"False": not an option'),
    # values
    ("--training.steps", "--training.steps: has no value", "an integer >= 1"),
    ("--training.steps --profiling.enable", "--training.steps: has no value", "an integer >= 1"),
    ("--training.steps " + "9" * 5000, "--training.steps: ", "an integer >= 1"),
    ("--training.steps " + "9" * 30, "--training.steps: ", "does not fit in 64 bits"),
    ("--training.steps 3 --training.steps x", '--training.steps: "x" is not an integer'),
    ("--optimizer.lr -inf", "--optimizer.lr: -inf is not a finite"),
    ("--rollout.group_size 1099511627776", "is out of range; wanted", "<= 1048576"),
    ("--parallelism.data_parallel_shard_degree 0", "0 is not a number of ranks; wanted -1, or"),
    ("--data.path a\0b", "--data.path: ", "a NUL"),
    ("--data.path a\udcffb", "--data.path: ", "not UTF-8"),
    ("--data.path https://me:secret@host/x", "--data.path: contains a URL with a user name or pa"),
    ("--data.path https://host/x?sig=y", '--data.path: "https://..." is a URL; wanted a local pa'),
    ("--data.path " + "x" * 5000, "--data.path: ", "(5000 characters) is too long for a path"),
    ("--student.hf_path ~nobody-here", "--student.hf_path: ", "no such user"),
    ("--job.dump_folder s3://bucket/run", '"s3://..." is a URL; wanted a local path'),
    ("--job.dump_folder ~/run", '--job.dump_folder: "~/run": ~ is not expanded here'),
    ("--job.config_file no.toml", "--job.config_file: no.toml: no such file"),
    ("--job.config_file .", "--job.config_file: . is a folder; wanted a TOML file"),
    ("--validation.sets", "--validation.sets: has no value; wanted a TOML array of tables"),
    ("--validation.sets x", '--validation.sets: "x" is not a TOML array of tables', "'[{key"),
    ("--validation.sets [{nme='a'}]", "--validation.sets[0].nme: unknown key; did you mean"),
    ("--validation.sets [{max_prompts='3'}]", '--validation.sets[0].max_prompts: "3" is not an in'),
]


@pytest.mark.parametrize("case", BAD_ARGUMENTS, ids=lambda case: repr(case[0][-40:]))
def test_bad_arguments(case: tuple) -> None:
    line, *parts = case
    message = refusal([*MODELS, *line.split(" ")])
    assert all(part in message for part in parts), message


OUT_OF_RANGE = {
    "reference.coef": (-1, -2.5),
    "rollout.group_size": (0, 2**20 + 1),
    "rollout.temperature": (0, -1),
    "rollout.top_p": (0, 1.5),
    "rollout.on_policy_fraction": (-0.5, 2),
    "distill.clip_low": (-0.1, 1),
    "optimizer.beta1": (-0.1, 1),
    "optimizer.beta2": (-0.1, 1),
    "optimizer.eps": (0, -1e-8),
    "lr_scheduler.min_lr_factor": (-0.1, 1.1),
    "parallelism.data_parallel_shard_degree": (-2,),
    "checkpoint.load_step": (-2,),
    "validation.samples_per_prompt": (0, 2**20 + 1),
    "metrics.sample_rollouts": (-2,),
    "comm.init_timeout_seconds": (0, 10**8),
    "comm.train_timeout_seconds": (0, 10**8),
}
AT_LEAST_ONE = """data.max_prompt_tokens rollout.prompts_per_step rollout.max_new_tokens
    distill.minibatches distill.top_k training.steps training.max_tokens_per_microbatch
    parallelism.data_parallel_replicate_degree parallelism.tensor_parallel_degree
    metrics.log_freq profiling.interval""".split()


@pytest.mark.parametrize("name", [n for n, f in OPTIONS.items() if f.annotation in (int, float)])
def test_ranges(tmp_path: Path, name: str) -> None:
    """Each number is refused outside of its range, in a file and on the command line."""
    table, _, key = name.partition(".")
    for value in OUT_OF_RANGE.get(name, (0, -1) if name in AT_LEAST_ONE else (-1,)):
        message = refusal([*MODELS, f"--{name}", str(value)])
        assert message.startswith(f'--{name}: "{value}" is out of range; wanted a')
        (tmp_path / "train.toml").write_text(f"[{table}]\n{key} = {value}\n")
        message = refusal(["--job.config_file", str(tmp_path / "train.toml")])
        assert f"train.toml: [{table}] {key}: {value} is out of range" in message
    if name not in OUT_OF_RANGE:  # the lowest right value; no other key contradicts it
        lowest = 1 if name in AT_LEAST_ONE else 0
        config = load_config([*MODELS, f"--{name}", str(lowest)])
        assert getattr(getattr(config, table), key) == lowest


WRONG_TYPE = {bool: ('"yes"', "1"), int: ('"2"', "1.5", "true"), float: ('"2"', "true")}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "job.config_file"])
def test_types(tmp_path: Path, name: str) -> None:
    """TOML values of the wrong type are refused, even if text or 1 could be converted."""
    table, _, key = name.partition(".")
    kind = OPTIONS[name].annotation
    for value in WRONG_TYPE.get(kind, ('"nonsense"', "7") if get_args(kind) else ("3", "true")):
        (tmp_path / "train.toml").write_text(f"[{table}]\n{key} = {value}\n")
        message = refusal(["--job.config_file", str(tmp_path / "train.toml")])
        assert f"train.toml: [{table}] {key}: {value} is not " in message


@pytest.mark.parametrize("name", [n for n in VALUES if n.endswith(("path", "evaluate.model"))])
@pytest.mark.parametrize("value", ["s3://bucket/x", "~nobody-here/x", "x" * 300])
def test_paths(name: str, value: str) -> None:
    """Every option that names something to read wants a path or a hub id."""
    rows, _, key = name.rpartition(".")
    argv = [f"--{rows}", f"[{{{key} = '{value}'}}]"] if rows in LISTS else [f"--{name}", value]
    assert refusal([*MODELS, *argv]).startswith(f"--{rows}")


# --- help, and the printed config ---


def test_help_lists_every_option_fast_and_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run_python("-X", "importtime", "-m", "opd_titan.config", "--help")
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0 and seconds < 2, seconds  # 0.3 s on an idle core
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert "opd_titan.config" in modules and "torch" not in modules
    text = " ".join(done.stdout.split())
    for name, field in VALUES.items():
        assert name not in OPTIONS or f" --{name} (" in text
        doc = " ".join(field.description.split())
        assert len(doc) > 10 and doc.endswith(".") and doc in text, name
    for name in LISTS:
        assert f" --{name} (tables; " in text and f" [[{name}]] " in text


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_wins_over_what_is_wrong(capsys, flag: str) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--nonsense", flag])
    assert stop.value.code == 0
    assert "--rollout.group_size  (an integer >= 1" in capsys.readouterr().out


def test_printed_config_can_be_fed_back(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[job]\ndescription = "a\\n\\"é\\u007f"\n', encoding="utf-8")
    argv = ["--job.config_file", str(tmp_path / "a.toml"), *MODELS, "--training.seed", "7"]
    done = run_python("-m", "opd_titan.config", *argv, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "b.toml").write_text(done.stdout, encoding="utf-8")
    config = load_config(["--job.config_file", str(tmp_path / "b.toml")])
    assert config == load_config(argv) and config.job.description == 'a\n"é\x7f'


def test_a_wrong_config_is_one_line_and_exit_code_2() -> None:
    done = run_python("-m", "opd_titan.config", "--rollout.group_sise", "2")
    assert (done.returncode, done.stdout) == (2, "")
    expected = "--rollout.group_sise: unknown option; did you mean --rollout.group_size?\n"
    assert done.stderr == expected


def test_random_teachers_have_seeds_of_their_own_whatever_the_objective() -> None:
    options = ["--student.hf_path", "s", "--teacher.models"]
    options += ['[{name = "a", hf_path = "m"}, {name = "b", hf_path = "m"}]']
    options += [
        "--data.sets",
        '[{name = "x", path = "p", teacher = "a"}, {name = "y", path = "q", teacher = "b"}]',
    ]
    config = load_config([*options, "--validation.enable", "false"])
    seeds = {role: spec.seed for role, spec in resolve(config, "cpu", 1).models.items()}
    assert len(set(seeds.values())) == 3
    config.distill.objective = "sft"
    assert set(resolve(config, "cpu", 1).models) == {"student"}
    assert {spec.role: spec.seed for spec in teacher_specs(config)} == {
        role: seed for role, seed in seeds.items() if role != "student"
    }
