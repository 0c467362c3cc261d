"""Any right config survives being written and read; nothing wrong ends in a traceback."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_config import MODELS

from opd_titan.config import ConfigError, JobConfig, checks, load_config, to_toml
from opd_titan.config.checks import LISTS, OPTIONS, TABLES, VALUES
from opd_titan.config.consistency import EXTRAPOLATES
from opd_titan.config.job_config import DataSet

STRINGS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda text: "://" not in text and not text.startswith("~"))


def values(name: str) -> st.SearchStrategy:
    """Right values of an option, or of a list's key, by itself."""
    kind = VALUES[name]
    if name.endswith(".grader"):
        return st.sampled_from([*checks.GRADERS, "my.module:grade"])
    if name in [f"{rows}.name" for rows in LISTS]:
        return st.text("abc-_.12", min_size=1, max_size=9).map("s{}".format)
    if get_args(kind):
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is str:
        return STRINGS
    edge = 2**63 - 1 if kind is int else 1e38
    below, above = -edge, edge
    for bound in checks.bounds(name):
        compare, limit = bound.split()
        below = int(limit) if compare[0] == ">" else below
        above = int(limit) if compare[0] == "<" else above
    numbers = st.integers(below, above) if kind is int else st.floats(below, above)
    return numbers.filter(lambda v: all(OPERATORS[b.split()[0]](v, b) for b in checks.bounds(name)))


OPERATORS = {
    op: lambda v, bound, f=f: f(v, int(bound.split()[1])) for op, f in checks._COMPARE.items()
}


@st.composite
def configs(draw) -> JobConfig:
    """Right configs: any values, then the rules between keys are met."""
    tables: dict[str, dict] = {table: {} for table in TABLES}
    for name in OPTIONS:
        table, _, key = name.partition(".")
        if name != "job.config_file":
            tables[table][key] = draw(values(name))
    for name, row in LISTS.items():
        table, _, key = name.partition(".")
        keys = [n.removeprefix(f"{name}.") for n in VALUES if n.startswith(f"{name}.")]
        rows = st.fixed_dictionaries({k: values(f"{name}.{k}") for k in keys}).map(
            lambda found, row=row: row(**found)
        )
        unique = st.lists(rows, max_size=3, unique_by=lambda r: r.name)
        tables[table][key] = draw(unique)
    c = JobConfig(**{table: cls(**tables[table]) for table, cls in TABLES.items()})
    _route(draw, c)
    sft = c.distill.objective == "sft"
    c.data.enable_thinking &= c.data.template == "chat"
    c.validation.temperature += 1e-3
    if c.distill.objective in ("sft", "policy_gradient"):
        c.rollout.on_policy_fraction = 0.0 if sft else 1.0
    if c.rollout.on_policy_fraction == 0.0:
        c.rollout.group_size = 1
    if sft:
        c.rollout.temperature, c.rollout.top_p, c.rollout.top_k = 1.0, 1.0, 0
    c.reference.coef *= not sft
    d = c.distill
    if d.objective not in EXTRAPOLATES:
        c.reference.coef = abs(c.reference.coef)
    if d.objective != "policy_gradient":
        d.baseline, d.reward_power = "none", 0.0
        c.rollout.top_p, c.rollout.top_k = 1.0, 0
    d.log_ratio_clamp *= d.reward_power == 0.0
    c.distill.minibatches = min(c.distill.minibatches, c.rollout.prompts_per_step)
    responses = c.rollout.prompts_per_step * c.rollout.group_size
    if c.rollout.on_policy_fraction == 0.0 or c.rollout.max_tokens_per_step < responses:
        c.rollout.max_tokens_per_step = 0
    c.job.dump_folder = "a folder of its own" + c.job.dump_folder.replace("/", "_")
    c.checkpoint.enable |= c.checkpoint.load_step > 0 or c.watchdog.action == "rollback"
    return c


def _route(draw, c: JobConfig) -> None:
    """Every set has a teacher of its own, every teacher a set."""
    names = [model.name for model in c.teacher.models]
    c.data.sets += [DataSet(f"of-{i}", path="x") for i in range(len(c.data.sets), len(names))]
    for i, row in enumerate(c.data.sets):
        row.teacher = (
            (names[i] if i < len(names) else draw(st.sampled_from(names))) if names else ""
        )
    if len(names) > 1 and not c.validation.sets:
        c.validation.dataset = c.validation.path = ""
    for row in c.validation.sets:
        row.teacher = draw(st.sampled_from(names)) if names else ""
    for row in (*c.data.sets, *c.validation.sets):
        row.dataset, row.path = row.dataset or "gsm8k", row.path or "x"
    for model in c.teacher.models:
        model.hf_path = model.hf_path or "x"
    if names:
        c.teacher.hf_path = ""
    if len(c.data.sets) > 1:
        c.training.epochs = 0


