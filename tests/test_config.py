from __future__ import annotations

import ast
import inspect
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opd_titan.config import ConfigError, JobConfig, checks, job_config, load_config, to_toml
from opd_titan.config.checks import LISTS, OPTIONS, TABLES, VALUES
from opd_titan.config.resolve import data_sets, teachers, validation_sets

MODELS = ["--student.hf_path", "s", "--teacher.hf_path", "t"]
SFT = ["--student.hf_path", "s", "--distill.objective", "sft", "--rollout.on_policy_fraction", "0"]
SFT += ["--rollout.group_size", "1"]


def load(tmp_path: Path, toml: str | bytes, *argv: str) -> JobConfig:
    """Load `toml` (as train.toml, with both models named) and `argv`."""
    file = tmp_path / "train.toml"
    file.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    return load_config(["--job.config_file", str(file), *MODELS, *argv])


def refusal(argv: list[str]) -> str:
    """The message of the ConfigError that `argv` must give, checked to be one clean line."""
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable(), message
    assert message.isascii() or not " ".join(argv).isascii(), message  # no boxes
    return message


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, encoding="utf-8", env={**os.environ, **env}
    )


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

    def load(toml: str) -> JobConfig:
        (tmp_path / "own.toml").write_text(toml)
        return load_config(["--job.config_file", str(tmp_path / "own.toml")])

    c = load(short)
    assert (c.teacher.hf_path, c.teacher.cpu_offload) == ("", True)
    assert [t.hf_path for t in teachers(c)] == ["ta", "tb"]
    assert [(s.name, s.dataset, s.path, s.weight, s.teacher) for s in data_sets(c)] == [
        ("x", "prompts", "p", 1.0, "b"),
        ("y", "gsm8k", "", 2.0, "a"),  # other rows than the table's do not lie there
    ]
    assert [(s.name, s.split, s.teacher) for s in validation_sets(c)] == [
        ("x", "test", "b"),
        ("y", "test", "a"),
    ]
    # Without a teacher nobody is asked for, and nothing is loaded.
    plain = short.replace('teacher = "a"', "").replace('teacher = "b"', "")
    sft = '[distill]\nobjective = "sft"\n[rollout]\non_policy_fraction = 0\ngroup_size = 1\n'
    for text in (plain, short):
        c_sft = load(text + sft)
        assert teachers(c_sft) == [] and {s.teacher for s in data_sets(c_sft)} == {""}
    long = short.replace("[[teacher]]", "[[teacher.models]]").replace("[[data]]", "[[data.sets]]")
    other = load(long + '[teacher]\nhf_path = ""\n')
    assert (other.teacher, other.data) == (c.teacher, c.data)
    assert load(to_toml(c)) == c


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
        (["--metrics.enable_tensorboard", "false"], ("metrics", "enable_tensorboard", False)),
        (["--metrics.enable_tensorboard=FALSE"], ("metrics", "enable_tensorboard", False)),
        (["--profiling.enable", "true"], ("profiling", "enable", True)),
        (["--profiling.enable"], ("profiling", "enable", True)),
        (["--profiling.enable", "--training.steps", "3"], ("profiling", "enable", True)),
        (["--validation.no_enable"], ("validation", "enable", False)),
        (["--validation.no-enable"], ("validation", "enable", False)),
        (["--rollout.group-size", "2"], ("rollout", "group_size", 2)),
        (["--rollout.group_size=2"], ("rollout", "group_size", 2)),
        (["--metrics.sample_rollouts", "-1"], ("metrics", "sample_rollouts", -1)),
        (["--reference.coef", "-0.5"], ("reference", "coef", -0.5)),
        (["--reference.coef=-.5"], ("reference", "coef", -0.5)),
        (["--optimizer.lr", "3e-5"], ("optimizer", "lr", 3e-5)),
        (["--optimizer.lr", "1"], ("optimizer", "lr", 1.0)),
        (["--training.steps", "3", "--training.steps", "5"], ("training", "steps", 5)),
        (["--profiling.enable", "--profiling.no_enable"], ("profiling", "enable", False)),
        (["--job.description=--a b=c"], ("job", "description", "--a b=c")),
        (["--job.description", "-h x"], ("job", "description", "-h x")),
        (["--job.description="], ("job", "description", "")),
        (["--job.description", ""], ("job", "description", "")),
        (["--data.path", "/a b/{c}'\"[d]"], ("data", "path", "/a b/{c}'\"[d]")),
        (["--data.path", "123"], ("data", "path", "123")),
        (["--validation.dataset", ""], ("validation", "dataset", "")),
        (["--job.config_file="], ("job", "config_file", "")),
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


