"""Fuzz recipes, command lines and data files.

Each gives a value or a UserError of one printable line, and never another exception or a hang.

`OPD_TITAN_FUZZ=1000 pytest tests/test_fuzz.py` runs 1000 times as many examples, and new ones. What
it finds is kept here as an `@example`, or in the tests of the reader.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_config import MODELS

from opd_titan.config import JobConfig, load_config, to_toml
from opd_titan.config.options import OPTIONS, TABLES
from opd_titan.data.loading import load_rows
from opd_titan.data.prompts import build_prompts
from opd_titan.data.sources import DATASETS
from opd_titan.errors import UserError

pytestmark = pytest.mark.long

FACTOR = int(os.environ.get("OPD_TITAN_FUZZ", 1))


def fuzz(examples: int) -> Callable[[Callable], Callable]:
    """Run a test on `examples` times FACTOR examples, each of at most 60 s."""
    return settings(
        max_examples=examples * FACTOR,
        deadline=60_000,
        database=None,
        derandomize=FACTOR == 1,
        suppress_health_check=list(HealthCheck),
    )


def survives(act: Callable[[], Any]) -> Any:
    """Return what `act` returns, or None for a UserError, which must be printable."""
    try:
        return act()
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) <= 1000, message
        return None


# ------------------------------------------------------------------------ recipes

RECIPES = [
    path.read_bytes()
    for path in sorted((Path(__file__).parent.parent / "train_configs").glob("*.toml"))
]
NAMES = [*OPTIONS, *(name.partition(".")[2] for name in OPTIONS), *TABLES]
NAMES += ["base", "", "x", "job.x", "rollout.group_sise"]
SCRAPS = ["=", "\n", "[", "]", "[[", '"', "'''", "1", "-1", "0.5", "true", "nan", "[]", "{}"]
SCRAPS += ["1979-05-27", "#", "\\", "\0", "\x1b", "\u2028", '"gsm8k"', "\u00e9", "_", "."]
TOML_LINES = st.one_of(
    st.sampled_from(list(TABLES)).map("[{}]".format),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(SCRAPS)).map(" = ".join),
)
TOML_TEXTS = st.one_of(
    st.lists(st.sampled_from([*NAMES, *SCRAPS]), max_size=12).map(lambda s: "".join(s).encode()),
    st.lists(TOML_LINES, max_size=6).map(lambda lines: "\n".join(lines).encode()),
)
WHOLE = to_toml(load_config(MODELS)).encode()


@st.composite
def damaged(draw: st.DrawFn, sources: st.SearchStrategy[bytes]) -> bytes:
    """Return one of the sources with some bytes replaced, removed or repeated."""
    data = bytearray(draw(sources))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 16))
        kind = draw(st.sampled_from(["put", "cut", "copy", "flip", "end"]))
        if kind == "put":
            data[at : at + length] = draw(st.one_of(st.binary(max_size=8), SPECIAL))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "copy":
            data[at:at] = data[at // 2 : at // 2 + 4 * length]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "end":
            del data[at:]
    return bytes(data)


# Hard cases for parsers: large numbers, deep nesting, half characters, controls, long lines.
SPECIAL = st.sampled_from(
    [b"9" * 5000, b"1e999", b"-0", b"0x" + b"f" * 5000, b"[" * 3000, b'{"a":' * 3000]
    + [b"[" * 60 + b"]" * 60, b'"\\ud800"', b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"\xff\xfe"]
    + [b"\xef\xbb\xbf", b"\0", b"\x1b[31m", b"\r", b"\n", b"\n\n\n", "\u2028".encode(), b"null"]
    + [b"NaN", b"-Infinity", b"true", b'"' + b"x" * 100_000 + b'"', b"a." * 2000, b"'''", b'"""']
    + [b"[[x]]", b"{}", b'{"a": null}', b"1979-05-27T07:32:00Z"]
)
RECIPE = st.one_of(TOML_TEXTS, st.binary(max_size=400), damaged(st.sampled_from([WHOLE, *RECIPES])))


