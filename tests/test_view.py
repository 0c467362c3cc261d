"""The page of rollouts: its content, its safety, and files that are damaged.

`test_view_browser` looks at it in a browser.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from programs import run_python
from tensorboard.compat.proto.summary_pb2 import Summary
from tiny_world import World, make_world, read_rollouts, train

from opd_titan.observability.events import EventFile
from opd_titan.view.__main__ import main
from opd_titan.view.curves import read_curves

NEW = "response_pieces student_ranks teacher_ranks reference_ranks teacher_top".split()


def make_row(step: int, index: int, sample: int, pieces: list[str], **changes: Any) -> dict:
    """Return a row as the program writes it; log S - log T grows from token to token."""
    n = len(pieces)
    text = "".join(pieces)
    return {
        "step": step,
        "prompt_index": index,
        "sample_index": sample,
        "prompt": f"Question: number {index}?\nAnswer:",
        "response": text.removesuffix("<eos>"),
        "prompt_tokens": [1, 2],
        "response_tokens": list(range(n)),
        "student_logprobs": [-0.5] * n,
        "teacher_logprobs": [-0.5 - i for i in range(n)],
        "reference_logprobs": None,
        "advantages": [0.0 - i for i in range(n)],
        "finish_reason": "stop" if text.endswith("<eos>") else "length",
        "answer": "4",
        "correct": text == "4<eos>",
        "response_pieces": pieces,
        "student_ranks": [1] * n,
        "teacher_ranks": [1 + i for i in range(n)],
        "reference_ranks": None,
        "teacher_top": [[["4", -0.01], ["5", -4.6]]] * n,
        **changes,
    }


def write_step(dump: Path, step: int, rows: list[dict]) -> Path:
    path = dump / "rollouts" / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Blocks(html.parser.HTMLParser):
    """The page's elements, as an HTML parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.content[self._inside] = self.content.get(self._inside, "") + data

    def block(self, name: str) -> Any:
        return json.loads(gzip.decompress(base64.b64decode(self.content[name])))


def page_of(dump: Path) -> Blocks:
    assert main([str(dump)]) == 0
    return Blocks((dump / "rollouts.html").read_text("ascii"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    options = ["--reference.coef", 0.5, "--training.steps", 3]
    assert train(world.argv("run", *options)) == 0
    return world


# ---------------------------------------------------------------------------- content


def test_the_page_holds_what_the_files_do(world: World) -> None:
    page = page_of(world.folder / "run")
    rows = [row for rows in read_rollouts(world.folder / "run").values() for row in rows]
    index = page.block("index")["rollouts"]
    assert len(index["step"]) == len(rows) > 10
    for i, row in enumerate(rows):
        chunk = page.block(f"chunk-{index['chunk'][i]}")
        words, found = chunk["words"], chunk["rows"][index["place"][i]]
        assert words[found["prompt"]] == row["prompt"]
        assert [words[w] for w in found["pieces"]] == row["response_pieces"]
        for role in ("student", "teacher", "reference"):
            logprobs = [v / 1000 for v in found[role]]
            assert logprobs == pytest.approx(row[f"{role}_logprobs"], abs=5.1e-4)
            assert found[f"{role}_ranks"] == row[f"{role}_ranks"]
        assert found["top_sizes"] == [5] * len(found["pieces"])
        pairs = [pair for top in row["teacher_top"] for pair in top]
        assert [words[w] for w in found["top"]] == [text for text, _ in pairs]
        assert found["top_logprobs"] == [round(1000 * value) for _, value in pairs]
        n = len(row["response_tokens"])
        gaps = zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)
        assert index["kl"][i] == pytest.approx(sum(s - t for s, t in gaps) / n, rel=1e-3)
        assert index["cut"][i] == (row["finish_reason"] == "length")
        assert index["correct"][i] == (None if row["correct"] is None else int(row["correct"]))
    assert page.block("texts")["responses"] == [row["response"] for row in rows]


def test_curves_are_those_of_the_run(world: World) -> None:
    run = world.folder / "run"
    curves = read_curves(run)
    kl = []
    for step, rows in read_rollouts(run).items():
        pairs = [zip(r["student_logprobs"], r["teacher_logprobs"], strict=True) for r in rows]
        gaps = [s - t for pair in pairs for s, t in pair]
        kl.append((step, pytest.approx(sum(gaps) / len(gaps), rel=1e-4)))
    assert curves["kl"] == kl
    assert [step for step, _ in curves["accuracy"]] == [0, 2, 3]


def test_curves_of_a_resumed_run_have_each_step_once(tmp_path: Path) -> None:
    for second, (first, purge) in enumerate([(1, 0), (3, 3)]):
        file = EventFile(tmp_path / "tb", purge)
        for step in range(first, first + 4):
            values = {"kl/student_teacher": step + 10 * second, "lr": math.nan}
            points = [Summary.Value(tag=n, simple_value=v) for n, v in values.items()]
            file.add_summary(Summary(value=points), step)
    expected = [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0), (6, 16.0)]
    assert read_curves(tmp_path) == {"kl": expected}
    file.path.write_bytes(file.path.read_bytes()[:-7])  # the run is writing to it
    assert read_curves(tmp_path) == {"kl": expected[:-1]}
    assert read_curves(tmp_path / "none") == {}


