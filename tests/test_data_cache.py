"""The cache of tokenized prompts: reuse, staleness, damage, several processes."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_data import build, question, write_lines
from tiny_tokenizer import tiny_tokenizer

from opd_titan.data import cache, files
from opd_titan.data.cache import TokenizedRow, Write, cached_prompts
from opd_titan.data.files import digest_of_files
from opd_titan.data.loader import PromptLoader
from opd_titan.data.prompts import PromptSet
from opd_titan.data.sources import DATASETS, Record, dataset
from opd_titan.errors import DataError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the cache, which does not exist yet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cache._warn_once.cache_clear()
    return tmp_path / "cache" / "opd_titan"


def numbers(size: int, tokens: int = 3) -> Callable[[Write], dict[str, int]]:
    """Return a function that makes prompts with the texts "0" to "size - 1"."""

    def make(write: Write) -> dict[str, int]:
        for i in range(0, size, 1000):
            rows = range(i, min(i + 1000, size))
            write([TokenizedRow(n, str(n), [n] * tokens, None, f"a{n}") for n in rows])
        return {"num_rows": size, "end": size}

    return make


def never(write: Write) -> dict[str, int]:
    raise AssertionError("made again")


def content(found: PromptSet) -> tuple[Any, ...]:
    prompts = found.prompts
    assert prompts.longest == max(len(p.token_ids) for p in prompts)
    return list(prompts), prompts.digest, found.num_rows, found.num_duplicates, found.num_too_long


# ------------------------------------------------------------------ prompts on access


def test_prompts_are_a_sequence_and_any_order_is_that_of_a_list() -> None:
    found = cached_prompts("key", numbers(2500))
    found.first_index, found.teacher = 7, "teacher.x"
    listed = list(found)
    assert [p.text for p in listed] == [str(n) for n in range(2500)]
    assert found[-1] == listed[-1] and found[999:1001] == listed[999:1001]
    assert (listed[3].index, listed[3].token_ids, listed[3].teacher) == (10, (3, 3, 3), "teacher.x")
    with pytest.raises(IndexError):
        found[2500]
    assert found.texts_among(["0", "1700", "2500", ""]) == {"0", "1700"}
    loaders = [PromptLoader([p], prompts_per_step=900, seed=5) for p in (found, listed)]
    for _ in range(4):
        assert next(loaders[0]) == next(loaders[1])


def test_the_digest_is_of_the_tokens_whatever_the_batches() -> None:
    def digest(parts: list[list[int]], batch: int) -> str:
        rows = [TokenizedRow(i, "", ids, None, None) for i, ids in enumerate(parts)]

        def make(write: Write) -> dict[str, int]:
            for i in range(0, len(rows), batch):
                write(rows[i : i + batch])
            return {}

        return cached_prompts(f"{parts} {batch}", make).digest

    differ = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2]]]
    assert len({digest(parts, 5) for parts in differ}) == len(differ)
    assert [digest(parts, 1) for parts in differ] == [digest(parts, 5) for parts in differ]


def test_prompts_take_no_private_memory() -> None:
    """As Python objects these prompts take 80 MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def private() -> float:
        gc.collect()
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) / 1024

    size = 50_000
    cached_prompts("key", numbers(size, tokens=200))
    before = private()
    found = cached_prompts("key", never)
    loader = PromptLoader([found], prompts_per_step=64, seed=0)
    for _ in range(3):
        next(loader)
    assert found.texts_among(["7", "x"]) == {"7"}
    assert private() - before < 15


# ------------------------------------------------------------------ when it is used


