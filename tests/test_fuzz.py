"""Anything may stand in a recipe, on the command line or in a data file: what comes out is a
value or a UserError of one printable line, never another exception and never a hang.

A few examples of each run with the other tests. `OPD_TITAN_FUZZ_SECONDS=600 pytest
tests/test_fuzz.py` runs each of the tests here for so long, on examples of its own; what it finds
stays here as an `@example`, or as a row of `mistakes.TABLE`.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from test_config import MODELS
from test_config_properties import ARGUMENTS, NAMES, SCRAPS, TOML_TEXTS

from opd_titan.config import JobConfig, load_config, to_toml
from opd_titan.data.loading import load_rows
from opd_titan.data.prompts import build_prompts
from opd_titan.data.sources import DATASETS
from opd_titan.errors import UserError

SECONDS = float(os.environ.get("OPD_TITAN_FUZZ_SECONDS", 0))
SLOWEST = 20.0  # seconds for one example; the machine may be busy


def fuzz(examples: int) -> Callable[[Callable], Callable]:
    """So many examples, or as many as fit in SECONDS where that is set."""

    def limit(test: Callable) -> Callable:
        count = 10**7 if SECONDS else examples
        phases = [Phase.explicit, Phase.generate, Phase.shrink]
        return settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=not SECONDS,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        )(test)

    return limit


_started: dict[str, float] = {}
_examples: Counter[str] = Counter()
_failed: set[str] = set()  # whose failure hypothesis is still making smaller


def survives(name: str, act: Callable[[], Any]) -> Any:
    """What `act` returns; None for a UserError, which must be fit to print."""
    begin = time.monotonic()
    over = SECONDS and begin - _started.setdefault(name, begin) > SECONDS
    if over and name not in _failed:
        pytest.skip(f"{SECONDS:.0f} seconds, {_examples[name]} examples, no finding")
    _examples[name] += 1
    try:
        return act()
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) <= 1000, message
        return None
    except Exception:
        _failed.add(name)
        raise
    finally:
        assert time.monotonic() - begin < SLOWEST


# ------------------------------------------------------------------------ recipes

RECIPES = [
    path.read_bytes()
    for path in sorted((Path(__file__).parent.parent / "train_configs").glob("*.toml"))
]
WHOLE = to_toml(load_config(MODELS)).encode()


@st.composite
def damaged(draw: st.DrawFn, sources: st.SearchStrategy[bytes]) -> bytes:
    """One of the sources with some of its bytes replaced, cut, doubled or moved."""
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


# What parsers trip over: numbers too large, deep nesting, half characters, controls, long lines.
SPECIAL = st.sampled_from(
    [
        b"9" * 5000,
        b"1e999",
        b"-0",
        b"0x" + b"f" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"[" * 60 + b"]" * 60,
        b'"\\ud800"',
        b"\\ud800",
        b"\\u0000",
        b"\xed\xa0\x80",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\0",
        b"\x1b[31m",
        b"\r",
        b"\n",
        b"\n\n\n",
        "\u2028".encode(),
        b"null",
        b"NaN",
        b"-Infinity",
        b"true",
        b'"' + b"x" * 100_000 + b'"',
        b"a." * 2000,
        b"'''",
        b'"""',
        b"[[x]]",
        b"{}",
        b'{"a": null}',
        b"1979-05-27T07:32:00Z",
    ]
)
RECIPE = st.one_of(TOML_TEXTS, st.binary(max_size=400), damaged(st.sampled_from([WHOLE, *RECIPES])))


@fuzz(60)
@given(text=RECIPE)
@example(text=b"a." * 20_000 + b"b = 1")
@example(text=b"[job]\ndescription = '" + b"x" * 100_000 + b"\x01'")
def test_recipes(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_bytes(text)
    argv = ["--job.config_file", str(file), *MODELS]
    config = survives("recipes", lambda: load_config(argv))
    if config is not None:
        file.write_text(to_toml(config), encoding="utf-8", newline="")
        assert load_config(["--job.config_file", str(file)]) == config


WORDS = st.one_of(
    ARGUMENTS,
    st.text(max_size=30),
    st.tuples(st.sampled_from(NAMES), st.text(max_size=30)).map(lambda p: "--{}={}".format(*p)),
    st.tuples(
        st.sampled_from(NAMES), st.sampled_from(SCRAPS + ["9" * 5000, "\udcff", "~", "~x"])
    ).map(lambda p: "--{}={}".format(*p)),
)


@fuzz(60)
@given(argv=st.lists(WORDS.filter(lambda word: word not in ("-h", "--help")), max_size=8))
@example(argv=["--data.path=~x"])
@example(argv=["--data.path=https://me:secret@host/x"])
def test_command_lines(argv: list[str]) -> None:
    config = survives("command lines", lambda: load_config([*MODELS, *argv]))
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
FILES = [".jsonl", ".json"]


def read(tiny: Any, file: Path, dataset: str, template: str) -> int:
    """How many prompts the file has."""
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


@fuzz(40)
@given(
    content=CONTENT,
    suffix=st.sampled_from(FILES),
    dataset=st.sampled_from(list(DATASETS)),
    template=st.sampled_from(["raw", "chat"]),
)
@example(b'{"question": 1' + b"0" * 5000 + b"}\n", ".jsonl", "gsm8k", "raw")
@example(b"[" * 100_000, ".jsonl", "gsm8k", "raw")
@example(b'[{"a":' * 30_000, ".json", "gsm8k", "raw")
@example(
    b'{"question": "a", "answer": "#### 1", "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    ".jsonl",
    "gsm8k",
    "raw",
)
def test_json_files(
    tiny: Any,
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    suffix: str,
    dataset: str,
    template: str,
) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    file.write_bytes(content)
    survives("json", lambda: read(tiny, file, dataset, template))


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """The rows as parquet; what Arrow cannot make a table of gives an empty one."""
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


@fuzz(25)
@given(
    content=st.one_of(PARQUET, damaged(PARQUET), damaged(st.just(parquet(GOOD[:1] * 50)))),
    dataset=st.sampled_from(list(DATASETS)),
)
def test_parquet_files(
    tiny: Any, tmp_path_factory: pytest.TempPathFactory, content: bytes, dataset: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    file.write_bytes(content)
    survives("parquet", lambda: read(tiny, file, dataset, "chat"))


@fuzz(15)
@given(data=st.data())
def test_saved_folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz-saved"
    if not folder.exists():
        datasets.Dataset.from_list(GOOD[:1] * 20).save_to_disk(folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = file.read_bytes()
    # A mapped file must not change in place: the last example's table may still be open.
    damage = data.draw(damaged(st.just(whole)))
    file.unlink()
    file.write_bytes(damage)
    try:
        survives("saved", lambda: read(tiny, folder, "gsm8k", "chat"))
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
    survives("splits", lambda: list(load_rows("gsm8k", str(file), split).records()))