@fuzz(60)
@given(text=RECIPE)
@example(text=b"a." * 20_000 + b"b = 1")
@example(text=b"base = '\\'")
@example(text=b"job.x.y = 1")
@example(text=b"rollout.group_size = [0x" + b"f" * 5000 + b"]")
@example(text=b"[job]\ndescription = '" + b"x" * 100_000 + b"\x01'")
def test_recipes(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_bytes(text)
    argv = ["--job.config_file", str(file), *MODELS]
    config = survives(lambda: load_config(argv))
    if config is not None:
        file.write_text(to_toml(config), encoding="utf-8", newline="")
        assert load_config(["--job.config_file", str(file)]) == config


FLAGS = st.sampled_from(NAMES).map("--{}".format)
VALUES = st.text(max_size=30) | st.sampled_from([*SCRAPS, "9" * 5000, "\udcff", "~", "~x"])
WORDS = FLAGS | VALUES | st.tuples(FLAGS, VALUES).map("=".join) | st.sampled_from(["--", "-"])


@fuzz(60)
@given(argv=st.lists(WORDS, max_size=8))
@example(argv=["--data.path=~x"])
@example(argv=["--data.path=https://me:secret@host/x"])
def test_command_lines(argv: list[str]) -> None:
    config = survives(lambda: load_config([*MODELS, *argv]))
    assert config is None or isinstance(config, JobConfig)


# --------------------------------------------------------------------------- data

TEXT = st.one_of(
    st.text(max_size=20), st.sampled_from(["#### 1", "", " ", "\0", "\ud800", "\u2028", "1" * 500])
)
VALUE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        TEXT,
        st.sampled_from([2**63, 2**64, 10**400, 1e308, "user", "human"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "a", ""]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
KEYS = ["question", "answer", "conversations", "prompt", "messages", "response", "x", ""]
GOOD = [
    {"question": "What is 1+1?", "answer": "#### 2"},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"prompt": "Q", "answer": 3},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
]
ROW = st.one_of(
    st.sampled_from(GOOD),
    st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=3),
    st.tuples(st.sampled_from(GOOD), st.sampled_from(KEYS), VALUE).map(
        lambda t: {**t[0], t[1]: t[2]}
    ),
)


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


LINES = st.lists(st.one_of(ROW, VALUE), max_size=4).map(as_lines)
ARRAY = st.lists(st.one_of(ROW, VALUE), max_size=4).map(
    lambda rows: json.dumps(rows, indent=1).encode()
)
CONTENT = st.one_of(st.binary(max_size=100), LINES, ARRAY, damaged(st.one_of(LINES, ARRAY)))


def read(tiny: Any, file: Path, dataset: str, template: str) -> int:
    """Return the number of prompts in the file."""
    found = build_prompts(
        dataset=dataset,
        path=str(file),
        split="train",
        template=template,
        enable_thinking=False,
        max_prompt_tokens=1000,
        tokenizer=tiny,
        keep_responses=False,
    )
    for prompt in found.prompts:
        prompt.text.encode()
    return len(found.prompts)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Return the rows as parquet, or an empty table if Arrow refuses the rows."""
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        table = pa.table({"question": pa.array([], pa.string())})
    buffer = io.BytesIO()
    try:
        pq.write_table(table, buffer)
    except pa.ArrowException:  # a struct without fields
        return b"PAR1"
    return buffer.getvalue()


PARQUET = st.lists(ROW, max_size=4).map(parquet)
FILES = st.one_of(
    st.tuples(CONTENT, st.sampled_from([".jsonl", ".json"])),
    st.tuples(
        st.one_of(PARQUET, damaged(PARQUET), damaged(st.just(parquet(GOOD[:1] * 50)))),
        st.just(".parquet"),
    ),
)


@fuzz(65)
@given(
    file=FILES,
    dataset=st.sampled_from(list(DATASETS)),
    template=st.sampled_from(["raw", "chat"]),
)
@example((b'{"question": 1' + b"0" * 5000 + b"}\n", ".jsonl"), "gsm8k", "raw")
@example((b"[" * 100_000, ".jsonl"), "gsm8k", "raw")
@example((b'[{"a":' * 30_000, ".json"), "gsm8k", "raw")
@example(
    (
        b'{"question": "a", "answer": "#### 1", "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        ".jsonl",
    ),
    "gsm8k",
    "raw",
)
def test_data_files(
    tiny: Any,
    tmp_path_factory: pytest.TempPathFactory,
    file: tuple[bytes, str],
    dataset: str,
    template: str,
) -> None:
    content, suffix = file
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    survives(lambda: read(tiny, path, dataset, template))


@fuzz(15)
@given(data=st.data())
def test_saved_folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz-saved"
    if not folder.exists():
        datasets.Dataset.from_list(GOOD[:1] * 20).save_to_disk(folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = file.read_bytes()
    # A memory-mapped file must not change in place: the previous table may still be open.
    damage = data.draw(damaged(st.just(whole)))
    file.unlink()
    file.write_bytes(damage)
    try:
        survives(lambda: read(tiny, folder, "gsm8k", "chat"))
    finally:
        file.unlink()
        file.write_bytes(whole)


@fuzz(60)
@given(split=st.one_of(st.text(max_size=20), st.from_regex(r"train\[.{0,20}\]", fullmatch=True)))
@example(split="train[999999999999%:]")
def test_splits(tmp_path_factory: pytest.TempPathFactory, split: str) -> None:
    file = tmp_path_factory.getbasetemp() / "splits.jsonl"
    if not file.exists():
        file.write_bytes(as_lines(GOOD[:1] * 5))
    survives(lambda: list(load_rows("gsm8k", str(file), split).records()))