def test_the_second_start_neither_reads_nor_tokenizes(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_SETTLED", 0.0)
    file = write_lines(tmp_path / "train.jsonl", [question(i) for i in range(20)])
    first = content(build(tiny, "gsm8k", file))
    monkeypatch.setattr(cache, "_store", never)
    monkeypatch.setattr(files, "_digest", never)
    assert content(build(tiny_tokenizer(), "gsm8k", file)) == first


def test_files_are_compared_by_content_when_anything_about_them_changes(
    tiny, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(files, "_SETTLED", 0.0)
    file = tmp_path / "train.jsonl"
    write_lines(file, [{"prompt": "old"}])
    times = file.stat()
    assert build(tiny, "prompts", file).prompts[0].text == "old"
    time.sleep(0.02)
    write_lines(file, [{"prompt": "new"}])  # of the same size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert build(tiny, "prompts", file).prompts[0].text == "new"
    other = write_lines(tmp_path / "other", [{"prompt": "own"}])
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)
    assert build(tiny, "prompts", file).prompts[0].text == "own"
    # A touched or copied file has the same content.
    digest = digest_of_files([file])
    os.utime(file, (1, 1))
    assert digest_of_files([file]) == digest == digest_of_files([shutil.copy(file, other)])


def test_a_file_that_was_just_written_is_read_again(tiny, tmp_path) -> None:
    """It may change again without a change of its times."""
    file = write_lines(tmp_path / "train.jsonl", [{"prompt": "a"}])
    digest_of_files([file])
    assert not list(files.cache_folder().glob("*.json"))


def test_everything_that_changes_prompts_changes_the_key(tmp_path, monkeypatch) -> None:
    rows = [{"prompt": f"What is {i}?", "response": "r", "answer": i} for i in range(40)]
    file = write_lines(tmp_path / "train.jsonl", rows)
    silent = tiny_tokenizer()
    silent.chat_template = "{{ messages[0].content }}!"
    larger = tiny_tokenizer()
    larger.add_tokens(["What"])
    changes: list[dict[str, Any]] = [
        {},
        {"split": "train[5:]"},
        {"split": "train[:5]"},
        {"template": "chat"},
        {"template": "chat", "enable_thinking": True},
        {"template": "chat", "tokenizer": silent},
        {"tokenizer": larger},
        {"max_prompt_tokens": 10},
        {"max_prompts": 3},
        {"keep_responses": True},
    ]
    same = {"dataset": "prompts", "tokenizer": tiny_tokenizer(), "path": file}
    options = [{**same, **change} for change in changes]
    found = [content(build(**o)) for o in options]
    assert len({repr(f) for f in found}) == len(changes)
    monkeypatch.setattr(cache, "_store", never)
    assert [content(build(**o)) for o in options] == found


def test_a_file_that_changes_while_it_is_read_is_not_cached(tiny, tmp_path) -> None:
    file = write_lines(tmp_path / "train.jsonl", [{"riddle": "a"}, {"riddle": "b"}])
    try:

        @dataset("riddles", columns=("riddle",))
        def riddles(row) -> Record:
            write_lines(file, [{"riddle": "c"}])
            return Record([{"role": "user", "content": row["riddle"]}])

        with pytest.raises(DataError, match="data.path: .*train.jsonl changed while it was read"):
            build(tiny, "riddles", file)
        assert [p.text for p in build(tiny, "riddles", file).prompts] == ["c"]
    finally:
        del DATASETS["riddles"]


# ------------------------------------------------------------------ damage


def truncate(entry: Path) -> None:
    os.truncate(entry / cache.PROMPTS, (entry / cache.PROMPTS).stat().st_size // 2)


def flip(entry: Path) -> None:
    damaged = bytearray((entry / cache.PROMPTS).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (entry / cache.PROMPTS).unlink()  # it may be mapped
    (entry / cache.PROMPTS).write_bytes(damaged)


def miscount(entry: Path) -> None:
    stored = json.loads((entry / cache.INFO).read_text())
    stored["info"]["longest"] += 1
    (entry / cache.INFO).write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        miscount,
        lambda entry: (entry / cache.INFO).write_text("[]"),
        lambda entry: (shutil.rmtree(entry), entry.mkdir()),
    ],
)
def test_a_damaged_entry_is_made_anew(folder: Path, damage: Callable[[Path], Any]) -> None:
    whole = list(cached_prompts("key", numbers(50)))
    gc.collect()
    damage(folder / "key")
    with pytest.raises(AssertionError, match="made again"):
        cached_prompts("key", never)
    assert list(cached_prompts("key", numbers(50))) == whole
    assert list(cached_prompts("key", never)) == whole
    assert {path.name for path in folder.iterdir()} == {"key", "key.lock"}


def test_a_cache_that_cannot_be_written_gives_one_warning(
    tiny, tmp_path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_lines(tmp_path / "train.jsonl", [question(i) for i in range(20)])
    expected = content(build(tiny, "gsm8k", file))
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with caplog.at_level(logging.WARNING):
        found = [build(tiny, "gsm8k", file) for _ in range(2)]
    assert [content(f) for f in found] == [expected] * 2
    (record,) = caplog.records
    assert "file/opd_titan cannot be written (Not a directory)" in record.getMessage()
    assert "HF_DATASETS_CACHE" in record.getMessage()
    assert not list((tmp_path / "temporary").iterdir())


# ------------------------------------------------------------------ several processes

PROCESS = """
import sys, time, datasets
from opd_titan.data import cache
from opd_titan.errors import DataError
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
for line in sys.stdin:
    key, pause, *fail = line.split()
    made = 0
    def make(write):
        global made
        print("making", flush=True)
        made += 1
        for n in range(20):
            write([cache.TokenizedRow(n, str(n), [n], None, None)])
            time.sleep(float(pause))
        if fail:
            raise DataError("no good")
        return {}
    try:
        print(len(cache.cached_prompts(key, make)), made, flush=True)
    except DataError as error:
        print(error, made, flush=True)
"""


@pytest.mark.slow
def test_several_processes_need_the_same_prompts(tmp_path: Path, folder: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "cache")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]

    def ask(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def answer(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return next(line for line in process.stdout if line != "making\n").strip()

    try:
        # One makes them, the others wait.
        for process in processes:
            ask(process, "good 0.05")
        assert sorted(map(answer, processes)) == ["20 0", "20 0", "20 1"]
        # An error reaches all: those that waited try at the same time.
        begin = time.monotonic()
        for process in processes:
            ask(process, "bad 0.1 fail")
        assert list(map(answer, processes)) == ["no good 1"] * 3
        assert time.monotonic() - begin < 2.5 * 20 * 0.1 + 1
        assert not list(folder.glob("bad*.tmp")) and not (folder / "bad").exists()
        # Another process makes what a killed process has begun.
        first, second = processes[:2]
        ask(first, "killed 60")
        assert first.stdout is not None and first.stdout.readline() == "making\n"
        ask(second, "killed 0")
        first.kill()
        assert answer(second) == "20 1"
        assert len(cached_prompts("killed", never)) == 20
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    # Its temporary folder is deleted when the entry is made again a day later.
    (left,) = folder.glob("*.tmp")
    os.utime(left, (1, 1))
    truncate(folder / "killed")
    assert len(cached_prompts("killed", numbers(20))) == 20
    assert not list(folder.glob("*.tmp"))
