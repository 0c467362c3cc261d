"""Any valid configuration survives being written and read, with values and types unchanged."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import MODELS

from opd_titan.config import JobConfig, load_config, to_toml
from opd_titan.config.options import LISTS, OPTIONS, TABLES, VALUES, bounds
from opd_titan.config.value_types import GRADERS, literal

STRINGS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda text: "://" not in text and not text.startswith("~"))


def values(name: str) -> st.SearchStrategy:
    """Valid values of an option, or of a list's key."""
    kind: Any = VALUES[name].annotation
    if name.endswith(".grader"):
        return st.sampled_from([*GRADERS, "my.module:grade"])
    if get_args(kind):
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is str:
        return STRINGS
    limits = dict(bounds(VALUES[name]))
    edge = 2**63 - 1 if kind is int else 1e38
    low = limits.get(">=", limits.get(">", -edge))
    high = limits.get("<=", limits.get("<", edge))
    if kind is int:
        numbers = st.integers(low, high)
        return numbers.filter(bool) if name.endswith("shard_degree") else numbers
    return st.floats(low, high, exclude_min=">" in limits, exclude_max="<" in limits)


@st.composite
def configs(draw: st.DrawFn) -> JobConfig:
    """Configurations of values that are each valid; the rules between keys may not hold."""
    tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    for name in OPTIONS:
        table, _, key = name.partition(".")
        if name != "job.config_file":
            tables[table][key] = draw(values(name))
    for name, row in LISTS.items():
        table, _, key = name.partition(".")
        keys = [n.removeprefix(f"{name}.") for n in VALUES if n.startswith(f"{name}.")]
        rows = st.fixed_dictionaries({k: values(f"{name}.{k}") for k in keys})
        tables[table][key] = [row(**found) for found in draw(st.lists(rows, max_size=3))]
    return JobConfig(**{table: cls(**tables[table]) for table, cls in TABLES.items()})


def inline(rows: list[Any]) -> str:
    """The rows of a list as one TOML array."""
    tables = [", ".join(f"{key} = {literal(v)}" for key, v in asdict(row).items()) for row in rows]
    return "[" + ", ".join(f"{{{table}}}" for table in tables) + "]"


def load(*argv: str) -> JobConfig:
    return load_config(argv, check=lambda config: None)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs())
def test_round_trip(tmp_path_factory: Any, config: JobConfig) -> None:
    """A configuration survives TOML, and the command line."""
    file = tmp_path_factory.mktemp("trip") / "config.resolved.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    again = load("--job.config_file", str(file))
    assert again == config and to_toml(again) == to_toml(config)
    words = []
    for name in [*OPTIONS, *LISTS]:
        table, _, key = name.partition(".")
        value = getattr(getattr(config, table), key)
        words.append(f"--{name}={inline(value) if name in LISTS else value}")
    assert load(*words) == config


def test_to_toml_writes_each_key_once() -> None:
    lines = to_toml(load_config(MODELS)).splitlines()
    assert sum("=" in line for line in lines) == len(OPTIONS) - 1
    assert not any(line.startswith("config_file") for line in lines)
    assert 'hf_path = "s"' in lines and "enable_tensorboard = true" in lines