def changed(got: JobConfig, default: JobConfig) -> list[str]:
    """The differences between two configs, as arguments."""
    return [
        f"--{name}={getattr(getattr(got, table), key)}"
        for name in OPTIONS
        for table, key in [name.split(".")]
        if getattr(getattr(got, table), key) != getattr(getattr(default, table), key)
    ]


def inline(rows: list[Any]) -> str:
    """The rows of a list as one TOML array."""
    tables = [
        ", ".join(f"{key} = {checks.literal(value)}" for key, value in asdict(row).items())
        for row in rows
    ]
    return "[" + ", ".join(f"{{{table}}}" for table in tables) + "]"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs())
def test_round_trip(tmp_path_factory, config: JobConfig) -> None:
    """A config survives TOML, and the command line, unchanged in value and type."""
    file = tmp_path_factory.mktemp("trip") / "config.resolved.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    again = load_config(["--job.config_file", str(file)])
    assert again == config and to_toml(again) == to_toml(config)
    lists = [
        f"--{name}={inline(getattr(getattr(config, table), key))}"
        for name in LISTS
        for table, _, key in [name.partition(".")]
    ]
    assert load_config([*changed(config, JobConfig()), *lists]) == config


def test_to_toml_writes_each_key_once() -> None:
    lines = to_toml(load_config(MODELS)).splitlines()
    assert sum("=" in line for line in lines) == len(OPTIONS) - 1
    assert not any(line.startswith("config_file") for line in lines)
    assert 'hf_path = "s"' in lines and "enable_tensorboard = true" in lines


NAMES = [*OPTIONS, *TABLES, "base", "", "x", "job.x", "rollout.group_sise"]
SCRAPS = ["=", "\n", "[", "]", "[[", '"', "'''", "1", "-1", "0.5", "true", "nan", "[]", "{}"]
SCRAPS += ["1979-05-27", "#", "\\", "\0", "\x1b", "\u2028", '"gsm8k"', "\u00e9", "_", "."]
TOML_LINES = st.one_of(
    st.sampled_from(list(TABLES)).map(lambda table: f"[{table}]"),
    st.tuples(st.sampled_from(list(OPTIONS)), st.sampled_from(SCRAPS)).map(
        lambda pair: f"{pair[0].partition('.')[2]} = {pair[1]}"
    ),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(SCRAPS)).map(" = ".join),
)
TOML_TEXTS = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from([*NAMES, *SCRAPS]), max_size=12).map(lambda s: "".join(s).encode()),
    st.lists(TOML_LINES, max_size=6).map(lambda lines: "\n".join(lines).encode()),
)


def survives(argv: list[str]) -> None:
    """A config comes out, or a ConfigError of one line; nothing else."""
    try:
        assert isinstance(load_config(argv), JobConfig)
    except ConfigError as e:
        assert len(str(e).splitlines()) == 1 and str(e).isprintable(), str(e)
    except SystemExit as stop:
        assert not stop.code and {"-h", "--help"} & set(argv)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TOML_TEXTS)
@example(text=b"base = '\\'")
@example(text=b"job.x.y = 1")
@example(text=b"a = 0x" + b"f" * 5000)
@example(text=b"rollout.group_size = [0x" + b"f" * 5000 + b"]")
def test_fuzz_toml(tmp_path_factory, text: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_bytes(text)
    survives(["--job.config_file", str(file), *MODELS])


ARGUMENTS = st.one_of(
    st.sampled_from(NAMES).map("--{}".format),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(SCRAPS)).map(lambda p: "--{}={}".format(*p)),
    st.sampled_from([*SCRAPS, "-h", "--help", "--", "-", "True", "false", "/dev/null"]),
    st.text(max_size=8),
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(argv=st.lists(ARGUMENTS, max_size=6))
def test_fuzz_arguments(capsys, argv: list[str]) -> None:
    survives([*MODELS, *argv])