@pytest.mark.parametrize(
    "argv",
    [
        SFT,
        [*SFT, "--lr_scheduler.decay", "cosine", "--training.steps", "2"],
        # A recipe cut short for a trial may end within its warm-up.
        [*MODELS, "--lr_scheduler.decay=linear", "--lr_scheduler.warmup_steps=900"],
        [*MODELS, "--validation.samples_per_prompt", "4", "--validation.temperature", "0.6"],
        [*MODELS, "--distill.minibatches", "128"],
        [*MODELS, "--data.dataset", "prompts", "--data.path", "x.jsonl"],
        [*MODELS, "--checkpoint.load_step", "0", "--checkpoint.no_enable"],
        [*MODELS, "--validation.dataset", "prompts", "--validation.no_enable"],
        [*MODELS, "--validation.dataset", "prompts", "--validation.path", "x.jsonl"],
        [*MODELS, "--checkpoint.keep_latest_k", "1"],
        [*MODELS, "--reference.coef", "1", "--reference.hf_path", "r"],
    ],
)
def test_accepted_combinations(argv: list[str]) -> None:
    load_config(argv)


# --- what is wrong in a TOML file ---

BAD_TOML = [
    # unknown names
    ("[rollout]\ngroup_sise = 2", "train.toml: [rollout] group_sise: unknown key", "group_size?"),
    ("[rollout]\ngroup-size = 2", "[rollout] group-size", "did you mean group_size?"),
    ("[rolout]\ngroup_size = 2", "train.toml: [rolout]: unknown table", "did you mean rollout?"),
    ("[zzz]\nx = 2", "[zzz]: unknown table", "known: job, student, teacher,"),
    ("[training]\nlr = 2", "[training] lr: unknown key", "did you mean optimizer.lr?"),
    ("[student]\nzzz = 2", "[student] zzz: unknown key", "known: hf_path, random_init"),
    ("[student]\nconfig.x = 2", "[student] config: unknown key"),
    ("[sparse]\nenable = true", "[sparse]: unknown table"),
    ("[teacher]\ngpu_offload = true", "[teacher] gpu_offload: unknown key"),
    ("lr = 3", "train.toml: lr: unknown key outside of any table", "did you mean optimizer.lr?"),
    ("bse = 'x.toml'", "bse: unknown key outside of any table", "did you mean base?"),
    ("'a\\nb' = 1", "a\\nb: unknown key outside of any table", "known: base"),
    ('[job]\n"a\\u2028b\\u001b[31m" = 1', "a\\u2028b\\x1b[31m: unknown key"),
    ("rollout = 3", "train.toml: rollout: 3 is not a table; write [rollout]"),
    ("[[rollout]]\ngroup_size = 2", "rollout: an array is not a table", "[rollout]"),
    ("[job]\nconfig_file = 'x'", "[job] config_file: only for the command line", "base ="),
    # types
    ("[rollout]\ngroup_size = '2'", '[rollout] group_size: "2" is not an integer >= 1'),
    ("[rollout]\ngroup_size = 2.0", "[rollout] group_size: 2.0 is not an integer"),
    ("[rollout]\ngroup_size = true", "[rollout] group_size: true is not an integer"),
    ("[rollout]\ngroup_size = [2]", "[rollout] group_size: an array is not an integer"),
    ("[rollout.group_size]\nx = 2", "[rollout] group_size: a table is not an integer"),
    ("[rollout]\ngroup_size = 1979-05-27", "group_size: ", "is not an integer"),
    ("[optimizer]\nlr = '1e-6'", '[optimizer] lr: "1e-6" is not a number >= 0'),
    ("[optimizer]\nlr = false", "[optimizer] lr: false is not a number"),
    ("[optimizer]\nlr = nan", "[optimizer] lr: nan is not finite", "a number >= 0"),
    ("[optimizer]\nlr = inf", "[optimizer] lr: inf is not finite"),
    ("[optimizer]\nlr = 1e999", "[optimizer] lr: inf is not finite"),
    ("[optimizer]\nlr = 0x" + "f" * 4000, "lr: a number of over 60 digits does not fit", ">= 0"),
    ("[training]\nsteps = 9223372036854775808", "steps: 9223372036854775808 does not fit", ">= 1"),
    ("[training]\nseed = " + "9" * 5000, "train.toml: not valid TOML"),
    ("[profiling]\nenable = 1", "[profiling] enable: 1 is not true or false"),
    ("[profiling]\nenable = 'true'", '[profiling] enable: "true" is not true or false'),
    ("[student]\nhf_path = 3", "[student] hf_path: 3 is not a string"),
    ("[student]\nhf_path = ['a']", "[student] hf_path: an array is not a string"),
    ('[data]\npath = "a\\u0000b"', "[data] path: ", "a NUL"),
    # choices
    ("[data]\ndataset = 'gsm'", '"gsm" is not one of gsm8k, openthoughts3, prompts'),
    ("[data]\ntemplate = 'Chat'", '[data] template: "Chat" is not one of raw, chat'),
    ("[distill]\nobjective = 'js'", "objective: ", "one of policy_gradient, reverse_kl"),
    ("[optimizer]\nname = 'sgd'", '[optimizer] name: "sgd" is not one of adamw'),
    ("[lr_scheduler]\ndecay = 'cos'", "decay: ", "one of constant, linear, cosine"),
    ("[training]\ndtype = 'float16'", "dtype: ", "one of auto, float32, bfloat16"),
    ("[training]\ndtype = 16", "[training] dtype: 16 is not one of auto"),
    ("[checkpoint]\nasync_mode = true", "async_mode: true is not one of disabled, async"),
    ("[validation]\ndataset = 'x'", 'is not one of "", gsm8k'),
    # empty
    ("[job]\ndump_folder = ''", "[job] dump_folder: must not be empty"),
    ("[data]\nsplit = ''", "[data] split: must not be empty"),
    # not TOML
    ("[rollout\n", "train.toml: not valid TOML", "line 1"),
    ("[rollout]\n\ngroup_size = \n", "train.toml: not valid TOML", "line 3"),
    ("[student]\nhf_path = Qwen/Qwen3", "train.toml: not valid TOML", "line 2"),
    ("[data]\n[data]\n", "train.toml: not valid TOML", "line 2"),
    ("[training]\nsteps = 1\nsteps = 2", "train.toml: not valid TOML"),
    ("x = " + "[" * 20000, "train.toml: not valid TOML"),
    (b"[job]\ndescription = '\xff'", "train.toml: not UTF-8 text (byte 21, line 2)"),
    (b"\xff\xfe[\x00j\x00", "train.toml: not UTF-8 text"),
    # base
    ("base = 'no.toml'", "train.toml: base: ", "no.toml: no such file"),
    ("base = 3", "train.toml: base: 3 is not the path of a TOML file"),
    ("base = ''", 'train.toml: base: "" is not the path of a TOML file'),
    ("base = ['a.toml', 'b.toml']", "base: an array is not the path of a TOML file"),
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
    assert message.endswith("did you mean steps?")


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


# --- what is wrong on the command line, or between keys ---

BAD_ARGUMENTS = [
    # names
    ("--rollout.group_sise 2", "--rollout.group_sise: unknown option", "--rollout.group_size?"),
    ("--rolout.group_size 2", "--rolout.group_size", "did you mean --rollout.group_size?"),
    ("--rollout.group_sise=2", "--rollout.group_sise: unknown", "--rollout.group_size?"),
    ("--group_size 2", "--group_size: unknown option", "did you mean --rollout.group_size?"),
    ("--training.lr 2", "--training.lr: unknown option", "did you mean --optimizer.lr?"),
    ("--rollout.no_group_size", "--rollout.no_group_size: unknown", "--rollout.group_size?"),
    ("--validation.no_enable=True", "--validation.no_enable: unknown", "--validation.enable?"),
    ("--zzz", "--zzz: unknown option", "--help"),
    ("--rollout", "--rollout: unknown option"),
    ("--a\nb 1", "--a\\nb: unknown option"),
    ("--", "--: unknown option", "--help"),
    ("train.toml", '"train.toml": not an option', "--table.key value"),
    ("-x", '"-x": not an option', "--table.key value"),
    ("--training.steps 3 4", '"4": not an option', "--table.key value"),
    ("--validation.no_enable False", '"False": not an option'),
    # values
    ("--training.steps", "--training.steps: has no value", "an integer >= 1"),
    ("--training.steps --profiling.enable", "--training.steps: has no value", "an integer >= 1"),
    ("--job.description --x", "--job.description: has no value", "a string"),
    ("--training.steps=", '--training.steps: "" is not an integer >= 1'),
    ("--training.steps abc", '--training.steps: "abc" is not an integer >= 1'),
    ("--training.steps 1.0", '--training.steps: "1.0" is not an integer'),
    ("--training.steps True", '--training.steps: "True" is not an integer'),
    ("--training.steps " + "9" * 5000, "--training.steps: ", "an integer >= 1"),
    ("--training.steps " + "9" * 30, "--training.steps: ", "does not fit in 64 bits"),
    ("--optimizer.lr abc", '--optimizer.lr: "abc" is not a number >= 0'),
    ("--optimizer.lr nan", "--optimizer.lr: nan is not finite", "a number >= 0"),
    ("--optimizer.lr -inf", "--optimizer.lr: -inf is not finite"),
    ("--optimizer.lr 1e999", "--optimizer.lr: inf is not finite"),
    ("--profiling.enable yes", '--profiling.enable: "yes" is not true or false'),
    ("--profiling.enable 1", '--profiling.enable: "1" is not true or false'),
    ("--profiling.enable=", '--profiling.enable: "" is not true or false'),
    ("--data.template x", '--data.template: "x" is not one of raw, chat'),
    ("--distill.objective js", '"js" is not one of policy_gradient, reverse_kl, forward_kl, jsd,'),
    ("--data.path a\0b", "--data.path: ", "a NUL"),
    ("--data.path a\udcffb", "--data.path: ", "not UTF-8"),
    ("--job.dump_folder=", "--job.dump_folder: must not be empty"),
    ("--job.config_file no.toml", "--job.config_file: no.toml: no such file"),
    ("--job.config_file .", "--job.config_file: . is a folder; wanted a TOML file"),
    ("--job.config_file a\nb", "--job.config_file: a\\nb: no such file"),
    # between keys
    ("--student.hf_path=", "[student] hf_path: required", "a hub id"),
    ("--student.hf_path= --student.random_init", "[student] hf_path: required"),
    ("--teacher.hf_path=", "[teacher] hf_path: required", "policy_gradient", "a hub id"),
    (
        "--teacher.hf_path= --teacher.random_init --distill.objective sft "
        "--rollout.on_policy_fraction 0",
        "[teacher] random_init: true takes the sizes of [teacher] hf_path",
    ),
    ("--data.dataset prompts", "[data] path: required", '"prompts"'),
    ("--validation.dataset prompts", "[validation] path: required", '"prompts"'),
    ("--data.enable_thinking --data.template raw", "[data] enable_thinking", 'template = "chat"'),
    (
        "--validation.samples_per_prompt 4",
        "[validation] samples_per_prompt: 4 greedy samples",
        "temperature > 0",
    ),
    (
        "--rollout.on_policy_fraction 0.5",
        "[rollout] on_policy_fraction: 0.5 contradicts",
        '"policy_gradient"',
        "the student's own samples; wanted 1.0",
    ),
    ("--rollout.on_policy_fraction 0", "0.0 contradicts", '"policy_gradient"', "wanted 1.0"),
    ("--distill.objective sft", "[rollout] on_policy_fraction: 1.0", '"sft"', "wanted 0.0"),
    (
        "--distill.objective sft --rollout.on_policy_fraction 0.5",
        "[rollout] on_policy_fraction: 0.5",
        '"sft"',
        "wanted 0.0",
    ),
    (
        "--distill.objective jsd --rollout.on_policy_fraction 0",
        "[rollout] group_size: 4 contradicts on_policy_fraction = 0.0",
    ),
    (
        "--distill.objective jsd --rollout.on_policy_fraction 0.5 --distill.minibatches 33",
        "[distill] minibatches: 33 is more than a step's 32 responses",
        "prompts_per_step, if none is sampled",
        "at most 32",
    ),
    (
        " ".join(SFT) + " --rollout.group_size 2",
        "[rollout] group_size: 2 contradicts on_policy_fraction = 0.0",
        "wanted 1",
    ),
    (" ".join(SFT) + " --rollout.top_k 5", "[rollout] temperature: 1.0", "top_k 5", "wanted 1.0"),
    (" ".join(SFT) + " --reference.coef 1", "[reference] coef: must be 0", '"sft"'),
    (
        "--distill.objective reverse_kl --distill.baseline kl",
        '[distill] baseline: "kl" contradicts [distill] objective = "reverse_kl"',
        'wanted "none"',
    ),
    (
        "--distill.objective jsd --distill.reward_power 0.5",
        "[distill] reward_power: 0.5 contradicts",
        "wanted 0",
    ),
    (
        "--distill.reward_power 0.5 --distill.log_ratio_clamp 2",
        "[distill] log_ratio_clamp: 2.0 contradicts reward_power = 0.5",
    ),
    ("--distill.objective jsd --rollout.top_p 0.9", "[rollout] top_p: 0.9", '"jsd"', "wanted 1.0"),
    ("--distill.objective top_k_reverse_kl --rollout.top_k 9", "[rollout] top_k: 9", "wanted 0"),
    ("--distill.minibatches 129", "[distill] minibatches: 129", "group_size", "at most 128"),
    ("--checkpoint.load_step 5 --checkpoint.no_enable", "[checkpoint] load_step: 5", "enable"),
]


@pytest.mark.parametrize("case", BAD_ARGUMENTS, ids=lambda case: repr(case[0][:40]))
def test_bad_arguments(case: tuple) -> None:
    line, *parts = case
    message = refusal([*MODELS, *line.split(" ")])
    assert all(part in message for part in parts), message


OUT_OF_RANGE = {
    "reference.coef": (-1, -2.5),
    "rollout.temperature": (0, -1),
    "rollout.top_p": (0, 1.5),
    "rollout.on_policy_fraction": (-0.5, 2),
    "distill.clip_low": (-0.1, 1),
    "optimizer.beta1": (-0.1, 1),
    "optimizer.beta2": (-0.1, 1),
    "optimizer.eps": (0, -1e-8),
    "lr_scheduler.min_lr_factor": (-0.1, 1.1),
    "parallelism.data_parallel_shard_degree": (0, -2),
    "checkpoint.load_step": (-2,),
    "metrics.sample_rollouts": (-2,),
}
AT_LEAST_ONE = """data.max_prompt_tokens rollout.prompts_per_step rollout.group_size
    rollout.max_new_tokens distill.minibatches distill.top_k training.steps
    training.max_tokens_per_microbatch
    parallelism.data_parallel_replicate_degree parallelism.tensor_parallel_degree
    validation.samples_per_prompt metrics.log_freq profiling.interval comm.init_timeout_seconds
    comm.train_timeout_seconds""".split()


@pytest.mark.parametrize("name", [n for n, kind in OPTIONS.items() if kind in (int, float)])
def test_ranges(tmp_path: Path, name: str) -> None:
    """Every number refuses what lies outside of its range, from either side of the config."""
    table, _, key = name.partition(".")
    for value in OUT_OF_RANGE.get(name, (0, -1) if name in AT_LEAST_ONE else (-1,)):
        message = refusal([*MODELS, f"--{name}", str(value)])
        assert message.startswith(f"--{name}: {OPTIONS[name](value)} is out of range; wanted a")
        (tmp_path / "train.toml").write_text(f"[{table}]\n{key} = {value}\n")
        message = refusal(["--job.config_file", str(tmp_path / "train.toml")])
        assert f"train.toml: [{table}] {key}: " in message and "out of range" in message
    if name not in OUT_OF_RANGE:  # the lowest right value, where no other key contradicts it
        lowest = 1 if name in AT_LEAST_ONE else 0
        config = load_config([*MODELS, f"--{name}", str(lowest)])
        assert getattr(getattr(config, table), key) == lowest


def test_range_rows_belong_to_numbers() -> None:
    assert all(VALUES[name] in (int, float) for name in checks.RANGES)
    assert all(name in OPTIONS for name in checks.NOT_EMPTY)


# --- help, and the printed config ---


def field_docs() -> dict[str, str]:
    """{"table.key": docstring} from the source, where a string stands right under a field."""
    table_of = {cls.__name__: table for table, cls in {**TABLES, **LISTS}.items()}
    docs = {}
    for node in ast.parse(inspect.getsource(job_config)).body:
        if isinstance(node, ast.ClassDef) and node.name in table_of:
            for field, below in itertools.pairwise([*node.body, ast.Pass()]):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    docs[f"{table_of[node.name]}.{field.target.id}"] = below.value.value
    return docs


def test_few_options_each_with_a_docstring() -> None:
    # About 80: objectives needed four more (baseline, beta, top_k, reward_power), faults three
    # (allow_changes, max_skipped_updates, keep_rollouts), evaluation three (grader, model, folder)
    # and the seven of a [[validation.sets]], several teachers two and their data sets six.
    assert len(VALUES) <= 107
    docs = field_docs()
    assert set(docs) == {*VALUES, *LISTS}
    assert all(len(doc) > 10 and doc.endswith(".") for doc in docs.values())


def test_help_lists_every_option_fast_and_without_torch() -> None:
    start = time.perf_counter()
    done = run("-X", "importtime", "-m", "opd_titan.config", "--help")
    seconds = time.perf_counter() - start
    assert done.returncode == 0 and seconds < 3, seconds  # 0.25 s on an idle core
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert "opd_titan.config" in modules and "torch" not in modules
    assert "\x1b" not in done.stdout
    text = " ".join(done.stdout.replace("│", " ").split())
    for name, doc in field_docs().items():
        if name in OPTIONS:
            assert f"--{name} " in text and " ".join(doc.split()) in text, name


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_wins_over_what_is_wrong(capsys, flag: str) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--nonsense", flag])
    assert stop.value.code == 0
    assert "--rollout.group_size INT" in capsys.readouterr().out


def test_printed_config_can_be_fed_back(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[job]\ndescription = "a\\n\\"é\\u007f"\n', encoding="utf-8")
    argv = ["--job.config_file", str(tmp_path / "a.toml"), *MODELS, "--training.seed", "7"]
    done = run("-m", "opd_titan.config", *argv, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "b.toml").write_text(done.stdout, encoding="utf-8")
    config = load_config(["--job.config_file", str(tmp_path / "b.toml")])
    assert config == load_config(argv) and config.job.description == 'a\n"é\x7f'


def test_a_wrong_config_is_one_line_and_exit_code_2() -> None:
    done = run("-m", "opd_titan.config", "--rollout.group_sise", "2")
    assert (done.returncode, done.stdout) == (2, "")
    expected = "--rollout.group_sise: unknown option; did you mean --rollout.group_size?\n"
    assert done.stderr == expected