def test_files_of_earlier_versions_are_shown(tmp_path: Path) -> None:
    row = make_row(1, 0, 0, ["4", "<eos>"])
    write_step(tmp_path, 1, [{k: v for k, v in row.items() if k not in NEW}])
    chunk = page_of(tmp_path).block("chunk-0")
    (found,) = chunk["rows"]
    assert chunk["words"][found["response"]] == "4" and found["ids"] == [0, 1]


def test_scores_and_numbers_that_are_no_log_probs(tmp_path: Path) -> None:
    """A user's own grader may give a score: `validation.grader`."""
    scores = [0.25, 1.0, 0.0, True, None]
    rows = [make_row(1, i, 0, ["4"], correct=score) for i, score in enumerate(scores)]
    unknown = [math.nan, -math.inf, -1.0]
    write_step(tmp_path, 1, [*rows, make_row(1, 5, 0, ["4", "5", "6"], teacher_logprobs=unknown)])
    page = page_of(tmp_path)
    assert page.block("index")["rollouts"]["correct"][:5] == [0.25, 1, 0, 1, None]
    assert page.block("chunk-0")["rows"][5]["teacher"] == [None, None, -1000]
    assert page.block("index")["rollouts"]["kl"][5] == 0.5


def test_the_list_omits_the_words_that_all_prompts_start_with(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [make_row(1, i, 0, ["4"]) for i in (10, 11)])
    questions = page_of(tmp_path).block("index")["rollouts"]["questions"]
    assert questions == ["10? Answer:", "11? Answer:"]


# ------------------------------------------------------------------------------- safety


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--<script>"
    write_step(tmp_path, 1, [make_row(1, 0, 0, [evil], prompt=evil, answer=evil)])
    page = page_of(tmp_path)
    text = (tmp_path / "rollouts.html").read_text()
    assert "alert(1)" not in text
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert {a.get("type") for a in scripts} == {None, "application/octet-stream"}
    assert sum("type" not in a for a in scripts) == 1
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        for name in attributes:
            assert name not in ("src", "href", "style") and not name.startswith("on"), (tag, name)
    (policy,) = (a["content"] for _, a in page.tags if "http-equiv" in a)
    for kind in ("script", "style"):
        digest = hashlib.sha256(page.content[kind].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


# -------------------------------------------------------------------------- bad input

GOOD = make_row(3, 0, 0, ["4", "<eos>"])
WRONG: dict[str, tuple[bytes, str]] = {
    "cut off": (json.dumps(GOOD)[:-20].encode(), "line 1 is not a rollout"),
    "second line": (json.dumps(GOOD).encode() + b"\n{}\n", "line 2 .*no key 'response_tokens'"),
    "not UTF-8": (json.dumps(GOOD).encode() + b'\n{"step": "\xff"}\n', "line 2 .*can't decode"),
    "empty": (b"", "files are empty"),
    "deep": (b"[" * 100_000, "line 1 is not a rollout"),
    "numbers": (json.dumps({**GOOD, "advantages": ["x", 1]}).encode(), "line 1 is not a rollout"),
    "too few": (json.dumps({**GOOD, "teacher_ranks": [1]}).encode(), "has 1 entries for 2 tokens"),
    "top": (json.dumps({**GOOD, "teacher_top": [[], [["4"]]]}).encode(), "line 1 is not a rollout"),
}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("opd_titan: ") and len(captured.err) < 700
    return captured.err


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, why = WRONG[name]
    path = write_step(tmp_path, 3, [])
    path.write_bytes(content)
    line = refused([str(tmp_path)], capsys)
    assert str(path if content else path.parent) in line and re.search(why, line)
    assert not (tmp_path / "rollouts.html").exists()


MISTAKES = [
    (["{dump}/nowhere"], "nowhere: has no folder rollouts"),
    (["{dump}/empty"], "has no step-N.jsonl"),
    (["{dump}", "--out", "{dump}/rollouts"], "--out: .*rollouts cannot be written"),
    (["{dump}", "--out", "{dump}/no/page.html"], "--out: .*page.html cannot be written"),
    ([], "arguments are required: dump_folder"),
    (["{dump}", "--output", "x"], "unrecognized arguments: --output"),
]


@pytest.mark.parametrize(("argv", "why"), MISTAKES)
def test_a_mistake_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], why: str
) -> None:
    write_step(tmp_path, 3, [GOOD])
    (tmp_path / "empty" / "rollouts").mkdir(parents=True)
    (tmp_path / "empty" / "rollouts" / "step-1.jsonl.tmp").write_text("half")
    assert re.search(why, refused([a.format(dump=tmp_path) for a in argv], capsys))
    assert not list(tmp_path.rglob("*.html*"))


# ------------------------------------------------------------------------ the program


def test_it_starts_without_torch(tmp_path: Path) -> None:
    write_step(tmp_path, 3, [GOOD])
    code = (
        "import sys; from opd_titan.view.__main__ import main; "
        f"assert main([{str(tmp_path)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    assert run_python("-c", code).returncode == 0
